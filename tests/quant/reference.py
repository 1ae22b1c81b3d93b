"""The papers' equations of every grid, in float64: what `dqtrain/quant/grid.py` is checked against, written from the papers and not from it.

`reference` is forward and gradients derived by hand, one scale at a time; `textbook` is the forward alone, with rounding that
autograd passes straight through. Where a scale is snapped, it is snapped in the equation too, and its gradient passes through.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

TINY = float(np.finfo(np.float32).tiny)


class Shared(NamedTuple):
    """What one scale's weights become."""

    value: np.ndarray
    codes: np.ndarray
    scale: float
    grad_weight: np.ndarray
    grad_learned: tuple[float, ...] = ()


class Reference(NamedTuple):
    """What a whole weight becomes; scales and gradients of what is learned are flat."""

    value: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    grad_weight: np.ndarray
    grad_learned: np.ndarray  # [learned, scales]


def scale_of_element(shape: tuple[int, ...], granularity: str, row_axis: int, group_size: int | None) -> np.ndarray:
    """Index of the scale of each element: matrices first, then what varies within a matrix in the order of the weight."""
    index = np.zeros(shape, dtype=np.int64)
    for position in np.ndindex(*shape):
        matrix = position[0] if len(shape) == 3 else 0
        row, column = position[-2 + row_axis], position[-1 - row_axis]  # an output, an input
        rows, columns = shape[-2 + row_axis], shape[-1 - row_axis]
        if granularity == "per_tensor":
            index[position] = matrix
        elif granularity == "per_row":
            index[position] = matrix * rows + row
        else:
            groups, group = columns // group_size, column // group_size
            index[position] = (matrix * rows + row) * groups + group if row_axis == 0 else (matrix * groups + group) * rows + row
    return index


def snapped(scale: float) -> float:
    """Nearest number of 8 significant bits, ties to even, within [2^-14, 65280]; of the fp32 number, which is what training has (one in 10^5 doubles differs)."""
    significand, exponent = math.frexp(float(np.float32(min(max(scale, 2.0**-14), 65280.0))))
    return math.ldexp(round(significand * 256), exponent - 8)


def positive(scale: float) -> float:
    """A scale that is not snapped."""
    return max(scale, TINY)


def qmax(bits: int | str) -> int:
    return 1 if bits == "ternary" else 2 ** (bits - 1) - 1


def _symmetric(w: np.ndarray, g: np.ndarray, scale: float, largest: int) -> Shared:
    """Levels -largest..largest, gradient straight through."""
    codes = np.clip(np.rint(w / scale), -largest, largest)
    return Shared(codes * scale, codes, scale, g)


def _dynamic(w, g, bits, settle, numel, gamma):
    """QuantGPT, section 3.2: alpha = gamma mean|w|, Q(u) = round(u N) / N with u = clip(w, -alpha, alpha) / alpha."""
    n, mean = qmax(bits), np.abs(w).mean()
    alpha = settle(gamma * mean / n) * n
    u = np.clip(w, -alpha, alpha) / alpha
    q = np.rint(u * n) / n
    inside = np.abs(w) < alpha
    return Shared(alpha * q, q * n, alpha / n, g * inside, ((g * mean * np.where(inside, q - w / alpha, np.sign(w))).sum(),))


def _pact(w, g, bits, settle, numel, clip):
    """PACT, eq. 3, on both sides: dL/dalpha = sum over the clipped of g sign(w)."""
    n = qmax(bits)
    alpha = settle(clip / n) * n
    q = np.rint(np.clip(w, -alpha, alpha) * n / alpha)
    inside = np.abs(w) < alpha
    return Shared(q * alpha / n, q, alpha / n, g * inside, ((g * np.sign(w))[~inside].sum(),))


