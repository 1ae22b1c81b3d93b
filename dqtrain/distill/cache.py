"""What a teacher says about every training sample, stored once and read by any number of runs and ranks instead of running the teacher.

Beside the shards stands a folder named after everything that decides its content (teacher, tokenizer, data, what is stored), so that it is
never stale; its parts are complete or absent, so that writing goes on where it stopped. `hidden` are the last hidden states at target
positions, with which the teacher's own head, stored beside them, gives its exact word for any vocabulary. `sampled` are ids drawn from its
distributions: unbiased (Sparse Logit Sampling: Anshumann et al., ACL 2025). `top_k` are the likeliest ids: biased, since
what is left out counts as 0. A sample has the same words in every epoch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dqtrain.config import Teacher as TeacherSettings
from dqtrain.data.prepare import read_index
from dqtrain.data.shard import writing
from dqtrain.data.stream import AnyStream, Batch
from dqtrain.errors import DataError
from dqtrain.files import write_text, write_whole
from dqtrain.models import Head, Inputs, Outputs, Taught, inputs_of
from dqtrain.world import World, barrier

VERSION = 1
SAMPLES_PER_PART = 256
INDEX, HEAD = "index.json", "head.safetensors"
_ROWS = 256
"""Target positions whose logits exist at once while ids are drawn."""


class Online(Protocol):
    """A teacher that runs."""

    def teaching(self, batch: Batch, inputs: Inputs) -> AbstractContextManager[Taught]:
        """What it says about a micro-batch, within a context. Collective."""
        ...


def cache_folder(shards: Path, settings: TeacherSettings, teacher: Path, layout: dict[str, Any], seed: int, precision: str) -> Path:
    """Where the words of the teacher in a model directory are kept for the samples of a folder of shards; `layout` is what makes samples of the shards.

    The name changes with every byte of the model, with the shards, the layout and what is stored, and where ids are drawn with their number and `seed`.
    """
    index = read_index(shards)
    files = sorted(path for path in teacher.iterdir() if path.suffix in (".safetensors", ".bin") or path.name == "config.json")
    identity = {
        "version": VERSION,
        "teacher": {path.name: _sha256(path) for path in files},
        "tokenizer": index["tokenizer_hash"],
        "shards": [shard["checksum"] for shard in index["shards"]],
        "layout": layout,
        "precision": precision,
        "drawn": None if settings.source == "hidden" else [settings.draws, seed if settings.source == "sampled" else None],
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return shards / f"teacher-{settings.source}-{name}"


def write_cache(
    folder: Path,
    settings: TeacherSettings,
    teacher: Online,
    stream: AnyStream,
    micro_batch: int,
    seed: int,
    dtype: torch.dtype,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store what the teacher says about every sample of a stream that is not shuffled; parts that are there already are kept. Collective.

    `dtype`: of stored hidden states. `progress` is called with (rounds done, rounds). Raises DataError when the disk refuses.
    """
    if (folder / INDEX).is_file():
        return
    num_parts = math.ceil(stream.num_samples / SAMPLES_PER_PART)
    missing = [number for number in range(num_parts) if not (folder / _part(number)).is_file()]
    barrier()  # before any rank writes one
    rounds = math.ceil(len(missing) / world.world_size)
    for turn in range(rounds):
        place = turn * world.world_size + world.rank
        number = missing[min(place, len(missing) - 1)]
        samples = range(number * SAMPLES_PER_PART, min((number + 1) * SAMPLES_PER_PART, stream.num_samples))
        words: list[dict[str, Tensor]] = []
        for start in range(0, SAMPLES_PER_PART, micro_batch):  # every rank makes the same number of forwards, as ZeRO-3 needs
            wanted = samples[start : start + micro_batch]
            said = _ask(teacher, stream, wanted or samples[:1], settings, seed, world)
            words += said if wanted else []
        if place < len(missing):
            lengths = torch.tensor([len(word["lengths"]) for word in words])
            part = {name: torch.cat([word[name] for word in words]) for name in words[0]}
            part = {name: tensor.to(dtype) if name == "hidden" else tensor for name, tensor in part.items()}
            _write(folder / _part(number), {"ends": lengths.cumsum(0), "row_ends": part.pop("lengths").cumsum(0), **part})
        if progress:
            progress(turn + 1, rounds)
    batch = stream.batch(range(1))
    with teacher.teaching(batch, inputs_of(batch, world.device)[0]) as taught:
        head = taught.head
        assert head is not None
        if world.rank == 0:
            if settings.source == "hidden":
                _write(folder / HEAD, {name: tensor for name, tensor in (("weight", head.weight), ("bias", head.bias)) if tensor is not None})
            with writing(folder / INDEX):
                write_text(folder / INDEX, json.dumps({"source": settings.source, "num_parts": num_parts, "softcap": head.softcap}, indent=1))
    barrier()


def _ask(teacher: Online, stream: AnyStream, samples: range, settings: TeacherSettings, seed: int, world: World) -> list[dict[str, Tensor]]:
    """What is stored of each of some samples. Collective."""
    batch = stream.batch(samples)
    inputs, _ = inputs_of(batch, world.device)
    with torch.no_grad(), teacher.teaching(batch, inputs) as taught:
        assert taught.outputs is not None and taught.head is not None
        states = [taught.outputs.hidden[row][inputs.is_target[row]] for row in range(len(samples))]
        if settings.source == "hidden":
            return [{"lengths": torch.ones(len(hidden), dtype=torch.int64), "hidden": hidden.cpu()} for hidden in states]
        return [_words(hidden, taught.head, settings, _generator(seed, sample, world)) for hidden, sample in zip(states, samples, strict=True)]


