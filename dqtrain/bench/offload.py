"""What offloading takes and gives on this machine: one student, its optimizer and weights in memory and on a local disk.

Resident bytes (Linux: anonymous memory and pages of files alike) beyond what the process had after a tiny run: the high-water mark of the start, of a step, of a
checkpoint and of loading it. Without a GPU the memory of `none` is that of the host.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dqtrain.bench.memory import _config, _write_teacher
from dqtrain.bench.resident import resident
from dqtrain.config import validate

PLACES = ("none", "cpu", "nvme")
STEPS = 3


def run(folder: Path = Path("runs"), layers: int = 12, width: int = 768, vocabulary: int = 50257) -> str:
    """A table as text, one row per place; files and checkpoints (3 GB) are in a folder of their own in `folder`, which should be on a local disk."""
    folder.mkdir(exist_ok=True)
    lines = [f"GPT-2 of {layers} layers, width {width}, vocabulary {vocabulary:,}, float, fp32, stage 3, 1 rank, 1 x 64 tokens; MB beyond a tiny run, seconds"]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name).resolve()
        _write_teacher(path, layers, width, vocabulary, 64)
        for place in PLACES:
            zero = {"live_layers": 1, "offload_optimizer": place, "offload_parameters": place} | ({"nvme": str(path)} if place == "nvme" else {})
            changes = {"zero": zero, "quant": None, "teacher": None, "distill": {"logits": None, "task": 1.0}}
            blocks = []
            for model in ("tiny", "teacher"):
                found = _config(path, path / model, 3, 1, 64, 1, {**changes, "student": {"init_from": str(path / model)}})
                found["run"] = {"dir": str(path / f"{place}-{model}")}
                blocks.append(found)
            env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
            output = subprocess.run([sys.executable, "-m", "dqtrain.bench.offload", json.dumps(blocks)], stdout=subprocess.PIPE, text=True, env=env, check=True)
            figures = json.loads(output.stdout.splitlines()[-1])
            lines.append(
                f"  {place:5s} " + "  ".join(f"{key} {value:.2f}" if key.endswith("_s") else f"{key} {value / 1e6:.0f}" for key, value in figures.items())
            )
    return "\n".join(lines)


def _measure(tiny: dict[str, Any], blocks: dict[str, Any]) -> dict[str, float]:
    import torch

    from dqtrain import checkpoint
    from dqtrain.build import build
    from dqtrain.engine import start
    from dqtrain.rundir import RunDir
    from dqtrain.signals import Requests
    from dqtrain.world import init_world

    torch.set_num_threads(1)
    world = init_world()
    start(world, timeout_s=600)
    requests = Requests()

    def built(blocks: dict[str, Any]) -> Any:
        settings = validate(blocks, "bench")
        run = RunDir(settings.run.dir)
        run.claim(settings)
        return build(settings, run, world)

    def step(trainer: Any) -> None:
        batches = trainer.micro_batches()
        trainer.one_step(batches, trainer.agree(batches, requests)[0])

    warm = built(tiny)
    for _ in range(2):
        step(warm)
    warm.student.destroy()
    del warm
    gc.collect()
    before = resident("VmRSS")
    found: dict[str, float] = {}

    def high(moment: str) -> None:
        found[moment] = resident("VmHWM", restart=True) - before

    resident("VmHWM", restart=True)
    trainer = built(blocks)
    high("start")
    step(trainer)
    high("first step")
    started = time.monotonic()
    for _ in range(STEPS):
        step(trainer)
    found["step_s"] = (time.monotonic() - started) / STEPS
    high("steps")
    gc.collect()
    found["between"] = resident("VmRSS") - before
    trainer.step = 1 + STEPS
    trainer.save()
    trainer.saver.close()
    high("checkpoint")
    gc.collect()
    resident("VmHWM", restart=True)
    folder, _ = checkpoint.newest(trainer.run.checkpoints)
    assert folder is not None
    checkpoint.load(folder, trainer.student)
    high("loading it")
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
