"""A packed artifact beside what else runs the same model on this machine's CPUs, and on its GPU: size, load time, memory, speed.

The models are students of the shapes of GPT-2 and BART-base at 2-2-8 with random weights; their codes are real, their text is not. Each runtime has a process of its own,
in whose environment it is installed, which loads the model and then waits; in each round one after the other reads a prompt and writes, at each batch size. A further
runtime is one more entry of RUNTIMES. This file is a program in those environments, too, some of which have no dqtrain: it imports what it needs where that is needed.
"""

import gc
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

Write = Callable[[list[list[int]], int], None]
"""Reads ids [batch][tokens] and writes exactly so many tokens to each, greedily; what an encoder reads, where there is one."""

ROOT = Path(__file__).parents[2]
"""Where `make runtimes` makes environments."""


class Runtime(NamedTuple):
    """One row of a table."""

    folder: str  # below that of `_prepare`
    weight_bytes: float  # that one weight takes when it is multiplied
    load: Callable[[Path], Write]
    packages: tuple[str, ...] = ()  # of Python, that are extras
    wider: str | None = None  # the row of the same program at 8 bits, which fewer bits should not be slower than
    head_bytes: float | None = None  # that one weight of the head takes, where that is another number
    environment: str | None = None  # that has a Python of its own, below ROOT
    imports: str = "dqtrain.artifact.load"  # before memory is looked at: the imports of all runtimes, where they are in one environment
    compiles: bool = False  # C++
    on_gpu: bool = False

    @property
    def missing(self) -> str | None:
        """What to install before this runs here."""
        if self.environment is not None and not (ROOT / self.environment / "bin/python").is_file():
            return f"there is no {self.environment}; `make runtimes` makes it"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed; pip install 'dqtrain[runtimes,bench]'"
        compiler = os.environ.get("CXX", "g++")
        if self.compiles and shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler}; apt-get install g++, or dnf install gcc-c++"
        if self.on_gpu:
            import torch

            if not torch.cuda.is_available():
                return f"torch {torch.__version__} sees no GPU here"
        return None


def _transformers(folder: Path) -> Write:
    return _generate(_model(folder))


def _transformers_on_gpu(folder: Path) -> Write:
    return _generate(_model(folder).to("cuda"))


def _model(folder: Path) -> Any:
    from dqtrain.models.making import model_class, read_model_config

    return model_class(read_model_config(folder)).from_pretrained(folder, local_files_only=True)


def _with_linears(folder: Path) -> Any:
    """A model whose Conv1D are nn.Linear: quantizers of torch know no others."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = _model(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, linear)
    return model


def _compiled(folder: Path) -> Write:
    """Steps of one token by torch.compile, with a cache that does not grow, as transformers compiles on GPUs; prompts, which have many lengths, as they are."""
    import torch
    from transformers import StaticCache

    model = _model(folder)
    plain, compiled = model.forward, torch.compile(model.forward, dynamic=False)
    model.forward = lambda *given, **named: (compiled if named["input_ids"].shape[1] == 1 else plain)(*given, **named)
    return _generate(model, lambda num_tokens: StaticCache(config=model.config, max_cache_len=-(-num_tokens // 64) * 64))


def _dynamic_int8(folder: Path) -> Write:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to be replaced by torchao, which has no such kernels for x86
        return _generate(torch.ao.quantization.quantize_dynamic(_with_linears(folder), {torch.nn.Linear}))


def _torchao(folder: Path) -> Write:
    """8-bit weights alone, since its 4-bit ones have no kernels for CPUs."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _with_linears(folder)
    quantize_(model, Int8WeightOnlyConfig())
    return _generate(model)


def _ours(mode: str, device: str = "cpu") -> Callable[[Path], Write]:
    def load(folder: Path) -> Write:
        from dqtrain.artifact.load import load_artifact

        return _generate(load_artifact(folder, mode, device))

    return load


def _generate(model: Any, cache: Callable[[int], Any] = lambda num_tokens: None) -> Write:
    import torch

    def write(ids: list[list[int]], tokens: int) -> None:
        read = torch.tensor(ids, device=model.device)
        with torch.no_grad():
            found = model.generate(
                read,
                attention_mask=torch.ones_like(read),
                past_key_values=cache(read.shape[1] + tokens),
                max_new_tokens=tokens,
                eos_token_id=model.config.vocab_size,  # an end that never comes: to forbid the real one takes as long as a tenth of a step of `fast`
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
            )
        found.cpu()  # a GPU has then written it

    return write


