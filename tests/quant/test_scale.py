import pytest
import torch

from dqtrain.errors import ConfigError
from dqtrain.quant.grid import dynamic_scale, fake_quantize
from dqtrain.quant.scale import initial_gamma, round_to_nearest


def error(weight, gamma, bits, granularity, row_axis):
    scale = dynamic_scale(weight, gamma, bits, granularity, row_axis, True)
    difference = (fake_quantize(weight, scale, bits, row_axis) - weight).double().square()
    return difference.sum().reshape(1) if granularity == "per_tensor" else difference.sum(1 - row_axis)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
@pytest.mark.parametrize("row_axis", [0, 1])
def test_gamma_is_the_best_of_a_dense_grid(bits, granularity, row_axis):
    # Rows of a few elements would have a jagged error, whose least point only luck finds.
    weight = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 0, 6)[:, None]
    weight = weight if row_axis == 0 else weight.T.contiguous()
    found = initial_gamma(weight, bits, granularity, row_axis, True)
    assert found.dtype == torch.float32 and found.shape == (1 if granularity == "per_tensor" else weight.shape[row_axis],)
    grid = torch.stack([error(weight, torch.full_like(found, g), bits, granularity, row_axis) for g in torch.linspace(0.5, 20, 800).tolist()])
    assert (error(weight, found, bits, granularity, row_axis) <= grid.min(0).values * 1.02).all()


@pytest.mark.parametrize(("bits", "expected"), [(2, 1.55), (4, 3.1), (8, 4.9)])
def test_gamma_of_gaussian_weights(bits, expected):
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    assert initial_gamma(weight, bits, "per_tensor", 0, False).item() == pytest.approx(expected, rel=0.03)


def test_chunks_do_not_change_gamma():
    weight = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))  # two chunks
    rows = torch.cat([initial_gamma(weight[i : i + 100], 4, "per_row", 0, True) for i in range(0, 700, 100)])
    assert torch.equal(initial_gamma(weight, 4, "per_row", 0, True), rows)
    assert torch.equal(initial_gamma(weight.T, 4, "per_row", 1, True), rows)


def test_zero_and_constant_rows():
    weight = torch.stack([torch.zeros(8), torch.full((8,), -0.375), torch.full((8,), 0.5)])
    gamma = initial_gamma(weight, 2, "per_row", 0, True)
    assert gamma.isfinite().all() and gamma[0] == 1
    assert torch.equal(fake_quantize(weight, dynamic_scale(weight, gamma, 2, "per_row", 0, True), 2), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="h.0.attn.weight holds NaN or infinite"):
        initial_gamma(torch.tensor([[1.0, value]]), 2, "per_row", 0, True, "h.0.attn.weight")


def test_round_to_nearest_rules():
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))

    def relative(bits, kind):
        return ((round_to_nearest(weight, bits, "per_row", 0, kind) - weight).square().sum() / weight.square().sum()).item()

    # Relative errors of ternary grids on Gaussian weights: 0.1905 at best, 0.200 at 4/3 mean|w|; minmax keeps only the extremes.
    assert relative(2, "mse") == pytest.approx(0.19, abs=0.01) and relative(2, "mse") < relative(2, "mean_abs") == pytest.approx(0.20, abs=0.01)
    assert relative(2, "minmax") > 0.4
    assert relative(8, "minmax") < 1e-4
    with pytest.raises(ConfigError, match="mean_abs is a rule for 2 bits, but bits is 4"):
        round_to_nearest(weight, 4, "per_row", 0, "mean_abs")
