"""Models of 1.5 billion parameters on this machine: loaded straight into partitions, and a run that steps, is killed and goes on.

Memory is anonymous memory (RssAnon and RssShmem of /proc/PID/status), looked at every few milliseconds: pages of the files that are read belong to the
system's cache, which it takes back when it needs them.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import GPT2Config

from dqtrain import engine
from dqtrain.build import student_model
from dqtrain.config import Source, load_config
from dqtrain.data.prepare import load_tokenizer, train_tokenizer
from dqtrain.models.making import meta_model
from dqtrain.models.weights import open_weights
from dqtrain.tensor_file import write_tensors
from dqtrain.world import barrier, init_world

XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257}
RANKS = 2
_NOTICED_S = 0.005
FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc keeps freed blocks of up to 32 MB; so it gives back those above 1 MB, as allocators of GPUs do."""


def run(folder: Path = Path("runs/bench-sharding"), shape: dict[str, int] | None = None) -> str:
    """A table as text. `folder` holds the model (3 GB), the run and its checkpoints (some 12 GB) meanwhile; it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config = _write_model(folder / "teacher", shape or XL)
        lines = [f"GPT-2 of {config.n_layer} layers, width {config.n_embd}, {_numel(config) / 1e9:.2f} billion parameters in bf16, {RANKS} ranks"]
        return "\n".join([*lines, *_load(folder), *_train(folder)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_model(folder: Path, shape: dict[str, int]) -> GPT2Config:
    """Random bf16 weights, one tensor in memory at a time, in files of about 500 MB, with a tokenizer of the model's vocabulary beside them."""
    folder.mkdir()
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dtype="bfloat16")  # type: ignore[arg-type]
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}

    def draw(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.full(shapes[name], float(name.endswith("weight")), dtype=torch.bfloat16)
        return (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()

    files: list[list[str]] = [[]]
    for name in shapes:
        if sum(2 * torch.Size(shapes[n]).numel() for n in files[-1]) > 500e6:
            files.append([])
        files[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(folder / file, {name: (torch.bfloat16, shapes[name]) for name in names}, draw)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = folder.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of {i * i} words, and {i % 7} more"}) + "\n" for i in range(2000)))
    train_tokenizer([Source(path=str(text))], 512, folder.parent / "tokenizer")
    load_tokenizer(folder.parent / "tokenizer").save_pretrained(folder)
    return config


def _numel(config: GPT2Config) -> int:
    return sum(p.numel() for p in meta_model(config).parameters())


def _config(folder: Path, decoder_layers: int | None) -> Path:
    weights = {"bits": 2, "granularity": "per_row"}
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(folder / "teacher"), "dtype": "bf16"},
        "student": {"decoder_layers": decoder_layers},
        "data": {"train": str(folder / "text.jsonl"), "tokens_per_sample": 64},
        "zero": {"live_layers": 2},
        "train": {"steps": 4, "global_batch": 2, "micro_batch": 1, "lr": 1e-5, "activation_checkpointing": True},
        "quant": {"linears": weights, "embeddings": weights, "positions": None, "activations": {"bits": 8}},
        "distill": {"logits": {"weight": 1.0}},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
        "log": {"every_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _load(folder: Path) -> list[str]:
    config = _config(folder, None)
    env = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dqtrain.bench.sharding", str(config)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(RANKS)
    ]
    reports = [json.loads(process.communicate()[0].splitlines()[-1]) for process in ranks]
    peak, shards = (sum(report[key] for report in reports) for key in ("peak", "shards"))
    return [
        f"  teacher and student of all layers into bf16 partitions, scales searched: {reports[0]['seconds']:.0f} s, peak {peak / 2**30:.2f} GiB above the start, "
        f"partitions {shards / 2**30:.2f} GiB, ratio {peak / shards:.3f}"
    ]


def _load_rank(path: Path) -> dict[str, float]:
    """One rank: teacher and student into bf16 partitions."""
    config, world = load_config(path), init_world()
    engine.start(world)
    assert config.teacher is not None
    started = time.monotonic()
    with _peak(lambda: [os.getpid()]) as peak:
        student = student_model(config, 0, 0, world)
        engine.materialise(student.model, student.weights, torch.bfloat16, partitioned=True)
        teacher = meta_model(config.teacher.path)
        engine.materialise(teacher, open_weights(config.teacher.path, teacher), torch.bfloat16, partitioned=True)
    barrier()
    shards = sum(p.ds_tensor.nbytes for model in (student.model, teacher) for p in model.parameters())  # type: ignore[attr-defined]
    return {"peak": peak[0], "shards": shards, "seconds": time.monotonic() - started}


def _train(folder: Path) -> list[str]:
    """A student of a quarter of the layers, saved at every step: killed after the first, resumed, killed after the third."""
    config, run, lines = _config(folder, 12), folder / "run", []
    for step, command in ((1, ["train", str(config), "--ranks", str(RANKS)]), (3, ["resume", str(run)])):
        started, last = time.monotonic(), run / f"checkpoints/step-{step:09d}"
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen([sys.executable, "-m", "dqtrain", *command], stdout=output, stderr=output, env=os.environ | FREED)
            with _peak(functools.partial(_family, process.pid)) as peak:
                while process.poll() is None and not last.is_dir():
                    time.sleep(_NOTICED_S)
                for pid in _children(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        if not last.is_dir():
            raise RuntimeError((folder / "output.txt").read_text())
        lines.append(
            f"  student of 12 layers under ZeRO-3, teacher in bf16, {command[0]} to step {step}, then killed: "
            f"{time.monotonic() - started:.0f} s, peak of all processes {peak[0] / 2**30:.1f} GiB"
        )
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = ", ".join(f"{line['loss']:.3f}" for line in log if "loss" in line)
    saves = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"checkpoint"' in line]
    stall = max(event["stall_s"] for event in saves)
    lines.append(
        f"  losses {losses}; a checkpoint of {saves[-1]['bytes'] / 2**30:.1f} GiB in {saves[-1]['write_s']:.0f} s, of which training stood still for {stall:.1f} s"
    )
    return lines


def _family(pid: int) -> list[int]:
    return [pid, *_children(pid)]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _anonymous_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kb) for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE))


@contextmanager
def _peak(pids: Callable[[], list[int]]) -> Iterator[list[int]]:
    """[most anonymous bytes that the processes held together, above what they held at the start]."""
    found, done = [0], threading.Event()
    start = sum(map(_anonymous_bytes, pids()))

    def watch() -> None:
        while not done.wait(_NOTICED_S):
            found[0] = max(found[0], sum(map(_anonymous_bytes, pids())) - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    print(json.dumps(_load_rank(Path(sys.argv[1]))), flush=True)
    os._exit(0)
