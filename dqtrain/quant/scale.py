"""Where scales come from: a search on the real tensor before training, and the rules of quantizing without training.

The search minimises the squared error of the quantized weights; the rules are the baselines a trained model must beat.
"""

from typing import Literal

import torch
from torch import Tensor

from dqtrain.errors import ConfigError
from dqtrain.quant.grid import Granularity, fake_quantize, largest_code, mean_abs, scale_from_clip

NUM_CANDIDATES = 64, 16
"""Clips tried over the whole range, then between the neighbours of the best one."""

CHUNK_ELEMENTS = 2**17
"""Elements whose error is measured at a time: few enough to stay in a core's cache."""


def initial_gamma(weight: Tensor, bits: int, granularity: Granularity, row_axis: int, portable: bool, name: str = "weight") -> Tensor:
    """Gamma of the dynamic grid that minimises the squared error of `weight` [rows, columns]: fp32, [1] or [rows].

    Candidates are spread geometrically from 0.5 to max|w| / mean|w| and then around the best. A row of zeros gets 1.
    Raises ConfigError, with `name`, when the weight is not finite.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{name} holds NaN or infinite values, so it has no scale. Start from a model whose weights are finite.")
    mean = mean_abs(weight, granularity, row_axis)
    largest = _max_abs(weight, granularity, row_axis)
    low = torch.full_like(mean, 0.5)
    high = torch.where(mean > 0, largest / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0).clamp_min(1.0)
    rows = weight if row_axis == 0 else weight.T
    for num_candidates in NUM_CANDIDATES:
        steps = torch.linspace(0, 1, num_candidates, device=weight.device)
        gammas = low[:, None] * (high / low)[:, None] ** steps  # [1 or rows, candidates]
        gammas[:, -1] = high  # exact, so that a row of equal magnitudes is met exactly
        scales = scale_from_clip(gammas * mean[:, None], bits, portable)
        errors = _squared_errors(rows, scales, bits)
        best = (errors.sum(0, keepdim=True) if granularity == "per_tensor" else errors).argmin(1, keepdim=True)
        gamma = gammas.gather(1, best).squeeze(1)
        low = gammas.gather(1, (best - 1).clamp_min(0)).squeeze(1)
        high = gammas.gather(1, (best + 1).clamp_max(num_candidates - 1)).squeeze(1)
    return torch.where(mean > 0, gamma, torch.ones_like(gamma))


def _squared_errors(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Squared error of each row [rows, columns] under each candidate scale [1 or rows, candidates] -> float64 [rows, candidates]."""
    scales = scales.expand(rows.shape[0], -1)
    errors = torch.empty(scales.shape, dtype=torch.float64, device=rows.device)
    num_rows = max(1, CHUNK_ELEMENTS // rows.shape[1])
    qmax = largest_code(bits)
    buffer = torch.empty(min(num_rows, rows.shape[0]), rows.shape[1], device=rows.device)
    for start in range(0, rows.shape[0], num_rows):
        chunk = rows[start : start + num_rows].contiguous()
        difference = buffer[: chunk.shape[0]]
        for candidate in range(scales.shape[1]):
            scale = scales[start : start + num_rows, candidate, None]
            torch.div(chunk, scale, out=difference).round_().clamp_(-qmax, qmax).mul_(scale).sub_(chunk)
            errors[start : start + num_rows, candidate] = difference.square_().sum(1)
    return errors


def _max_abs(weight: Tensor, granularity: Granularity, row_axis: int) -> Tensor:
    return weight.abs().amax().reshape(1) if granularity == "per_tensor" else weight.abs().amax(1 - row_axis)


def round_to_nearest(weight: Tensor, bits: int, granularity: Granularity, row_axis: int, kind: Literal["minmax", "mean_abs", "mse"]) -> Tensor:
    """Quantize `weight` [rows, columns] without training, with portable scales -> real values, fp32.

    `minmax` clips at max|w|; `mean_abs` at 4/3 * mean|w|, for 2 bits alone (Liu et al., ACL 2023, "Binary and Ternary Natural
    Language Generation"); `mse` where the squared error is least. Raises ConfigError for mean_abs at other bit widths.
    """
    weight = weight.detach().float()
    if kind == "mean_abs" and bits != 2:
        raise ConfigError(f"mean_abs is a rule for 2 bits, but bits is {bits}. Use minmax or mse.")
    if kind == "minmax":
        clip = _max_abs(weight, granularity, row_axis)
    elif kind == "mean_abs":
        clip = mean_abs(weight, granularity, row_axis) * (4 / 3)
    else:
        clip = initial_gamma(weight, bits, granularity, row_axis, portable=True) * mean_abs(weight, granularity, row_axis)
    return fake_quantize(weight, scale_from_clip(clip, bits, portable=True), bits, row_axis)
