"""Codes as OpenVINO's constants, and what is said where OpenVINO is not installed. What it computes of them: tests/runtimes/test_openvino.py, in an environment of its own."""

import sys

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_ggml_blocks import GRIDS_AND_BITS, drawn, quantizer_of
from test_onnx import with_tokenizer
from test_packed import settings
from transformers import MixtralConfig

from dqtrain import tensor_file
from dqtrain.artifact import format
from dqtrain.artifact.gguf.blocks import as_tensor, rows_of
from dqtrain.artifact.openvino.digits import fit, num_bytes, pack, parts
from dqtrain.artifact.openvino.graph import openvino_package
from dqtrain.artifact.openvino.runtime import OpenVinoRunner
from dqtrain.artifact.openvino.target import OpenVinoTarget
from dqtrain.config import Export
from dqtrain.errors import ConfigError
from dqtrain.quant.modules import quantize_model

SHAPES = {  # name: granularity, group size, columns
    "a scale for all": ("per_tensor", None, 256),
    "rows": ("per_row", None, 96),
    "rows of half bytes": ("per_row", None, 33),
    "rows of quarters of bytes": ("per_row", None, 34),
    "short rows": ("per_row", None, 12),
    "groups of 128": ("per_group", 128, 256),
    "groups of 8": ("per_group", 8, 40),
    "groups of 256": ("per_group", 256, 768),
    "one group": ("per_group", 48, 48),
}


def numbers(array, type, shape):
    """A constant of OpenVINO, read as its documentation has it: bits from the lowest up, nothing between rows."""
    bits = int(type[1:])
    if type.startswith("f"):
        return array.reshape(shape).astype(np.float32)
    every = np.unpackbits(array, bitorder="little")[: bits * int(np.prod(shape))].reshape(-1, bits).astype(np.int64)
    weights = 2 ** np.arange(bits)
    weights[-1] *= -1 if type.startswith("i") else 1
    return (every @ weights).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("row_axis", [0, 1])
@pytest.mark.parametrize("grid", sorted({grid for grid, _ in GRIDS_AND_BITS}))
def test_constants_are_the_trained_values(grid, row_axis):
    """Difference 0.0 on every grid, width and shape; scales of fp32, and those that fp16 holds."""
    for bits in [bits for name, bits in GRIDS_AND_BITS if name == grid]:
        for number, (granularity, group_size, columns) in enumerate(SHAPES.values()):
            quantizer = quantizer_of(grid, bits, granularity, group_size, row_axis, portable=number % 2 == 0)
            codes, scale, zero_point = drawn(quantizer, (7, columns) if row_axis == 0 else (columns, 7), number)
            found = fit(quantizer, columns)
            listed = parts(quantizer, found, (7, columns), False)
            packed = pack(rows_of(codes, scale, zero_point, quantizer), quantizer, found)
            assert packed.keys() == listed.keys()
            read = {end: numbers(packed[end], *part) for end, part in listed.items()}
            assert all(packed[end].nbytes == num_bytes(*part) for end, part in listed.items())
            value = (read[""] - read.get(".zero_point", np.float32(0))) * read[".scale"]
            assert torch.equal(as_tensor(value.reshape(7, columns), quantizer), quantizer.dequantize(codes, scale, zero_point))


@pytest.mark.parametrize(
    ("grid", "bits", "columns", "type", "zero_points", "why"),
    [
        ("lsq", 2, 34, "i4", None, "rows of 34 are no whole bytes of 2 bits, and OpenVINO multiplies such rows wrongly"),
        ("seq", 2, 33, "u8", "f32", "rows of 33 are no whole bytes of 2 bits"),
        ("affine", 4, 33, "u8", "u8", "rows of 33 are no whole bytes of 4 bits"),
        ("dynamic", "ternary", 44, "u2", "u2", None),
        ("lsq", 2, 44, "u2", "u2", None),
        ("seq", 2, 44, "u2", "f32", None),  # half a step beside the integers: 1.5
        ("mean43", 1, 44, "u2", "f32", "2 levels take 2 bits each"),
        ("dynamic", 3, 44, "i4", None, "7 levels take 4 bits each; there are digits of 2, 4 and 8"),
        ("dynamic", 4, 44, "i4", None, None),
        ("affine", 4, 44, "u4", "u4", None),
        ("dynamic", 8, 44, "i8", None, None),
        ("affine", 8, 44, "u8", "u8", None),
    ],
)
def test_the_fewest_bits(grid, bits, columns, type, zero_points, why):
    quantizer = quantizer_of(grid, bits, "per_row", None)
    found = fit(quantizer, columns)
    assert found.type == type and (why in found.why if why else found.why is None)
    assert parts(quantizer, found, (7, columns), False).get(".zero_point", (None,))[0] == zero_points


@pytest.mark.parametrize("group", [3, 4, 24, 40, 96, 192])
def test_groups_that_openvino_multiplies_wrongly_are_floats(group):
    quantizer = quantizer_of("dynamic", 4, "per_group", group)
    found = fit(quantizer, 3 * group)
    assert found.is_float and f"groups of {group} are multiplied wrongly" in found.why
    assert parts(quantizer, found, (7, 3 * group), False) == {"": ("f32", (7, 3 * group))}
    assert not fit(quantizer, group).is_float


def test_its_weights_are_one_file_of_any_size(world, tmp_path, monkeypatch):
    made = with_tokenizer(world, FAMILIES["gpt2"](), settings(), tmp_path / "packed")
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 5_000)
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        assert OpenVinoTarget(tensors, made[0].config, Export()).files == ["model.bin"]


def coverage_of(quant):
    model = FAMILIES["gpt2"]()
    return model, quantize_model(model, quant)


def test_what_it_would_hold_is_told_without_it(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    quant = settings(3, 4, 8, grid="dynamic")
    model, coverage = coverage_of(quant)
    described = OpenVinoTarget.describe(quant, model.config, coverage, [(32,)] * 5, Export())
    assert "bytes of tensors; i4 for 9, i8 for 1 of 10 quantized weights" in described[0]
    assert described[1].startswith("openvino: i4 for transformer.h.0.") and "7 levels take 4 bits each" in described[1]


def test_without_the_package_it_is_said_what_to_install(world, monkeypatch, tmp_path):
    openvino_package.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    quant = settings(2, 2, 8)
    model, coverage = coverage_of(quant)
    for asks in (lambda: OpenVinoTarget.check(quant, model.config, coverage, world / "tokenizer", Export()), lambda: OpenVinoRunner(tmp_path)):
        with pytest.raises(
            ConfigError, match=r"needs the Python package openvino, which is not installed here\. Install it, .*pip install 'dqtrain\[openvino\]'"
        ):
            asks()
    openvino_package.cache_clear()


def test_models_that_the_graphs_do_not_compute_are_refused(world):
    quant = settings(2, 2, 8)
    with pytest.raises(ConfigError, match=r"the openvino target writes gpt2, .*, and this model is mixtral\. Use the target packed, or hf"):
        OpenVinoTarget.check(quant, MixtralConfig(), coverage_of(quant)[1], world / "tokenizer", Export())
