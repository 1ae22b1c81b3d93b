"""Each term against a float64 reference written by hand, gradient included."""

import itertools
import math
from collections import Counter

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from dqtrain.distill import terms


def test_task_is_minus_log_probability():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 6, 2, 2])
    found = terms.task(x, labels)
    y = x.tolist()
    expected = [-math.log(math.exp(y[i][label]) / sum(math.exp(v) for v in y[i])) for i, label in enumerate(labels.tolist())]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    one_hot = torch.nn.functional.one_hot(labels, 7)
    assert torch.allclose(gradient, x.softmax(-1) - one_hot, atol=1e-12)


def by_hand(name, s, t, temperature, beta):
    """Value [n] and gradient for s [n, vocabulary] of a divergence, in numpy and float64."""
    p, q = (np.exp(a / temperature) / np.exp(a / temperature).sum(-1, keepdims=True) for a in (t, s))
    m = beta * p + (1 - beta) * q
    forward, reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    to_mean = (q * np.log(q / m)).sum(-1)
    # d/ds_j of sum_v f(q_v) is q_j (f'(q_j) - sum_v q_v f'(q_v)) / T
    of_forward, of_reverse = q - p, q * (np.log(q / p) - reverse[:, None])
    value, gradient = {
        "cross_entropy": (-(p * np.log(q)).sum(-1), of_forward),
        "forward_kl": (forward, of_forward),
        "reverse_kl": (reverse, of_reverse),
        "jensen_shannon": (beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * to_mean, (1 - beta) * q * (np.log(q / m) - to_mean[:, None])),
        "confidence_kl": (beta * reverse + (1 - beta) * forward, beta * of_reverse + (1 - beta) * of_forward),
        "mse": (((s - t) ** 2).mean(-1), 2 * (s - t) / s.shape[1]),
    }[name]
    return (value, gradient) if name == "mse" else (value * temperature**2, gradient * temperature)


def call(name, s, t, temperature=1.0, beta=0.3):
    betas = {"beta": beta} if name in ("jensen_shannon", "confidence_kl") else {}
    return getattr(terms, name)(s, t, **betas) if name == "mse" else getattr(terms, name)(s, t, **betas, temperature=temperature)


DIVERGENCES = ("cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "confidence_kl", "mse")
KULLBACK_LEIBLER = ("forward_kl", "reverse_kl", "jensen_shannon", "confidence_kl")


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_and_its_gradient_are_those_derived_by_hand(name, beta, temperature):
    torch.manual_seed(0)
    s, t = (2 * torch.randn(5, 9, dtype=torch.float64) for _ in range(2))
    s.requires_grad_(), t.requires_grad_()
    found = call(name, s, t, temperature, beta)
    value, gradient = by_hand(name, s.detach().numpy(), t.detach().numpy(), temperature, beta)
    assert found.shape == (5,) and np.allclose(found.detach().numpy(), value, rtol=0, atol=1e-10)
    scale = torch.rand(5, dtype=torch.float64)
    of_student, of_teacher = torch.autograd.grad(found @ scale, [s, t], allow_unused=True)
    assert np.allclose(of_student.numpy(), gradient * scale.numpy()[:, None], rtol=0, atol=1e-10)
    assert of_teacher is None  # a constant


@pytest.mark.parametrize("name", KULLBACK_LEIBLER)
def test_a_student_equal_to_the_teacher_is_at_0_with_no_gradient(name):
    s = torch.randn(4, 8, dtype=torch.float64)
    value = call(name, s.requires_grad_(), s.detach() + 5.0, 2.0)  # a shift of all logits is no difference
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), s)[0].abs().max() < 1e-12


@hypothesis.given(
    seed=strategies.integers(0, 2**31), beta=strategies.floats(0.01, 0.99), temperature=strategies.floats(0.3, 5.0), scale=strategies.floats(0.1, 20.0)
)
def test_how_the_divergences_relate(seed, beta, temperature, scale):
    draw = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(3, 7, dtype=torch.float64, generator=draw) for _ in range(2))
    square = temperature**2
    forward, reverse = terms.forward_kl(s, t, temperature), terms.reverse_kl(s, t, temperature)
    assert torch.allclose(reverse, terms.forward_kl(t, s, temperature))
    assert torch.allclose(forward, terms.cross_entropy(s, t, temperature) - square * terms.entropy(t / temperature))
    assert torch.allclose(terms.confidence_kl(s, t, beta, temperature), beta * reverse + (1 - beta) * forward)
    between = terms.jensen_shannon(s, t, beta, temperature)
    assert torch.allclose(between, terms.jensen_shannon(t, s, 1 - beta, temperature))
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (between >= -1e-12).all() and (between <= square * most + 1e-12).all()
    assert (forward >= -1e-12).all() and (reverse >= -1e-12).all()


def test_jensen_shannon_becomes_each_kl_in_its_limit():
    torch.manual_seed(0)
    s, t = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(terms.jensen_shannon(s, t, 1e-7) / 1e-7, terms.forward_kl(s, t), rtol=1e-4)
    assert torch.allclose(terms.jensen_shannon(s, t, 1 - 1e-7) / 1e-7, terms.reverse_kl(s, t), rtol=1e-4)


@pytest.mark.parametrize("name", ["task", *DIVERGENCES])
def test_huge_logits_in_fp32_stay_finite_and_right(name):
    torch.manual_seed(0)
    s = 1e4 * torch.randn(6, 50)
    t = torch.cat([1e4 * torch.randn(4, 50), s[4:5], -s[5:6]])  # also full agreement, and utter disagreement

    def value_and_gradient(s, t):
        s = s.requires_grad_()
        value = terms.task(s, t.argmax(-1)) if name == "task" else call(name, s, t)
        return value, torch.autograd.grad(value.sum(), s)[0]

    for found, expected in zip(value_and_gradient(s, t), value_and_gradient(s.detach().double(), t.double()), strict=True):
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-3)  # fp32 has no finer steps at 2e4


