"""Integer codes -> constants of OpenVINO, with not a single float rounded.

A weight [outputs, inputs] is digits of a type that OpenVINO's constants have, the first in a byte's lowest bits and rows without gaps, and is read as
(digit - zero point) x scale. Signed digits (i4, i8) have no zero point. Those of two bits are unsigned (u2), with one zero point for all. So are those of any width
whose levels lie half a step beside the integers; their zero point is a float, such as 1.5. Affine grids, whose zero point is one of their codes, have unsigned digits
and a zero point for each scale. Groups are an axis of their own, [outputs, groups, inputs]. `tests/runtimes` asks OpenVINO for the products of all that is written like this.
"""

import math
from dataclasses import dataclass

import numpy as np

from dqtrain.artifact.gguf.blocks import Rows
from dqtrain.artifact.graphs.target import Digits, Part
from dqtrain.quant.grid import WeightQuantizer

WIDTHS = (2, 4, 8)
"""Bits of digits."""

LEAST_GROUP = 8
"""Of groups of fewer inputs, and where their number is no power of two, OpenVINO 2026.4 multiplies other numbers, without a word: 40, 96 and 192 are such."""

FLOAT = "F32"
"""What is stored as it is."""

BITS = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "f32": 32}
"""Types of constants."""


@dataclass(frozen=True)
class Fit:
    """The type of a weight's digits, or FLOAT. `why` says what kept fewer bits from it."""

    type: str
    why: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether it is stored as it is, for its groups."""
        return self.type == FLOAT


def fit(quantizer: WeightQuantizer, columns: int) -> Fit:
    """The fewest bits that hold a grid on rows of `columns` inputs. A row is whole bytes: of others OpenVINO 2026.4 multiplies the last digits wrongly."""
    levels, group = quantizer.levels, _group(quantizer, columns)
    if group is not None and (group < LEAST_GROUP or group & (group - 1)):
        return Fit(FLOAT, f"groups of {group} are multiplied wrongly by OpenVINO, which does {LEAST_GROUP}, 16, 32 and so on; set group_size to 32 or 128")
    natural = math.ceil(math.log2(levels.count))
    least = next(width for width in WIDTHS if natural <= width)
    bits = next(width for width in WIDTHS if least <= width and columns * width % 8 == 0)
    is_signed = bits > 2 and not quantizer.has_zero_points and not levels.offset
    why = f"{levels.count} levels take {bits} bits each; there are digits of 2, 4 and 8" if natural < bits else None
    if least < bits:
        why = f"rows of {columns} are no whole bytes of {least} bits, and OpenVINO multiplies such rows wrongly"
    return Fit(f"{'i' if is_signed else 'u'}{bits}", why)


def _group(quantizer: WeightQuantizer, columns: int) -> int | None:
    """Inputs that share a scale, where a row has several."""
    return None if quantizer.group_size == columns else quantizer.group_size


def parts(quantizer: WeightQuantizer, found: Fit, shape: tuple[int, int], is_table: bool) -> dict[str, Part]:
    """What is stored of a weight [outputs, inputs], a table or not: end of the name -> type, shape; of floats as transformers has them, which may be transposed.

    Scales are those of training: one for each group of each row, or for all.
    """
    rows, columns = shape
    if found.is_float:
        return {"": ("f32", shape if quantizer.row_axis == 0 else shape[::-1])}
    group = _group(quantizer, columns)
    groups = (columns // group,) if group else ()
    num_scales = (1 if quantizer.granularity == "per_tensor" else rows, *groups, 1)
    stored: dict[str, Part] = {"": (found.type, (rows, *groups, group or columns)), ".scale": ("f16" if quantizer.portable else "f32", num_scales)}
    if quantizer.levels.offset:
        stored[".zero_point"] = ("f32", (1,) * len(num_scales))
    elif found.type.startswith("u"):
        stored[".zero_point"] = (found.type, num_scales if quantizer.has_zero_points else (1,) * len(num_scales))
    return stored


def pack(rows: Rows, quantizer: WeightQuantizer, found: Fit) -> dict[str, np.ndarray]:
    """The arrays that `parts` lists for a weight that digits hold; digits, and zero points of their type, as bytes without a shape."""
    num_rows, columns = rows.integers.shape
    listed = parts(quantizer, found, (num_rows, columns), False)
    num_scales = listed[".scale"][1][0]
    unit, low, integers = rows.unit[:num_scales], rows.low[:num_scales], rows.integers
    if quantizer.levels.offset:  # odd integers of half a unit
        unit, integers = 2 * unit, (integers - quantizer.levels.low * 2 - 1) // 2
        zero_point = np.full(1, -quantizer.levels.low - quantizer.levels.offset, np.float32)
    elif found.type.startswith("u"):
        integers = integers - np.repeat(rows.low, columns // rows.low.shape[1], 1)
        zero_point = _bytes(-low if quantizer.has_zero_points else -low[:1, :1], BITS[found.type])
    packed = {"": _bytes(integers, BITS[found.type]), ".scale": unit.astype(np.float16 if quantizer.portable else np.float32)}
    return packed | ({".zero_point": zero_point} if ".zero_point" in listed else {})


def _bytes(digits: np.ndarray, bits: int) -> np.ndarray:
    """Digits of any shape -> bytes, the first digit lowest; negative ones as the complement of two."""
    per_byte = 8 // bits
    flat = digits.reshape(-1).astype(np.int8).view(np.uint8) if digits.min() < 0 else digits.reshape(-1).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.uint8)]).reshape(-1, per_byte) & np.uint8(2**bits - 1)
    packed = flat[:, 0].copy()
    for place in range(1, per_byte):
        packed |= flat[:, place] << np.uint8(place * bits)
    return packed


def num_bytes(type: str, shape: tuple[int, ...]) -> int:
    """Bytes of a constant."""
    return math.ceil(math.prod(shape) * BITS[type] / 8)


DIGITS = Digits("openvino", fit, parts, pack, num_bytes, "f32")
"""How the target holds codes."""
