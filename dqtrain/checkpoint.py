"""Checkpoints that are complete or absent, written by a thread as fragments that any world size and ZeRO stage can read.

    checkpoints/step-000000010/   rank-00000.safetensors ...   NAME|fp32, NAME|exp_avg, NAME|exp_avg_sq: the pieces that each rank owned
                                  buffers.safetensors          what every rank holds alike: the contrastive bank
                                  index.json                   which rank's file holds which elements of which parameter
                                  state.json                   step, best validation loss, values not yet logged, config, versions
                                  MANIFEST.json                size and hash of every file above
    checkpoints/LATEST            name of the newest one, for people; loading trusts manifests alone

Everything is written into `.tmp-step-...`, synced, and renamed once all ranks are done: a kill at any moment leaves the
older checkpoints and no broken new one. A loader finds the intervals it needs by parameter name and offset. No pickle.
"""

import bisect
import functools
import itertools
import json
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor, nn

from dqtrain.config import PASSIVE, RunConfig, differences, validate
from dqtrain.engine import Fragment, StudentEngine
from dqtrain.errors import CheckpointError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.models import Reader, by_names, meta_model, readers_of
from dqtrain.quant.modules import is_learned_scale
from dqtrain.tensor_file import Layout, MappedFiles, num_bytes, write_model_files, write_tensors
from dqtrain.world import World, broadcast_object, first_problem, gather_objects

FORMAT = 2

SHARED_DISK_S = 60.0
"""Seconds after which what another rank has written must be visible to rank 0."""

_POLL_S = 0.01
_BLOCK_ELEMENTS = 1 << 24
_PREFIX = "student.model."
"""What stands before the names of a transformers model in those of the trained module."""


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint, by name."""
    found = {}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


# --- files


def _write_json(path: Path, content: Any, indent: int | None = None) -> tuple[int, str]:
    text = json.dumps(content, indent=indent)
    write_text(path, text)
    return len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode())


class Part(NamedTuple):
    """Elements of a parameter that are asked for and that a rank's file has."""

    rank: int
    offset: int  # in the rank's piece
    start: int  # in what is asked for
    numel: int


def _first_element(piece: Sequence[int]) -> int:
    return piece[1]


class Index:
    """Which rank's file holds which elements of which parameter, and how often the optimizer has stepped."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.optimizer_step_count: int = content["optimizer_step_count"]
        self.parameters: dict[str, dict[str, Any]] = content["parameters"]
        """name -> total (elements), shape, pieces: [rank, first element, elements] each, in the order of their elements."""

    @classmethod
    def join(cls, pieces: Iterable[Mapping[str, tuple[int, int, int, Sequence[int]]]], optimizer_step_count: int) -> "Index":
        """From what each rank owns, in the order of the ranks: name -> (first element, elements, elements of the parameter, its shape)."""
        parameters: dict[str, dict[str, Any]] = {}
        for rank, own in enumerate(pieces):
            for name, (start, numel, total, shape) in own.items():
                parameters.setdefault(name, {"total": total, "shape": list(shape), "pieces": []})["pieces"].append([rank, start, numel])
        for parameter in parameters.values():
            parameter["pieces"].sort(key=_first_element)
        return cls({"optimizer_step_count": optimizer_step_count, "parameters": parameters})

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """That of a checkpoint."""
        return cls(json.loads((folder / "index.json").read_text()))

    def parts(self, name: str, start: int, numel: int) -> Iterator[Part]:
        """Where elements start .. start + numel of a flattened parameter are; nothing for an unknown one."""
        pieces = self.parameters[name]["pieces"] if name in self.parameters else []
        before = bisect.bisect_right(pieces, start, key=_first_element) - 1
        for rank, first, length in itertools.islice(pieces, max(before, 0), None):
            if first >= start + numel:
                break
            low, high = max(first, start), min(first + length, start + numel)
            if low < high:
                yield Part(rank, low - first, low - start, high - low)

    def ranks(self, wanted: Iterable[tuple[str, int, int]]) -> set[int]:
        """Whose files hold any of the elements (name, start, numel)."""
        return {part.rank for interval in wanted for part in self.parts(*interval)}

    def holders(self) -> set[int]:
        """Whose files hold anything."""
        return {rank for parameter in self.parameters.values() for rank, _, _ in parameter["pieces"]}


# --- writing


@dataclass(frozen=True)
class _Snapshot:
    """What a rank's thread writes: copies that training does not touch."""

    step: int
    files: dict[str, dict[str, Tensor]]
    about: dict[str, Any]  # pieces and step count, for the index
    state: dict[str, Any]
    stall_s: float
    engine: StudentEngine | None  # whose files are written as they are, while training waits


