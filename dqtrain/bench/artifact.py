"""A packed artifact beside what else runs the same model on this machine's CPUs: size, load time, memory, speed.

The model is a student of GPT-2's shape at 2-2-8 with random weights; its codes are real, its text is not. Each runtime has a process of its own, which loads
the model and then waits; in each round one after the other reads a prompt and writes, at each batch size. A further runtime is one more entry of RUNTIMES.
"""

import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Write = Callable[[list[list[int]], int], None]
"""Reads ids [batch][tokens] and writes exactly so many tokens to each, greedily."""


class Runtime(NamedTuple):
    """One row of the table."""

    folder: str  # below that of `_prepare`
    weight_bytes: float  # that one weight takes when it is multiplied
    load: Callable[[Path], Write]
    wider: str | None = None  # the row of the same program at 8 bits, which fewer bits should not be slower than


def _transformers(folder: Path) -> Write:
    from transformers import AutoModelForCausalLM

    return _generate(AutoModelForCausalLM.from_pretrained(folder))


def _dynamic_int8(folder: Path) -> Write:
    """torch.ao's dynamic quantization of linear layers, into which Conv1D is made first: it knows none."""
    import warnings

    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to be replaced by torchao, which has no such kernels for x86
        return _generate(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}))


def _ours(mode: str) -> Callable[[Path], Write]:
    def load(folder: Path) -> Write:
        from dqtrain.artifact.load import load_artifact

        return _generate(load_artifact(folder, mode))

    return load


def _generate(model: Any) -> Write:
    import torch

    def write(ids: list[list[int]], tokens: int) -> None:
        read = torch.tensor(ids)
        with torch.no_grad():
            model.generate(
                read,
                attention_mask=torch.ones_like(read),
                max_new_tokens=tokens,
                eos_token_id=model.config.vocab_size,  # an end that never comes: to forbid the real one takes as long as a tenth of a step of `fast`
                do_sample=False,
                pad_token_id=0,
            )

    return write


def _llama_cpp(folder: Path) -> Write:
    """One sequence after the other."""
    from dqtrain.artifact.llama_cpp import LlamaCpp

    runtime = LlamaCpp(folder / "model.gguf", longest=LONGEST)

    def write(ids: list[list[int]], tokens: int) -> None:
        for sequence in ids:
            list(itertools.islice(runtime.greedily(sequence), tokens))

    return write


def _onnx_runtime(folder: Path) -> Write:
    from dqtrain.artifact.onnx_runtime import OnnxRunner

    runner = OnnxRunner(folder)

    def write(ids: list[list[int]], tokens: int) -> None:
        reading, read = runner.start(batch=len(ids)), ids
        for _ in range(tokens):
            read = reading.read(read)[:, -1].argmax(-1)[:, None].tolist()

    return write


RUNTIMES = {
    "transformers fp32": Runtime("fp32", 4, _transformers),
    "transformers bf16": Runtime("bf16", 2, _transformers),
    "torch dynamic int8": Runtime("fp32", 1, _dynamic_int8),
    "packed, exact": Runtime("packed 2", 4, _ours("exact")),
    "packed, fast": Runtime("packed 2", 0.5, _ours("fast")),
    "llama.cpp F32": Runtime("gguf float", 4, _llama_cpp),
    "llama.cpp Q8_0": Runtime("gguf 8", 8.5 / 8, _llama_cpp),
    "llama.cpp Q4_0": Runtime("gguf 4", 4.5 / 8, _llama_cpp, "llama.cpp Q8_0"),
    "llama.cpp TQ1_0": Runtime("gguf 2", 1.6875 / 8, _llama_cpp, "llama.cpp Q8_0"),
    "llama.cpp TQ2_0": Runtime("gguf 2 fastest", 2.0625 / 8, _llama_cpp, "llama.cpp Q8_0"),
    "ONNX Runtime fp32": Runtime("onnx float", 4, _onnx_runtime),
    "ONNX Runtime 8 bit": Runtime("onnx 8", 1 + 4 / 128, _onnx_runtime),
    "ONNX Runtime 4 bit": Runtime("onnx 4", 0.5 + 4 / 128, _onnx_runtime, "ONNX Runtime 8 bit"),
    "ONNX Runtime 2 bit": Runtime("onnx 2", 0.25 + 4 / 128, _onnx_runtime, "ONNX Runtime 8 bit"),
}

