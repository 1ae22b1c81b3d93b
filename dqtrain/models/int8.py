"""A teacher whose matrices are int8 codes, made of its float weights while they are read."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.errors import ConfigError
from dqtrain.models.weights import Reader
from dqtrain.quant.modules import keep_in_int8

BLOCK_ELEMENTS = 2**18
"""Elements of a matrix that are looked at together while its int8 codes are made: 1 MB in fp32, which fits a core's cache."""


def in_int8(model: PreTrainedModel, weights: Mapping[str, Reader]) -> dict[str, Reader]:
    """`quant.modules.keep_in_int8` of a model on the meta device, and readers of what it then has, made of readers of its float weights; nothing is read yet.

    code = round(w / scale), scale = max |w| of an output / 127, rounded to bf16. A reader reads the rows that its slice touches twice, a block of BLOCK_ELEMENTS at a
    time; where outputs are columns (Conv1D, some experts) every rank reads the whole matrix for its scales. Raises ConfigError, when read, for weights
    that are not finite.
    """
    readers = dict(weights)
    for name, axis in keep_in_int8(model).items():
        coded = _Coded(name, weights[name], model.get_parameter(name).shape, axis)
        readers |= {name: coded.read_codes, f"{name}_scale": coded.read_scales}
    return readers


class _Coded:
    """A float tensor, read as int8 codes and scales. It is a row of units [inputs, width], each with `width` scales: rows of a matrix, or matrices whose outputs are columns."""

    def __init__(self, name: str, read: Reader, shape: torch.Size, axis: int) -> None:
        self._name, self._read = name, read
        self._width = shape[-1] if axis == 1 else 1
        self._size = math.prod(shape[-1 - axis :])  # of a unit
        self._largest = torch.zeros(shape.numel() // self._size, self._width)  # |w| by output
        self._is_known = torch.zeros(len(self._largest), dtype=torch.bool)

    def read_codes(self, start: int, out: Tensor) -> None:
        """As a Reader."""
        stop = start + out.numel()
        first, last = start // self._size, -(-stop // self._size)
        self._look(first, last)
        for units, begin, end in self._pieces(first, last):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                codes = self._values(begin, end).div_(self._scales(units)[:, None]).round_().to(torch.int8)
                out[low - start : high - start] = codes.view(-1)[low - begin : high - begin]

    def read_scales(self, start: int, out: Tensor) -> None:
        """As a Reader."""
        stop = start + out.numel()
        first, last = start // self._width, -(-stop // self._width)
        self._look(first, last)
        out.copy_(self._scales(slice(first, last)).view(-1)[start - first * self._width : stop - first * self._width])

    def _look(self, first: int, last: int) -> None:
        """Find the largest |w| of units first, ..., last - 1, unless they are known."""
        for units, begin, end in self._pieces(first, last):
            if not self._is_known[units].all():
                self._largest[units] = torch.maximum(self._largest[units], self._values(begin, end).abs_().amax(1))
        self._is_known[first:last] = True
        if not self._largest[first:last].isfinite().all():
            raise ConfigError(f"{self._name} holds NaN or infinite values, so that it has no int8 scale. Mend the teacher, or set teacher.dtype to bf16.")

    def _scales(self, units: slice) -> Tensor:
        return (self._largest[units] / 127).bfloat16().float().clamp_min_(torch.finfo(torch.bfloat16).tiny)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[slice, int, int]]:
        """(units, first element, last element + 1) of a block of whole units, or of inputs of one that is larger than a block."""
        if self._size <= BLOCK_ELEMENTS:
            step = BLOCK_ELEMENTS // self._size
            for unit in range(first, last, step):
                units = slice(unit, min(unit + step, last))
                yield units, units.start * self._size, units.stop * self._size
            return
        step = max(1, BLOCK_ELEMENTS // self._width) * self._width
        for unit in range(first, last):
            for begin in range(unit * self._size, (unit + 1) * self._size, step):
                yield slice(unit, unit + 1), begin, min(begin + step, (unit + 1) * self._size)

    def _values(self, begin: int, end: int) -> Tensor:
        """Elements of a piece: [units, inputs, width] in fp32."""
        values = torch.empty(end - begin)
        self._read(begin, values)
        return values.view(-1, min(self._size, end - begin) // self._width, self._width)
