"""Integer codes -> blocks of ggml's tensor types, with not a single float rounded (ggml-quants.c and ggml-common.h of llama.cpp).

Every grid of dqtrain is unit x integer: a code - zero_point of a grid without offset counts scales, 2 code + 1 of a half-step grid counts
half scales. A type holds a row whose integers are in its range, where its blocks divide what shares a scale. All scales of blocks are fp16.

    type    block  bytes  integers
    TQ1_0   256    54     -1..1, five to a byte
    TQ2_0   256    66     -1..2, or -2..1 with a negative scale
    Q2_K    256    84     four equally spaced ones from any start in -6..0
    Q3_K    256    110    -4..3
    Q4_0    32     18     -8..7
    Q5_0    32     22     -16..15
    Q8_0    32     34     -128..127
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dqtrain.quant.grid import WeightQuantizer


class Rows(NamedTuple):
    """A matrix [outputs, inputs] in integers: what it is = unit x integers."""

    integers: np.ndarray  # int16 [rows, columns]
    unit: np.ndarray  # fp32 [rows, columns / a divisor of them], each for as many neighbours in its row
    low: np.ndarray  # int16, shaped as `unit`: the least integer that the grid has there


class _Type(NamedTuple):
    """One of ggml's types."""

    block: int  # weights
    num_bytes: int  # of a block
    pack: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (integers [blocks, block], fp16 unit and low [blocks, 1]) -> bytes [blocks, num_bytes]


def _fp16(unit: np.ndarray) -> np.ndarray:
    return unit.astype("<f2").view(np.uint8)