def _llama_cpp(folder: Path) -> Write:
    """One sequence after the other."""
    from dqtrain.artifact.gguf.llama_cpp import LlamaCpp

    runtime = LlamaCpp(folder / "model.gguf", longest=LONGEST)

    def write(ids: list[list[int]], tokens: int) -> None:
        for sequence in ids:
            list(itertools.islice(runtime.greedily(sequence), tokens))

    return write


def _onnx_runtime(folder: Path) -> Write:
    from dqtrain.artifact.onnx.runtime import OnnxRunner

    return _by_graphs(OnnxRunner(folder))


def _openvino(folder: Path) -> Write:
    from dqtrain.artifact.openvino.runtime import OpenVinoRunner

    return _by_graphs(OpenVinoRunner(folder))


def _by_graphs(runner: Any) -> Write:
    def write(ids: list[list[int]], tokens: int) -> None:
        has_encoder = runner.encoder is not None
        reading = runner.start(ids if has_encoder else None, len(ids))
        read = [[runner.config.decoder_start_token_id]] * len(ids) if has_encoder else ids
        for _ in range(tokens):
            read = reading.read(read)[:, -1].argmax(-1)[:, None].tolist()

    return write


def _vllm(folder: Path) -> Write:
    """In this process, without compiling, and without AMX: vLLM ends with SIGILL on virtual machines whose processor says that it has AMX and does not run it."""
    import torch

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    torch.cpu._is_amx_tile_supported = lambda: False
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=LONGEST,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def write(ids: list[list[int]], tokens: int) -> None:
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        model.generate([{"prompt_token_ids": sequence} for sequence in ids], how, use_tqdm=False)

    return write


_GGUF, _ONNX, _OPENVINO = ("gguf", "xllamacpp"), ("onnx", "onnxruntime"), ".venv-openvino"

RUNTIMES = {
    "transformers fp32": Runtime("fp32", 4, _transformers),
    "transformers compiled": Runtime("fp32", 4, _compiled, compiles=True),
    "transformers bf16": Runtime("bf16", 2, _transformers),
    "torch dynamic int8": Runtime("fp32", 1, _dynamic_int8),
    "torchao int8 weights": Runtime("fp32", 1, _torchao, ("torchao",)),
    "packed, exact": Runtime("packed 2", 4, _ours("exact")),
    "packed, fast": Runtime("packed 2", 0.5, _ours("fast")),
    "llama.cpp F32": Runtime("gguf float", 4, _llama_cpp, _GGUF),
    "llama.cpp Q8_0": Runtime("gguf 8", 8.5 / 8, _llama_cpp, _GGUF),
    "llama.cpp Q4_0": Runtime("gguf 4", 4.5 / 8, _llama_cpp, _GGUF, "llama.cpp Q8_0"),
    "llama.cpp TQ1_0": Runtime("gguf 2", 1.6875 / 8, _llama_cpp, _GGUF, "llama.cpp Q8_0"),
    "llama.cpp TQ2_0": Runtime("gguf 2 fastest", 2.0625 / 8, _llama_cpp, _GGUF, "llama.cpp Q8_0"),
    "ONNX Runtime fp32": Runtime("onnx float", 4, _onnx_runtime, _ONNX),
    "ONNX Runtime 8 bit": Runtime("onnx 8", 1 + 4 / 128, _onnx_runtime, _ONNX),
    "ONNX Runtime 4 bit": Runtime("onnx 4", 0.5 + 4 / 128, _onnx_runtime, _ONNX, "ONNX Runtime 8 bit"),
    "ONNX Runtime 2 bit": Runtime("onnx 2", 0.25 + 4 / 128, _onnx_runtime, _ONNX, "ONNX Runtime 8 bit"),
    "OpenVINO 8 bit": Runtime("openvino 8", 1, _openvino, environment=_OPENVINO),
    "OpenVINO 4 bit": Runtime("openvino 4", 0.5, _openvino, wider="OpenVINO 8 bit", environment=_OPENVINO),
    "OpenVINO 2 bit": Runtime("openvino 2", 0.25, _openvino, wider="OpenVINO 8 bit", environment=_OPENVINO),
    "vLLM bf16": Runtime("bf16", 2, _vllm, environment=".venv-vllm", imports="vllm"),
    "vLLM 8 bit": Runtime("compressed-tensors 8", 1, _vllm, ("compressed_tensors",), head_bytes=2, environment=".venv-vllm", imports="vllm"),
    "vLLM 4 bit": Runtime("compressed-tensors 4", 0.5, _vllm, ("compressed_tensors",), "vLLM 8 bit", 2, ".venv-vllm", "vllm"),
    "GPU, transformers bf16": Runtime("bf16", 2, _transformers_on_gpu, on_gpu=True),
    "GPU, packed, fast": Runtime("packed 2", 0.5, _ours("fast", "cuda"), on_gpu=True),
}