WEIGHTS = {".safetensors", ".gguf", ".onnx", ".data"}

LONGEST = 1024
"""Positions of the model."""


def run(
    layers: int = 12,
    width: int = 768,
    vocabulary: int = 50257,
    prompt: int = 32,
    tokens: int = 32,
    batches: tuple[int, ...] = (1, 8),
    rounds: int = 5,
    threads: int | None = None,
) -> str:
    """A table as text: medians of `rounds` in which the runtimes alternate; memory is what loading and the first texts add to the process at their highest."""
    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        case = {"folder": folder, "prompt": prompt, "tokens": tokens, "batches": batches, "vocabulary": vocabulary, "threads": threads}
        _ask(_start({**case, "prepare": [layers, width]}))
        weights = 12 * layers * width**2 + vocabulary * width  # that one word multiplies
        processes = {name: _start({**case, "runtime": name}) for name in RUNTIMES}
        bandwidth = _start({**case, "bandwidth": True})
        try:
            _ask(bandwidth)
            loaded = {name: _ask(process) for name, process in processes.items()}
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNTIMES}
            read: list[float] = []
            for _ in range(rounds):
                read.append(_ask(bandwidth, "go")["bytes_per_s"])
                for name, process in processes.items():
                    found[name].append(_ask(process, "go"))
        finally:
            for process in (*processes.values(), bandwidth):
                process.kill()
                process.communicate()
        speed = statistics.median(read)
        heads = "".join(f" {f'prompt {b}':>9s} {f'decode {b}':>9s}" for b in batches)
        lines = [
            f"GPT-2 of {layers} layers, width {width}, vocabulary {vocabulary:,}, 2-2-8, random; {threads} threads, torch {loaded['packed, exact']['torch']}",
            f"prompts of {prompt} tokens, {tokens} written; tokens/s, median of {rounds} interleaved rounds (decode 1: lowest and highest); memory reads {speed / 1e9:.1f} GB/s",
            f"  {'':20s} {'MB':>7s} {'load s':>7s} {'peak MB':>8s}{heads}  {'range':>13s} {'x fp32':>7s} {'limit':>7s} {'share':>6s}",
        ]
        medians = {name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in found.items()}
        first = f"decode {batches[0]}"
        for name, runtime in RUNTIMES.items():
            size = sum(file.stat().st_size for file in (Path(folder) / runtime.folder).iterdir() if file.suffix in WEIGHTS)
            figures, limit = medians[name], speed / (weights * runtime.weight_bytes)
            cells = "".join(f" {figures[f'prompt {b}']:9.0f} {figures[f'decode {b}']:9.1f}" for b in batches)
            low, high = (end(r[first] for r in found[name]) for end in (min, max))
            ratio = figures[first] / medians["transformers fp32"][first]
            lines.append(
                f"  {name:20s} {size / 1e6:7.1f} {loaded[name]['load_s']:7.2f} {loaded[name]['peak'] / 1e6:8.0f}{cells}  {f'{low:.1f}-{high:.1f}':>13s}"
                f" {ratio:7.2f} {limit:7.0f} {figures[first] / limit:6.0%}"
            )
    for name, runtime in RUNTIMES.items():
        if runtime.wider is not None and medians[name][first] < medians[runtime.wider][first]:
            lines.append(f"{name} is slower than {runtime.wider}: it has no kernel of its own on this processor.")
    lines.append(
        "limit: tokens/s at batch 1 if the matrices that a word multiplies were read once at that speed, and nothing else took time; caches may hold small ones."
    )
    return "\n".join(lines)