class Saver:
    """Writes a run's checkpoints by a thread while training goes on, one at a time; what is on a local disk, too much for a copy, while training waits.

    Only `save` and `wait` are collective. The threads meet through files alone: a collective would interleave with those of training.
    """

    def __init__(self, root: Path, world: World, keep_last: int, keep_every: int | None = None, event: Callable[..., None] | None = None) -> None:
        """The newest `keep_last` are kept, `state["best"]`, and those of steps that `keep_every` divides.

        Rank 0's thread calls `event("checkpoint", step=, stall_s=, write_s=, bytes=)` when one is complete: seconds that rank 0's training stood still,
        seconds until the checkpoint was visible, bytes of all files; and `event("not_deleted", checkpoint=, problem=)` when an old one resists.
        """
        self.root, self.world, self.keep_last, self.keep_every, self.event = root, world, keep_last, keep_every, event
        self._host: dict[str, Tensor] = {}
        self._step = 0
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._give_up_at = math.inf

    @property
    def failed(self) -> bool:
        """Whether this rank has failed to write its part of the save in flight; `wait` then raises. No collective."""
        return self._error is not None

    def save(self, step: int, engine: StudentEngine, state: dict[str, Any]) -> None:
        """Copy this rank's part and start to write it, after the save before. Collective.

        `state` is JSON and equal on all ranks. Raises CheckpointError on every rank when the save before failed, or when the disk is too full for this one.
        """
        started = time.monotonic()
        self.wait()
        self._step, self._give_up_at = step, math.inf
        fragments = list(engine.fragments())
        own = {f"{fragment.name}|{key}": value for fragment in fragments for key, value in fragment.tensors.items()}
        buffers = persistent_buffers(engine.module) if self.world.rank == 0 else {}
        num_bytes = sum(gather_objects(sum(value.nbytes for value in (*own.values(), *buffers.values()))))
        self._raise_if(broadcast_object(self._prepare(num_bytes) if self.world.rank == 0 else None))
        files = {_rank_file(self.world.rank): own if engine.on_disk else self._copy(own)} | (
            {"buffers.safetensors": self._copy(buffers)} if self.world.rank == 0 else {}
        )
        if any(value.is_cuda for value in (*own.values(), *buffers.values())):
            torch.cuda.synchronize()
        about = {"pieces": {f.name: (f.start, f.numel, f.total, f.shape) for f in fragments}, "optimizer_step_count": engine.optimizer_step_count()}
        snapshot = _Snapshot(step, files, about, state, time.monotonic() - started, engine if engine.on_disk else None)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=_name(step), daemon=True)
        self._thread.start()
        if engine.on_disk:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight, if there is one, is complete. Collective. Raises CheckpointError on every rank when any rank could not write."""
        if self._thread is None:
            return
        if self.world.rank != 0:
            self._thread.join()
        problem = first_problem(self._error)
        # All other threads have ended: what they wrote is there, or rank 0's would wait for it in vain.
        self._give_up_at = time.monotonic() + (0 if problem else SHARED_DISK_S)
        self._thread.join()
        problem = broadcast_object(problem or self._error)
        self._thread = self._error = None
        self._raise_if(problem)

    def close(self) -> None:
        """`wait`, and give back the memory of the copies. Collective."""
        self.wait()
        self._host.clear()

    def _partial(self) -> Path:
        return self.root / f".tmp-{_name(self._step)}"

    def _prepare(self, num_bytes: int) -> str | None:
        """Clear what dead runs left and make room; what is wrong, if anything."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for left in self.root.glob(".tmp-*"):  # an old done-*.json would be taken for a new one
                shutil.rmtree(left)
            for old in self.root.glob(".old-*"):  # what a kill left half deleted may take the room of a whole checkpoint
                shutil.rmtree(old, ignore_errors=True)
            free = shutil.disk_usage(self.root).free
            if num_bytes > free:
                return f"No space left on device: it takes {num_bytes:,} bytes, but {free:,} are free"
            self._partial().mkdir()
        except OSError as error:
            return str(error)
        return None

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which is kept for the next ones: fresh pages would cost more than the copying."""
        for name, value in tensors.items():
            if name not in self._host or self._host[name].shape != value.shape:
                self._host[name] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format, pin_memory=value.is_cuda)
            self._host[name].copy_(value, non_blocking=True)
        return {name: self._host[name] for name in tensors}

    def _write(self, snapshot: _Snapshot) -> None:
        """The thread: no collective here."""
        started, partial = time.monotonic(), self._partial()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            files = {
                name: write_tensors(partial / name, {key: (value.dtype, value.shape) for key, value in tensors.items()}, _reader_of(tensors, snapshot.engine))
                for name, tensors in snapshot.files.items()
            }
            write_text(partial / f"done-{self.world.rank:05d}.json", json.dumps({"files": files, **snapshot.about}))
            if self.world.rank == 0:
                num_bytes = self._commit(snapshot)
                write_s = time.monotonic() - started
                stall_s = snapshot.stall_s + (write_s if snapshot.engine is not None else 0.0)
                self._tell("checkpoint", step=snapshot.step, stall_s=round(stall_s, 4), write_s=round(write_s, 4), bytes=num_bytes)
                self._forget(snapshot.state.get("best"))
        except OSError as error:
            self._error = f"rank {self.world.rank}: {error}"
        except Exception:  # a mistake of ours: the main threads must hear of it, or they would wait for ever
            self._error = f"rank {self.world.rank}: {traceback.format_exc()}"

    def _commit(self, snapshot: _Snapshot) -> int:
        """Wait for the other ranks' files, and make the checkpoint visible; bytes of all files. Raises OSError."""
        partial, final = self._partial(), self.root / _name(snapshot.step)
        done = [f"done-{rank:05d}.json" for rank in range(self.world.world_size)]
        while missing := set(done).difference(os.listdir(partial)):
            if time.monotonic() > self._give_up_at:
                raise OSError(f"{partial} has no {min(missing)}, which that rank has written; run.dir must be on a disk that all ranks share")
            time.sleep(_POLL_S)
        reports = [json.loads((partial / name).read_text()) for name in done]
        for name in done:
            (partial / name).unlink()
        files = {name: entry for report in reports for name, entry in report["files"].items()}
        index = Index.join((report["pieces"] for report in reports), max(report["optimizer_step_count"] for report in reports))
        files["index.json"] = _write_json(partial / "index.json", index.content)
        versions = {name: version(name) for name in ("dqtrain", "torch", "deepspeed", "transformers")}
        files["state.json"] = _write_json(partial / "state.json", {**snapshot.state, "versions": versions}, indent=1)
        manifest = {"format": FORMAT, "step": snapshot.step, "world_size": self.world.world_size, "files": files}
        _write_json(partial / "MANIFEST.json", manifest, indent=1)
        if final.exists():
            final.rename(self.root / f".old-{final.name}")
        partial.rename(final)
        sync_path(self.root)
        write_text(self.root / "LATEST", final.name + "\n")
        shutil.rmtree(self.root / f".old-{final.name}", ignore_errors=True)
        return sum(size for size, _ in files.values())

    def _tell(self, kind: str, **fields: Any) -> None:
        if self.event is not None:
            self.event(kind, **fields)

    def _forget(self, best: dict[str, Any] | None) -> None:
        """Delete the checkpoints that are not to be kept; one that resists is tried again after the next save."""
        kept = {_name(best["step"])} if best is not None else set()
        old = {name for name in _complete_names(self.root)[: -self.keep_last] if self.keep_every is None or int(name.removeprefix("step-")) % self.keep_every}
        left = {path.name.removeprefix(".old-") for path in self.root.glob(".old-*")}
        for name in sorted(old - kept | left):
            try:
                if name in old - kept:
                    (self.root / name).rename(self.root / f".old-{name}")
                shutil.rmtree(self.root / f".old-{name}")
            except OSError as error:
                self._tell("not_deleted", checkpoint=name, problem=str(error))

    def _raise_if(self, problem: str | None) -> None:
        """Raise CheckpointError for a problem that all ranks know of. Collective."""
        if problem is None:
            return
        message = ""
        if self.world.rank == 0:
            shutil.rmtree(self._partial(), ignore_errors=True)
            kept = _complete_names(self.root)
            last = f"The last complete checkpoint is {self.root / kept[-1]}" if kept else "There is no earlier checkpoint"
            what = f"{self.root / _name(self._step)}: could not be saved ({problem})"
            message = f"{what}. {last}; free space in {self.root}, then `dqtrain resume {self.root.parent}`."
        raise CheckpointError(broadcast_object(message))