WEIGHTS = {".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin"}

LONGEST = 1024
"""Positions of the models."""


class Shape(NamedTuple):
    """A model, and the rows of its table."""

    family: str  # gpt2 or bart
    layers: tuple[int, ...]  # of the decoder, or of encoder and decoder
    width: int
    vocabulary: int
    rows: tuple[str, ...]

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{'GPT-2' if self.family == 'gpt2' else 'BART'} of {' and '.join(map(str, self.layers))} layers, width {self.width}, vocabulary {self.vocabulary:,}"

    @property
    def linears(self) -> int:
        """Weights of linear layers that one word of the decoder multiplies: keys and values of what an encoder read are made once."""
        return (12 if self.family == "gpt2" else 14) * self.layers[-1] * self.width**2


_SEQ2SEQ = ("transformers fp32", "transformers bf16", "packed, exact", "packed, fast", *(name for name in RUNTIMES if name.startswith(("ONNX", "OpenVINO"))))
SHAPES = (
    Shape("gpt2", (12,), 768, 50257, tuple(RUNTIMES)),
    Shape("bart", (6, 6), 768, 50265, _SEQ2SEQ),
    Shape("bart", (1, 1), 768, 50265, _SEQ2SEQ),
)


def run(
    shapes: Sequence[Shape] = SHAPES, prompt: int = 32, tokens: int = 32, batches: tuple[int, ...] = (1, 8), rounds: int = 5, threads: int | None = None
) -> str:
    """Tables as text: medians of `rounds` in which the runtimes alternate; memory is what loading and the first texts add to the process at their highest."""
    texts = []
    for shape in shapes:
        with Table(shape, prompt, tokens, batches, threads or len(os.sched_getaffinity(0))) as table:
            for _ in range(rounds):
                table.measure()
            texts.append(table.text())
    return "\n\n".join(texts)


