import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.quant.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    DynamicFakeQuantize,
    dequantize,
    dynamic_scale,
    fake_quantize,
    fake_quantize_activation,
    largest_code,
    mean_abs,
    quantize,
    snap,
)

BITS = st.sampled_from([2, 4, 8])
GRANULARITY = st.sampled_from(["per_tensor", "per_row"])


def reference(weight, gamma, bits, granularity, row_axis, portable, grad):
    """Forward and both gradients in numpy float64, from the equations of the paper."""
    axis = None if granularity == "per_tensor" else 1 - row_axis
    qmax = 2 ** (bits - 1) - 1
    mean = np.abs(weight).mean(axis=axis, keepdims=True)
    gamma = gamma if granularity == "per_tensor" else np.expand_dims(gamma, 1 - row_axis)
    scale = gamma * mean / qmax
    scale = snap(torch.from_numpy(scale)).numpy() if portable else np.maximum(scale, np.finfo(np.float32).tiny)
    value = weight / scale
    code = np.clip(np.round(value), -qmax, qmax)
    inside = np.abs(value) < qmax
    grad_gamma = (grad * np.where(inside, code - value, np.sign(value) * qmax) * mean / qmax).sum(axis=axis)
    return code * scale, grad * inside, np.atleast_1d(grad_gamma)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bits=BITS,
    granularity=GRANULARITY,
    row_axis=st.integers(0, 1),
    portable=st.booleans(),
    seed=st.integers(0, 999),
    degenerate=st.sampled_from(["no", "zero row", "constant row"]),
)
def test_forward_and_gradients_equal_the_paper(shape, bits, granularity, row_axis, portable, seed, degenerate):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape)
    if degenerate != "no":
        np.moveaxis(weight, row_axis, 0)[0] = 0.0 if degenerate == "zero row" else -0.37
    gamma = rng.uniform(0.6, 4.0, size=1 if granularity == "per_tensor" else shape[row_axis])
    grad = rng.normal(size=shape)
    expected = reference(weight, gamma, bits, granularity, row_axis, portable, grad)

    w, g = torch.from_numpy(weight).requires_grad_(), torch.from_numpy(gamma).requires_grad_()
    quantized, scale = DynamicFakeQuantize.apply(w, g, bits, granularity, row_axis, portable)
    quantized.backward(torch.from_numpy(grad))
    assert scale.shape == g.shape and g.grad is not None and g.grad.shape == g.shape
    for ours, theirs in zip((quantized.detach(), w.grad, g.grad), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_of_gamma_equals_autograd_through_the_clip(bits):
    """The identity of the paper: differentiate alpha * STE-round(clip(w, -alpha, alpha) / alpha * N) / N itself."""
    torch.manual_seed(bits)
    weight, grad = torch.randn(16, 24, dtype=torch.float64), torch.randn(16, 24, dtype=torch.float64)
    qmax, gamma = largest_code(bits), torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    alpha = gamma * weight.abs().mean()
    unit = torch.maximum(torch.minimum(weight, alpha), -alpha) / alpha * qmax
    (alpha * (unit + (unit.round() - unit).detach()) / qmax).backward(grad)
    ours = gamma.detach().clone().requires_grad_()
    DynamicFakeQuantize.apply(weight, ours, bits, "per_tensor", 0, False)[0].backward(grad)
    assert abs(ours.grad.item() - gamma.grad.item()) < 1e-10


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 7)), bits=BITS, granularity=GRANULARITY, row_axis=st.integers(0, 1), seed=st.integers(0, 99))
def test_training_and_export_values_are_equal(shape, bits, granularity, row_axis, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    gamma = torch.full((1 if granularity == "per_tensor" else shape[row_axis],), 1.5)
    trained, scale = DynamicFakeQuantize.apply(weight, gamma, bits, granularity, row_axis, True)
    again = dynamic_scale(weight, gamma, bits, granularity, row_axis, True)
    codes = quantize(weight, again, bits, row_axis)
    assert codes.dtype == torch.int8 and codes.abs().max() <= largest_code(bits)
    assert torch.equal(again, scale) and torch.equal(dequantize(codes, again, row_axis), trained)
    assert torch.equal(fake_quantize(weight, scale, bits, row_axis), trained)


def test_mean_does_not_depend_on_the_order_of_the_sum():
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    shuffled = weight.flatten()[torch.randperm(weight.numel())].reshape(weight.shape)
    assert torch.equal(mean_abs(weight, "per_tensor"), mean_abs(shuffled, "per_tensor"))
    assert torch.equal(mean_abs(weight.T, "per_row", row_axis=1), mean_abs(weight, "per_row"))


@given(st.floats(2.0**-14, 65280.0))
def test_snapped_scales_are_exact_in_every_format_and_nearest(value):
    scale = torch.tensor([value], dtype=torch.float32)
    snapped = snap(scale)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(snapped.to(dtype).float(), snapped)
    assert torch.equal(snap(snapped), snapped)
    ulp = 2.0 ** (np.floor(np.log2(scale.item())) - 7)
    assert abs(snapped.item() - scale.item()) <= ulp / 2


def test_snap_rounds_ties_to_even_and_clamps():
    assert snap(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1.0, 1 + 2 * 2**-7]
    assert snap(torch.tensor([0.0, -3.0, 1e-9, 1e9])).tolist() == [SMALLEST_SCALE] * 3 + [LARGEST_SCALE]


@pytest.mark.parametrize("portable", [True, False])
def test_zero_weight_has_code_zero_and_finite_gradients(portable):
    weight, gamma = torch.zeros(3, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    quantized, scale = DynamicFakeQuantize.apply(weight, gamma, 2, "per_row", 0, portable)
    quantized.sum().backward()
    assert (scale > 0).all() and not quantized.any() and torch.equal(weight.grad, torch.ones(3, 4)) and not gamma.grad.any()


def test_a_gamma_below_zero_can_recover():
    weight, gamma = torch.randn(4, 4), torch.tensor([-0.1], requires_grad=True)
    quantized, scale = DynamicFakeQuantize.apply(weight, gamma, 4, "per_tensor", 0, True)
    (quantized - weight).square().sum().backward()
    assert scale.item() == SMALLEST_SCALE and gamma.grad.item() < 0  # a step of descent raises gamma


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_activation_codes_per_token(shape, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, size=[*shape[:-1], 1])
    x[..., :] *= rng.integers(0, 2, size=[*shape[:-1], 1])  # some tokens are zero
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    expected = np.round(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)) * scale
    ours = torch.from_numpy(x).requires_grad_()
    quantized = fake_quantize_activation(ours, 8)
    grad = torch.randn(shape, dtype=torch.float64)
    quantized.backward(grad)
    np.testing.assert_allclose(quantized.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.grad, grad)


def test_activation_keeps_its_dtype_and_is_quantized_in_fp32():
    x = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = fake_quantize_activation(x, 8)
    assert quantized.dtype == torch.bfloat16 and torch.equal(quantized, fake_quantize_activation(x.float(), 8).bfloat16())
    assert fake_quantize_activation(torch.empty(0, 8), 8).shape == (0, 8)  # a rank without target tokens
