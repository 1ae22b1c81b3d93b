"""The figures against plain formulas on whole tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqtrain.config import BITS_OF_GRID
from dqtrain.quant.diagnose import SHADES, Homogeneity, effective_rank, mean_cosine, relative, similarity_picture, weight_statistics
from dqtrain.quant.grid import CHUNK_ELEMENTS, WeightQuantizer
from dqtrain.quant.scale import initial_learned


def prepared(weight, grid="dynamic", bits=2, granularity="per_row", group_size=None, row_axis=0):
    quantizer = WeightQuantizer(grid, bits, granularity, group_size, row_axis, True)
    return quantizer, quantizer.scales(weight, *initial_learned(weight, quantizer))


def spread(flat, weight, quantizer):
    """One value per scale -> one per weight."""
    view = quantizer.blocks.view(weight)
    return quantizer.blocks.spread(flat, view).expand(view.shape).reshape(weight.shape)


@pytest.mark.parametrize("shape, granularity, group_size, row_axis", [
    ((12, 20), "per_tensor", None, 0), ((12, 20), "per_row", None, 1), ((12, 20), "per_group", 5, 0), ((12, 20), "per_group", 4, 1),
    ((3, 8, 10), "per_tensor", None, 0), ((3, 8, 10), "per_row", None, 1), ((700, 500), "per_row", None, 0), ((700, 500), "per_tensor", None, 1),
])  # fmt: skip
@pytest.mark.parametrize("grid, bits", [("dynamic", 2), ("twn", "ternary"), ("seq", 2), ("lsq", 4), ("mean43", 1), ("affine", 3), ("minmax_affine", 8)])
def test_statistics_are_those_of_the_whole_tensors(grid, bits, shape, granularity, group_size, row_axis):
    torch.manual_seed(0)
    weight = torch.randn(shape) + 0.2
    quantizer, scales = prepared(weight, grid, bits, granularity, group_size, row_axis)
    previous = quantizer.quantize(weight + 0.3 * torch.randn(shape), scales)
    found = weight_statistics(weight, quantizer, scales, previous)
    codes, value, levels = quantizer.quantize(weight, scales), quantizer.value(weight, scales), quantizer.levels
    assert torch.equal(found.codes, codes) and found.codes.dtype == torch.int8
    error, norm = (value - weight).double().square().sum(), weight.double().square().sum()
    assert float(found.squared_error) == pytest.approx(float(error), rel=1e-12)
    assert float(found.squared_norm) == pytest.approx(float(norm), rel=1e-12)
    assert found.relative_error == pytest.approx(float(error / norm), rel=1e-12)
    assert found.histogram.tolist() == [int((codes == code).sum()) for code in range(levels.low, levels.high + 1)]
    assert found.histogram.dtype == torch.int64
    shift = levels.offset if scales.zero_point is None else -spread(scales.zero_point, weight, quantizer)
    scale = spread(scales.scale, weight, quantizer)
    outside = (weight > (levels.high + shift) * scale) | (weight < (levels.low + shift) * scale)
    assert found.clip_fraction == int(outside.sum()) / weight.numel()
    assert found.changed_fraction == int((codes != previous).sum()) / weight.numel() > 0
    assert weight_statistics(weight, quantizer, scales).changed_fraction is None
    assert weight_statistics(weight, quantizer, scales, codes).changed_fraction == 0.0


@pytest.mark.parametrize("grid, bits", [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths])
def test_sums_over_weights_are_those_of_one_weight(grid, bits):
    torch.manual_seed(1)
    weight = torch.randn(8, 40)
    quantizer, scales = prepared(weight, grid, bits)
    whole = weight_statistics(weight, quantizer, scales)
    parts = [weight_statistics(weight[rows], *prepared(weight[rows], grid, bits)) for rows in (slice(0, 3), slice(3, 8))]
    for name in ("squared_error", "squared_norm", "histogram", "num_clipped"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), rtol=1e-12, atol=0)


def test_clipping_in_known_places():
    weight = torch.tensor([[-3.0, -1.0, 0.2, 0.6, 1.0, 1.5, 0.0, 2.0]])
    quantizer = WeightQuantizer("lsq", 2, "per_row", None, 0, True)
    found = weight_statistics(weight, quantizer, quantizer.scales(weight, torch.ones(1)))  # levels -2, -1, 0, 1
    assert found.codes.tolist() == [[-2, -1, 0, 1, 1, 1, 0, 1]]
    assert found.histogram.tolist() == [1, 1, 2, 4]
    assert found.clip_fraction == 3 / 8
    assert float(found.squared_error) == pytest.approx(1 + 0.04 + 0.16 + 0.25 + 1, rel=1e-6)


def test_a_weight_of_zeros_has_lost_nothing_unless_there_is_no_level_at_zero():
    weight = torch.zeros(2, 4)
    assert weight_statistics(weight, *prepared(weight)).relative_error == 0.0
    assert weight_statistics(weight, *prepared(weight, "mean43", 1)).relative_error == math.inf
    assert relative(1.0, 4.0) == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_they_are(dtype):
    torch.manual_seed(2)
    weight = torch.randn(30, 40).to(dtype)
    quantizer, scales = prepared(weight)
    found = weight_statistics(weight, quantizer, scales)
    assert torch.equal(found.codes, quantizer.quantize(weight, scales))
    assert float(found.squared_error) == pytest.approx(float((quantizer.value(weight, scales) - weight).double().square().sum()), rel=1e-6)


class _LargestFloat(TorchDispatchMode):
    """Notes the largest storage of floats, or of anything wider than a code, that an operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.int8 and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dense_is_made_but_the_codes(dtype):
    weight = torch.randn(1024, 512).to(dtype)
    quantizer, scales = prepared(weight)
    previous = quantizer.quantize(weight, scales)
    with _LargestFloat() as mode:
        weight_statistics(weight, quantizer, scales, previous)
    assert 0 < mode.largest <= CHUNK_ELEMENTS < weight.numel()