def test_half_precision_is_widened_and_no_rows_are_no_values():
    s, t, labels = torch.randn(4, 9).bfloat16(), torch.randn(4, 9).bfloat16(), torch.tensor([0, 8, 3, 3])
    for name in DIVERGENCES:
        assert call(name, s, t).dtype == torch.float32 and torch.equal(call(name, s, t), call(name, s.float(), t.float()))
        assert call(name, s[:0], t[:0]).shape == (0,)
    assert torch.equal(terms.task(s, labels), terms.task(s.float(), labels))
    for weight in (terms.tsld(t, labels), terms.entropy(t), terms.confidence(t)):
        assert weight.dtype == torch.float32


def test_token_weights_are_those_derived_by_hand():
    torch.manual_seed(0)
    t, labels = 3 * torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    t.requires_grad_()
    p = np.exp(t.detach().numpy())
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(p[np.arange(6), labels.numpy()])
    weights = {"tsld": terms.tsld(t, labels), "entropy": terms.entropy(t), "confidence": terms.confidence(t)}
    by_hand = {"tsld": np.exp(loss / 10), "entropy": -(p * np.log(p)).sum(-1), "confidence": p.max(-1)}
    for name, weight in weights.items():
        assert not weight.requires_grad and (weight >= 0).all()
        assert np.allclose(weight.numpy(), by_hand[name], rtol=0, atol=1e-10)
    assert torch.allclose(weights["tsld"] / weights["tsld"].sum(), torch.softmax(torch.from_numpy(loss) / 10, 0))  # as in TSLD's code


def test_token_weights_of_huge_logits_stay_finite():
    t = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    assert terms.tsld(t, torch.tensor([1, 0])).tolist() == pytest.approx([math.exp(50)] * 2, rel=1e-5)
    assert terms.tsld(t, torch.tensor([0, 1])).tolist() == pytest.approx([1.0, math.exp(math.log(2) / 10)], rel=1e-5)
    assert terms.entropy(t).tolist() == pytest.approx([0.0, math.log(2)], rel=1e-5)
    assert terms.confidence(t).tolist() == pytest.approx([1.0, 0.5], rel=1e-5)


def sampled(s, draws, k):
    """`sampled_cross_entropy` of the drawn ids [n, draws], each id once and as wide as `k`, filled up with share 0."""
    ids, shares = torch.zeros(len(s), k, dtype=torch.long), s.new_zeros(len(s), k)
    for i, row in enumerate(draws.tolist()):
        for j, (word, count) in enumerate(Counter(row).items()):
            ids[i, j], shares[i, j] = word, count / len(row)
    return terms.sampled_cross_entropy(s, ids, shares)


def test_sampled_cross_entropy_and_its_gradient_are_those_derived_by_hand():
    torch.manual_seed(0)
    s, ids = (3 * torch.randn(5, 9, dtype=torch.float64)).requires_grad_(), torch.randint(9, (5, 4))  # an id may come twice
    shares = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    found = terms.sampled_cross_entropy(s, ids, shares)
    scale = torch.rand(5, dtype=torch.float64)
    gradient, of_shares = torch.autograd.grad(found @ scale, [s, shares], allow_unused=True)
    q = np.exp(s.detach().numpy())
    q /= q.sum(-1, keepdims=True)
    for i in range(5):
        value, slope = 0.0, np.zeros(9)
        for word, share in zip(ids[i].tolist(), shares[i].tolist(), strict=True):
            value -= share * math.log(q[i, word])
            slope += share * (q[i] - np.eye(9)[word])
        assert found[i].item() == pytest.approx(value, abs=1e-12)
        assert np.allclose(gradient[i].numpy(), slope * scale[i].item(), rtol=0, atol=1e-12)
    assert of_shares is None


def test_sampled_cross_entropy_is_cross_entropy_on_average_over_all_that_could_be_drawn():
    torch.manual_seed(0)
    s, t = (torch.randn(1, 4, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    p = t.softmax(-1)[0]
    draws = torch.tensor(list(itertools.product(range(4), repeat=3)))  # every outcome of three draws, and how likely it is
    likelihood = p[draws].prod(-1)
    mean = likelihood @ sampled(s.expand(64, 4), draws, 3)
    full = terms.cross_entropy(s, t)
    assert mean.item() == pytest.approx(full.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, s)[0] for value in (mean, full[0])]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def test_sampled_cross_entropy_of_all_ids_is_exact_and_of_the_likeliest_ones_less():
    torch.manual_seed(0)
    s, t = (torch.randn(6, 8, dtype=torch.float64) for _ in range(2))
    shares, ids = t.softmax(-1).sort(descending=True)
    assert torch.allclose(terms.sampled_cross_entropy(s, ids, shares), terms.cross_entropy(s, t), rtol=0, atol=1e-12)
    assert (terms.sampled_cross_entropy(s, ids[:, :3], shares[:, :3]) < terms.cross_entropy(s, t)).all()
    half = terms.sampled_cross_entropy(s.bfloat16(), ids, shares.half())
    assert half.dtype == torch.float32 and torch.allclose(half.double(), terms.cross_entropy(s, t), rtol=0.02)
    huge = terms.sampled_cross_entropy(1e4 * s.float(), ids, shares.float())
    assert torch.allclose(huge.double(), terms.cross_entropy(1e4 * s, t), rtol=1e-5)
    assert terms.sampled_cross_entropy(s[:0], ids[:0], shares[:0]).shape == (0,)