def _trits(digits: np.ndarray, per_byte: int) -> np.ndarray:
    """Digits 0..2 [blocks, bytes * per_byte] -> the fixed-point fractions of ggml: the first of `per_byte` strided digits weighs 81 / 243."""
    powers = np.array([81, 27, 9, 3, 1][:per_byte], np.int32)[:, None]
    value = (digits.reshape(len(digits), per_byte, -1).astype(np.int32) * powers).sum(1)
    return ((value * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    digits = integers + 1
    return np.concatenate([_trits(digits[:, :160], 5), _trits(digits[:, 160:240], 5), _trits(digits[:, 240:], 4), _fp16(unit)], 1)


def _pairs_of_bits(digits: np.ndarray) -> np.ndarray:
    """Digits 0..3 [blocks, 256] -> 64 bytes: each half of a block in 32 bytes, its quarters at bits 0, 2, 4, 6."""
    quarters = digits.reshape(len(digits), 2, 4, 32).astype(np.uint8)
    return (quarters << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8).reshape(len(digits), 64)


def _tq2_0(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    sign = np.where(low < -1, -1, 1)
    return np.concatenate([_pairs_of_bits(integers * sign + 1), _fp16(unit * sign)], 1)


def _q2_k(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    # value = d (scale & 15) q - dmin (scale >> 4), q in 0..3
    stride = np.where(low == -3, 2, 1) if (integers & 1).all() else np.ones_like(low)
    scales = np.broadcast_to((stride | (-low << 4)).astype(np.uint8), (len(integers), 16))
    return np.concatenate([scales, _pairs_of_bits((integers - low) // stride), _fp16(unit), _fp16(unit)], 1)


def _q3_k(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    digits = integers + 4
    high = (digits >> 2).reshape(len(digits), 8, 32).astype(np.uint8)
    mask = (high << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    ones = np.broadcast_to(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (len(digits), 12))  # sixteen 6-bit scales of 1, stored as 33
    return np.concatenate([mask, _pairs_of_bits(digits & 3), ones, _fp16(unit)], 1)


def _nibbles(digits: np.ndarray) -> np.ndarray:
    halves = digits.astype(np.uint8).reshape(len(digits), 2, 16)
    return halves[:, 0] | halves[:, 1] << np.uint8(4)


def _q4_0(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.concatenate([_fp16(unit), _nibbles(integers + 8)], 1)


def _q5_0(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    digits = integers + 16
    fifth = np.packbits((digits >> 4).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([_fp16(unit), fifth, _nibbles(digits & 15)], 1)


def _q8_0(integers: np.ndarray, unit: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.concatenate([_fp16(unit), integers.astype(np.int8).view(np.uint8)], 1)


TYPES = {
    "TQ1_0": _Type(256, 54, _tq1_0),
    "TQ2_0": _Type(256, 66, _tq2_0),
    "Q2_K": _Type(256, 84, _q2_k),
    "Q3_K": _Type(256, 110, _q3_k),
    "Q4_0": _Type(32, 18, _q4_0),
    "Q5_0": _Type(32, 22, _q5_0),
    "Q8_0": _Type(32, 34, _q8_0),
}
"""In the order of their size."""


def num_bytes(type: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; its last axis is that of the blocks."""
    numel = int(np.prod(shape))
    return 4 * numel if type == "F32" else numel // TYPES[type].block * TYPES[type].num_bytes


@dataclass(frozen=True)
class Fit:
    """What ggml has for a weight. `type` is exact unless `rounds_scales`; `why` says what kept a smaller one, or all but F32, from holding it."""

    type: str
    why: str | None = None
    rounds_scales: bool = False
    is_refused: bool = False  # nothing but F32 holds the grid, which is no fault of the model's width


def fit(quantizer: WeightQuantizer, columns: int, fastest: bool = False) -> Fit:
    """The smallest type that holds a grid on rows of `columns` inputs, from the grid alone; the `fastest` for 3 levels is TQ2_0 instead of TQ1_0."""
    shared = quantizer.group_size if quantizer.granularity == "per_group" and quantizer.group_size else columns
    names = [name for name in TYPES if _holds(name, quantizer) and not (fastest and name == "TQ1_0")]
    fitting = [name for name in names if shared % TYPES[name].block == 0]
    if not names:
        low, high = _range(quantizer)
        return Fit("F32", f"{high - low + 1} levels from {low} to {high} with its zero points; a symmetric grid of {quantizer.bits} bits fits", is_refused=True)
    least, what = TYPES[names[-1]].block, "rows" if shared == columns else "groups"
    if not fitting:
        advice = "" if shared == columns else f"; set group_size to {least} or 128"
        return Fit("F32", f"{what} of {shared} are no multiple of {least}, the least that blocks of ggml hold{advice}", is_refused=shared != columns)
    smallest = names[0]
    why = None if fitting[0] == smallest else f"{what} of {shared} are no multiple of {TYPES[smallest].block}, the block of {smallest}"
    return Fit(fitting[0], why, rounds_scales=not quantizer.portable)


def _range(quantizer: WeightQuantizer) -> tuple[int, int]:
    """Least and largest integer of a grid."""
    levels = quantizer.levels
    return (levels.low - levels.high, levels.high - levels.low) if quantizer.has_zero_points else levels.integers


def _holds(name: str, quantizer: WeightQuantizer) -> bool:
    low, high = _range(quantizer)
    if name == "Q2_K":  # any other grid that it holds fits a smaller type
        return quantizer.levels.count == 4 and (low, high) == (-3, 3)
    if name == "TQ2_0":
        return low >= -1 and high <= 2 or low >= -2 and high <= 1
    least, largest = {"TQ1_0": (-1, 1), "Q3_K": (-4, 3), "Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}[name]
    return low >= least and high <= largest


def rows_of(codes: Tensor, scale: Tensor, zero_point: Tensor | None, quantizer: WeightQuantizer) -> Rows:
    """A weight's codes as a matrix [outputs, inputs] of integers, Conv1D transposed."""
    levels = quantizer.levels
    view = quantizer.blocks.view(codes)  # [1, rows, groups, inputs], or [1, groups, inputs, rows]
    assert len(view) == 1, "a stack of matrices is no row"

    def in_rows(flat: Tensor) -> np.ndarray:  # one for each group of each row
        spread = quantizer.blocks.spread(flat, view)[0]
        spread = spread[..., 0] if quantizer.row_axis == 0 else spread[:, 0].T
        return spread.expand(len(matrix), num_groups).contiguous().numpy()

    matrix = (codes if quantizer.row_axis == 0 else codes.T).contiguous().numpy().astype(np.int16)
    num_groups = matrix.shape[1] // quantizer.group_size if quantizer.group_size else 1
    if levels.offset:
        unit = in_rows(scale / 2)
        return Rows(2 * matrix + 1, unit, np.full(unit.shape, 2 * levels.low + 1, np.int16))
    unit = in_rows(scale)
    if zero_point is None:
        return Rows(matrix, unit, np.full(unit.shape, levels.low, np.int16))
    zeros = in_rows(zero_point).astype(np.int16)
    return Rows(matrix - np.repeat(zeros, matrix.shape[1] // zeros.shape[1], 1), unit, (levels.low - zeros).astype(np.int16))


def pack(rows: Rows, type: str) -> np.ndarray:
    """Blocks of a type that `fit` gave, uint8 [rows, bytes]; units are rounded to fp16, which portable scales survive."""
    block = TYPES[type].block
    num_rows, columns = rows.integers.shape

    def per_block(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, columns // block // values.shape[1], 1).reshape(-1, 1)

    packed = TYPES[type].pack(rows.integers.reshape(-1, block), per_block(rows.unit), per_block(rows.low))
    return np.ascontiguousarray(packed).reshape(num_rows, -1)


def value(rows: Rows) -> np.ndarray:
    """What the matrix is, fp32."""
    return rows.integers.astype(np.float32) * np.repeat(rows.unit, rows.integers.shape[1] // rows.unit.shape[1], 1)


def as_tensor(matrix: np.ndarray, quantizer: WeightQuantizer) -> Tensor:
    """A matrix [outputs, inputs] in the shape of the weight."""
    tensor = torch.from_numpy(matrix)
    return tensor if quantizer.row_axis == 0 else tensor.T
