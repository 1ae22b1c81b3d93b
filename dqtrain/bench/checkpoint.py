"""Checkpoints: how long training stands still for one, on real engines here; and what 70B parameters on hundreds of ranks would read, by simulation.

The simulation asks the functions that loading uses (`checkpoint.Index`) which files each rank opens and which elements it takes from them, for the shapes
of Llama 3 70B that 512 ranks saved and 384 load under ZeRO-3; bytes become seconds by what this disk gives to the function that checks hashes.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dqtrain.checkpoint import Index, Saver, load
from dqtrain.config import Distill, Quant, Train, WeightQuant, Zero
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.engine import StudentEngine, start
from dqtrain.files import digest
from dqtrain.models.language import LanguageModel
from dqtrain.models.layers import all_layers
from dqtrain.quant.modules import quantize_model
from dqtrain.world import barrier, init_world

BYTES_PER_ELEMENT = 12
"""fp32 weight and two moments."""


def run(saved_by: int = 512, loaded_by: int = 384, rounds: int = 9, disk_bytes: int = 2**30) -> str:
    """A table as text."""
    return "\n".join([*_stall(rounds), *_scale(saved_by, loaded_by, disk_bytes)])


# --- at scale


def llama_70b() -> dict[str, tuple[int, ...]]:
    """Shapes of Llama 3 70B, by name."""
    width, inner, key_value, vocabulary = 8192, 28672, 1024, 128256
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, width), "norm": (width,), "lm_head": (vocabulary, width)}
    for layer in range(80):
        shapes |= {f"layers.{layer}.self_attn.{name}_proj": (width, width) for name in "qo"}
        shapes |= {f"layers.{layer}.self_attn.{name}_proj": (key_value, width) for name in "kv"}
        shapes |= {f"layers.{layer}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes |= {f"layers.{layer}.mlp.down_proj": (width, inner)}
        shapes |= {f"layers.{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    return shapes


def owned(shapes: dict[str, tuple[int, ...]], num_ranks: int) -> Iterator[dict[str, tuple[int, int, int, tuple[int, ...]]]]:
    """What each rank owns under ZeRO-3: name -> (first element, elements, elements of the parameter, its shape)."""
    for rank in range(num_ranks):
        own = {}
        for name, shape in shapes.items():
            total = torch.Size(shape).numel()
            length = -(-total // num_ranks)
            if rank * length < total:
                own[name] = rank * length, min(length, total - rank * length), total, shape
        yield own


def _scale(saved_by: int, loaded_by: int, disk_bytes: int) -> list[str]:
    shapes = llama_70b()
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    pieces = list(owned(shapes, saved_by))
    sizes = [BYTES_PER_ELEMENT * sum(numel for _, numel, _, _ in own.values()) for own in pieces]
    began = time.perf_counter()
    index = Index.join(pieces, 1)
    text = json.dumps(index.content)
    joining = time.perf_counter() - began

    began = time.perf_counter()
    index = Index(json.loads(text))
    parsing = time.perf_counter() - began

    files: list[int] = []
    needed: list[int] = []
    hashed: list[int] = []
    seconds: list[float] = []
    for own in owned(shapes, loaded_by):
        wanted = [(name, start, numel) for name, (start, numel, _, _) in own.items()]
        began = time.perf_counter()
        ranks = index.ranks(wanted)
        parts = [part for interval in wanted for part in index.parts(*interval)]
        seconds.append(parsing + time.perf_counter() - began)
        assert sum(part.numel for part in parts) == sum(numel for _, _, numel in wanted)
        files.append(len(ranks))
        needed.append(BYTES_PER_ELEMENT * sum(part.numel for part in parts))
        hashed.append(sum(sizes[rank] for rank in ranks))
    speed = _read_speed(disk_bytes)
    worst = max(hashed) / speed
    return [
        "",
        f"simulation: Llama 3 70B, {elements:,} parameters in {len(shapes)} tensors, ZeRO-3, saved by {saved_by} ranks, loaded by {loaded_by}",
        f"  {'':<34s} {'min':>8s} {'mean':>8s} {'max':>8s}",
        _line("GB that a rank writes", [size / 1e9 for size in sizes]),
        _line("files that a rank opens", files),
        _line("GB that a rank needs", [size / 1e9 for size in needed]),
        _line("GB that a rank reads and hashes", [size / 1e9 for size in hashed]),
        _line("s of a rank for the index", seconds),
        f"  {saved_by + 4} files of {sum(sizes) / 1e9:.0f} GB; index.json: {len(text) / 1e6:.1f} MB, joined and written as JSON by rank 0 in {joining:.2f} s",
        f"  this disk, read and hashed out of no cache: {speed / 1e6:,.0f} MB/s; at that speed for each rank {worst:.1f} s, "
        f"for all together {sum(hashed) / speed / 60:.0f} min",
    ]


def _line(name: str, values: Iterable[float]) -> str:
    found = list(values)
    return f"  {name:<34s} {min(found):8.3f} {statistics.mean(found):8.3f} {max(found):8.3f}"


def _read_speed(num_bytes: int) -> float:
    """Bytes per second of `digest`, of a file that is not in memory."""
    with tempfile.NamedTemporaryFile(dir=".") as file:
        for _ in range(num_bytes >> 24):
            file.write(os.urandom(1 << 24))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        digest(Path(file.name))
        return num_bytes / (time.perf_counter() - began)


# --- on real engines


def _stall(rounds: int, layers: int = 8, width: int = 512, vocabulary: int = 16384) -> list[str]:
    """Seconds of a save on 2 ranks: of all of it, and of the part that training waits for; interleaved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, "-m", "dqtrain.bench.checkpoint", folder, str(rounds), str(layers), str(width), str(vocabulary)]
        ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}; the ranks' messages are above")
        found = json.loads((Path(folder) / "found.json").read_text())
    whole, stall = statistics.median(found["whole"]), statistics.median(found["stall"])
    shares = [stalled / all_of_it for stalled, all_of_it in zip(found["stall"], found["whole"], strict=True)]
    return [
        f"GPT-2 of {layers} layers, width {width}, vocabulary {vocabulary:,}, 2-2-float, {found['elements']:,} parameters, ZeRO-3 on 2 ranks, "
        f"{found['bytes'] / 1e6:.0f} MB, median of {rounds} interleaved rounds (smallest, largest)",
        f"  a save that training waits for   {whole:7.3f} s ({min(found['whole']):.3f}, {max(found['whole']):.3f})",
        f"  stall of one that it does not    {stall:7.3f} s ({min(found['stall']):.3f}, {max(found['stall']):.3f}), "
        f"{statistics.median(shares):.1%} ({min(shares):.1%}, {max(shares):.1%})",
        f"  load                             {statistics.median(found['load']):7.3f} s",
    ]


