"""Where learned scales start: at the least squared error of the weight itself, searched before training."""

import torch
from torch import Tensor

from dqtrain.errors import ConfigError
from dqtrain.quant.grid import GRIDS, SMALLEST_SCALE, TINY, WeightQuantizer, level_of

NUM_CANDIDATES = 24, 8
"""Scales tried over the whole range, then between the neighbours of the best one. The error is flat around its least value."""


@torch.no_grad()
def initial_learned(weight: Tensor, quantizer: WeightQuantizer, name: str = "weight") -> tuple[Tensor, ...]:
    """What the quantizer learns, at the least squared error of `weight`: fp32, one vector [scales] for each of its `learned` names.

    Scales are spread geometrically between a small share of mean|w| and what clips nothing, and then around the best one; the
    weight is read piece by piece. Weights of zeros get the smallest scale, or a gamma of 1. Raises ConfigError, with `name`, when the weight is not finite.
    """
    quantizer.num_scales(tuple(weight.shape), name)
    grid, blocks, levels = GRIDS[quantizer.grid], quantizer.blocks, quantizer.levels
    view = quantizer.view(weight)
    if not all(bool(piece.isfinite().all()) for (piece,) in blocks.pieces(view)):
        raise ConfigError(f"{name} holds NaN or infinite values, so it has no scale. Start from a model whose weights are finite.")
    if not grid.learned:
        return ()
    unit = grid.unit(view, blocks, levels)
    zero_point = grid.zero_point(view, blocks, levels)
    spread_zero = None if zero_point is None else blocks.spread(zero_point.round().clamp(levels.low, levels.high), view)
    mean = blocks.mean_abs(view)
    high = (grid.scale(view, blocks, levels) if zero_point is not None else blocks.max_abs(view) / (levels.high + levels.offset)).clamp_min(TINY)
    low = torch.minimum(mean / (levels.count - 1), high).clamp_min(TINY)
    scale, least = high, torch.full(mean.shape, torch.inf, dtype=torch.float64, device=mean.device)
    for num_candidates in NUM_CANDIDATES:
        ratio = high / low
        candidates = [low * ratio ** (i / (num_candidates - 1)) for i in range(num_candidates - 1)] + [high]  # exact, so that equal magnitudes are met exactly
        errors = torch.stack([_squared_error(quantizer, view, quantizer.settle(candidate), spread_zero) for candidate in candidates])
        best = errors.argmin(0, keepdim=True)
        stacked, found = torch.stack(candidates), errors.gather(0, best)[0]
        scale, least = torch.where(found < least, stacked.gather(0, best)[0], scale), torch.minimum(found, least)
        low = stacked.gather(0, (best - 1).clamp_min(0))[0]
        high = stacked.gather(0, (best + 1).clamp_max(num_candidates - 1))[0]
    # Where the weight is 0 so is the dynamic grid's unit, whatever gamma is.
    learned = torch.where(mean > 0, scale / unit, 1.0) if isinstance(unit, Tensor) else torch.where(mean > 0, scale, SMALLEST_SCALE) / unit
    return tuple(t.float() for t in ([learned] if zero_point is None else [learned, zero_point]))


def _squared_error(quantizer: WeightQuantizer, view: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Sum of squared errors over what shares a scale, float64, flat [scales]."""
    blocks, levels = quantizer.blocks, quantizer.levels

    def error(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return level_of(weight, scale, zero_point, levels).mul_(scale).sub_(weight).square_()

    return blocks.reduce(error, view, blocks.spread(scale, view), *([] if zero_point is None else [zero_point]))
