"""What quantization does to a weight, and whether vectors have become alike: the figures of `dqtrain inspect` and of TensorBoard.

Two causes make older quantizers fail on generative models: the word embeddings of a small-capacity model collapse towards each
other, and the weights of different modules are distributed differently (QuantGPT: Tao et al., ACL 2022, section 3). Here are the
figures for both. Nothing here knows of files, models or ranks; what is summed over ranks or weights is given as sums.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dqtrain.quant.grid import Scales, WeightQuantizer, compute, level_of

ROWS_AT_ONCE = 2**20
"""Elements that are held in float64 at a time."""

SHADES = " ░▒▓█"
"""A cosine below 0.2, 0.4, 0.6, 0.8, and above."""


@dataclass(frozen=True)
class WeightStatistics:
    """One quantized weight. The sums, all on the weight's device, may be added over weights; the shares are of one weight."""

    squared_error: Tensor  # sum of (quantized - weight)^2, float64 []
    squared_norm: Tensor  # sum of weight^2, float64 []
    num_clipped: Tensor  # weights beyond the outermost level, int64 []
    num_changed: Tensor | None  # codes that are not those of before, int64 []; None where those are not known
    histogram: Tensor  # how often each code occurs, from the lowest to the highest, int64 [levels]
    codes: Tensor  # int8, of the weight's shape: the next call's `previous_codes`

    @property
    def relative_error(self) -> float:
        """Squared error / squared norm; 0 for a weight of zeros that stays so, infinite for one that does not."""
        return relative(float(self.squared_error), float(self.squared_norm))

    @property
    def clip_fraction(self) -> float:
        """Share of the weights whose magnitude no level reaches."""
        return int(self.num_clipped) / max(1, self.codes.numel())

    @property
    def changed_fraction(self) -> float | None:
        """Share of the codes that are not those of before; None where those are not known."""
        return None if self.num_changed is None else int(self.num_changed) / max(1, self.codes.numel())


def relative(squared_error: float, squared_norm: float) -> float:
    """Squared error / squared norm, where 0 / 0 is 0: nothing was lost."""
    return squared_error / squared_norm if squared_norm else (math.inf if squared_error else 0.0)


@torch.no_grad()
def weight_statistics(weight: Tensor, quantizer: WeightQuantizer, scales: Scales, previous_codes: Tensor | None = None) -> WeightStatistics:
    """Error, clipping and codes of a weight under a quantizer with these scales, read piece by piece: nothing dense is made but the codes.

    `weight` is [rows, columns] or [matrices, rows, columns], in any float dtype; where the quantizer rounds it to bf16, all figures are of
    the rounded one. `previous_codes` is int8 of its shape. The codes are those of `quantizer.quantize`, and the error that of
    `quantizer.value`, in every bit. A weight counts as clipped when it lies beyond the outermost level's value, whatever the gradient does
    there.
    """
    blocks, levels = quantizer.blocks, quantizer.levels
    view = blocks.view(quantizer.as_read(weight))
    codes = torch.empty(view.shape, dtype=torch.int8, device=view.device)
    error, norm = (torch.zeros((), dtype=torch.float64, device=view.device) for _ in range(2))
    clipped, changed = (torch.zeros((), dtype=torch.int64, device=view.device) for _ in range(2))
    histogram = torch.zeros(levels.count, dtype=torch.int64, device=view.device)
    optional = [] if scales.zero_point is None else [blocks.spread(scales.zero_point, view)]
    if previous_codes is not None:
        assert previous_codes.shape == weight.shape, "codes of another weight"
        optional.append(blocks.view(previous_codes))
    for out, piece, scale, step, *rest in blocks.pieces(codes, view, blocks.spread(scales.scale, view), blocks.spread(scales.step, view), *optional):
        zero = None if scales.zero_point is None else rest[0]
        shift = levels.offset if zero is None else -zero
        values = compute(piece)
        level = level_of(values, step, zero, levels)
        out.copy_(level - shift)
        clipped += ((values > (levels.high + shift) * scale) | (values < (levels.low + shift) * scale)).sum()
        histogram += torch.bincount(out.flatten().int() - levels.low, minlength=levels.count)
        if previous_codes is not None:
            changed += (out != rest[-1]).sum()
        norm += values.double().square().sum()
        error += level.mul_(scale).sub_(values).double().square_().sum()
    return WeightStatistics(error, norm, clipped, None if previous_codes is None else changed, histogram, codes.view(weight.shape))


