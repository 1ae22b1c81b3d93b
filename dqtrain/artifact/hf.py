"""Floats that transformers loads without dqtrain: what forward computed with, in fp32, or rounded to bf16 once. Quantized activations become floats."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dqtrain.artifact.description import LIST, write_list
from dqtrain.artifact.size import FloatPart
from dqtrain.artifact.target import names_of
from dqtrain.config import Export
from dqtrain.errors import ConfigError
from dqtrain.files import write_text
from dqtrain.models.making import meta_model
from dqtrain.quant.modules import Coverage, is_learned_scale, latent_heads, served_parameters
from dqtrain.tensor_file import write_model_files

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rounded(coverage: Coverage | None, floats: FloatPart, asked: Export) -> list[str]:
    """Names of what the files would not hold as it was trained, from grids and dtypes alone."""
    if asked.hf == "fp32":
        return []
    matrices = [row.name for row in coverage.rows if row.quantizer and row.quantizer.dtype == torch.float32] if coverage else []
    return matrices + [name for name, (dtype, _) in floats.tensors.items() if dtype == torch.float32 and not is_learned_scale(name)]


def describe(coverage: Coverage | None, floats: FloatPart, asked: Export) -> list[str]:
    """What a person should know of the files before there are any, a line each: what they cannot hold, and what does."""
    names = rounded(coverage, floats, asked)
    if not names:
        return ["hf: bf16 holds every value exactly"] if asked.hf == "bf16" else []
    return [
        f"hf cannot hold {names_of(names)} in bf16: up to 3.9e-3 of each value is rounded away; set export.hf to fp32 (--hf fp32), which holds all (bf16 holds "
        "`vectors: bf16`, and 1-bit and ternary matrices and 2-bit lsq with portable scales). Or allow it: --allow-inexact, or export.allow_inexact: true."
    ]


def check(coverage: Coverage | None, floats: FloatPart, asked: Export) -> list[str]:
    """What a person should know of the files before training, a line each. Raises ConfigError for what is rounded, unless that is allowed."""
    names = rounded(coverage, floats, asked)
    if not names:
        return []
    if not asked.allow_inexact:
        raise ConfigError(describe(coverage, floats, asked)[0])
    return [f"hf: bf16 rounds {names_of(names)}, by up to 3.9e-3 of each value"]


def write(model: PreTrainedModel, folder: Path, asked: Export) -> None:
    """Write the files of a trained model beside its config.json, which is in `folder`, one tensor at a time. Raises OSError."""
    plain = meta_model(model.config)
    buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not isinstance(tensor, nn.Parameter)}

    def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One of our model's tensors as its family's files have it: experts one by one."""
        return revert_weight_conversion(plain, {name: tensor.to(_DTYPES[asked.hf]) if tensor.is_floating_point() else tensor})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, value in itertools.chain(served_parameters(model), buffers.items()):
            if not is_learned_scale(name):
                yield from stored(name, value).items()

    shapes = [*model.named_parameters(), *latent_heads(model), *buffers.items()]
    layout = [pair for name, tensor in shapes if not is_learned_scale(name) for pair in stored(name, torch.empty_like(tensor, device="meta")).items()]
    config = json.loads((folder / "config.json").read_text())
    dtype = str(_DTYPES[asked.hf]).removeprefix("torch.")
    write_text(folder / "config.json", json.dumps(config | {"architectures": [type(plain).__name__], "dtype": dtype}, indent=2) + "\n")
    write_model_files(folder, {name: (tensor.dtype, tensor.shape) for name, tensor in layout}, tensors())
    write_list(folder / LIST)
