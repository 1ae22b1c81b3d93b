"""Writing checkpoints beside training."""

import json
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dqtrain.checkpoint.index import FORMAT, Index, complete_names, name_of, persistent_buffers, rank_file
from dqtrain.engine import StudentEngine
from dqtrain.errors import CheckpointError
from dqtrain.files import sync_path, write_text
from dqtrain.tensor_file import write_tensors
from dqtrain.world import World, broadcast_object, first_problem, gather_objects

SHARED_DISK_S = 60.0
"""Seconds after which what another rank has written must be visible to rank 0."""


_POLL_S = 0.01


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
        files = {rank_file(self.world.rank): own if engine.on_disk else self._copy(own)} | (
            {"buffers.safetensors": self._copy(buffers)} if self.world.rank == 0 else {}
        )
        if any(value.is_cuda for value in (*own.values(), *buffers.values())):
            torch.cuda.synchronize()
        about = {"pieces": {f.name: (f.start, f.numel, f.total, f.shape) for f in fragments}, "optimizer_step_count": engine.optimizer_step_count()}
        snapshot = _Snapshot(step, files, about, state, time.monotonic() - started, engine if engine.on_disk else None)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=name_of(step), daemon=True)
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
        return self.root / f".tmp-{name_of(self._step)}"

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
        partial, final = self._partial(), self.root / name_of(snapshot.step)
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
        kept = {name_of(best["step"])} if best is not None else set()
        old = {name for name in complete_names(self.root)[: -self.keep_last] if self.keep_every is None or int(name.removeprefix("step-")) % self.keep_every}
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
            kept = complete_names(self.root)
            last = f"The last complete checkpoint is {self.root / kept[-1]}" if kept else "There is no earlier checkpoint"
            what = f"{self.root / name_of(self._step)}: could not be saved ({problem})"
            message = f"{what}. {last}; free space in {self.root}, then `dqtrain resume {self.root.parent}`."
        raise CheckpointError(broadcast_object(message))


def _reader_of(tensors: dict[str, Tensor], engine: StudentEngine | None) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        if engine is not None:
            engine.release()  # the tensor before it
        return tensors[name].cpu()

    return read


def _write_json(path: Path, content: Any, indent: int | None = None) -> tuple[int, str]:
    text = json.dumps(content, indent=indent)
    write_text(path, text)
    return len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode())
