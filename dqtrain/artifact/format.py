"""The packed artifact: integer codes, their scales, and what is needed to read them; nothing else holds the model.

    model.safetensors   NAME             uint8, flat, as many codes to a byte as fit (`quant.pack`): 5 ternary ones, 1.6 bits each
                        NAME.scale       real units per code, flat; float16 where the grid is portable, which holds it exactly
                        NAME.zero_point  codes, int8, of the affine grids
                        NAME             what stays float, fp32, or bf16 where training rounded it; buffers that are not zero
                        over 5 GB in parts and with an index, as transformers names them
    artifact.json       format version, bytes and hashes of the files above, shape and grid of every matrix, sizes, figures of the proof, a hash of itself (`description`)
    parity.json         all that `parity.verify_packed` found before the artifact was published
    README.md           the model card (`card`)
    config.json         as transformers writes it, and a quantization_config that names dqtrain (`pretrained`)
    tokenizer files     as transformers writes them

Codes have the names of the float model's matrices, but one dimension: a loader that knows nothing of dqtrain then stops at their shapes, where
it would draw random weights for names that it misses.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.artifact import description
from dqtrain.artifact.size import float_part, layout_of
from dqtrain.errors import CheckpointError
from dqtrain.files import write_text
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import Coverage, QuantizedParameter, float_bytes, quantized_parameters, values_of
from dqtrain.quant.pack import pack, packed_bytes, unpack
from dqtrain.tensor_file import Layout, MappedFiles, write_model_files


@torch.no_grad()
def write(model: PreTrainedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write a quantized model's codes and scales and artifact.json into an existing folder, one weight at a time; its parameters may be in files. Raises OSError.

    `about` is what artifact.json says besides, among it, under `coverage`, the rows of `Coverage.to_json`.
    """
    layout = layout_of(Coverage.from_json(json.dumps(about["coverage"])), float_part(model))
    files = write_model_files(folder, layout, _tensors(model, layout))
    write_text(folder / "artifact.json", description.describe(files, float_bytes(model), about))


def add_parity(folder: Path, figures: Mapping[str, float]) -> None:
    """Write figures of `description.PARITY` into the artifact.json of an artifact that was proven. Raises OSError."""
    path = folder / "artifact.json"
    write_text(path, description.with_parity(path.read_text(), figures))


def _tensors(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """What is stored, weight by weight."""
    state = model.state_dict(keep_vars=True)
    quantized = {parameter.name: parameter for parameter in quantized_parameters(model)}
    for parameter in quantized.values():
        yield from _in_codes(parameter).items()
    for name in layout:
        if name in state and name not in quantized:
            yield name, values_of(state[name]).to(layout[name][0])


def _in_codes(parameter: QuantizedParameter) -> dict[str, Tensor]:
    name, quantizer = parameter.name, parameter.quantizer
    weight, scales = parameter.read()
    codes = quantizer.quantize(weight, scales)
    del weight  # what follows takes as much
    stored = {name: pack(codes, quantizer.levels), f"{name}.scale": scales.scale.to(torch.float16) if quantizer.portable else scales.scale}
    return stored if scales.zero_point is None else stored | {f"{name}.zero_point": scales.zero_point.to(torch.int8)}


def read_description(folder: Path) -> dict[str, Any]:
    """artifact.json, after it, the files that it lists and those of the folder's own list were held against their hashes.

    Raises CheckpointError for anything damaged or of another version.
    """
    path = folder / "artifact.json"
    about = description.read(description.read_sealed(path, description.FORMAT))
    description.check_files(path, about["weights"])
    description.check_if_listed(folder)
    return about


def keys_of(name: str, quantizer: WeightQuantizer) -> list[str]:
    """Under which a weight's codes, scales and, on affine grids, zero points are stored."""
    return [name, f"{name}.scale"] + [f"{name}.zero_point"] * quantizer.has_zero_points


class Stored(NamedTuple):
    """One weight's tensors in the file."""

    packed: Tensor
    scale: Tensor  # fp16 or fp32
    zero_point: Tensor | None = None  # int8


@dataclass(frozen=True)
class Codes:
    """One weight as it is stored."""

    codes: Tensor  # int8, of the weight's shape
    scale: Tensor  # fp32, flat, in the order of `quant.grid`
    zero_point: Tensor | None  # integers in fp32, as `scale`
    quantizer: WeightQuantizer

    def value(self) -> Tensor:
        """The real values, fp32."""
        return self.quantizer.dequantize(self.codes, self.scale, self.zero_point)


def as_codes(stored: Stored, shape: tuple[int, ...], quantizer: WeightQuantizer) -> Codes:
    """A weight of this shape, unpacked. Raises CheckpointError where the bytes do not fit it."""
    zero_point = None if stored.zero_point is None else stored.zero_point.float()
    return Codes(unpack(stored.packed, shape, quantizer.levels), stored.scale.float(), zero_point, quantizer)


class PackedTensors:
    """The tensors of a packed artifact, read one at a time: what every other target is made of. A context manager.

    `about` is what `read_description` gave for the folder, which checks the file first. Raises CheckpointError where the file does not hold what artifact.json lists.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.coverage = Coverage.from_json(json.dumps(about["coverage"]))
        self.quantized = {row.name: row.quantizer for row in self.coverage.rows if row.quantizer}
        self._shapes = {row.name: row.shape for row in self.coverage.rows if row.quantizer}
        self._files = MappedFiles()
        try:
            paths = [folder / name for name in about["weights"] if name.endswith(".safetensors")]
            self._paths = self._files.places(paths)
        except SafetensorError as error:
            raise self._damaged(str(error)) from None
        for name, quantizer in self.quantized.items():
            codes, *scales = keys_of(name, quantizer)
            expected = {codes: packed_bytes(math.prod(self._shapes[name]), quantizer.levels)}
            expected |= dict.fromkeys(scales, quantizer.num_scales(self._shapes[name], name))
            for key, count in expected.items():
                if key not in self._paths:
                    raise self._damaged(f"no {key}")
                found = math.prod(self._files.shape(self._paths[key], key))
                if found != count:
                    raise self._damaged(f"{key} has {found} values, not {count}")
        self.floats = sorted(key for key in self._paths if key not in self.quantized and key.rpartition(".")[0] not in self.quantized)

    def __enter__(self) -> "PackedTensors":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._shapes[name] if name in self._shapes else self._files.shape(self._paths[name], name)

    def stored(self, name: str) -> Stored:
        """A quantized weight as it is stored."""
        return Stored(*(self.floating(key) for key in keys_of(name, self.quantized[name])))

    def codes(self, name: str) -> Codes:
        """A quantized weight."""
        return as_codes(self.stored(name), self._shapes[name], self.quantized[name])

    def floating(self, name: str) -> Tensor:
        """What is stored as floats, in the dtype of the file."""
        return self._files.read(self._paths[name], name)

    def value(self, name: str) -> Tensor:
        """A parameter or buffer: the fp32 values of its codes, or as it is stored."""
        return self.codes(name).value() if name in self.quantized else self.floating(name)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: its safetensors files do not hold what artifact.json lists ({what}). Export the run again.")
