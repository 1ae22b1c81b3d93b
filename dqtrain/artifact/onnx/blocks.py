"""Integer codes -> blocks of ONNX Runtime's MatMulNBits and GatherBlockQuantized, with not a single float rounded (ContribOperators.md of onnxruntime).

Every grid of dqtrain is unit x integer (`gguf.blocks.rows_of`). A weight [outputs, inputs] is unsigned digits of 2, 4 or 8 bits, the first in a byte's lowest bits,
and is read as (digit - zero point) x scale. Blocks are 16, 32, 64 or 128 inputs of a row, the last one filled up; each has a scale in fp32 and perhaps a zero point.
Without zero points that of all is 2^(bits - 1): integers from there down to its negative fit. Affine grids, whose zero point is one of their codes, have them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqtrain.artifact.gguf.blocks import Rows
from dqtrain.quant.grid import WeightQuantizer

WIDTHS = (2, 4, 8)
"""Bits that the two operators know."""

BLOCKS = (128, 64, 32, 16)
"""Inputs to a block, the fastest first; those of 16 have no kernel of 2 bits, and those of 256 a slow one."""

FLOAT = 32
"""Bits of what no block holds."""


@dataclass(frozen=True)
class Fit:
    """How a weight is stored, always exactly: `bits` of a digit and `block`, or as floats. `why` says what kept the smallest digits or fastest blocks from it."""

    bits: int
    block: int
    why: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether blocks do not hold it, for its groups."""
        return self.bits == FLOAT

    @property
    def type(self) -> str:
        """For people."""
        return "F32" if self.is_float else f"{self.bits} bit"

    def num_blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return math.ceil(columns / self.block)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's digits, the last block filled up."""
        return self.num_blocks(columns) * self.block * self.bits // 8


def fit(quantizer: WeightQuantizer, columns: int) -> Fit:
    """The smallest digits and largest blocks that hold a grid on rows of `columns` inputs, from the grid alone."""
    levels, group = quantizer.levels, quantizer.group_size
    if quantizer.has_zero_points:
        bits = next(width for width in WIDTHS if levels.count <= 2**width)
    else:
        low, high = levels.integers
        bits = next(width for width in WIDTHS if -(2 ** (width - 1)) <= low and high < 2 ** (width - 1))
    natural = math.ceil(math.log2(levels.count))
    stored = (
        f"{levels.count} levels{' without one at 0' * bool(levels.offset)} take {bits} bits each; there are digits of 2, 4 and 8" if natural < bits else None
    )
    if not group or group == columns:
        return Fit(bits, next((size for size in BLOCKS[:3] if columns % size == 0), BLOCKS[2]), stored)
    block = next((size for size in BLOCKS if group % size == 0), None)
    if block is None:
        return Fit(FLOAT, 0, f"groups of {group} are no multiple of {BLOCKS[-1]}, the least of its blocks; set group_size to {BLOCKS[-1]} or 128")
    slow = f"blocks of {block} have no fast kernel; set group_size to 128" if block == BLOCKS[-1] and bits == 2 else None
    return Fit(bits, block, slow or stored)


def parts(quantizer: WeightQuantizer, found: Fit, shape: tuple[int, int], is_table: bool = False) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """What is stored of a weight [outputs, inputs]: end of the name -> dtype, shape. Digits are [outputs, blocks, bytes], of a table that is looked up [rows, bytes].

    Scales are those of training: one for each group of each row, or for all.
    """
    rows, columns = shape
    if found.is_float:
        return {"": (np.float32, shape if quantizer.row_axis == 0 else shape[::-1])}
    scale = np.float16 if quantizer.portable else np.float32  # portable scales are fp16's
    num_scales = (1 if quantizer.granularity == "per_tensor" else rows, columns // quantizer.group_size if quantizer.group_size else 1, 1)
    blocks = found.num_blocks(columns)
    row_bytes = found.row_bytes(columns)
    digits = (rows, row_bytes) if is_table else (rows, blocks, row_bytes // blocks)
    stored: dict[str, tuple[Any, tuple[int, ...]]] = {"": (np.uint8, digits), ".scale": (scale, num_scales)}
    if quantizer.has_zero_points:
        stored[".zero_point"] = (np.uint8, (rows, math.ceil(blocks * found.bits / 8)))
    return stored


def pack(rows: Rows, quantizer: WeightQuantizer, found: Fit) -> dict[str, np.ndarray]:
    """The arrays that `parts` lists for a weight that blocks hold, digits as [outputs, bytes]."""
    num_rows, columns = rows.integers.shape
    blocks = found.num_blocks(columns)
    zero = -rows.low if quantizer.has_zero_points else np.full((1, 1), 2 ** (found.bits - 1), np.int16)
    digits = np.zeros((num_rows, blocks * found.block), np.uint8)
    digits[:, :columns] = rows.integers + np.repeat(zero, columns // zero.shape[1], 1)
    listed = parts(quantizer, found, (num_rows, columns))
    dtype, shape = listed[".scale"]
    packed = {"": _bytes(digits, found.bits), ".scale": rows.unit[: shape[0], :, None].astype(dtype)}
    if ".zero_point" in listed:
        per_block = np.zeros((num_rows, math.ceil(blocks * found.bits / 8) * 8 // found.bits), np.uint8)
        per_block[:, :blocks] = np.repeat(zero, blocks // zero.shape[1], 1)
        packed[".zero_point"] = _bytes(per_block, found.bits)
    return packed


def _bytes(digits: np.ndarray, bits: int) -> np.ndarray:
    """Digits [rows, n] -> bytes [rows, n * bits / 8], the first digit lowest."""
    per_byte = 8 // bits
    packed = digits[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= digits[:, place::per_byte] << np.uint8(place * bits)
    return packed
