import math

import numpy as np
import pytest
import torch
from reference import reference, scale_of_element

from dqtrain.config import BITS_OF_GRID
from dqtrain.errors import ConfigError
from dqtrain.quant import grid as grid_module
from dqtrain.quant.grid import GRIDS, SMALLEST_SCALE, WeightQuantizer
from dqtrain.quant.scale import initial_learned

ALL = [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths]
LEARNED = [(grid, bits) for grid, bits in ALL if GRIDS[grid].learned]


def each(pairs):
    return pytest.mark.parametrize(("grid", "bits"), pairs, ids=[f"{grid}-{bits}" for grid, bits in pairs])


def squared_error(weight, quantizer, *learned):
    """Of each row of outputs, or of the whole weight; float64, [scales]."""
    difference = (quantizer.fake_quantize(weight, *learned)[0] - weight).double().square()
    return difference.sum().reshape(1) if quantizer.granularity == "per_tensor" else difference.sum(1 - quantizer.row_axis)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laplace(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).exponential_(generator=generator) * torch.empty(shape).bernoulli_(generator=generator).mul_(2).sub_(1)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
@pytest.mark.parametrize("draw", [normal, laplace])
@each(LEARNED)
def test_error_is_the_least_of_a_dense_search(grid, bits, draw, granularity):
    # Rows of fewer elements would have a jagged error, whose least point only luck finds: the more so, the more levels.
    row_axis = bits == 4
    weight = draw(3, 40_000 if bits == 8 else 8000, seed=1) * torch.tensor([0.02, 0.3, 1.0])[:, None]
    weight = weight.T.contiguous() if row_axis else weight
    quantizer = WeightQuantizer(grid, bits, granularity, None, int(row_axis), True)
    found, *zero_points = initial_learned(weight, quantizer)
    assert found.dtype == torch.float32 and found.shape == (quantizer.num_scales(weight.shape),)
    widest = weight.abs().amax() if granularity == "per_tensor" else weight.abs().amax(1 - int(row_axis))
    # A learned value of 1 makes a scale of `unit`: scales from what clips nothing (with levels on one side alone) down to 1 % of it.
    unit = quantizer.scales(weight, found, *zero_points).unit
    candidates = [2 * widest / max(quantizer.levels.high, 1.5) / unit * 0.01 ** (i / 299) for i in range(300)]
    least = torch.stack([squared_error(weight, quantizer, candidate, *zero_points) for candidate in candidates]).amin(0)
    assert (squared_error(weight, quantizer, found, *zero_points) <= 1.02 * least).all()


GAUSS, LAPLACE = normal(2000, 1000), laplace(2000, 1000)

FIGURES = [
    # grid, bits, relative squared error of Gaussian and of Laplace weights: the [CALC] lines of the methods dossier
    ("dynamic", "ternary", 0.1905, 0.2645),  # the least of any ternary grid
    ("pact", 2, 0.1905, 0.2645),
    ("lsq", "ternary", 0.1905, 0.2645),
    ("seq", "ternary", 0.1905, 0.2645),
    ("laq", "ternary", 0.1905, 0.2645),
    ("twn", "ternary", 0.192, 0.283),
    ("mean43", "ternary", 0.200, 0.315),
    ("absmean", "ternary", 0.264, 0.393),
    ("seq", 2, 0.119, 0.196),
]
GAMMAS = [("dynamic", 2, 1.55, 2.0), ("dynamic", 4, 3.1, 4.8), ("dynamic", 8, 4.9, 9.8)]  # where its error is least


@pytest.mark.parametrize(("grid", "bits", "gauss", "laplace"), FIGURES + GAMMAS)
def test_figures_of_gaussian_and_laplace_weights(grid, bits, gauss, laplace):
    quantizer = WeightQuantizer(grid, bits, "per_tensor", None, 0, False)
    for weight, figure in ((GAUSS, gauss), (LAPLACE, laplace)):
        learned = initial_learned(weight, quantizer)
        error = squared_error(weight, quantizer, *learned).item()
        if (grid, bits, gauss, laplace) in FIGURES:
            assert error / weight.double().square().sum().item() == pytest.approx(figure, rel=0.005)
        else:
            assert error <= 1.005 * squared_error(weight, quantizer, torch.tensor([figure])).item()
            # The error is flat around its least value, in 8 bits above all, so that candidates a few percent apart find it.
            assert learned[0].item() == pytest.approx(figure, rel=0.025 if bits < 8 else 0.05)


@pytest.mark.parametrize("bits", BITS_OF_GRID["laq"])
@pytest.mark.parametrize("weight", [GAUSS[:200], LAPLACE[:200]], ids=["gauss", "laplace"])
def test_laq_minimises_the_squared_error(weight, bits):
    laq, searched = (WeightQuantizer(grid, bits, "per_tensor", None, 0, False) for grid in ("laq", "dynamic"))
    assert squared_error(weight, laq).item() <= (1.5 if bits == 8 else 1.05) * squared_error(weight, searched, *initial_learned(weight, searched)).item()