def _doubles(x: Tensor) -> Iterator[Tensor]:
    """The rows of x [..., width] in float64, some at a time."""
    rows = x.detach().flatten(0, -2)
    for piece in rows.split(max(1, ROWS_AT_ONCE // max(1, rows.shape[1]))):
        yield piece.double()


def _add_units(x: Tensor, total: Tensor, count: Tensor) -> None:
    """Add the sum of the directions of x [rows, width] to `total`, and their number to `count`; rows of zeros have none."""
    norm = x.norm(dim=1, keepdim=True)
    total += torch.where(norm == 0, 0.0, x / norm).sum(0)
    count += (norm != 0).sum()


def _mean_cosine(total: Tensor, count: Tensor) -> float:
    n = float(count)
    return (float(total.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan


def _effective_rank(second_moment: Tensor) -> float:
    if not second_moment.isfinite().all():
        return math.nan
    squares = torch.linalg.eigvalsh(second_moment)
    # What rounding leaves in place of 0 would count by its root; numpy's matrix_rank draws the same line.
    squares = squares[squares > squares.amax() * len(squares) * torch.finfo(torch.float64).eps]
    shares = squares.sqrt() / squares.sqrt().sum()
    return math.exp(-float((shares * shares.log()).sum())) if len(shares) else math.nan


class Homogeneity:
    """How alike vectors are, over any number of batches: their mean pairwise cosine and their effective rank.

    The vectors are taken as they are, not centred: a direction that all share, as of collapsed embeddings, is what is looked for.
    The state is three tensors in float64, `tensors`, which may be summed over ranks in place.
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.unit_sum = torch.zeros(width, dtype=torch.float64, device=device)
        """Sum of x / |x|, [width]."""
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        """Vectors that are not 0, [1]."""
        self.second_moment = torch.zeros(width, width, dtype=torch.float64, device=device)
        """Sum of x x^T, [width, width]."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole state; its sum over ranks is the state of all vectors."""
        return self.unit_sum, self.count, self.second_moment

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count in the vectors of x [..., width]; leave padding out before."""
        for piece in _doubles(x):
            _add_units(piece, self.unit_sum, self.count)
            self.second_moment += piece.T @ piece

    @property
    def mean_cosine(self) -> float:
        """See `mean_cosine`."""
        return _mean_cosine(self.unit_sum, self.count)

    @property
    def effective_rank(self) -> float:
        """See `effective_rank`."""
        return _effective_rank(self.second_moment)


@torch.no_grad()
def mean_cosine(x: Tensor) -> float:
    """Mean cosine of all pairs of different rows of x [n, width], exact in O(n width): (|sum of x/|x||^2 - n) / (n (n - 1)), in float64.

    Rows of zeros have no direction and are left out; NaN with fewer than two others.
    """
    total, count = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device), torch.zeros(1, dtype=torch.float64, device=x.device)
    for piece in _doubles(x):
        _add_units(piece, total, count)
    return _mean_cosine(total, count)


@torch.no_grad()
def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the normalised singular values of x [n, width] (Roy and Vetterli, EUSIPCO 2007), from 1 to min(n, width).

    The singular values are the roots of the eigenvalues of x^T x in float64, so they are right down to 1e-7 of the largest, and
    smaller ones count as 0. x is not centred. NaN for zeros alone.
    """
    moment = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for piece in _doubles(x):
        moment += piece.T @ piece
    return _effective_rank(moment)


@torch.no_grad()
def similarity_picture(x: Tensor, rows: Sequence[int], width: int) -> str:
    """The matrix of the cosines between some rows of x [n, width of x] as text: a square of at most `width` columns and half as many lines.

    Darker (`SHADES`) is more alike; each character is the mean of the pairs that it covers, two of them where there are as many columns
    as rows. A row of zeros is like nothing, itself included.
    """
    units = F.normalize(x[torch.as_tensor(list(rows), device=x.device)].double(), dim=1)
    columns = min(width, len(units))
    cosines = F.adaptive_avg_pool2d((units @ units.T)[None], (math.ceil(columns / 2), columns))[0]
    shade = (cosines * len(SHADES)).nan_to_num(0.0).floor().clamp(0, len(SHADES) - 1).int()
    return "\n".join("".join(SHADES[i] for i in line) for line in shade.tolist())
