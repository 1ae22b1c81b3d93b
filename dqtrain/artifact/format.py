"""The packed artifact: integer codes, their scales, and what is needed to read them; nothing else holds the model.

    model.safetensors   NAME.codes  uint8, `quant.pack`: 5 ternary, 2 four-bit or 1 eight-bit codes per byte
                        NAME.scale  real units per code, [1] or [rows]; float16 where the grid is portable, which holds it exactly
                        NAME        what stays float, fp32
    artifact.json       format version, shape and grid of every packed tensor, hash of model.safetensors, coverage, sizes
    parity.json         what `parity.verify` found before the artifact was published
    config.json, tokenizer files: as transformers writes them

The names of packed tensors differ from those of the float model, so that a loader that knows nothing of dqtrain fails.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.errors import CheckpointError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.quant.grid import dequantize
from dqtrain.quant.modules import float_bytes, is_gamma, quantized_parameters
from dqtrain.quant.pack import pack, unpack

FORMAT = 1


def write(model: PreTrainedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write a quantized model's codes and scales and artifact.json into an existing folder. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    for name, weight, gamma, quantizer in quantized_parameters(model):
        codes, scale = quantizer.quantize(weight.detach(), gamma.detach())
        tensors[f"{name}.codes"] = pack(codes, quantizer.bits)
        tensors[f"{name}.scale"] = scale.to(torch.float16) if quantizer.portable else scale
        packed[name] = {
            "shape": list(weight.shape),
            "bits": quantizer.bits,
            "granularity": quantizer.granularity,
            "row_axis": quantizer.row_axis,
        }
    for name, tensor in _left_float(model, packed).items():
        tensors[name] = tensor.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    sync_path(folder / "model.safetensors")
    sizes = {"packed_bytes": (folder / "model.safetensors").stat().st_size, "fp32_bytes": float_bytes(model)}
    weights = {"file": "model.safetensors", "bytes": sizes["packed_bytes"], "xxh3_128": digest(folder / "model.safetensors")}
    write_text(folder / "artifact.json", json.dumps({"format": FORMAT, "weights": weights, "sizes": sizes, "packed": packed, **about}, indent=1))


def _left_float(model: PreTrainedModel, packed: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters that have no codes."""
    return {name: p for name, p in model.named_parameters() if name not in packed and not is_gamma(name)}


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
                codes = unpack(file.get_tensor(f"{name}.codes"), grid["shape"], grid["bits"])
                result[name] = dequantize(codes, file.get_tensor(f"{name}.scale").float(), grid["row_axis"])
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if name.rpartition(".")[0] not in about["packed"]:
                    result[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: model.safetensors does not hold what artifact.json lists ({error}). Export the run again.") from None
    return result