@each(LEARNED)
def test_error_found_is_that_of_the_paper_equation(grid, bits):
    """The search and the papers' forward, in float64, agree on what the error is."""
    quantizer = WeightQuantizer(grid, bits, "per_group", 50, 0, True)
    weight = normal(4, 100).double()
    learned = initial_learned(weight, quantizer)
    assert [t.dtype for t in learned] == [torch.float32] * len(quantizer.learned)
    index = scale_of_element((4, 100), "per_group", 0, 50)
    expected = reference(grid, bits, weight.numpy(), [t.double().numpy() for t in learned], index, True, np.ones((4, 100)))
    np.testing.assert_allclose(quantizer.value(weight, quantizer.scales(weight, *learned)).numpy(), expected.value, rtol=1e-6, atol=1e-12)
    assert np.square(expected.value - weight.numpy()).sum() < (0.25 if bits in ("ternary", 2) else 0.06) * weight.square().sum()


@each(LEARNED)
def test_pieces_and_stacked_experts_do_not_change_what_is_found(grid, bits, monkeypatch):
    for granularity, group_size, row_axis in [("per_tensor", None, 0), ("per_row", None, 1), ("per_group", 10, 0), ("per_group", 10, 1)]:
        quantizer = WeightQuantizer(grid, bits, granularity, group_size, row_axis, True)
        weight = normal(3, 20, 30)
        whole = initial_learned(weight, quantizer)
        with monkeypatch.context() as patch:
            patch.setattr(grid_module, "CHUNK_ELEMENTS", 70)
            pieces = initial_learned(weight, quantizer)
        alone = [torch.cat(vectors) for vectors in zip(*(initial_learned(matrix, quantizer) for matrix in weight), strict=True)]
        for ours, one_by_one, theirs in zip(pieces, alone, whole, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(one_by_one, theirs, rtol=1e-6, atol=0.0)  # powers of a longer vector may round otherwise


def test_grids_that_learn_nothing_start_with_nothing():
    for grid, bits in ALL:
        quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, True)
        assert len(initial_learned(normal(3, 8), quantizer)) == len(quantizer.learned)


@pytest.mark.parametrize("portable", [True, False])
@each(LEARNED)
def test_constant_rows_are_met(grid, bits, portable):
    weight = torch.tensor([-0.375, 0.5, 3.0])[:, None].expand(3, 8).contiguous()
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, portable)
    value, _ = quantizer.fake_quantize(weight, *initial_learned(weight, quantizer))
    torch.testing.assert_close(value, weight, rtol=2**-7 if portable else 1e-5, atol=0.0)


@each(LEARNED)
def test_error_is_no_more_than_where_nothing_is_clipped(grid, bits):
    """A candidate of the first round, which the second one may not lose, however jagged the error of a few weights is."""
    weight = torch.cat([torch.tensor([-0.375, 0.5, 3.0])[:, None].expand(3, 8), normal(400, 8)])
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, True)
    found, *zero_points = initial_learned(weight, quantizer)
    unit = quantizer.scales(weight, found, *zero_points).unit
    levels = quantizer.levels
    span = weight.amax(1).clamp_min(0) - weight.amin(1).clamp_max(0)
    widest = span / (levels.count - 1) if zero_points else weight.abs().amax(1) / (levels.high + levels.offset)
    unclipped = squared_error(weight, quantizer, widest / unit, *zero_points)
    assert (squared_error(weight, quantizer, found, *zero_points) <= unclipped * (1 + 1e-6)).all()


@pytest.mark.parametrize("portable", [True, False])
@each(LEARNED)
def test_zero_rows_get_the_smallest_scale_and_stay_next_to_zero(grid, bits, portable):
    weight = torch.stack([torch.zeros(8), torch.linspace(-1, 1, 8)])  # a padding token's row, which seq with 2 bits has no level 0 for
    quantizer = WeightQuantizer(grid, bits, "per_row", None, 0, portable)
    learned = initial_learned(weight, quantizer)
    assert all(t.isfinite().all() for t in learned)
    value, scales = quantizer.fake_quantize(weight, *learned)
    assert value[0].abs().max() <= SMALLEST_SCALE / 2 and scales.scale[0] <= SMALLEST_SCALE


@each(LEARNED)
def test_values_found_for_zero_rows_are_finite(grid, bits):
    quantizer = WeightQuantizer(grid, bits, "per_group", 4, 1, True)
    learned = initial_learned(torch.zeros(8, 3), quantizer)
    value, scales = quantizer.fake_quantize(torch.zeros(8, 3), *learned)
    assert all(t.isfinite().all() and t.shape == (6,) for t in learned) and (scales.scale > 0).all() and value.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grid", ["dynamic", "affine", "minmax"])
def test_weight_that_is_not_finite_is_refused_by_name(grid, value):
    weight = normal(40, 5000)  # more than one piece
    weight[-1, -1] = value
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.weight holds NaN or infinite values.*Start from a model whose weights are finite"):
        initial_learned(weight, WeightQuantizer(grid, 4, "per_row", None, 0, True), "h.0.attn.weight")


def test_group_size_that_does_not_divide_is_refused_by_name():
    quantizer = WeightQuantizer("lsq", 4, "per_group", 64, 0, True)
    with pytest.raises(ConfigError, match=r"h\.0\.mlp\.weight has 96 inputs, which a group_size of 64 does not divide\. Set it to 48, or use per_row"):
        initial_learned(normal(4, 96), quantizer, "h.0.mlp.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each(LEARNED)
def test_what_is_learned_is_fp32_for_weights_of_any_dtype(grid, bits, dtype):
    weight, quantizer = normal(4, 64).to(dtype), WeightQuantizer(grid, bits, "per_row", None, 0, True)
    found = initial_learned(weight, quantizer)
    assert all(t.dtype == torch.float32 for t in found)
    if dtype != torch.float64:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, initial_learned(weight.float(), quantizer), strict=True))