def _reader_of(tensors: dict[str, Tensor], engine: StudentEngine | None) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        if engine is not None:
            engine.release()  # the tensor before it
        return tensors[name].cpu()

    return read


# --- finding


def _complete_names(root: Path) -> list[str]:
    """Names of committed checkpoints, oldest first."""
    return sorted(path.name for path in root.glob("step-*")) if root.is_dir() else []


Files = dict[str, tuple[int, str]]
"""File -> (bytes, hash), as a manifest has them."""


def _problem(folder: Path, check: Callable[[Files], str | None]) -> str | None:
    """What `check` says of the files in a checkpoint's manifest, or why that cannot be said. Raises OSError for files that are there but cannot be read now."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"MANIFEST.json has format {manifest['format']}, this dqtrain reads {FORMAT}"
        return check(manifest["files"])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        # No file, no JSON, or JSON of another shape. A disk that fails or forbids is no damage: the checkpoint may be sound, and must not be passed over.
        return f"{type(error).__name__}: {error}"


def _wrong_size(folder: Path, files: Files) -> str | None:
    for name, (size, _) in files.items():
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, the manifest says {size}"
    return None


def _wrong_hash(folder: Path, files: Files, names: Iterable[str]) -> str | None:
    damaged = next((name for name in names if digest(folder / name) != files[name][1]), None)
    return None if damaged is None else f"{damaged} does not have the hash in the manifest"


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing: every size and hash is compared with the manifest."""
    return _problem(folder, lambda files: _wrong_size(folder, files) or _wrong_hash(folder, files, files))