class Table:
    """The runtimes of a shape, each loaded in its process. A context manager: at its end all are gone, and their files."""

    def __init__(self, shape: Shape, prompt: int, tokens: int, batches: tuple[int, ...], threads: int) -> None:
        self.shape, self.prompt, self.tokens, self.batches, self.threads = shape, prompt, tokens, batches, threads
        self.left_out = {name: why for name in shape.rows if (why := RUNTIMES[name].missing) is not None}
        self.found: dict[str, list[dict[str, Any]]] = {}
        self.read: list[float] = []
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            case = {"folder": str(self.folder), "prompt": prompt, "tokens": tokens, "batches": batches, "vocabulary": shape.vocabulary, "threads": threads}
            rows = [name for name in shape.rows if name not in self.left_out]
            names = list(dict.fromkeys(RUNTIMES[name].folder for name in rows))
            # The environment for OpenVINO has all that this one has, and writes its files, too.
            own = _OPENVINO if any(RUNTIMES[name].environment == _OPENVINO for name in rows) else None
            with _Worker(own, {**case, "prepare": [shape._asdict(), names]}) as preparing:
                preparing.ask()
            self.bandwidth = stack.enter_context(_Worker(None, {**case, "bandwidth": True}))
            self.bandwidth.ask()
            self.processes, self.loaded = {}, {}
            for name in rows:
                process = stack.enter_context(_Worker(RUNTIMES[name].environment, {**case, "runtime": name}))
                try:
                    self.loaded[name] = process.ask()
                    self.processes[name] = process
                except ChildProcessError as error:
                    self.left_out[name] = f"its process {error}; what it said is above"
            self._stack = stack.pop_all()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self) -> None:
        """One round."""
        self.read.append(self.bandwidth.ask()["bytes_per_s"])
        for name, process in self.processes.items():
            self.found.setdefault(name, []).append(process.ask())

    def text(self) -> str:
        """What was measured, and what was not."""
        speed, first = statistics.median(self.read), f"decode {self.batches[0]}"
        heads = "".join(f" {f'prompt {b}':>9s} {f'decode {b}':>9s}" for b in self.batches)
        versions = ", torch ".join(dict.fromkeys(["", *(loaded["torch"] for loaded in self.loaded.values())]))
        lines = [
            f"{self.shape.title}, 2-2-8, random; {self.threads} threads{versions}",
            f"prompts of {self.prompt} tokens, {self.tokens} written; tokens/s, median of {len(self.read)} interleaved rounds (decode {self.batches[0]}: lowest and "
            f"highest); memory reads {speed / 1e9:.1f} GB/s",
            f"  {'':22s} {'MB':>7s} {'load s':>7s} {'peak MB':>8s}{heads}  {'range':>13s} {'x fp32':>7s} {'limit':>7s} {'share':>6s}",
        ]
        medians = {name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in self.found.items()}
        for name, figures in medians.items():
            runtime = RUNTIMES[name]
            size = sum(file.stat().st_size for file in (self.folder / runtime.folder).iterdir() if file.suffix in WEIGHTS)
            head = self.shape.vocabulary * self.shape.width * (runtime.head_bytes or runtime.weight_bytes)
            limit = speed / (self.shape.linears * runtime.weight_bytes + head)
            share = f" {limit:7.0f} {figures[first] / limit:6.0%}" if not runtime.on_gpu else ""  # it has a memory of its own
            cells = "".join(f" {figures[f'prompt {b}']:9.0f} {figures[f'decode {b}']:9.1f}" for b in self.batches)
            low, high = (end(r[first] for r in self.found[name]) for end in (min, max))
            ratio = f"{figures[first] / medians['transformers fp32'][first]:7.2f}" if "transformers fp32" in medians else f"{'':7s}"
            lines.append(
                f"  {name:22s} {size / 1e6:7.1f} {self.loaded[name]['load_s']:7.2f} {self.loaded[name]['peak'] / 1e6:8.0f}{cells}  {f'{low:.1f}-{high:.1f}':>13s}"
                f" {ratio}{share}"
            )
        for name, figures in medians.items():
            wider = RUNTIMES[name].wider
            if wider in medians and figures[first] < medians[wider][first]:
                lines.append(f"{name} is slower than {wider}: it has no kernel of its own on this processor.")
        lines += [f"{name} is left out: {why}." for name, why in self.left_out.items()]
        lines.append(
            "limit: tokens/s at batch 1 if the matrices that a word multiplies were read once at that speed, and nothing else took time; caches may hold small ones."
        )
        return "\n".join(lines)