def _generator(seed: int, sample: int, world: World) -> torch.Generator:
    return torch.Generator(world.device).manual_seed(xxhash.xxh64_intdigest(f"{seed}/teacher/{sample}".encode()) >> 1)


def _words(hidden: Tensor, head: Head, settings: TeacherSettings, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids of each position of a sample, one behind the other, with their shares; `lengths` says how many each has."""
    lengths, ids, shares = [], [], []
    for rows in hidden.split(_ROWS):
        probabilities = head.logits(rows).softmax(-1)
        if settings.source == "top_k":
            values, found = probabilities.topk(min(settings.draws, probabilities.shape[-1]))
            lengths.append(torch.full((len(rows),), found.shape[1]))
            ids.append(found.flatten().int().cpu())
            shares.append(values.flatten().float().cpu())
            continue
        for drawn in torch.multinomial(probabilities, settings.draws, replacement=True, generator=generator).cpu():
            found, counts = drawn.unique(return_counts=True)
            lengths.append(torch.tensor([len(found)]))
            ids.append(found.int())
            shares.append(counts.float() / settings.draws)
    empty = torch.empty(0)
    return {"lengths": torch.cat(lengths or [empty.long()]), "ids": torch.cat(ids or [empty.int()]), "shares": torch.cat(shares or [empty])}


class CachedTeacher:
    """A teacher whose words are read from a folder that `write_cache` made.

    Raises DataError when there is none for this teacher and data, or when it is damaged.
    """

    def __init__(self, folder: Path, command: str, device: torch.device) -> None:
        """`command`: what makes the folder, for the message."""
        self.folder, self.device = folder, device
        if not (folder / INDEX).is_file():
            kind = folder.name.rsplit("-", 1)[0]
            others = [path.name for path in folder.parent.glob(f"{kind}-*") if path != folder and (path / INDEX).is_file()]
            stale = f" What is there ({', '.join(others)}) is of another teacher, tokenizer, corpus or setting, and is not read." if others else ""
            raise DataError(f"{folder}: the teacher's words are not stored there, or not to the end.{stale} Run `{command}`.")
        self._index = json.loads((folder / INDEX).read_text())
        self._part = cache(self._open)
        self._head = None
        if self._index["source"] == "hidden":
            stored = self._open(folder / HEAD)
            names = stored.keys()
            bias = stored.get_tensor("bias").to(device) if "bias" in names else None
            self._head = Head(stored.get_tensor("weight").to(device), bias, self._index["softcap"])

    def words(self) -> dict[str, float]:
        """Nothing: the embeddings are not stored."""
        return {}

    @contextmanager
    def teaching(self, batch: Batch, inputs: Inputs) -> Iterator[Taught]:
        """What is stored of a micro-batch."""
        found = [self._sample(int(sample)) for sample in batch.samples]
        counts = inputs.is_target.sum(1).tolist()
        for sample, (lengths, _), count in zip(batch.samples, found, counts, strict=True):
            if count not in (0, len(lengths)):  # 0: a rank without work
                raise DataError(
                    f"{self.folder}: has {len(lengths)} words on sample {sample}, which has {count} targets; delete the folder and store them again."
                )
        found = [item for item, count in zip(found, counts, strict=True) if count]
        if self._head is not None:
            hidden = torch.zeros(*inputs.ids.shape, self._head.weight.shape[1], device=self.device)
            if found:
                hidden[inputs.is_target] = torch.cat([tensors["hidden"] for _, tensors in found]).float().to(self.device)
            yield Taught(Outputs(hidden), self._head)
            return
        lengths = torch.cat([lengths for lengths, _ in found]) if found else torch.zeros(0, dtype=torch.int64)
        widest = int(lengths.max()) if len(lengths) else 1
        slot = torch.arange(widest)[None] < lengths[:, None]
        ids, shares = torch.zeros(len(lengths), widest, dtype=torch.int64), torch.zeros(len(lengths), widest)
        if found:
            ids[slot] = torch.cat([tensors["ids"] for _, tensors in found]).long()
            shares[slot] = torch.cat([tensors["shares"] for _, tensors in found])
        yield Taught(ids=ids.to(self.device), shares=shares.to(self.device))

    def _sample(self, sample: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(stored rows of each target token, tensors) of a sample."""
        part = self._part(self.folder / _part(sample // SAMPLES_PER_PART))
        place = sample % SAMPLES_PER_PART
        ends = part.get_slice("ends")
        start, end = (int(ends[place - 1 : place][0]) if place else 0), int(ends[place : place + 1][0])
        row_ends = part.get_slice("row_ends")
        rows = torch.cat([row_ends[start - 1 : start] if start else torch.zeros(1, dtype=torch.int64), row_ends[start:end]])
        names = [name for name in part.keys() if name not in ("ends", "row_ends")]  # noqa: SIM118
        return rows.diff(), {name: part.get_slice(name)[int(rows[0]) : int(rows[-1])] for name in names}

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, "pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Delete {self.folder} and store the teacher's words again.") from None


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with writing(path):
        write_whole(path, [save({name: tensor.contiguous() for name, tensor in tensors.items()})])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
