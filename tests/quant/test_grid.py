"""Grids against the papers' equations (`reference.py`), and against themselves: training and export, pieces, precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference, scale_of_element, textbook

from dqtrain.config import BITS_OF_GRID
from dqtrain.errors import ConfigError
from dqtrain.quant import grid as grid_module
from dqtrain.quant.grid import GRIDS, SMALLEST_SCALE, TINY, Levels, WeightQuantizer, snap

ALL = [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths]
LEARNED = [(grid, bits) for grid, bits in ALL if GRIDS[grid].learned]


def each(pairs):
    return pytest.mark.parametrize(("grid", "bits"), pairs, ids=[f"{grid}-{bits}" for grid, bits in pairs])


def learned_for(quantizer, num_scales, rng):
    """float64 vectors, some weights of a standard normal being clipped and some not; with zero points beyond the codes."""
    levels = quantizer.levels
    clip = rng.uniform(0.4, 3.5, num_scales)
    found = {
        "gamma": lambda: clip,
        "clip": lambda: clip,
        "step": lambda: clip / levels.high,
        "zero_point": lambda: rng.uniform(levels.low - 2, levels.high + 2, num_scales),
    }
    return [found[name]() for name in quantizer.learned]


@st.composite
def cases(draw, grid, bits):
    """(quantizer, weight, learned, gradient of the quantized weight), all float64."""
    row_axis = draw(st.integers(0, 1))
    shape = draw(st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))))
    granularity = draw(st.sampled_from(["per_tensor", "per_row", "per_group"]))
    inputs = shape[-1 - row_axis]
    group_size = draw(st.sampled_from([n for n in range(1, inputs + 1) if inputs % n == 0])) if granularity == "per_group" else None
    quantizer = WeightQuantizer(grid, bits, granularity, group_size, row_axis, draw(st.booleans()))

    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    weight = rng.normal(size=shape)
    special = draw(st.sampled_from(["none", "zeros", "zero row", "minus zero row", "constant row", "huge element"]))
    output = np.moveaxis(weight, -2 + row_axis, 0)[0]
    if special == "huge element":
        weight[(0,) * len(shape)] = -1e4
    elif special == "zeros":
        weight[:] = 0.0
    elif special != "none":
        output[:] = {"zero row": 0.0, "minus zero row": -0.0, "constant row": -0.37}[special]
    learned = learned_for(quantizer, quantizer.num_scales(shape), rng)
    if learned and draw(st.integers(0, 9)) == 0:
        learned[0][0] = draw(st.sampled_from([0.0, -0.5]))
    return quantizer, weight, learned, rng.normal(size=shape), draw(st.booleans())


@each(ALL)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_forward_and_gradients_equal_the_papers(grid, bits, data):
    quantizer, weight, learned, grad, transposed = data.draw(cases(grid, bits))
    index = scale_of_element(weight.shape, quantizer.granularity, quantizer.row_axis, quantizer.group_size)
    expected = reference(grid, bits, weight, learned, index, quantizer.portable, grad)

    w = torch.from_numpy(np.swapaxes(weight.swapaxes(-1, -2).copy(), -1, -2) if transposed else weight).requires_grad_()
    parameters = [torch.from_numpy(parameter).requires_grad_() for parameter in learned]
    value, scales = quantizer.fake_quantize(w, *parameters)
    value.backward(torch.from_numpy(grad))

    def check(ours, theirs):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-10 * max(1, np.abs(weight).max()))

    check(value, expected.value)
    check(scales.scale, expected.scale)
    np.testing.assert_array_equal(quantizer.quantize(w.detach(), scales).numpy(), expected.codes)
    check(w.grad, expected.grad_weight)
    assert scales.scale.shape == (quantizer.num_scales(weight.shape),) == (index.max() + 1,)
    for parameter, theirs in zip(parameters, expected.grad_learned, strict=True):
        assert parameter.grad.shape == parameter.shape
        check(parameter.grad, theirs)


@pytest.mark.parametrize("bits", BITS_OF_GRID["laq"])
def test_laq_alternates_ten_times(bits):
    weight = np.random.default_rng(0).normal(size=(1, 3000))  # small ones converge earlier
    scales = WeightQuantizer("laq", bits, "per_tensor", None, 0, False).scales(torch.from_numpy(weight))
    expected = reference("laq", bits, weight, [], np.zeros(weight.shape, np.int64), False, weight)
    np.testing.assert_allclose(scales.scale.numpy(), expected.scale, rtol=1e-12)


@pytest.mark.parametrize("portable", [False, True])
@each(LEARNED)
def test_gradients_equal_autograd_through_the_textbook_formula(grid, bits, portable):
    rng = np.random.default_rng(ALL.index((grid, bits)))
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, portable)
    weight, grad = torch.from_numpy(rng.normal(size=(12, 40))), torch.from_numpy(rng.normal(size=(12, 40)))
    learned = [torch.from_numpy(parameter) for parameter in learned_for(quantizer, 12, rng)]

    theirs, ours = ([t.clone().requires_grad_() for t in (weight, *learned)] for _ in range(2))
    expected = textbook(grid, bits, theirs[0], portable, *theirs[1:])
    expected.backward(grad)
    value, _ = quantizer.fake_quantize(*ours)
    value.backward(grad)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert (ours[0].grad == 0).any() and (ours[0].grad != 0).any(), "some weights are clipped, some are not"


@each(ALL)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), double=st.booleans())
def test_value_is_the_dequantized_codes_in_every_bit(grid, bits, data, double):
    quantizer, weight, learned, _, _ = data.draw(cases(grid, bits))
    dtype = torch.float64 if double else torch.float32
    w, parameters = torch.from_numpy(weight).to(dtype), [torch.from_numpy(parameter).to(dtype) for parameter in learned]
    value, scales = quantizer.fake_quantize(w, *parameters)
    codes = quantizer.quantize(w, scales)
    levels = quantizer.levels
    assert codes.dtype == torch.int8 and codes.shape == w.shape and codes.amin() >= levels.low and codes.amax() <= levels.high
    assert value.dtype == scales.scale.dtype == dtype and (scales.scale > 0).all()
    for read_back in (quantizer.dequantize(codes, scales.scale, scales.zero_point), quantizer.value(w, quantizer.scales(w, *parameters))):
        assert read_back.numpy().tobytes() == value.numpy().tobytes()
    assert (value + 0.0).numpy().tobytes() == value.numpy().tobytes(), "no -0"
    if quantizer.portable:
        assert torch.equal(scales.scale.half().to(dtype), scales.scale) and torch.equal(scales.scale.bfloat16().to(dtype), scales.scale)


def forward_and_backward(quantizer, dtype, weight, learned, grad):
    """(value, codes, scales, [gradients])."""
    w, *parameters = (torch.from_numpy(a).to(dtype).requires_grad_() for a in (weight, *learned))
    value, scales = quantizer.fake_quantize(w, *parameters)
    value.backward(torch.from_numpy(grad).to(dtype))
    return value.detach(), quantizer.quantize(w.detach(), scales), scales.scale, [t.grad for t in (w, *parameters)]


@pytest.mark.parametrize("chunk", [1, 7, 100])
@each(ALL)
def test_pieces_change_nothing(grid, bits, chunk, monkeypatch):
    rng = np.random.default_rng(chunk)
    for granularity, group_size, row_axis in [("per_tensor", None, 0), ("per_row", None, 1), ("per_group", 3, 0), ("per_group", 3, 1)]:
        quantizer = WeightQuantizer(grid, bits, granularity, group_size, row_axis, True)
        weight, grad = rng.normal(size=(2, 9, 12)), rng.normal(size=(2, 9, 12))
        learned = learned_for(quantizer, quantizer.num_scales(weight.shape), rng)
        whole, whole64 = (forward_and_backward(quantizer, dtype, weight, learned, grad) for dtype in (torch.float32, torch.float64))
        with monkeypatch.context() as patch:
            patch.setattr(grid_module, "CHUNK_ELEMENTS", chunk)
            pieces, pieces64 = (forward_and_backward(quantizer, dtype, weight, learned, grad) for dtype in (torch.float32, torch.float64))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(pieces[:3], whole[:3], strict=True))
        torch.testing.assert_close(pieces64[3], whole64[3], rtol=1e-12, atol=1e-12)


@each(ALL)
def test_scale_does_not_depend_on_the_order_of_the_weight(grid, bits):
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))  # pieces of it are summed on their own
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(grid, bits, "per_tensor", None, 0, False)
    learned = [torch.ones(1) for _ in quantizer.learned]
    scales, shuffled = (quantizer.scales(w, *learned) for w in (weight, weight.flatten()[order].reshape(700, 300)))
    assert torch.equal(scales.scale, shuffled.scale) and torch.equal(scales.step, shuffled.step)


@each(ALL)
def test_experts_are_quantized_like_each_matrix_alone(grid, bits):
    rng = np.random.default_rng(0)
    for granularity, group_size, row_axis in [("per_tensor", None, 1), ("per_row", None, 0), ("per_row", None, 1), ("per_group", 4, 0), ("per_group", 4, 1)]:
        quantizer = WeightQuantizer(grid, bits, granularity, group_size, row_axis, True)
        weight, grad = torch.from_numpy(rng.normal(size=(3, 8, 12))), torch.from_numpy(rng.normal(size=(3, 8, 12)))
        learned = [torch.from_numpy(a) for a in learned_for(quantizer, quantizer.num_scales((3, 8, 12)), rng)]
        stack = [t.clone().requires_grad_() for t in (weight, *learned)]
        value, scales = quantizer.fake_quantize(*stack)
        value.backward(grad)
        for i in range(3):
            alone = [weight[i].clone().requires_grad_(), *(p.view(3, -1)[i].clone().requires_grad_() for p in learned)]
            alone_value, alone_scales = quantizer.fake_quantize(*alone)
            alone_value.backward(grad[i])
            assert torch.equal(value[i], alone_value) and torch.equal(scales.scale.view(3, -1)[i], alone_scales.scale)
            assert torch.equal(stack[0].grad[i], alone[0].grad)
            for ours, theirs in zip(stack[1:], alone[1:], strict=True):
                torch.testing.assert_close(ours.grad.view(3, -1)[i], theirs.grad, rtol=1e-12, atol=1e-12)


def test_number_of_codes_at_each_width():
    counts = {(grid, bits): GRIDS[grid].levels(bits).count for grid, bits in ALL}
    symmetric = {"ternary": 3, 2: 3, 3: 7, 4: 15, 8: 255}
    for grid in ("dynamic", "twn", "minmax", "pact", "laq", "absmean"):
        assert all(counts[grid, bits] == symmetric[bits] for bits in BITS_OF_GRID[grid])
    for grid in ("minmax_affine", "affine", "lsq"):
        assert all(counts[grid, bits] == (3 if bits == "ternary" else 2**bits) for bits in BITS_OF_GRID[grid])
    assert [counts["mean43", bits] for bits in (1, "ternary", 2)] == [2, 3, 3] and [counts["seq", bits] for bits in ("ternary", 2)] == [3, 4]
    assert (Levels(-2, 1, 0.5).largest, Levels(-8, 7).largest, Levels(-1, 0, 0.5).largest) == (1.5, 8, 0.5)


def test_order_of_the_scales_is_that_of_the_weight():
    weight = torch.arange(1.0, 25).reshape(2, 3, 4)

    def scales(row_axis, group_size=None, granularity="per_group"):
        return WeightQuantizer("minmax", "ternary", granularity, group_size, row_axis, False).scales(weight).scale.tolist()

    assert scales(0, granularity="per_tensor") == [12, 24]
    assert scales(0, granularity="per_row") == [4, 8, 12, 16, 20, 24] and scales(1, granularity="per_row") == [9, 10, 11, 12, 21, 22, 23, 24]
    assert scales(0, 2) == list(range(2, 25, 2))
    assert scales(1, 1) == list(range(1, 25))  # [groups, rows]: rows last
    assert scales(1, 3) == [9, 10, 11, 12, 21, 22, 23, 24]


@given(st.floats(2.0**-14, 65280.0, width=32))
@settings(deadline=None)
def test_snapped_scales_are_exact_in_every_format_and_nearest(value):
    scale = torch.tensor([value], dtype=torch.float32)
    snapped = snap(scale)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(snapped.to(dtype).float(), snapped)
    assert torch.equal(snap(snapped), snapped) and torch.equal(snap(scale.double()), snapped.double())
    assert abs(snapped.item() - value) <= math.ldexp(1, math.frexp(value)[1] - 9)  # half of the last of 8 bits


def test_snap_rounds_ties_to_even_and_clamps():
    assert snap(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1.0, 1 + 2 * 2**-7]
    assert snap(torch.tensor([0.0, -3.0, 1e-9, 1e9, 65500.0])).tolist() == [2.0**-14] * 3 + [65280.0] * 2
    assert WeightQuantizer("lsq", 4, "per_row", None, 0, False).settle(torch.tensor([-1.0, 0.0, 0.3])).tolist() == [TINY, TINY, torch.tensor(0.3).item()]


@pytest.mark.parametrize("portable", [True, False])
@each(LEARNED)
def test_what_is_learned_recovers_from_below_zero(grid, bits, portable):
    quantizer = WeightQuantizer(grid, bits, "per_tensor", None, 0, portable)
    weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    learned = [torch.tensor([-0.1], requires_grad=True), *(torch.zeros(1, requires_grad=True) for _ in quantizer.learned[1:])]
    value, scales = quantizer.fake_quantize(weight, *learned)
    (value - weight).square().sum().backward()
    assert scales.scale.item() == (SMALLEST_SCALE if portable else TINY) and learned[0].grad.item() < 0  # a step of descent raises it


@each(LEARNED)
def test_gradients_are_finite_where_a_learned_value_is_below_zero_and_weights_are_large(grid, bits):
    quantizer = WeightQuantizer(grid, bits, "per_tensor", None, 0, False)
    weight = torch.tensor([[5.0, -6.0, 0.5, 0.1]], requires_grad=True)  # w / s is infinite
    learned = [torch.tensor([-0.1], requires_grad=True), *(torch.zeros(1, requires_grad=True) for _ in quantizer.learned[1:])]
    value, _ = quantizer.fake_quantize(weight, *learned)
    (value - weight).square().sum().backward()
    assert value.isfinite().all() and all(t.grad.isfinite().all() for t in (weight, *learned))


@pytest.mark.parametrize("portable", [True, False])
@each(ALL)
def test_zero_weight_has_the_smallest_levels_and_finite_gradients(grid, bits, portable):
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, portable)
    weight, learned = torch.zeros(3, 4, requires_grad=True), [torch.full((3,), 1e-9, requires_grad=True) for _ in quantizer.learned]
    value, scales = quantizer.fake_quantize(weight, *learned)
    value.sum().backward()
    assert (scales.scale > 0).all() and (value.abs() <= quantizer.levels.offset * scales.scale[:, None]).all()
    assert torch.equal(weight.grad, torch.ones(3, 4)) and all(t.grad.isfinite().all() for t in learned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each(ALL)
def test_narrow_weights_are_quantized_in_fp32_and_get_gradients_of_their_own_dtype(grid, bits, dtype):
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, True)
    rng = np.random.default_rng(0)
    narrow = torch.from_numpy(rng.normal(size=(6, 32))).to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    learned = [torch.from_numpy(a).float() for a in learned_for(quantizer, 6, rng)]
    grad = torch.from_numpy(rng.normal(size=(6, 32))).float()
    grads = []
    for weight in (narrow, wide):
        parameters = [t.clone().requires_grad_() for t in learned]
        value, scales = quantizer.fake_quantize(weight, *parameters)
        value.backward(grad)
        assert value.dtype == scales.scale.dtype == torch.float32 and weight.grad.dtype == weight.dtype
        grads.append((value.detach(), quantizer.quantize(weight.detach(), scales), weight.grad.to(dtype), *(t.grad for t in parameters)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


@each(ALL)
def test_gradient_that_is_broadcast_equals_one_that_is_not(grid, bits):
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 1, True)
    rng = np.random.default_rng(0)
    tensors = [torch.from_numpy(rng.normal(size=(6, 4))), *(torch.from_numpy(a) for a in learned_for(quantizer, 4, rng))]
    broadcast, full = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    quantizer.fake_quantize(*broadcast)[0].sum().backward()
    quantizer.fake_quantize(*full)[0].backward(torch.ones(6, 4, dtype=torch.float64))
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in zip(broadcast, full, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each(ALL)
def test_backward_keeps_nothing_dense_but_the_weight(grid, bits, dtype):
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, True)
    weight = torch.randn(16, 64).to(dtype).requires_grad_()
    learned = [torch.ones(16, requires_grad=True) for _ in quantizer.learned]
    value, scales = quantizer.fake_quantize(weight, *learned)
    node = value.grad_fn
    assert [t.untyped_storage().data_ptr() for t in node.saved_tensors] == [weight.untyped_storage().data_ptr()]

    def tensors(found):
        if isinstance(found, torch.Tensor):
            return [found]
        return [t for item in found for t in tensors(item)] if isinstance(found, tuple | list) else []

    kept = {name: tensors(attribute) for name, attribute in vars(node).items()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for found in kept.values() for t in found}
    assert kept["scales"] and sum(storages.values()) <= 4 * 4 * 16, "at most four numbers for each scale"


@pytest.mark.parametrize(("shape", "row_axis"), [((6, 96), 0), ((96, 6), 1), ((2, 6, 96), 0), ((2, 96, 6), 1)])
def test_group_size_that_does_not_divide_is_refused(shape, row_axis):
    quantizer = WeightQuantizer("minmax", 4, "per_group", 128, row_axis, True)
    with pytest.raises(ConfigError, match=r"h\.0\.mlp\.weight has 96 inputs, which a group_size of 128 does not divide\. Set it to 96, or use per_row\."):
        quantizer.num_scales(shape, "h.0.mlp.weight")
    assert WeightQuantizer("minmax", 4, "per_group", 32, row_axis, True).num_scales(shape) == math.prod(shape) // 32


@pytest.mark.parametrize("grid", ["pact", "lsq", "dynamic"])
def test_a_weight_that_lies_on_the_clip_counts_as_clipped(grid):
    """As the papers have it (PACT eq. 3, LSQ eq. 3: v <= -Q_N, v >= Q_P); a clip that starts where nothing is clipped lies on the largest weight."""
    weight, learned = torch.tensor([[-1.0, 0.5, 1.0, 1.5]], requires_grad=True), torch.ones(1, requires_grad=True)
    value, scales = WeightQuantizer(grid, "ternary", "per_row", None, 0, False).fake_quantize(weight, learned)
    value.backward(torch.ones_like(value))
    assert scales.scale.item() == 1.0 and weight.grad.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    if grid == "pact":
        assert learned.grad.item() == 1.0  # signs of -1, 1 and 1.5