def _newest(root: Path, names: Sequence[str], problem_with: Callable[[Path], str | None]) -> tuple[Path | None, list[str]]:
    passed_over: list[str] = []
    for name in reversed(names):
        problem = problem_with(root / name)
        if problem is None:
            return root / name, passed_over
        passed_over.append(f"{root / name} is damaged ({problem}); the checkpoint before it is used.")
    if passed_over:
        raise CheckpointError(f"{root}: no checkpoint is sound; the newest: {passed_over[0].split('; the checkpoint')[0]}. Start a new run in another run.dir.")
    return None, []


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and one message for each newer one that is passed over.

    Raises CheckpointError when there are checkpoints but none is sound: starting from step 0 would be silent loss.
    """
    return _newest(root, _complete_names(root), problem_with)


def agree_on_newest(root: Path, engine: StudentEngine, world: World) -> tuple[Path | None, list[str]]:
    """`newest` for an engine: rank 0 compares sizes, each rank the hashes of what it will read. Collective; every rank gets, or raises, the same.

    After it the folder is the newest of all: damaged ones are renamed to `damaged-...`, so that retention does not count them.
    """
    wanted = [(fragment.name, fragment.start, fragment.numel) for fragment in engine.fragments()]

    def problem_with(folder: Path) -> str | None:
        problem = _problem(folder, lambda files: _wrong_size(folder, files)) if world.rank == 0 else None
        return broadcast_object(problem) or first_problem(_problem(folder, lambda files: _wrong_in_share(folder, files, wanted, world)))

    names = broadcast_object(_complete_names(root))
    folder, passed_over = _newest(root, names, problem_with)
    if folder is not None and world.rank == 0:
        for name in (name for name in names if name > folder.name):
            shutil.rmtree(root / f"damaged-{name}", ignore_errors=True)
            (root / name).rename(root / f"damaged-{name}")
    return folder, passed_over


def _wrong_in_share(folder: Path, files: Files, wanted: Iterable[tuple[str, int, int]], world: World) -> str | None:
    """Damage in the files that this rank reads for (name, start, numel); those that nobody reads are shared out."""
    problem = _wrong_hash(folder, files, [name for name in files if not name.startswith("rank-")])
    if problem is not None:
        return problem
    index = Index.read(folder)
    written = {int(name.removeprefix("rank-").removesuffix(".safetensors")) for name in files if name.startswith("rank-")}
    idle = {rank for rank in written - index.holders() if rank % world.world_size == world.rank}
    return _wrong_hash(folder, files, [_rank_file(rank) for rank in sorted(index.ranks(wanted) | idle)])


def at_step(root: Path, step: int) -> Path:
    """The checkpoint of a step. Raises CheckpointError if it is missing or damaged."""
    folder = root / _name(step)
    problem = problem_with(folder)
    if problem is not None:
        others = ", ".join(name for name in _complete_names(root) if name != folder.name) or "none"
        raise CheckpointError(f"{folder}: cannot be used ({problem}). Restore it, or use another one; there are: {others}.")
    return folder


# --- reading


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved, and `versions`."""
    return json.loads((folder / "state.json").read_text())


