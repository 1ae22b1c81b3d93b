"""The equations of quantization: symmetric grids, their codes, and the gradients that pass through them.

A weight w [rows, columns] becomes integer codes c = clamp(round(w / s), -qmax, qmax) and is read back as s * c (Jacob et al.
2018, eq. 1, zero_point 0). In the `dynamic` grid the clip alpha = gamma * mean|w| follows the weights and gamma is learned
(QuantGPT: Tao et al., ACL 2022), with s = alpha / qmax.

`row_axis` is the axis of a matrix's *outputs*: 0 for Linear and Embedding, 1 for Conv1D, which stores its weight transposed.
A scale has shape [1] or [rows]. Arithmetic is in fp32, or in float64 where the weight is; |w| is summed in float64 and
rounded once, so that the order of the sum (threads, device) has next to no chance to move a scale. Training and export share
these functions.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Granularity = Literal["per_tensor", "per_row"]
"""What shares one scale: a whole matrix, or each row of outputs."""

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65280.0
"""fp16's smallest normal number, and the largest one it holds that has a bf16 significand."""


def largest_code(bits: int) -> int:
    """Largest code, qmax = 2^(bits-1) - 1: 1 (ternary), 7 or 127 for 2, 4 or 8 bits; codes are -qmax..qmax."""
    return 2 ** (bits - 1) - 1


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _along_rows(scale: Tensor, row_axis: int) -> Tensor:
    """[1] or [rows], shaped so that it broadcasts over a matrix."""
    return scale if scale.numel() == 1 or row_axis == 1 else scale[:, None]


def snap(scale: Tensor) -> Tensor:
    """Nearest values that fp32, fp16 and bf16 all hold exactly, ties to even, within [2^-14, 65280]; 0 and below become 2^-14."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).to(scale.dtype)


def mean_abs(weight: Tensor, granularity: Granularity, row_axis: int = 0) -> Tensor:
    """Mean of |w|, [1] for a matrix or [rows] for each of its rows."""
    weight = _compute(weight)
    if granularity == "per_tensor":
        return (weight.abs().sum(dtype=torch.float64) / weight.numel()).to(weight.dtype).reshape(1)
    return (weight.abs().sum(1 - row_axis, dtype=torch.float64) / weight.shape[1 - row_axis]).to(weight.dtype)


def scale_from_clip(clip: Tensor, bits: int, portable: bool) -> Tensor:
    """Clips alpha (any shape) -> scales alpha / qmax, in real units per code; always > 0, and snapped if `portable`."""
    scale = clip / largest_code(bits)
    return snap(scale) if portable else scale.clamp_min(torch.finfo(torch.float32).tiny)


def dynamic_scale(weight: Tensor, gamma: Tensor, bits: int, granularity: Granularity, row_axis: int, portable: bool) -> Tensor:
    """Scale of a weight whose clip is gamma * mean|w|; gamma and the result are [1] or [rows]."""
    return scale_from_clip(gamma * mean_abs(weight, granularity, row_axis), bits, portable)


def _float_codes(weight: Tensor, scale: Tensor, bits: int, row_axis: int) -> Tensor:
    qmax = largest_code(bits)
    return (_compute(weight) / _along_rows(scale, row_axis)).round_().clamp_(-qmax, qmax)


def quantize(weight: Tensor, scale: Tensor, bits: int, row_axis: int = 0) -> Tensor:
    """Codes, int8, of the weight's shape: round half to even, clamped to +-qmax."""
    return _float_codes(weight, scale, bits, row_axis).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, row_axis: int = 0) -> Tensor:
    """Codes -> real values in the scale's dtype."""
    return codes * _along_rows(scale, row_axis)


@torch.no_grad()
def fake_quantize(weight: Tensor, scale: Tensor, bits: int, row_axis: int = 0) -> Tensor:
    """`dequantize(quantize(weight))`, equal in every element, without the integers in between; not differentiable."""
    codes = _float_codes(weight, scale, bits, row_axis)
    # Adding to +0 turns -0, which rounding gives and integers do not have, into +0: then the bits are equal too.
    return torch.addcmul(codes.new_zeros(()), codes, _along_rows(scale, row_axis), out=codes)


class DynamicFakeQuantize(torch.autograd.Function):
    """Fake-quantize a weight in the dynamic grid; keeps nothing for backward but the weight and two values per scale.

    `apply(weight, gamma, bits, granularity, row_axis, portable)` -> (quantized weight, scale). With v = w / s and the code c,
    mean|w| held constant and snapping passed straight through (Tao et al., ACL 2022; LSQ's term inside the clip, PACT's outside):
      dL/dw     = dL/dw_q where |v| < qmax, else 0
      dL/dgamma = mean|w| / qmax * sum of dL/dw_q * (c - v where |v| < qmax, else c), per scale.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gamma: Tensor, bits: int, granularity: Granularity, row_axis: int, portable: bool) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean = mean_abs(weight, granularity, row_axis)
        scale = scale_from_clip(gamma * mean, bits, portable)
        # The weight itself is saved, never a view or a copy: ZeRO-3 empties the Parameter after forward and fills it again for backward.
        ctx.save_for_backward(weight, scale, mean)
        ctx.bits, ctx.row_axis = bits, row_axis
        ctx.mark_non_differentiable(scale)
        return fake_quantize(weight, scale, bits, row_axis), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        weight, scale, mean = ctx.saved_tensors
        qmax, grad = largest_code(ctx.bits), _compute(grad)
        grad_weight = grad_gamma = None
        value = _compute(weight) / _along_rows(scale, ctx.row_axis)
        inside = value.abs() < qmax
        if ctx.needs_input_grad[0]:
            grad_weight = grad * inside
        if ctx.needs_input_grad[1]:
            slope = value.round().clamp_(-qmax, qmax).sub_(value.mul_(inside)).mul_(grad)
            total = slope.sum().reshape(1) if scale.numel() == 1 else slope.sum(1 - ctx.row_axis)
            grad_gamma = total * mean / qmax
        return grad_weight, grad_gamma, None, None, None, None


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        exact = _compute(x)
        # A token of zeros must not be divided by 0.
        scale = (exact.abs().amax(-1, keepdim=True) / largest_code(bits)).clamp_min_(torch.finfo(torch.float32).tiny)
        return (exact / scale).round_().mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Quantize each token (last axis) of `x` [..., features] with its own scale max|x| / qmax; same shape and dtype.

    Nothing is calibrated or learned and nothing is kept: the gradient passes straight through.
    """
    return _FakeQuantizeActivation.apply(x, bits)
