"""The packed artifact: integer codes, their scales, and what is needed to read them; nothing else holds the model.

    model.safetensors   NAME.codes       uint8, as many codes to a byte as fit (`quant.pack`): 5 ternary ones, 1.6 bits each
                        NAME.scale       real units per code, flat; float16 where the grid is portable, which holds it exactly
                        NAME.zero_point  codes, int8, of the affine grids
                        NAME             what stays float, fp32, or bf16 where training rounded it; buffers that are not zero
    artifact.json       format version, shape and grid of every packed tensor, hash of model.safetensors, coverage, sizes
    parity.json         what `parity.verify` found before the artifact was published
    config.json, tokenizer files: as transformers writes them

The names of packed tensors differ from those of the float model, so that a loader that knows nothing of dqtrain fails.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.errors import CheckpointError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import float_bytes, quantized_parameters, rounded_parameters, served_parameters
from dqtrain.quant.pack import pack, unpack

FORMAT = 2
METADATA = {"format": "pt"}


def write(model: PreTrainedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write a quantized model's codes and scales and artifact.json into an existing folder. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    for parameter in quantized_parameters(model):
        name, quantizer, scales = parameter.name, parameter.quantizer, parameter.scales()
        tensors[f"{name}.codes"] = pack(quantizer.quantize(parameter.weight, scales), quantizer.levels)
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


def read_weights(folder: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter by its transformers name: packed ones as the fp32 values of their codes, the others as they are stored."""
    result = {}
    try:
        with safe_open(folder / about["weights"]["file"], "pt") as file:
            for name, grid in about["packed"].items():
                quantizer = WeightQuantizer(**{key: value for key, value in grid.items() if key != "shape"})
                codes = unpack(file.get_tensor(f"{name}.codes"), grid["shape"], quantizer.levels)
                zero_point = file.get_tensor(f"{name}.zero_point").float() if f"{name}.zero_point" in file.keys() else None  # noqa: SIM118
                result[name] = quantizer.dequantize(codes, file.get_tensor(f"{name}.scale").float(), zero_point)
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if name.rpartition(".")[0] not in about["packed"]:
                    result[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: model.safetensors does not hold what artifact.json lists ({error}). Export the run again.") from None
    return result