class _Pieces:
    """The tensors of a checkpoint, read from whichever ranks' files hold them; a file is opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, Index.read(folder)
        self._files = MappedFiles()

    def close(self) -> None:
        """Take the pages of the files out of memory; they are opened again when they are needed."""
        self._files.close()

    def fill(self, name: str, key: str, start: int, out: Tensor) -> None:
        """Copy elements start .. start + len(out) of a flattened parameter's tensor into `out`."""
        filled = 0
        for part in self.index.parts(name, start, out.numel()):
            for done in range(0, part.numel, _BLOCK_ELEMENTS):
                numel = min(_BLOCK_ELEMENTS, part.numel - done)
                first = part.offset + done
                piece = self._files.read_part(self.folder / _rank_file(part.rank), f"{name}|{key}", first, first + numel)
                out[part.start + done : part.start + done + numel].copy_(piece)
            filled += part.numel
        if filled != out.numel():
            raise CheckpointError(
                f"{self.folder}: has {filled} of the {out.numel()} elements of {name} ({key}) that are needed; it was written by another model."
            )

    def whole(self, name: str) -> Tensor:
        """A parameter in fp32."""
        parameter = self.index.parameters[name]
        out = torch.empty(parameter["total"])
        self.fill(name, "fp32", 0, out)
        return out.view(parameter["shape"])


def load(folder: Path, engine: StudentEngine) -> None:
    """Put a sound checkpoint's weights, moments and buffers into an engine of any world size and stage. Collective.

    Raises CheckpointError, on every rank, when it was written by another model.
    """
    pieces, saved = _Pieces(folder), load_file(folder / "buffers.safetensors")
    engine.prepare_moments(pieces.index.optimizer_step_count)
    problem = None
    try:
        for fragment in engine.fragments():
            _fill_fragment(pieces, fragment)
            if engine.on_disk:
                pieces.close()
                engine.release()
        for name, buffer in persistent_buffers(engine.module).items():
            if name not in saved or saved[name].shape != buffer.shape:
                raise CheckpointError(f"{folder}: has no buffer {name} of shape {tuple(buffer.shape)}; it was written by another model.")
            buffer.copy_(saved[name])
    except CheckpointError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise CheckpointError(problem)
    engine.publish()


def _fill_fragment(pieces: _Pieces, fragment: Fragment) -> None:
    for key, tensor in fragment.tensors.items():
        if key == "fp32" or pieces.index.optimizer_step_count > 0:
            pieces.fill(fragment.name, key, fragment.start, tensor)