def _lsq(w, g, bits, settle, numel, step):
    """LSQ, eq. 1-3 and section 2.2; Q_N = 2^(b-1), Q_P = 2^(b-1) - 1."""
    q_p = qmax(bits)
    q_n = 1 if bits == "ternary" else q_p + 1
    s = settle(step)
    v = w / s
    codes = np.rint(np.clip(v, -q_n, q_p))
    slope = [-q_n if x <= -q_n else q_p if x >= q_p else -x + round(x) for x in v.tolist()]
    grad = float(np.dot(slope, g)) / math.sqrt(len(w) * q_p)
    return Shared(codes * s, codes, s, np.where((v > -q_n) & (v < q_p), g, 0.0), (grad,))


def _seq(w, g, bits, settle, numel, clip):
    """ParetoQ, section 3.2: w_q = alpha (round(clip(w / alpha, -0.99, 0.99) n - k) + k) / n."""
    n, k, q_p = (2.0, 0.5, 1) if bits == 2 else (1.5, 0.0, 1)
    alpha = settle(clip / n) * n
    codes = np.rint(np.clip(w / alpha, -0.99, 0.99) * n - k)
    q = (codes + k) / n
    middle = np.abs(w / alpha) < 0.99
    return Shared(alpha * q, codes, alpha / n, g * middle, (float((g * (q - w / alpha * middle)).sum()) / math.sqrt(numel * q_p),))


def _affine(w, g, bits, settle, numel, step, zero_point):
    """EfficientQAT, eq. 1-4, in its codes 0..2^b-1: w_q = (clamp(round(w / s) + round(z), 0, 2^b-1) - round(z)) s."""
    top, low = 2**bits - 1, -(2 ** (bits - 1))
    s, z = settle(step), min(max(round(zero_point) - low, 0), top)
    unclamped = np.rint(w / s) + z
    q = np.clip(unclamped, 0, top)
    clamped = q != unclamped
    grad_step = (g * np.where(clamped, q - z, q - z - w / s)).sum()
    return Shared((q - z) * s, q + low, s, g * ~clamped, (grad_step, (-s * g)[clamped].sum()))


def _minmax_affine(w, g, bits, settle, numel):
    """Jacob et al., eq. 1 and section 3.1: S = range / (2^b-1), Z = round(-min / S), q in 0..2^b-1; Z is of the S that is not snapped yet."""
    top, low = 2**bits - 1, -(2 ** (bits - 1))
    smallest, largest = min(w.min(), 0.0), max(w.max(), 0.0)
    s = (largest - smallest) / top
    z = round(-smallest / s) if s > 0 else 0
    s = settle(s)
    q = np.clip(np.rint(w / s) + z, 0, top)
    return Shared(s * (q - z), q + low, s, g)


def _minmax(w, g, bits, settle, numel):
    """Jacob et al., eq. 1 with Z = 0: S = max|w| / N."""
    return _symmetric(w, g, settle(np.abs(w).max() / qmax(bits)), qmax(bits))


def _twn(w, g, bits, settle, numel):
    """TWN, eq. 5-6: threshold 0.7 mean|w|, alpha = mean of the |w| above it."""
    above = np.abs(w) > 0.7 * np.abs(w).mean()
    alpha = settle(np.abs(w)[above].mean() if above.any() else 0.0)
    codes = np.sign(w) * above
    return Shared(alpha * codes, codes, alpha, g)


def _laq(w, g, bits, settle, numel):
    """LAQ, section 3.2, with D = 1: alpha = sum|b w| / sum(b b), b = round(clip(w / alpha, -1, 1) N) / N, ten times from a Gaussian's best clip; 8 bits: from max|w|."""
    n = qmax(bits)
    alpha = np.abs(w).max() if n == 127 else {1: 1.55, 3: 2.3, 7: 3.1}[n] * np.abs(w).mean()
    for _ in range(10):
        b = np.rint(np.clip(w / max(alpha, TINY), -1, 1) * n) / n
        if b.any():
            alpha = np.abs(b * w).sum() / (b * b).sum()
    return _symmetric(w, g, settle(alpha / n), n)


