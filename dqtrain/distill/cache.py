"""What a teacher says about every training sample, stored once and read by any number of runs and ranks instead of running the teacher.

Beside the shards stands a folder named after everything that decides its content (teacher, tokenizer, data, what is stored), so that it is
never stale; its parts are complete or absent, so that writing goes on where it stopped. `hidden` are the last hidden states at target
positions, with which the teacher's own head, stored beside them, gives its exact word for any vocabulary. `sampled` are ids drawn from its
distributions: unbiased (Sparse Logit Sampling: Anshumann et al., ACL 2025). `top_k` are the likeliest ids: biased, since
what is left out counts as 0. A sample has the same words in every epoch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dqtrain.config import Teacher as TeacherSettings
from dqtrain.data.prepare import read_index
from dqtrain.data.shard import writing
from dqtrain.data.stream import IGNORED, AnyStream, Batch
from dqtrain.errors import DataError
from dqtrain.files import digest, write_text, write_whole
from dqtrain.models.language import Head, Inputs, Outputs, Taught, Teacher, inputs_of
from dqtrain.models.weights import weight_files
from dqtrain.world import World, barrier, broadcast_object

VERSION = 1
SAMPLES_PER_PART = 64
"""A rank holds about three times the bytes of a part while it writes one."""
INDEX, HEAD = "index.json", "head.safetensors"
_OPEN_PARTS = 4096
"""Parts that are mapped at once; Linux allows a process 65,530 maps."""
_ROWS = 256
"""Target positions whose logits exist at once while ids are drawn."""

Words = dict[str, Tensor]
"""What is stored of one sample: `hidden` [target tokens, width], or `lengths` [target tokens] of the ids of each, and `ids` and `shares`, one token behind the other."""


def cache_folder(shards: Sequence[Path], settings: TeacherSettings, teacher: Path, layout: dict[str, Any], seed: int, precision: str) -> Path:
    """Where the words of the teacher in a model directory are kept for the samples of folders of shards; `layout` is what makes samples of the shards.

    The name changes with every byte of the model, with the shards, the layout and what is stored, and where ids are drawn with their number and `seed`.
    """
    indices = [read_index(folder) for folder in shards]
    identity = {
        "version": VERSION,
        "teacher": {path.name: digest(path) for path in weight_files(teacher)},
        "dtype": settings.dtype,
        "tokenizer": indices[0]["tokenizer_hash"],
        "shards": [shard["checksum"] for index in indices for shard in index["shards"]],
        "layout": layout,
        "precision": precision,
        "drawn": None if settings.source == "hidden" else [settings.draws, seed if settings.source == "sampled" else None],
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return shards[0] / f"teacher-{settings.source}-{name}"


def write_cache(
    folder: Path,
    settings: TeacherSettings,
    teacher: Teacher,
    stream: AnyStream,
    micro_batch: int,
    seed: int,
    dtype: torch.dtype,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Store what the teacher says about every sample of a stream that is not shuffled; what is there already is kept. Collective.

    `dtype`: of stored hidden states. `progress` is called with (micro-batches done, micro-batches) of this rank. Returns what index.json
    holds: num_samples, num_tokens (target tokens), num_ids, num_bytes. Raises DataError when the disk refuses.
    """
    parts = [range(start, min(start + SAMPLES_PER_PART, stream.num_samples)) for start in range(0, stream.num_samples, SAMPLES_PER_PART)]
    missing = [samples for samples in parts if not (folder / _part(samples.start)).is_file()]
    lacks_head = settings.source == "hidden" and not (folder / HEAD).is_file()
    barrier()  # before any rank writes
    size = min(micro_batch, SAMPLES_PER_PART)
    turns = [missing[start : start + world.world_size] for start in range(0, len(missing), world.world_size)]
    done, total = 0, sum(-(-len(turn[0]) // size) for turn in turns)
    for turn in turns:
        own = turn[world.rank] if world.rank < len(turn) else range(0)
        words: list[Words] = []
        # Every rank makes as many forwards, as ZeRO-3 needs, and of whole micro-batches, so that they round as in training.
        for start in range(own.start, own.start + len(turn[0]), size):
            words += _ask(teacher, stream.batch(range(start, start + size)), max(0, min(size, own.stop - start)), settings, seed, dtype, world.device)
            done += 1
            if progress:
                progress(done, total)
        if own:
            _write(folder / _part(own.start), dict(zip(map(str, own), words, strict=True)))
    if lacks_head:
        batch = stream.batch(range(1))
        with teacher.teaching(batch, inputs_of(batch, world.device)[0]) as taught:
            assert taught.head is not None
            weight, bias, softcap = taught.head
            if world.rank == 0:
                head = {"weight": weight, "bias": bias, "softcap": None if softcap is None else torch.tensor([softcap], dtype=torch.float64)}
                _write(folder / HEAD, {"head": {name: tensor.cpu() for name, tensor in head.items() if tensor is not None}})
    barrier()  # all is there
    return broadcast_object(_write_index(folder, parts) if world.rank == 0 else {})


def _write_index(folder: Path, parts: list[range]) -> dict[str, Any]:
    """The last file, without which the others do not count."""
    ends = np.sum([_open(folder / _part(samples.start))["ends"][-1].numpy() for samples in parts], axis=0).tolist()
    num_ids, num_tokens = (0, *ends) if len(ends) == 1 else ends[:2]  # of hidden, or of ids, lengths, shares
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"num_samples": parts[-1].stop, "num_tokens": num_tokens, "num_ids": num_ids, "num_bytes": num_bytes}
    with writing(folder / INDEX):
        write_text(folder / INDEX, json.dumps(index, indent=1))
        for left in folder.glob(".*"):  # by a killed writer
            left.unlink(missing_ok=True)
    return index


def _ask(teacher: Teacher, batch: Batch, num_kept: int, settings: TeacherSettings, seed: int, dtype: torch.dtype, device: torch.device) -> list[Words]:
    """What is stored of each of the first samples of a batch. Collective."""
    inputs, _ = inputs_of(batch, device)
    with torch.no_grad(), teacher.teaching(batch, inputs) as taught:
        assert taught.outputs is not None and taught.head is not None
        states = [taught.outputs.hidden[row][inputs.is_target[row]] for row in range(num_kept)]
        if settings.source == "hidden":
            return [{"hidden": hidden.to(dtype).cpu()} for hidden in states]
        return [_ids(hidden, taught.head, settings, f"{seed}/teacher/{sample}") for hidden, sample in zip(states, batch.samples, strict=False)]


def _ids(hidden: Tensor, head: Head, settings: TeacherSettings, seed: str) -> Words:
    """Ids of each position of a sample."""
    draw = np.random.default_rng(xxhash.xxh64_intdigest(seed.encode()))  # numpy's, so that every device draws the same
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in hidden.split(_ROWS):
        probabilities = head.logits(rows).softmax(-1)
        num_words = probabilities.shape[-1]
        if settings.source == "top_k":
            shares, ids = probabilities.topk(min(settings.draws, num_words))
            found.append((torch.full((len(rows),), ids.shape[1]), ids.flatten(), shares.flatten()))
            continue
        # A number u draws the first word at which the cumulative distribution passes u.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        uniform = torch.from_numpy(draw.random((len(rows), settings.draws))).to(hidden.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_(max=num_words - 1)
        drawn += num_words * torch.arange(len(rows), device=hidden.device)[:, None]
        ids, counts = drawn.unique(return_counts=True)
        found.append((torch.bincount(ids // num_words, minlength=len(rows)), ids % num_words, counts / settings.draws))
    lengths, ids, shares = (torch.cat(tensors).cpu() for tensors in zip(*found, strict=True))
    return {"lengths": lengths.int(), "ids": ids.int(), "shares": shares.float()}


class CachedTeacher:
    """A teacher whose words are read from a folder that `write_cache` made, through a memory map.

    Raises DataError when there is none for this teacher and data, or when it is damaged: every sample is checked whenever it is read.
    """

    def __init__(self, folder: Path, command: str, device: torch.device) -> None:
        """`command`: what makes the folder, for messages."""
        self.folder, self.device, self._command = folder, device, command
        self._part = lru_cache(_OPEN_PARTS)(_open)
        kind = folder.name.rsplit("-", 1)[0]
        if not (folder / INDEX).is_file():
            others = [path.parent.name for path in sorted(folder.parent.glob(f"{kind}-*/{INDEX}"))]
            stale = f" What is there ({', '.join(others)}) is of another teacher or setting, and is not read." if others else ""
            raise DataError(f"{folder}: what the teacher says about this corpus is not stored there, or not to the end.{stale} Run `{command}`.")
        try:
            num_samples = json.loads((folder / INDEX).read_bytes())["num_samples"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(folder / INDEX, error) from None
        wanted = [HEAD] * (kind == "teacher-hidden") + [_part(start) for start in range(0, num_samples, SAMPLES_PER_PART)]
        missing = sorted({*wanted} - {path.name for path in folder.iterdir()})
        if missing:
            raise DataError(f"{folder}: {len(missing)} files, such as {missing[0]}, are missing. Run `{command}`, which makes them again.")
        self._head: Head | None = None
        if HEAD in wanted:
            head = {name: tensor.to(device) for name, tensor in self._read(folder / HEAD, 0, "head").items()}
            self._head = Head(head["weight"], head.get("bias"), float(head["softcap"]) if "softcap" in head else None)

    def figures(self) -> dict[str, float]:
        """Nothing: the embeddings are not stored."""
        return {}

    def destroy(self) -> None:
        """Close the files."""
        self._part.cache_clear()
        self._head = None

    @contextmanager
    def teaching(self, batch: Batch, inputs: Inputs, layers: bool = True) -> Iterator[Taught]:
        """What is stored of a micro-batch."""
        has_target = (batch.labels != IGNORED).any(1)  # all have, or none on a rank without work
        found = [self._read(self.folder / _part(i), i % SAMPLES_PER_PART, str(i)) for i in batch.samples[has_target].tolist()]

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.zeros(0, dtype=dtype), *(words[name].to(dtype) for words in found)])

        if self._head is not None:
            hidden = torch.zeros(*inputs.ids.shape, self._head.weight.shape[1], device=self.device)
            if found:
                hidden[inputs.is_target] = torch.cat([words["hidden"] for words in found]).to(self.device).float()
            yield Taught(Outputs(hidden), self._head)
            return
        lengths = joined("lengths", torch.int64)
        slot = torch.arange(max(lengths.tolist(), default=1)) < lengths[:, None]
        ids = torch.zeros(slot.shape, dtype=torch.int64).masked_scatter(slot, joined("ids", torch.int64))
        shares = torch.zeros(slot.shape).masked_scatter(slot, joined("shares", torch.float32))
        yield Taught(ids=ids.to(self.device), shares=shares.to(self.device))

    def _read(self, path: Path, place: int, key: str) -> Words:
        """An entry of a file, checked."""
        try:
            part = self._part(path)
            start, end = part["ends"][place].tolist(), part["ends"][place + 1].tolist()
            names = sorted(part.keys() - {"ends", "digests"})
            words = {name: part[name][start[i] : end[i]] for i, name in enumerate(names)}
            sound = part["digests"][place].item() == _digest(f"{path.parent.name}/{key}", words)
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:  # whatever a damaged header leads to
            raise self._damaged(path, error) from None
        if not sound:
            raise self._damaged(path, f"{key} does not match its checksum")
        return words

    def _damaged(self, path: Path, why: Any) -> DataError:
        return DataError(f"{path} is damaged ({why}). Delete it and run `{self._command}`, which makes it again.")


def _part(sample: int) -> str:
    """Name of the file that holds a sample."""
    return f"part-{sample // SAMPLES_PER_PART:05d}.safetensors"


def _write(path: Path, entries: dict[str, Words]) -> None:
    """A file of entries with the same names: each name's tensors joined, where they end (by sorted name), and a checksum per entry."""
    names = sorted(next(iter(entries.values())))
    ends = torch.tensor([[0] * len(names), *([len(words[name]) for name in names] for words in entries.values())]).cumsum(0)
    digests = torch.tensor([_digest(f"{path.parent.name}/{key}", words) for key, words in entries.items()])
    part = {name: torch.cat([words[name] for words in entries.values()]) for name in names}
    with writing(path):
        write_whole(path, [save({**part, "ends": ends, "digests": digests})])


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: their bytes are read when they are used."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _digest(about: str, words: Words) -> int:
    """Of an entry of a file; `about` names the folder and the entry, so that files cannot be confused either."""
    result = xxhash.xxh3_64(about.encode())
    for name, tensor in sorted(words.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return result.intdigest() >> 1
