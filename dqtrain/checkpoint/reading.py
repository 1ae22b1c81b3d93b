"""Sound checkpoints into engines of any world size and stage, into models, and out as whole weights."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dqtrain.checkpoint.index import Index, persistent_buffers, rank_file
from dqtrain.config import PASSIVE, RunConfig, differences, validate
from dqtrain.engine import Fragment, StudentEngine
from dqtrain.errors import CheckpointError
from dqtrain.files import sync_path, write_text
from dqtrain.models.making import meta_model
from dqtrain.models.weights import Reader, by_names, readers_of
from dqtrain.quant.modules import is_learned_scale
from dqtrain.tensor_file import Layout, MappedFiles, num_bytes, write_model_files
from dqtrain.world import first_problem

_PREFIX = "student.model."
"""What stands before the names of a transformers model in those of the trained module."""


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
            self._files.fill(self.folder / rank_file(part.rank), f"{name}|{key}", part.offset, out[part.start : part.start + part.numel])
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


def require_fits(folder: Path, model: nn.Module, is_spare: Callable[[str], bool] = lambda name: False) -> None:
    """Raise CheckpointError unless a checkpoint holds a model's parameters and persistent buffers in their shapes, and no others but what `is_spare`."""
    places = dict(model.named_parameters()) | persistent_buffers(model)
    shapes: dict[str, Sequence[int]] = {name.removeprefix(_PREFIX): parameter["shape"] for name, parameter in Index.read(folder).parameters.items()}
    shapes |= {name: value.shape for name, value in _buffers_of_model(folder, _PREFIX).items()}
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