def _mean43(w, g, bits, settle, numel):
    """TBT: alpha = 4/3 mean|w|, alpha round(clip(w / alpha, -1, 1)); in 1 bit mean|w| sign(w), whose codes -1 and 0 are 2 mean|w| apart."""
    mean = np.abs(w).mean()
    if bits != 1:
        return _symmetric(w, g, settle(4 / 3 * mean), 1)
    scale = settle(2 * mean)
    return Shared(np.where(w < 0, -scale / 2, scale / 2), np.where(w < 0, -1, 0), scale, g)


def _absmean(w, g, bits, settle, numel):
    """BitNet b1.58, eq. 1-3: clip(round(w / mean|w|), -1, 1) mean|w|."""
    return _symmetric(w, g, settle(np.abs(w).mean()), 1)


EQUATIONS: dict[str, Callable[..., Shared]] = {
    "dynamic": _dynamic,
    "twn": _twn,
    "minmax": _minmax,
    "minmax_affine": _minmax_affine,
    "pact": _pact,
    "lsq": _lsq,
    "laq": _laq,
    "mean43": _mean43,
    "absmean": _absmean,
    "seq": _seq,
    "affine": _affine,
}


def reference(grid: str, bits: int | str, weight: np.ndarray, learned: list[np.ndarray], index: np.ndarray, portable: bool, grad: np.ndarray) -> Reference:
    """Forward and gradients of a weight whose elements have the scales `index`, for the gradient `grad` of its quantized value."""
    value, codes, grad_weight = np.zeros_like(weight), np.zeros(weight.shape, np.int64), np.zeros_like(weight)
    scales = int(index.max()) + 1
    scale, grad_learned = np.zeros(scales), np.zeros((len(learned), scales))
    for k in range(scales):
        mine = index == k
        found = EQUATIONS[grid](
            weight[mine],
            grad[mine],
            bits,
            snapped if portable else positive,
            weight[0].size if weight.ndim == 3 else weight.size,
            *(float(parameter[k]) for parameter in learned),
        )
        value[mine], codes[mine], scale[k], grad_weight[mine] = found.value, found.codes, found.scale, found.grad_weight
        grad_learned[:, k] = found.grad_learned
    return Reference(value, codes, scale, grad_weight, grad_learned)


def _round(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def _scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor + (x - x * factor).detach()


def textbook(grid: str, bits: int | str, weight: torch.Tensor, portable: bool, learned: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """Forward of a learned grid, one scale for each row of `weight`, for autograd: rounding and snapping pass straight through, clipping does not."""
    n = qmax(bits)

    def settled(scale: torch.Tensor) -> torch.Tensor:
        return scale + (torch.tensor([snapped(s) for s in scale.tolist()], dtype=torch.float64) - scale).detach() if portable else scale

    if grid == "dynamic":
        alpha = (settled(learned * weight.abs().mean(1).detach() / n) * n)[:, None]
        return alpha * _round(torch.minimum(torch.maximum(weight, -alpha), alpha) / alpha * n) / n
    if grid == "pact":
        alpha = (settled(learned / n) * n)[:, None]
        clipped = torch.minimum(torch.maximum(weight, -alpha), alpha)
        return clipped + ((clipped * n / alpha).round() * alpha / n - clipped).detach()
    if grid == "lsq":
        s = settled(_scaled_gradient(learned, 1 / math.sqrt(weight.shape[1] * n)))[:, None]
        return _round((weight / s).clamp(-1 if bits == "ternary" else -n - 1, n)) * s
    if grid == "seq":
        stretch, shift = (2.0, 0.5) if bits == 2 else (1.5, 0.0)
        alpha = (settled(_scaled_gradient(learned, 1 / math.sqrt(weight.numel())) / stretch) * stretch)[:, None]
        return alpha * (_round((weight / alpha).clamp(-0.99, 0.99) * stretch - shift) + shift) / stretch
    assert grid == "affine" and zero_point is not None
    s, top = settled(learned)[:, None], 2**bits - 1
    z = _round(zero_point)[:, None] + 2 ** (bits - 1)
    z = z + (z.clamp(0, top) - z).detach()
    return ((_round(weight / s) + z).clamp(0, top) - z) * s
