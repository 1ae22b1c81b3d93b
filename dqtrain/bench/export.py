"""Memory that `dqtrain export` takes for a student of 1.5 billion parameters: the most that its process ever held, pages of mapped files included.

The run was never trained: its config, its coverage and a checkpoint as four ranks of ZeRO-3 leave it, with random weights, are written here.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, PretrainedConfig

from dqtrain.bench.checkpoint import owned
from dqtrain.bench.resident import resident
from dqtrain.bench.sharding import XL
from dqtrain.checkpoint import FORMAT, Index, persistent_buffers
from dqtrain.config import load_config
from dqtrain.files import digest
from dqtrain.models.making import meta_model
from dqtrain.quant.modules import is_learned_scale, quantize_model
from dqtrain.rundir import RunDir
from dqtrain.tensor_file import write_tensors

RANKS = 4
SMALL = {"n_embd": 64, "n_layer": 1, "n_head": 1, "vocab_size": 512}


def run(folder: Path = Path("runs/bench-export"), shape: dict[str, int] | None = None, targets: Sequence[str] = ("packed", "hf")) -> str:
    """A table as text. `folder` holds the run and its artifacts (13 GB) meanwhile; it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        small, large = write_run(folder / "small", gpt2(SMALL)), write_run(folder / "large", gpt2(shape or XL))
        model = meta_model(large.student)
        numel, largest = sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters())
        lines = [
            f"GPT-2 of {model.config.n_layer} layers, width {model.config.n_embd}: {numel / 1e9:.2f} billion parameters, {4 * numel / 1e6:,.0f} MB in fp32, the largest matrix "
            f"{4 * largest / 1e6:,.0f} MB; 2-2-8, checkpoint of {RANKS} ranks under ZeRO-3",
            f"  {'':12s} {'MB':>8s} {'seconds':>8s} {'peak MB':>8s} {'above a small model':>20s} {'x largest matrix':>17s}",
        ]
        for target in targets:
            figures = measure(large, target)
            above = figures["peak"] - measure(small, target)["peak"]
            lines.append(
                f"  {target:12s} {figures['bytes'] / 1e6:8,.0f} {figures['seconds']:8.0f} {figures['peak'] / 1e6:8,.0f} {above / 1e6:20,.0f} {above / (4 * largest):17.2f}"
            )
        return "\n".join(lines)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(run: RunDir, target: str, program: Sequence[str] = ("-m", "dqtrain")) -> dict[str, Any]:
    """`dqtrain export RUN --to TARGET` in a process of its own, of that Python program: seconds, the most bytes that it held, bytes of the artifact's tensors, and its proof."""
    started = time.monotonic()
    peak = 0
    with subprocess.Popen([sys.executable, *program, "export", str(run.path), "--to", target], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:  # not getrusage's ru_maxrss, which begins with what this process holds
            peak = max(peak, resident("VmHWM", process=process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise RuntimeError(f"dqtrain export ended with exit code {process.returncode}; its message is above")
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
    return {"seconds": time.monotonic() - started, "peak": peak, "bytes": found["bytes"], "parity": found["parity"]}


def gpt2(shape: dict[str, int]) -> GPT2Config:
    """A config of GPT-2."""
    return GPT2Config(**shape, bos_token_id=0, eos_token_id=0)  # type: ignore[arg-type]


def write_run(folder: Path, config: PretrainedConfig) -> RunDir:
    """A finished run of a student at 2-2-8, with random weights, one tensor in memory at a time."""
    run = RunDir(folder.absolute())
    run.path.mkdir(parents=True)
    weights = {"bits": 2, "granularity": "per_row"}
    tree = {
        "run": {"dir": str(run.path)},
        "teacher": {"path": str(run.path / "teacher")},
        "data": {"train": str(run.path / "text.jsonl"), "tokens_per_sample": 64},
        "train": {"steps": 1, "global_batch": RANKS, "micro_batch": 1, "lr": 1e-5},
        "quant": {"linears": weights, "embeddings": weights, "positions": {"bits": 8, "granularity": "per_row"}, "activations": {"bits": 8}},
        "distill": {"logits": {"weight": 1.0}},
        "checkpoint": {"every_steps": 1},
    }
    run.config.write_text(yaml.safe_dump(tree))
    config.save_pretrained(run.student)
    model, quant = meta_model(run.student), load_config(run.config).quant
    assert quant is not None
    run.coverage.write_text(quantize_model(model, quant, initialise=False).to_json())
    _write_checkpoint(
        run.checkpoints / "step-000000001",
        {f"student.model.{name}": tuple(p.shape) for name, p in model.named_parameters()},
        {f"student.model.{name}": torch.randn_like(buffer) for name, buffer in persistent_buffers(model).items()},
    )
    run.result.write_text(json.dumps({"step": 1, "test": {}}))
    return run


def _write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], buffers: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    ranks = list(owned(shapes, RANKS))
    for rank, own in enumerate(ranks):

        def draw(key: str, own: dict[str, Any] = own) -> Tensor:
            name = key.removesuffix("|fp32")
            numel = own[name][1]
            if len(shapes[name]) == 1:
                return torch.full((numel,), float(is_learned_scale(name) or name.endswith("weight")))
            return torch.randn(numel, generator=generator) * 0.02

        write_tensors(folder / f"rank-{rank:05d}.safetensors", {f"{name}|fp32": (torch.float32, (piece[1],)) for name, piece in own.items()}, draw)
    save_file(buffers, folder / "buffers.safetensors")
    (folder / "index.json").write_text(json.dumps(Index.join(ranks, 1).content))
    (folder / "state.json").write_text(json.dumps({"step": 1}))
    files = {path.name: (path.stat().st_size, digest(path)) for path in folder.iterdir()}
    (folder / "MANIFEST.json").write_text(json.dumps({"format": FORMAT, "step": 1, "world_size": RANKS, "files": files}))
