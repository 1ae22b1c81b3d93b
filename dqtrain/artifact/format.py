"""The packed artifact: integer codes, their scales, and what is needed to read them; nothing else holds the model.

    model.safetensors   NAME             uint8, flat, as many codes to a byte as fit (`quant.pack`): 5 ternary ones, 1.6 bits each
                        NAME.scale       real units per code, flat; float16 where the grid is portable, which holds it exactly
                        NAME.zero_point  codes, int8, of the affine grids
                        NAME             what stays float, fp32, or bf16 where training rounded it; buffers that are not zero
    artifact.json       format version, shape and grid of every packed tensor, hash of model.safetensors, coverage, sizes
    parity.json         what `parity.verify` found before the artifact was published
    config.json         as transformers writes it, and a quantization_config that names dqtrain (`pretrained`)
    tokenizer files     as transformers writes them

Codes have the names of the float model's matrices, but one dimension: a loader that knows nothing of dqtrain then stops at their shapes, where
it would draw random weights for names that it misses.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.errors import CheckpointError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.quant.grid import GRIDS, MinMaxAffine, WeightQuantizer
from dqtrain.quant.modules import Coverage, float_bytes, quantized_parameters, rounded_parameters, served_parameters
from dqtrain.quant.pack import pack, packed_bytes, unpack

FORMAT = 3
METADATA = {"format": "pt"}


def write(model: PreTrainedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write a quantized model's codes and scales and artifact.json into an existing folder. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    for parameter in quantized_parameters(model):
        name, quantizer, scales = parameter.name, parameter.quantizer, parameter.scales()
        tensors[name] = pack(quantizer.quantize(parameter.weight, scales), quantizer.levels)
        tensors[f"{name}.scale"] = scales.scale.to(torch.float16) if quantizer.portable else scales.scale
        if scales.zero_point is not None:
            tensors[f"{name}.zero_point"] = scales.zero_point.to(torch.int8)
        packed[name] = {"shape": list(parameter.weight.shape), **asdict(quantizer)}
    rounded = rounded_parameters(model)
    for name, tensor in served_parameters(model):
        if name not in packed:
            tensors[name] = tensor.to(torch.bfloat16) if name in rounded else tensor.contiguous()
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state and buffer.any():  # a persistent one
            tensors[name] = buffer.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata=METADATA)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    sync_path(folder / "model.safetensors")
    size, hash = (folder / "model.safetensors").stat().st_size, digest(folder / "model.safetensors")
    write_text(folder / "artifact.json", describe(size, hash, float_bytes(model), packed, about))


def describe(size: int, hash: str, fp32_bytes: int, packed: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """Text of artifact.json; `size.artifact_bytes` knows its length before there are weights."""
    weights, sizes = {"file": "model.safetensors", "bytes": size, "xxh3_128": hash}, {"packed_bytes": size, "fp32_bytes": fp32_bytes}
    content = {"format": FORMAT, "weights": weights, "sizes": sizes, "packed": packed, **about}
    return "{\n" + ",\n".join(f'"{key}": {_a_line_each(value)}' for key, value in content.items()) + "\n}\n"


def _a_line_each(value: Any) -> str:
    """JSON, the entries of a list or of a dict of dicts on lines of their own: for people, and a third of what indentation takes."""
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(json.dumps(entry) for entry in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values()):
        return "{\n " + ",\n ".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n}"
    return json.dumps(value)


def read_description(folder: Path) -> dict[str, Any]:
    """artifact.json, after model.safetensors was checked against it. Raises CheckpointError for anything damaged or of another version."""
    path = folder / "artifact.json"
    try:
        about = json.loads(path.read_text())
        version, weights = about["format"], about["weights"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}). Export the run again with `dqtrain export RUN`.") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version}, this dqtrain reads {FORMAT}. Export the run again with `dqtrain export RUN`.")
    file = folder / weights["file"]
    found = file.stat().st_size if file.is_file() else 0
    if found != weights["bytes"]:
        raise CheckpointError(f"{file}: has {found} bytes, artifact.json says {weights['bytes']}; it is truncated or missing. Copy or export it again.")
    if digest(file) != weights["xxh3_128"]:
        raise CheckpointError(f"{file}: does not have the hash in artifact.json; a byte was changed. Copy or export it again.")
    return about


def keys_of(name: str, quantizer: WeightQuantizer) -> list[str]:
    """Under which a weight's codes, scales and, on affine grids, zero points are stored."""
    return [name, f"{name}.scale"] + [f"{name}.zero_point"] * isinstance(GRIDS[quantizer.grid], MinMaxAffine)


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
        self.quantized = {name: WeightQuantizer(**{key: value for key, value in grid.items() if key != "shape"}) for name, grid in about["packed"].items()}
        self._shapes = {name: tuple(grid["shape"]) for name, grid in about["packed"].items()}
        self._coverage = about.get("coverage")
        try:
            self._file = safe_open(folder / about["weights"]["file"], "pt").__enter__()
        except SafetensorError as error:
            raise self._damaged(str(error)) from None
        self._keys = frozenset(self._file.keys())
        for name, quantizer in self.quantized.items():
            codes, *scales = keys_of(name, quantizer)
            expected = {codes: packed_bytes(math.prod(self._shapes[name]), quantizer.levels)}
            expected |= dict.fromkeys(scales, quantizer.num_scales(self._shapes[name], name))
            for key, count in expected.items():
                if key not in self._keys:
                    raise self._damaged(f"no {key}")
                found = math.prod(self._file.get_slice(key).get_shape())
                if found != count:
                    raise self._damaged(f"{key} has {found} values, not {count}")
        self.floats = sorted(key for key in self._keys if key not in self.quantized and key.rpartition(".")[0] not in self.quantized)

    def __enter__(self) -> "PackedTensors":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    @property
    def coverage(self) -> Coverage:
        """What was quantized, and why the rest was not."""
        return Coverage.from_json(json.dumps(self._coverage))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._shapes[name] if name in self._shapes else tuple(self._file.get_slice(name).get_shape())

    def stored(self, name: str) -> Stored:
        """A quantized weight as it is stored."""
        return Stored(*(self._file.get_tensor(key) for key in keys_of(name, self.quantized[name])))

    def codes(self, name: str) -> Codes:
        """A quantized weight."""
        return as_codes(self.stored(name), self._shapes[name], self.quantized[name])

    def floating(self, name: str) -> Tensor:
        """What is stored as floats, in the dtype of the file."""
        return self._file.get_tensor(name)

    def value(self, name: str) -> Tensor:
        """A parameter or buffer: the fp32 values of its codes, or as it is stored."""
        return self.codes(name).value() if name in self.quantized else self.floating(name)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: model.safetensors does not hold what artifact.json lists ({what}). Export the run again.")