def weights(folder: Path, prefix: str = _PREFIX) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter whole, in fp32, one at a time, named as in its transformers model."""
    pieces = _Pieces(folder)
    for name in pieces.index.parameters:
        yield name.removeprefix(prefix), pieces.whole(name)


def _buffers_of_model(folder: Path, prefix: str) -> dict[str, Tensor]:
    saved = load_file(folder / "buffers.safetensors")
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


def readers(folder: Path, model: nn.Module, prefix: str = _PREFIX) -> dict[str, Reader]:
    """Readers of every trained parameter and buffer, by each name that `model` has for it: for `engine.materialise`. Learned scales by theirs."""
    pieces = _Pieces(folder)
    found: dict[str, Reader] = {name.removeprefix(prefix): functools.partial(pieces.fill, name, "fp32") for name in pieces.index.parameters}
    found |= readers_of(_buffers_of_model(folder, prefix))
    for names, _ in by_names(model):
        known = next((name for name in names if name in found), None)
        if known is not None:
            found |= dict.fromkeys(names, found[known])
    return found


def fill(model: nn.Module, folder: Path, prefix: str = _PREFIX) -> dict[str, Tensor]:
    """Put a checkpoint's weights and buffers into a model on this process, one tensor at a time; what the model has no place for, by name.

    Raises CheckpointError when the checkpoint lacks one of the model's parameters or holds another shape.
    """
    places = dict(model.named_parameters()) | persistent_buffers(model)
    found, left_over = set(), {}
    with torch.no_grad():
        for name, value in itertools.chain(weights(folder, prefix), _buffers_of_model(folder, prefix).items()):
            if name not in places:
                left_over[name] = value
                continue
            _require_shape(folder, name, value.shape, places[name].shape)
            places[name].copy_(value)
            found.add(name)
    _require_all(folder, places, found)
    return left_over


def require_fits(folder: Path, model: nn.Module, prefix: str = _PREFIX, is_spare: Callable[[str], bool] = lambda name: False) -> None:
    """Raise CheckpointError unless a checkpoint holds a model's parameters and persistent buffers in their shapes, and no others but what `is_spare`."""
    places = dict(model.named_parameters()) | persistent_buffers(model)
    shapes: dict[str, Sequence[int]] = {name.removeprefix(prefix): parameter["shape"] for name, parameter in Index.read(folder).parameters.items()}
    shapes |= {name: value.shape for name, value in _buffers_of_model(folder, prefix).items()}
    strange = sorted(name for name in shapes if name not in places and not is_spare(name))
    if strange:
        raise CheckpointError(f"{folder}: has {strange[0]}, which the model has no place for; it was written by another model.")
    _require_all(folder, places, shapes)
    for name, place in places.items():
        _require_shape(folder, name, shapes[name], place.shape)


def _require_shape(folder: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(found)}, the model's is {tuple(expected)}; it was written by another model.")


def _require_all(folder: Path, places: Iterable[str], found: Collection[str]) -> None:
    missing = sorted(name for name in places if name not in found)
    if missing:
        raise CheckpointError(f"{folder}: lacks {len(missing)} of the model's tensors, such as {missing[0]}; it was written by another model.")


def write_model(folder: Path, student: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a sound checkpoint's latent weights as a Hugging Face directory, in fp32 or bf16, with one tensor in memory at a time and without a GPU.

    `student` holds what a model has but its weights (`RunDir.student`). A quantized student's latent weights are those *before* fake quantization: a float
    model to look at or to train on. Its learned scales, which a float model has no place for, are left out; the packed artifact has what was trained. Tied
    weights are stored once. Raises CheckpointError when `out` exists, when it cannot be written, and for another model.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists, and nothing is overwritten. Give another directory, or remove it.")
    model = meta_model(student)
    require_fits(folder, model, is_spare=is_learned_scale)
    pieces, buffers = _Pieces(folder), _buffers_of_model(folder, _PREFIX)
    places = dict(model.named_parameters()) | persistent_buffers(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in places:
            value = buffers[name] if name in buffers else pieces.whole(_PREFIX + name)
            yield name, value.to(layout[name][0])

    layout: Layout = {name: (dtype if place.is_floating_point() else place.dtype, place.shape) for name, place in places.items()}
    partial = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in student.iterdir():
            shutil.copy(file, partial)
        config = json.loads((student / "config.json").read_text())
        write_text(partial / "config.json", json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2))  # transformers loads in this one
        write_model_files(partial, layout, tensors())
        for path in partial.iterdir():
            sync_path(path)
        partial.rename(out)
        sync_path(out.parent)
    except OSError as error:
        total = sum(num_bytes(*tensor) for tensor in layout.values())
        raise CheckpointError(f"{out}: could not be written ({error}). It takes {total:,} bytes; free space there, then try again.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_same_config(folder: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError, with the list, when a checkpoint with this state was written under a config that trains something else."""
    saved = validate(state["config"], str(folder / "state.json"))
    changes = {key: change for key, change in differences(saved, config).items() if key not in PASSIVE}
    before, now = ([stage.model_dump() for stage in data.mixture if stage.from_step < state["step"]] for data in (saved.data, config.data))
    if before != now:
        changes["data.mixture"] = before, now
    if changes:
        listed = "; ".join(f"{key}: {json.dumps(old)} there, {json.dumps(new)} here" for key, (old, new) in changes.items())
        raise CheckpointError(f"{folder}: was written with another config ({listed}). Restore these values, or start a new run with student.init_from.")