class _Worker:
    """A process of this file, in an environment (None: the one of this process). A context manager: it is killed at the end."""

    def __init__(self, environment: str | None, case: dict[str, Any]) -> None:
        python = sys.executable if environment is None else str(ROOT / environment / "bin/python")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(case["threads"]), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        # -P: else the modules of dqtrain.bench stand before those of libraries
        self._process = subprocess.Popen([python, "-P", __file__, json.dumps(case)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self) -> dict[str, Any]:
        """Send a line, and wait for the line of JSON that answers it. Raises ChildProcessError where the process has ended."""
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None and answers is not None
        try:
            to.write("\n")
            to.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ChildProcessError(f"ended with exit code {self._process.wait()}")
        return json.loads(answer)


def _prepare(folder: Path, shape: Shape, names: list[str]) -> None:
    """The named folders: students of 2 (ternary), 4 and 8 bits and one whose matrices stay float, packed and made of that; the first one's values as floats."""
    import torch

    from dqtrain.artifact import format
    from dqtrain.artifact.export import RUNTIMES as TARGETS
    from dqtrain.artifact.load import load_artifact
    from dqtrain.artifact.pretrained import name_in_config
    from dqtrain.artifact.size import export_about
    from dqtrain.config import Export, Quant, Source
    from dqtrain.data.prepare import load_tokenizer, train_tokenizer
    from dqtrain.models.making import model_class
    from dqtrain.quant.modules import quantize_model

    (folder / "text.txt").write_text(__doc__)
    train_tokenizer([Source(path=str(folder / "text.txt"))], 260, folder / "tokenizer")  # of no account, but a GGUF file has one
    config = _config(shape)
    wanted = [name.split() for name in names]
    for bits in ("2", "4", "8", "float"):
        made = [words for words in wanted if bits in words]
        if not made and bits != "2":
            continue
        torch.manual_seed(0)
        model = model_class(config).from_config(config, dtype=torch.float32).eval()
        matrices = None if bits == "float" else {"bits": int(bits), "granularity": "per_row"}
        positions = {"bits": 8, "granularity": "per_row"}
        quant = Quant.model_validate(
            {"linears": matrices, "embeddings": matrices, "positions": positions, "activations": matrices and {"bits": 8}, "vectors": "bf16"}
        )
        coverage = quantize_model(model, quant)
        packed = folder / f"packed {bits}"
        load_tokenizer(folder / "tokenizer").save_pretrained(packed)
        config.save_pretrained(packed)
        format.write(model, packed, export_about(coverage, quant))
        name_in_config(packed, type(model).__name__)
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            for target, *how in made:
                if target in TARGETS:
                    place = folder / " ".join([target, *how])
                    place.mkdir()
                    # Of compressed-tensors float activations are allowed: vLLM has no others beside 4 bits on CPUs.
                    asked = Export(gguf="fastest" if "fastest" in how else "smallest", compressed_tensors="vllm", allow_inexact=target == "compressed-tensors")
                    TARGETS[target].target(tensors, config, asked).write(place)
    dense = load_artifact(folder / "packed 2", "dense")
    dense.save_pretrained(folder / "fp32")
    dense.to(torch.bfloat16).save_pretrained(folder / "bf16")  # type: ignore[arg-type]


def _config(shape: Shape) -> Any:
    from transformers import BartConfig, GPT2Config

    heads = shape.width // 64
    size: dict[str, Any] = {"vocab_size": shape.vocabulary, "bos_token_id": 0}
    if shape.family == "gpt2":
        return GPT2Config(n_embd=shape.width, n_layer=shape.layers[0], n_head=heads, n_positions=LONGEST, eos_token_id=0, **size)
    both: dict[str, Any] = {
        f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("attention_heads", heads), ("ffn_dim", 4 * shape.width))
    }
    layers: dict[str, Any] = {"encoder_layers": shape.layers[0], "decoder_layers": shape.layers[1]}
    return BartConfig(d_model=shape.width, max_position_embeddings=LONGEST, forced_eos_token_id=None, **layers, **both, **size)


def _child(case: dict[str, Any]) -> None:
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print

    def answer(figures: dict[str, Any]) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    runtime = RUNTIMES[case["runtime"]] if "runtime" in case else None
    importlib.import_module(runtime.imports if runtime else "dqtrain.artifact.load")
    torch.set_num_threads(case["threads"])
    folder, draw = Path(case["folder"]), torch.Generator().manual_seed(0)
    sys.stdin.readline()  # one at a time
    if "prepare" in case:
        shape, names = case["prepare"]
        _prepare(folder, Shape(**shape), names)
        answer({})
        return
    if "bandwidth" in case:
        block = torch.ones(2**27)  # 512 MiB, more than any cache

        def measure() -> dict[str, Any]:
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                block.sum()
                seconds.append(time.perf_counter() - start)
            return {"bytes_per_s": block.nbytes / min(seconds)}

        ready: dict[str, Any] = {}
    else:
        assert runtime is not None
        gc.collect()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = time.perf_counter()
        write = runtime.load(folder / runtime.folder)
        ready = {"load_s": time.perf_counter() - start, "torch": torch.__version__}
        ids = {size: torch.randint(case["vocabulary"], (size, case["prompt"]), generator=draw).tolist() for size in case["batches"]}
        for batch in ids.values():
            write(batch, 2)
        ready["peak"] = torch.cuda.max_memory_allocated() if runtime.on_gpu else _resident("VmHWM") - before

        def measure() -> dict[str, Any]:
            figures = {}
            for size, batch in ids.items():
                write(batch, 1)  # what others did to the caches in between
                seconds = []
                for tokens in (1, case["tokens"]):
                    start = time.perf_counter()
                    write(batch, tokens)
                    seconds.append(time.perf_counter() - start)
                figures[f"prompt {size}"] = size * case["prompt"] / seconds[0]
                figures[f"decode {size}"] = size * (case["tokens"] - 1) / (seconds[1] - seconds[0])
            return figures

    answer(ready)
    for _ in sys.stdin:
        answer(measure())


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"no {name} in /proc/self/status"
    return 1024 * int(found[1])


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