def _measure(folder: Path, rounds: int, layers: int, width: int, vocabulary: int) -> None:
    world = init_world()
    start(world, timeout_s=600)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model, distill = GPT2LMHeadModel(config), Distill(task=1.0)
    ternary = WeightQuant(bits=2, granularity="per_row")
    quantize_model(model, Quant(linears=ternary, embeddings=ternary, positions=None, activations=None))
    elements = sum(parameter.numel() for parameter in model.parameters())
    objective = Objective(LanguageModel(model, "fp32", **needed_outputs(distill)), distill, all_layers(config))
    engine = StudentEngine(objective, Train(steps=1, global_batch=2, micro_batch=1, lr=1e-3), Zero(student=3), world)
    engine.prepare_moments(1)
    for fragment in engine.fragments():
        for tensor in fragment.tensors.values():
            tensor.normal_()

    found: dict[str, list[float]] = {"whole": [], "stall": [], "load": []}
    written: list[int] = []
    saver = Saver(folder / "checkpoints", world, keep_last=1, event=lambda kind, **saved: written.append(saved["bytes"]))
    for step in range(2 * (rounds + 1)):
        barrier()
        began = time.perf_counter()
        saver.save(step, engine, {"step": step})
        if step % 2:
            found["stall"].append(time.perf_counter() - began)
            saver.wait()
        else:
            saver.wait()
            found["whole"].append(time.perf_counter() - began)
    for _ in range(3):
        barrier()
        began = time.perf_counter()
        load(folder / f"checkpoints/step-{2 * rounds + 1:09d}", engine)
        found["load"].append(time.perf_counter() - began)
    if world.rank == 0:
        measured = {key: values[1:] for key, values in found.items()}  # the first round makes the copies' memory
        (folder / "found.json").write_text(json.dumps({**measured, "elements": elements, "bytes": written[-1]}))
    barrier()


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:]))
    os._exit(0)  # past the barrier nobody waits for this rank
