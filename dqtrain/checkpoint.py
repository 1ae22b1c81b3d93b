"""Checkpoints that are complete or absent, written as fragments that any world size and ZeRO stage can read.

    checkpoints/step-000000010/   rank-00000.safetensors ...   the pieces of weights and moments that each rank owned
                                  buffers.safetensors          what every rank holds alike: the contrastive bank
                                  state.json                   step, best validation loss, values not yet logged, config
                                  MANIFEST.json                size and hash of every file above
    checkpoints/LATEST            name of the newest one, for people; loading trusts manifests alone

Everything is written into `.tmp-step-...`, synced, and renamed once all ranks are done: a kill at any moment leaves the
older checkpoints and no broken new one. A loader finds the intervals it needs by parameter name and offset. No pickle.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dqtrain.config import PASSIVE, RunConfig, differences, validate
from dqtrain.engine import StudentEngine
from dqtrain.errors import CheckpointError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.world import broadcast_object, gather_objects

FORMAT = 1


def _name(step: int) -> str:
    return f"step-{step:09d}"


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint, by name."""
    found = {}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _write_rank_files(folder: Path, rank: int, engine: StudentEngine, state: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Write and sync this rank's files; file -> (bytes, hash)."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for fragment in engine.fragments():
        pieces[fragment.name] = {"start": fragment.start, "numel": fragment.numel, "total": fragment.total, "shape": fragment.shape}
        tensors |= {f"{fragment.name}|{key}": value.cpu().contiguous() for key, value in fragment.tensors.items()}
    names = [f"rank-{rank:05d}.safetensors"]
    meta = {"pieces": pieces, "optimizer_step_count": engine.optimizer_step_count()}
    save_file(tensors, folder / names[0], metadata={"meta": json.dumps(meta)})
    if rank == 0:
        save_file({name: buffer.cpu().contiguous() for name, buffer in persistent_buffers(engine.module).items()}, folder / "buffers.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        names += ["buffers.safetensors", "state.json"]
    for name in names:
        sync_path(folder / name)
    return {name: ((folder / name).stat().st_size, digest(folder / name)) for name in names}


def save(root: Path, step: int, rank: int, engine: StudentEngine, state: dict[str, Any], keep_last: int) -> None:
    """Commit one checkpoint, then delete those beyond the newest `keep_last` and `state["best"]`. Collective.

    `state` is JSON and equal on all ranks. Raises CheckpointError on every rank when any rank cannot write; older checkpoints stay.
    """
    final, partial = root / _name(step), root / f".tmp-{_name(step)}"
    error: str | None = None
    if rank == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            for left in [*root.glob(".tmp-*"), *root.glob(".old-*")]:
                shutil.rmtree(left)
            partial.mkdir()
        except OSError as problem:
            error = str(problem)
    if (error := broadcast_object(error)) is None:
        files: dict[str, tuple[int, str]] = {}
        mine = None
        try:
            files = _write_rank_files(partial, rank, engine, state)
        except (OSError, SafetensorError) as problem:
            mine = f"rank {rank}: {problem}"
        results = gather_objects((mine, files))
        error = next((message for message, _ in results if message), None)
        if rank == 0 and error is None:
            try:
                manifest = {"format": FORMAT, "step": step, "world_size": len(results), "files": {k: v for _, part in results for k, v in part.items()}}
                write_text(partial / "MANIFEST.json", json.dumps(manifest, indent=1))
                if final.exists():
                    final.rename(root / f".old-{_name(step)}")
                partial.rename(final)
                sync_path(root)
                write_text(root / "LATEST", _name(step) + "\n")
                shutil.rmtree(root / f".old-{_name(step)}", ignore_errors=True)
            except OSError as problem:
                error = f"rank 0: {problem}"
        error = broadcast_object(error)
    if error is not None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = _complete_names(root)
        last = f"The last complete checkpoint is {root / kept[-1]}" if kept else "There is no earlier checkpoint"
        raise CheckpointError(f"{final}: could not be saved ({error}). {last}; free space in {root}, then `dqtrain resume {root.parent}`.")
    if rank == 0:
        best = state.get("best")
        for name in _complete_names(root)[:-keep_last]:
            if best is None or name != _name(best["step"]):
                (root / name).rename(root / f".old-{name}")
                shutil.rmtree(root / f".old-{name}")


def _complete_names(root: Path) -> list[str]:
    """Names of committed checkpoints, oldest first."""
    return sorted(path.name for path in root.glob("step-*")) if root.is_dir() else []


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing: every size and hash is compared with the manifest."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"MANIFEST.json has format {manifest['format']}, this dqtrain reads {FORMAT}"
        for name, (size, expected) in manifest["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, the manifest says {size}"
            if digest(folder / name) != expected:
                return f"{name} does not have the hash in the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # no file, no JSON, or JSON of another shape
        return f"{type(error).__name__}: {error}"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and one message for each newer one that is passed over.

    Raises CheckpointError when there are checkpoints but none is sound: starting from step 0 would be silent loss.
    """
    passed_over: list[str] = []
    for name in reversed(_complete_names(root)):
        problem = problem_with(root / name)
        if problem is None:
            return root / name, passed_over
        passed_over.append(f"{root / name} is damaged ({problem}); the checkpoint before it is used.")
    if passed_over:
        raise CheckpointError(f"{root}: no checkpoint is sound; the newest: {passed_over[0].split('; the checkpoint')[0]}. Start a new run in another run.dir.")
    return None, []


def newest_alone(root: Path) -> tuple[Path | None, list[str]]:
    """`newest`, after which it is the newest of all: damaged ones are renamed to `damaged-...`, so that retention does not count them."""
    folder, passed_over = newest(root)
    for name in _complete_names(root) if folder else []:
        if folder and name > folder.name:
            shutil.rmtree(root / f"damaged-{name}", ignore_errors=True)
            (root / name).rename(root / f"damaged-{name}")
    return folder, passed_over


def at_step(root: Path, step: int) -> Path:
    """The checkpoint of a step. Raises CheckpointError if it is missing or damaged."""
    folder = root / _name(step)
    problem = problem_with(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: cannot be used ({problem}). Restore it, or set export.checkpoint to the other of last and best.")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved."""
    return json.loads((folder / "state.json").read_text())


class _Pieces:
    """All fragments of a checkpoint, by parameter name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [safe_open(path, "pt") for path in sorted(folder.glob("rank-*.safetensors"))]
        metas = [json.loads(file.metadata()["meta"]) for file in self.files]
        self.optimizer_step_count = max(meta["optimizer_step_count"] for meta in metas)
        self.index: dict[str, list[tuple[dict[str, Any], Any]]] = {}
        for file, meta in zip(self.files, metas, strict=True):
            for name, piece in meta["pieces"].items():
                self.index.setdefault(name, []).append((piece, file))
        self.keys = sorted({key.rpartition("|")[2] for file in self.files for key in file.keys()})  # noqa: SIM118 - safe_open is no dict

    def fill(self, name: str, key: str, start: int, out: Tensor) -> None:
        """Copy elements start .. start + len(out) of a flattened parameter's tensor into `out`."""
        stop, filled = start + out.numel(), 0
        for piece, file in self.index.get(name, []):
            low, high = max(piece["start"], start), min(piece["start"] + piece["numel"], stop)
            if low < high:
                part = file.get_slice(f"{name}|{key}")[low - piece["start"] : high - piece["start"]]
                out[low - start : high - start].copy_(part)
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(
                f"{self.folder}: has {filled} of the {out.numel()} elements of {name} ({key}) that are needed; it was written by another model."
            )


def load(folder: Path, engine: StudentEngine) -> None:
    """Put a checkpoint's weights, moments and buffers into an engine of any world size and stage. Collective."""
    pieces = _Pieces(folder)
    engine.prepare_moments(pieces.optimizer_step_count)
    for fragment in engine.fragments():
        for key, tensor in fragment.tensors.items():
            if key == "fp32" or pieces.optimizer_step_count > 0:
                pieces.fill(fragment.name, key, fragment.start, tensor)
    engine.publish()
    saved = load_file(folder / "buffers.safetensors")
    for name, buffer in persistent_buffers(engine.module).items():
        if name not in saved or saved[name].shape != buffer.shape:
            raise CheckpointError(f"{folder}: has no buffer {name} of shape {tuple(buffer.shape)}; it was written by another model.")
        buffer.copy_(saved[name])


def weights(folder: Path, prefix: str = "student.model.") -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter whole, in fp32, one at a time, named as in its transformers model."""
    pieces = _Pieces(folder)
    for name, found in pieces.index.items():
        whole = torch.empty(found[0][0]["total"])
        pieces.fill(name, "fp32", 0, whole)
        yield name.removeprefix(prefix), whole.view(found[0][0]["shape"])


def fill(model: nn.Module, folder: Path, prefix: str = "student.model.") -> dict[str, Tensor]:
    """Put a checkpoint's weights and buffers into a model on this process, one tensor at a time; what the model has no place for, by name.

    Raises CheckpointError when the checkpoint lacks one of the model's parameters or holds another shape.
    """
    places = dict(model.named_parameters()) | persistent_buffers(model)
    missing, left_over = set(places), {}
    saved = {name.removeprefix(prefix): value for name, value in load_file(folder / "buffers.safetensors").items() if name.startswith(prefix)}
    with torch.no_grad():
        for name, value in itertools.chain(weights(folder, prefix), saved.items()):
            if name not in places:
                left_over[name] = value
                continue
            if places[name].shape != value.shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(value.shape)}, the model's is {tuple(places[name].shape)}; it was written by another model."
                )
            places[name].copy_(value)
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: lacks {len(missing)} of the model's tensors, such as {min(missing)}; it was written by another model.")
    return left_over


def require_same_config(folder: Path, saved: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError, with the list, when a checkpoint was written under a config that trains something else."""
    changes = differences(validate(saved, str(folder / "state.json")), config)
    fatal = [f"{key}: {json.dumps(old)} there, {json.dumps(new)} here" for key, (old, new) in changes.items() if key not in PASSIVE]
    if fatal:
        raise CheckpointError(
            f"{folder}: was written with another config ({'; '.join(fatal)}). Restore these values, or start a new run with student.init_from."
        )