def brute_force_cosine(x):
    rows = [row for row in x.double() if row.norm() > 0]
    pairs = [torch.cosine_similarity(a, b, 0).item() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return sum(pairs) / len(pairs)


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 2**31), st.floats(0, 3))
def test_mean_cosine_is_the_mean_over_pairs(n, width, seed, shared):
    torch.manual_seed(seed)
    x = torch.randn(n, width) + shared
    x[0] *= 1e-3
    assert mean_cosine(x) == pytest.approx(brute_force_cosine(x), abs=1e-9)


def test_mean_cosine_of_known_rows():
    assert mean_cosine(torch.eye(5)) == pytest.approx(0.0, abs=1e-15)
    assert mean_cosine(torch.ones(4, 3) * torch.tensor([[1.0], [2], [3], [1e-30]])) == pytest.approx(1.0)
    assert mean_cosine(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1.0)
    assert mean_cosine(torch.tensor([[1.0, 0], [0, 0], [1, 1]])) == pytest.approx(math.sqrt(0.5))  # zeros are left out
    assert math.isnan(mean_cosine(torch.tensor([[1.0, 0], [0, 0]])))
    assert math.isnan(mean_cosine(torch.tensor([[1.0, math.nan], [0, 1], [1, 1]])))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_effective_rank_is_the_entropy_of_singular_values(n, width, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, width)
    shares = torch.linalg.svdvals(x.double())
    shares = shares / shares.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-float((shares * shares.log()).nan_to_num(0).sum())), rel=1e-5)


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(50, 64)) == pytest.approx(1, abs=1e-9)  # not centred
    torch.manual_seed(0)
    assert effective_rank(torch.randn(300, 1).double() @ torch.randn(1, 256).double()) == pytest.approx(1, abs=1e-9)  # rounding does not add ranks
    assert effective_rank(torch.diag(torch.tensor([1.0, 1, 1, 0]))) == pytest.approx(3)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1]))) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert math.isnan(effective_rank(torch.zeros(3, 4)))
    assert math.isnan(effective_rank(torch.full((3, 4), math.nan)))


def test_homogeneity_of_batches_and_of_ranks_is_that_of_all_rows():
    torch.manual_seed(3)
    x = torch.randn(6, 5, 16) + 1
    x[2, 3] = 0
    rows = x.flatten(0, 1)
    ranks = [Homogeneity(16), Homogeneity(16)]
    for i, batch in enumerate(x):
        ranks[i % 2].add(batch)
    for mine, other in zip(ranks[0].tensors, ranks[1].tensors, strict=True):
        mine += other  # an all-reduce
    assert ranks[0].count.item() == 29
    assert ranks[0].mean_cosine == pytest.approx(mean_cosine(rows), abs=1e-12) == pytest.approx(brute_force_cosine(rows), abs=1e-9)
    assert ranks[0].effective_rank == pytest.approx(effective_rank(rows), rel=1e-9)
    assert all(tensor.dtype == torch.float64 for tensor in ranks[0].tensors)
    assert math.isnan(Homogeneity(4).mean_cosine) and math.isnan(Homogeneity(4).effective_rank)


def test_tables_longer_than_a_piece(monkeypatch):
    x = torch.randn(100, 8)
    whole = mean_cosine(x), effective_rank(x)
    monkeypatch.setattr("dqtrain.quant.diagnose.ROWS_AT_ONCE", 24)
    assert (mean_cosine(x), effective_rank(x)) == pytest.approx(whole, rel=1e-12)


def test_picture():
    alike, different = similarity_picture(torch.ones(9, 4), range(8), 8), similarity_picture(torch.eye(8), range(8), 8)
    assert alike == "\n".join(["█" * 8] * 4)
    # The diagonal is the mean of a pair with itself and one with another.
    assert different == "\n".join(" " * 2 * i + "▒▒" + " " * (6 - 2 * i) for i in range(4))
    blocks = torch.tensor([[1.0, 0]] * 4 + [[0, 1.0]] * 4)
    assert similarity_picture(blocks, range(8), 4) == "██  \n  ██"
    assert similarity_picture(blocks, [0, 4, 1, 5], 4) == "▒▒▒▒\n▒▒▒▒"
    assert similarity_picture(torch.eye(3) * 0, [0, 1], 100) == "  "
    assert similarity_picture(torch.tensor([[1.0], [-1]]), [0, 0, 1, 1], 4) == "██  \n  ██"
    assert set(alike + different) <= {*SHADES, "\n"}
