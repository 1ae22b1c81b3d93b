"""Blocks of ggml's types, read back by ggml's own dequantizers: the Python package's and the runtime's C functions."""

import ctypes
import itertools

import gguf
import numpy as np
import pytest
import torch
import xllamacpp

from dqtrain.artifact.gguf.blocks import TYPES, as_tensor, fit, num_bytes, pack, rows_of, value
from dqtrain.config import BITS_OF_GRID
from dqtrain.quant.grid import GRIDS, MinMaxAffine, WeightQuantizer

GRIDS_AND_BITS = [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths]


def by_package(packed, type):
    return gguf.dequantize(packed, gguf.GGMLQuantizationType[type])


def by_runtime(packed, type):
    function = getattr(ctypes.CDLL(xllamacpp.xllamacpp.__file__), f"dequantize_row_{type.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows = len(packed)
    out = np.empty((rows, packed.size // rows // TYPES[type].num_bytes * TYPES[type].block), np.float32)
    function(packed.ctypes.data, out.ctypes.data, out.size)
    return out


def quantizer_of(grid, bits, granularity="per_row", group_size=None, row_axis=0, portable=True):
    return WeightQuantizer(grid, bits, granularity, group_size, row_axis, portable)


def drawn(quantizer, shape, seed=0):
    """Codes that use every level, scales over fp16's whole range, zero points wherever they may be."""
    rng = torch.Generator().manual_seed(seed)
    levels, num_scales = quantizer.levels, quantizer.num_scales(shape)
    codes = torch.randint(levels.low, levels.high + 1, shape, generator=rng, dtype=torch.int8)
    scale = quantizer.settle(2 ** (torch.rand(num_scales, generator=rng) * 28 - 14))
    affine = isinstance(GRIDS[quantizer.grid], MinMaxAffine)
    zero_point = torch.randint(levels.low, levels.high + 1, (num_scales,), generator=rng).float() if affine else None
    return codes, scale, zero_point


@pytest.mark.parametrize("row_axis", [0, 1])
@pytest.mark.parametrize(
    ("granularity", "group_size", "columns"), [("per_tensor", None, 512), ("per_row", None, 512), ("per_row", None, 96), ("per_group", 32, 256)]
)
@pytest.mark.parametrize(("grid", "bits"), GRIDS_AND_BITS)
def test_ggml_reads_back_the_trained_values(grid, bits, granularity, group_size, columns, row_axis):
    quantizer = quantizer_of(grid, bits, granularity, group_size, row_axis)
    shape = (7, columns) if row_axis == 0 else (columns, 7)
    codes, scale, zero_point = drawn(quantizer, shape)
    expected = quantizer.dequantize(codes, scale, zero_point)
    rows = rows_of(codes, scale, zero_point, quantizer)
    assert torch.equal(as_tensor(value(rows), quantizer), expected)
    for fastest in (False, True):
        found = fit(quantizer, columns, fastest)
        if found.type == "F32":
            assert found.is_refused and bits == 8 and grid in ("affine", "minmax_affine")
            return
        packed = pack(rows, found.type)
        assert packed.nbytes == num_bytes(found.type, (7, columns))
        for read in (by_package, by_runtime):
            assert torch.equal(as_tensor(read(packed, found.type), quantizer), expected), read.__name__


def test_every_type_is_the_smallest_for_some_grid():
    chosen = set()
    for (grid, bits), columns in itertools.product(GRIDS_AND_BITS, (256, 32)):
        chosen |= {fit(quantizer_of(grid, bits), columns, fastest).type for fastest in (False, True)}
    assert chosen == {*TYPES, "F32"}


@pytest.mark.parametrize(
    ("grid", "bits", "columns", "type"),
    [
        ("absmean", "ternary", 768, "TQ1_0"),
        ("absmean", "ternary", 896, "Q4_0"),
        ("lsq", 2, 768, "TQ2_0"),
        ("lsq", 2, 896, "Q4_0"),
        ("seq", 2, 768, "Q2_K"),
        ("seq", 2, 896, "Q4_0"),
        ("affine", 2, 768, "Q2_K"),
        ("mean43", 1, 768, "TQ1_0"),
        ("lsq", 3, 768, "Q3_K"),
        ("lsq", 3, 896, "Q4_0"),
        ("affine", 3, 768, "Q4_0"),
        ("lsq", 4, 768, "Q4_0"),
        ("affine", 4, 768, "Q5_0"),
        ("minmax", 8, 768, "Q8_0"),
        ("affine", 8, 768, "F32"),
        ("minmax", 8, 172, "F32"),
    ],
)
def test_chosen_type(grid, bits, columns, type):
    assert fit(quantizer_of(grid, bits), columns).type == type


def test_groups_must_hold_whole_blocks():
    assert fit(quantizer_of("absmean", "ternary", "per_group", 256), 512).type == "TQ1_0"
    assert fit(quantizer_of("absmean", "ternary", "per_group", 128), 512).type == "Q4_0"
    refused = fit(quantizer_of("absmean", "ternary", "per_group", 16), 512)
    assert refused.is_refused and "groups of 16 are no multiple of 32" in refused.why


def test_fp32_scales_are_rounded_and_that_is_said():
    quantizer = quantizer_of("lsq", 4, portable=False)
    codes, scale, _ = drawn(quantizer, (5, 64))
    assert fit(quantizer, 64).rounds_scales
    found = torch.from_numpy(by_package(pack(rows_of(codes, scale, None, quantizer), "Q4_0"), "Q4_0"))
    expected = quantizer.dequantize(codes, scale)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=0)
