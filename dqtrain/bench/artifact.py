"""A packed artifact beside what else runs the same model on this machine's CPUs: size, load time, memory, speed.

The model is a student of GPT-2's shape at 2-2-8 with random weights; its codes are real, its text is not. Each runtime has a process of its own, which loads
the model and then waits; in each round one after the other reads a prompt and writes, at each batch size. A further runtime is one more entry of RUNTIMES.
"""

import gc
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

    file: str  # below the folder of `_prepare`, whose bytes count: packed, fp32 or bf16
    weight_bytes: float  # that one weight takes when it is multiplied
    load: Callable[[Path], Write]


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
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=model.config.eos_token_id,
            )

    return write


RUNTIMES = {
    "transformers fp32": Runtime("fp32", 4, _transformers),
    "transformers bf16": Runtime("bf16", 2, _transformers),
    "torch dynamic int8": Runtime("fp32", 1, _dynamic_int8),
    "packed, exact": Runtime("packed", 4, _ours("exact")),
    "packed, fast": Runtime("packed", 0.5, _ours("fast")),
}


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
            size = sum(file.stat().st_size for file in (Path(folder) / runtime.file).glob("*.safetensors"))
            figures, limit = medians[name], speed / (weights * runtime.weight_bytes)
            cells = "".join(f" {figures[f'prompt {b}']:9.0f} {figures[f'decode {b}']:9.1f}" for b in batches)
            low, high = (end(r[first] for r in found[name]) for end in (min, max))
            ratio = figures[first] / medians["transformers fp32"][first]
            lines.append(
                f"  {name:20s} {size / 1e6:7.1f} {loaded[name]['load_s']:7.2f} {loaded[name]['peak'] / 1e6:8.0f}{cells}  {f'{low:.1f}-{high:.1f}':>13s}"
                f" {ratio:7.2f} {limit:7.0f} {figures[first] / limit:6.0%}"
            )
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


def _prepare(folder: Path, layers: int, width: int, vocabulary: int, positions: int) -> None:
    """packed/, fp32/ and bf16/: one student, as codes and as floats."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dqtrain.artifact import format
    from dqtrain.artifact.load import load_artifact
    from dqtrain.artifact.pretrained import name_in_config
    from dqtrain.artifact.size import export_about
    from dqtrain.config import Quant
    from dqtrain.quant.modules import quantize_model

    torch.manual_seed(0)
    ternary = {"bits": 2, "granularity": "per_row"}
    quant = Quant.model_validate(
        {"linears": ternary, "embeddings": ternary, "positions": {"bits": 8, "granularity": "per_row"}, "activations": {"bits": 8}, "vectors": "bf16"}
    )
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocabulary, n_positions=positions, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    coverage = quantize_model(model, quant)
    (folder / "packed").mkdir()
    config.save_pretrained(folder / "packed")
    format.write(model, folder / "packed", export_about(coverage, quant.activations.model_dump() if quant.activations else None))
    name_in_config(folder / "packed")
    dense = load_artifact(folder / "packed", "dense")
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
        _prepare(folder, layers, width, case["vocabulary"], positions=1024)
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
        write = runtime.load(folder / runtime.file)
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