def _start(case: dict[str, Any]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(case["threads"]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "dqtrain.bench.artifact", json.dumps(case)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def _ask(process: subprocess.Popen[str], word: str = "") -> dict[str, Any]:
    """Send a line, and wait for the line of JSON that answers it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a runtime ended with exit code {process.wait()}; its message is above")
    return json.loads(answer)


def _prepare(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """The folders of RUNTIMES: students of 2 (ternary), 4 and 8 bits and one whose matrices stay float, packed and as GGUF files; the first one's values as floats."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dqtrain.artifact import format
    from dqtrain.artifact.export_gguf import GgufTarget
    from dqtrain.artifact.export_onnx import OnnxTarget
    from dqtrain.artifact.load import load_artifact
    from dqtrain.artifact.pretrained import name_in_config
    from dqtrain.artifact.size import export_about
    from dqtrain.artifact.target import RuntimeTarget
    from dqtrain.config import Export, Quant, Source
    from dqtrain.data.prepare import load_tokenizer, train_tokenizer
    from dqtrain.quant.modules import quantize_model

    (folder / "text.txt").write_text(__doc__)
    train_tokenizer([Source(path=str(folder / "text.txt"))], 260, folder / "tokenizer")  # of no account, but a GGUF file has one
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocabulary, n_positions=LONGEST, bos_token_id=0, eos_token_id=0)
    for name in ("2", "4", "8", "float"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        matrices = None if name == "float" else {"bits": int(name), "granularity": "per_row"}
        positions = {"bits": 8, "granularity": "per_row"}
        quant = Quant.model_validate(
            {"linears": matrices, "embeddings": matrices, "positions": positions, "activations": matrices and {"bits": 8}, "vectors": "bf16"}
        )
        coverage = quantize_model(model, quant)
        packed = folder / f"packed {name}"
        load_tokenizer(folder / "tokenizer").save_pretrained(packed)
        config.save_pretrained(packed)
        format.write(model, packed, export_about(coverage, quant.activations.model_dump() if quant.activations else None))
        name_in_config(packed, type(model).__name__)
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            made: list[tuple[str, RuntimeTarget]] = [
                (f"gguf {name}", GgufTarget(tensors, config, Export())),
                (f"onnx {name}", OnnxTarget(tensors, config, Export())),
            ]
            made += [("gguf 2 fastest", GgufTarget(tensors, config, Export(gguf="fastest")))] if name == "2" else []
            for place, target in made:
                (folder / place).mkdir()
                target.write(folder / place)
    dense = load_artifact(folder / "packed 2", "dense")
    dense.save_pretrained(folder / "fp32")
    dense.to(torch.bfloat16).save_pretrained(folder / "bf16")  # type: ignore[arg-type]


def _child(case: dict[str, Any]) -> None:
    import torch

    import dqtrain.artifact.load  # noqa: F401 - the imports of all runtimes, before memory is looked at

    torch.set_num_threads(case["threads"])
    folder, draw = Path(case["folder"]), torch.Generator().manual_seed(0)
    sys.stdin.readline()  # one at a time
    if "prepare" in case:
        layers, width = case["prepare"]
        _prepare(folder, layers, width, case["vocabulary"])
        _answer({})
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
        runtime = RUNTIMES[case["runtime"]]
        gc.collect()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        start = time.perf_counter()
        write = runtime.load(folder / runtime.folder)
        ready = {"load_s": time.perf_counter() - start, "torch": torch.__version__}
        ids = {size: torch.randint(case["vocabulary"], (size, case["prompt"]), generator=draw).tolist() for size in case["batches"]}
        for batch in ids.values():
            write(batch, 2)
        ready["peak"] = _resident("VmHWM") - before

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

    _answer(ready)
    for _ in sys.stdin:
        _answer(measure())


def _answer(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"no {name} in /proc/self/status"
    return 1024 * int(found[1])


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
