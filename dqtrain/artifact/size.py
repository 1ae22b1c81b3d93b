"""How many bytes a model takes: as the papers count, and exactly those of our artifact's files, from names and shapes alone.

The papers (QuantGPT, QuantBART, DQ-BART, TBT) bill Transformer matrices and word embeddings at their bits, a ternary weight at 2, and
positions, norms and biases at 32; the tied head once, scales of matrices not at all. BART's published sizes hold one fp32 scale
per word besides. `artifact_bytes` predicts what `format.write` will write, to the byte.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dqtrain.artifact.description import PARITY, describe
from dqtrain.config import Quant
from dqtrain.quant.modules import Coverage, is_learned_scale, latent_heads, quantized_parameters, rounded_parameters
from dqtrain.quant.pack import packed_bytes
from dqtrain.tensor_file import Layout, file_bytes, index_text, model_files

MIB = 2**20


@dataclass(frozen=True)
class FloatPart:
    """What a quantized model keeps as floats."""

    tensors: Layout  # parameters, learned activation steps and buffers, as the artifact stores them
    other_elements: int  # elements of the float model that Coverage does not list: norms and biases

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of those that other programs store too: all but learned steps."""
        return [tuple(shape) for name, (_, shape) in self.tensors.items() if not is_learned_scale(name)]


def float_part(model: nn.Module, nonzero_buffers: Collection[str] = ()) -> FloatPart:
    """What stays float in a quantized model, on any device. Of buffers without values (on meta) those named are taken to be not all 0."""
    quantized = {parameter.name: parameter.quantizer for parameter in quantized_parameters(model)}
    in_codes = {*quantized, *(f"{name}_{learned}" for name, quantizer in quantized.items() for learned in quantizer.learned)}
    rounded, state = rounded_parameters(model), model.state_dict()
    floats = [(name, parameter) for name, parameter in model.named_parameters() if name not in in_codes] + list(latent_heads(model))
    tensors = {name: (torch.bfloat16 if name in rounded else parameter.dtype, tuple(parameter.shape)) for name, parameter in floats}
    for name, buffer in model.named_buffers():
        if name in state and (name in nonzero_buffers if buffer.is_meta else bool(buffer.any())):
            tensors[name] = buffer.dtype, tuple(buffer.shape)
    vectors = [p.numel() for name, p in model.named_parameters() if p.ndim < 2 and not is_learned_scale(name)]
    return FloatPart(tensors, sum(vectors))


def num_elements(coverage: Coverage, other_elements: int) -> int:
    """Parameters of the float model, tied ones once."""
    return sum(row.numel for row in coverage.rows) + other_elements


@dataclass(frozen=True)
class PaperBytes:
    """A model's bytes as the papers count them."""

    linears: int
    embeddings: int
    floats: int  # positions, norms, biases, and whatever else is no matrix of a linear layer
    row_scales: int  # 4 for each word; QuantBART's published sizes include them, QuantGPT's are told alike with and without

    @property
    def total(self) -> int:
        """Without the scales of words."""
        return self.linears + self.embeddings + self.floats

    @property
    def total_with_row_scales(self) -> int:
        """With one fp32 scale per word."""
        return self.total + self.row_scales


def paper_bytes(coverage: Coverage, other_elements: int) -> PaperBytes:
    """Linear and embedding matrices at their quantizers' bits (ternary: 2; float: 32), all else at 32, `other_elements` included."""
    bits = {"linears": 0, "embeddings": 0, "floats": 32 * other_elements}
    words = 0
    for row in coverage.rows:
        kind = row.kind if row.kind in ("linears", "embeddings") else "floats"
        width = 32 if row.quantizer is None or kind == "floats" else 2 if row.quantizer.bits == "ternary" else row.quantizer.bits
        bits[kind] += row.numel * width
        words += row.shape[0] if kind == "embeddings" else 0
    return PaperBytes(**{kind: math.ceil(total / 8) for kind, total in bits.items()}, row_scales=4 * words)


def layout_of(coverage: Coverage, floats: FloatPart) -> Layout:
    """The tensors of the artifact: those that stay float, and then each weight's, side by side."""
    tensors = dict(floats.tensors)
    for row in coverage.rows:
        quantizer = row.quantizer
        if quantizer is None:
            continue
        tensors[row.name] = torch.uint8, (packed_bytes(row.numel, quantizer.levels),)
        tensors[f"{row.name}.scale"] = torch.float16 if quantizer.portable else torch.float32, (row.num_scales,)
        if quantizer.has_zero_points:
            tensors[f"{row.name}.zero_point"] = torch.int8, (row.num_scales,)
    return tensors


@dataclass(frozen=True)
class ArtifactBytes:
    """Sizes of what holds the model."""

    weights: int  # model.safetensors, or its parts and their index
    description: int  # artifact.json

    @property
    def total(self) -> int:
        """All of these files."""
        return self.weights + self.description


def artifact_bytes(coverage: Coverage, floats: FloatPart, about: dict[str, Any]) -> ArtifactBytes:
    """Exactly what `format.write` will write for a model of this coverage; `about` is what it will be given, values of equal length at least.

    config.json, parity.json, README.md and the tokenizer, which lie beside these files, are not in it.
    """
    parts = model_files(layout_of(coverage, floats))
    sizes = {name: file_bytes(part) for name, part in parts.items()} | {name: len(text.encode()) for name, text in index_text(parts).items()}
    fp32_bytes = 4 * num_elements(coverage, floats.other_elements)
    description = describe({name: (size, "0" * 32) for name, size in sizes.items()}, fp32_bytes, about)
    return ArtifactBytes(sum(sizes.values()), len(description.encode()))


def export_about(coverage: Coverage, quant: Quant, checkpoint: str = "step-000000000") -> dict[str, Any]:
    """What artifact.json says besides; without a checkpoint, of one whose name is as long."""
    activations = quant.activations and quant.activations.model_dump()
    return {"activations": activations, "checkpoint": checkpoint, "parity": dict.fromkeys(PARITY), "coverage": json.loads(coverage.to_json())}
