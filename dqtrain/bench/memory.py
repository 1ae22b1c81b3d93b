"""What the memory model of `dqtrain plan` is worth: real engines of two ranks on this machine, their bytes beside the model's.

Each rank is a process of its own that builds a tiny run first, so that libraries, threads and buffers are there, and then the one
that is measured: resident bytes beyond what it had before (Linux), at rest after the start and after the first step, and the high-water
mark of forward, backward and update of the second step. glibc is told to take every large tensor from the system and to give it back at once,
so that what is resident is what is alive.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dqtrain.bench.resident import resident
from dqtrain.config import RunConfig, Source, validate
from dqtrain.plan import Memory, memory_of

TOLERANCE = 0.10
"""Share by which measured bytes may differ from predicted ones."""

STAGES = (1, 2, 3)


def run(layers: int = 12, width: int = 768, vocabulary: int = 50257, samples: int = 2, tokens: int = 256, stages: tuple[int, ...] = STAGES) -> str:
    """A table as text: a GPT-2-shaped teacher and a 2-2-8 student of equal size, at each ZeRO stage of the student."""
    lines = [f"GPT-2 of {layers} layers, width {width}, vocabulary {vocabulary:,}, 2-2-8, fp32, 2 ranks, {samples} x {tokens} tokens each; MB per rank"]
    with tempfile.TemporaryDirectory() as folder:
        _write_teacher(Path(folder), layers, width, vocabulary, tokens)
        for stage in stages:
            measured, predicted = measure(Path(folder), stage, samples, tokens)
            lines += [f"  student at stage {stage}, teacher at stage 3", *(f"    {line}" for line in check(measured, predicted)[0])]
    return "\n".join(lines)


def check(measured: Mapping[str, float], predicted: Memory) -> tuple[list[str], bool]:
    """(lines of a table, whether rests and the peak are within TOLERANCE of the model): bytes of each moment beside the model's, the parts of the model below."""
    lines, largest = [f"{'':34s} {'model':>9s} {'measured':>9s} {'ratio':>6s}"], max(sum(parts.values()) for parts in predicted.moments.values())
    close = True
    for moment, parts in predicted.moments.items():
        total = sum(parts.values())
        ratio = measured[moment] / total
        lines.append(f"{moment:34s} {total / 1e6:9.0f} {measured[moment] / 1e6:9.0f} {ratio:6.2f}")
        lines += [f"  {name:32s} {value / 1e6:9.0f}" for name, value in parts.items() if value >= 5e5]
        close &= abs(ratio - 1) <= TOLERANCE or moment not in ("start", "rest")
    peak = max(measured[moment] for moment in predicted.moments)
    lines.append(f"{'peak':34s} {largest / 1e6:9.0f} {peak / 1e6:9.0f} {peak / largest:6.2f}")
    return lines, close and abs(peak / largest - 1) <= TOLERANCE


def measure(folder: Path, stage: int, samples: int, tokens: int, ranks: int = 2, **changes: Any) -> tuple[dict[str, float], Memory]:
    """Bytes of the rank that has most at each moment, and the model's; `folder` holds what `_write_teacher` wrote."""
    config = _config(folder, folder / "teacher", stage, samples, tokens, ranks, changes)
    tiny = _config(folder, folder / "tiny", stage, samples, tokens, ranks, changes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Every tensor from 64 KiB up is a mapping of its own, which goes back to the system when the tensor dies.
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "dqtrain.bench.memory", json.dumps([tiny, config])]
    started = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(ranks)]
    try:
        found = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"exit codes {[process.returncode for process in started]}; the ranks' messages are above")
    figures = [json.loads(output.splitlines()[-1]) for output in found]
    measured = {moment: max(figure[moment] for figure in figures) for moment in figures[0]}
    return measured, memory_of(validate(config, "bench"), ranks, device="cpu")


def _config(folder: Path, teacher: Path, stage: int, samples: int, tokens: int, ranks: int, changes: dict[str, Any]) -> dict[str, Any]:
    ternary = {"bits": 2, "granularity": "per_row"}
    blocks: dict[str, dict[str, Any] | None] = {
        "run": {"dir": str(folder / f"{teacher.name}-{stage}")},
        "teacher": {"path": str(teacher)},
        "data": {"train": str(folder / "train.jsonl"), "tokens_per_sample": min(tokens, 16) if teacher.name == "tiny" else tokens},
        "train": {"steps": 4, "global_batch": ranks * samples, "micro_batch": samples, "lr": 1e-4},
        "zero": {"student": stage, "teacher": 3},
        "quant": {"linears": ternary, "embeddings": ternary, "positions": None, "activations": {"bits": 8}},
        "distill": {"logits": {}},
        "checkpoint": {"every_steps": 1000},
    }
    for name, change in changes.items():
        blocks[name] = None if change is None else {**(blocks.get(name) or {}), **change}
    return blocks


def _write_teacher(folder: Path, layers: int, width: int, vocabulary: int, tokens: int) -> None:
    """teacher/, tiny/ and train.jsonl: random weights and words."""
    import random

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dqtrain.data.prepare import load_tokenizer, train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(50)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(100)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    train_tokenizer([Source(path=str(folder / "train.jsonl"))], 300, folder / "tokenizer")
    shapes: dict[str, dict[str, Any]] = {
        "teacher": {"n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": vocabulary, "n_positions": tokens},
        "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 300, "n_positions": 16},
    }
    for name, shape in shapes.items():
        torch.manual_seed(0)
        config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        load_tokenizer(folder / "tokenizer").save_pretrained(folder / name)


def _measure(tiny: dict[str, Any], config: dict[str, Any]) -> dict[str, float]:
    """Bytes of this rank beyond those it has after a tiny run."""
    import torch

    from dqtrain.build import build
    from dqtrain.engine import start
    from dqtrain.rundir import RunDir
    from dqtrain.signals import Requests
    from dqtrain.world import init_world

    torch.set_num_threads(1)
    world = init_world()
    start(world, timeout_s=600)
    requests = Requests()
    found: dict[str, float] = {}

    def built(blocks: dict[str, Any]) -> Any:
        settings: RunConfig = validate(blocks, "bench")
        run = RunDir(settings.run.dir)
        if world.rank == 0:
            run.claim(settings)
        return build(settings, run, world)

    def step(trainer: Any, around: Callable[[str], None]) -> None:
        engine, backward, update = trainer.student, trainer.student.backward, trainer.student.step

        def measured_backward(loss: Any) -> None:
            around("forward")
            backward(loss)
            around("backward")

        def measured_update(factor: float) -> float:
            norm = update(factor)
            around("update")
            return norm

        engine.backward, engine.step = measured_backward, measured_update
        batches = next(trainer.batches(trainer.step))
        num_tokens, _, _ = trainer.agree(batches, requests)
        resident("VmHWM", restart=True)
        trainer.one_step(batches, num_tokens)
        engine.backward, engine.step = backward, update

    warm = built(tiny)
    for _ in range(2):
        step(warm, lambda moment: None)
    warm.student.destroy()
    del warm
    gc.collect()
    before = resident("VmRSS")

    def high(moment: str) -> None:
        found[moment] = max(found.get(moment, 0), resident("VmHWM", restart=True) - before)

    resident("VmHWM", restart=True)
    trainer = built(config)
    high("load")
    gc.collect()
    found["start"] = resident("VmRSS") - before
    step(trainer, lambda moment: None)
    gc.collect()
    found["rest"] = resident("VmRSS") - before
    step(trainer, high)
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
