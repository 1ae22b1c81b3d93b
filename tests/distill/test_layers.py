"""Distances of hidden states and of attention against loops in float64, gradient included; padding changes nothing."""

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from dqtrain.distill import terms

DISTANCES = ("mse", "normalised_mse", "cosine")


def hidden_by_hand(s, t, distance):
    """Distance of two vectors and its gradient for the first."""
    if distance == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s), 2 * (s - t) / len(s)
    of_s, of_t = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
    cosine = sum(a * b for a, b in zip(s, t, strict=True)) / of_s / of_t
    if distance == "cosine":
        return 1 - cosine, -(t / of_t - cosine * s / of_s) / of_s
    return sum((a / of_s - b / of_t) ** 2 for a, b in zip(s, t, strict=True)), -2 * (t / of_t - cosine * s / of_s) / of_s


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
def test_hidden_distance_and_its_gradient_are_those_of_the_loops(distance, shape):
    torch.manual_seed(0)
    s, t = (3 * torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, scale = terms.hidden_distance(s, t, distance), torch.rand(shape[:-1], dtype=torch.float64)
    of_student, of_teacher = torch.autograd.grad((found * scale).sum(), [s, t], allow_unused=True)
    assert found.shape == shape[:-1] and of_student.shape == shape and of_teacher is None
    for at in np.ndindex(*shape[:-1]):
        value, gradient = hidden_by_hand(s.detach().numpy()[at], t.detach().numpy()[at], distance)
        assert found[at].item() == pytest.approx(value, abs=1e-12)
        assert np.allclose(of_student.numpy()[at], gradient * scale[at].item(), rtol=0, atol=1e-12)


def test_how_the_hidden_distances_relate():
    torch.manual_seed(0)
    s, t = torch.randn(20, 7), torch.randn(20, 7)
    cosine, normalised = terms.hidden_distance(s, t, "cosine"), terms.hidden_distance(s, t, "normalised_mse")
    assert torch.allclose(2 * cosine, normalised, atol=1e-5)
    assert torch.allclose(terms.hidden_distance(7 * s, t / 5, "cosine"), cosine, atol=1e-6)  # blind to length
    assert terms.hidden_distance(s, -s, "normalised_mse").tolist() == pytest.approx([4.0] * 20, rel=1e-5)
    for distance in DISTANCES:
        assert terms.hidden_distance(s, s, distance).abs().max() < 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
def test_states_of_zeros_and_huge_ones_are_finite(distance):
    torch.manual_seed(0)
    s, t = torch.randn(4, 7), torch.randn(4, 7)
    s[0], t[1], s[2], t[2], s[3] = 0, 0, 0, 0, 1e15 * s[3]
    value = terms.hidden_distance(s.requires_grad_(), t, distance)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    assert value[2].item() == (1.0 if distance == "cosine" else 0.0)


def attention(*shape):
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    seed=strategies.integers(0, 2**31),
    samples=strategies.integers(0, 3),
    heads=strategies.integers(1, 3),
    queries=strategies.integers(0, 4),
    keys=strategies.integers(1, 6),
    masked=strategies.booleans(),
)
def test_attention_distance_and_its_gradient_are_those_of_the_loops(seed, samples, heads, queries, keys, masked):
    torch.manual_seed(seed)
    s, t = (attention(samples, heads, queries, keys).requires_grad_() for _ in range(2))
    is_real = torch.rand(samples, keys) < 0.6 if masked else torch.ones(samples, keys, dtype=torch.bool)  # also samples without any
    found, scale = terms.attention_distance(s, t, is_real if masked else None), torch.rand(samples, queries, dtype=torch.float64)
    of_student, of_teacher = torch.autograd.grad((found * scale).sum(), [s, t], allow_unused=True)
    expected, gradient = np.zeros((samples, queries)), np.zeros(s.shape)
    for b, h, q, k in np.ndindex(*s.shape):
        if is_real[b, k]:
            number = heads * int(is_real[b].sum())
            difference = (s[b, h, q, k] - t[b, h, q, k]).item()
            expected[b, q] += difference**2 / number
            gradient[b, h, q, k] = 2 * difference / number * scale[b, q].item()
    assert np.allclose(found.detach().numpy(), expected, rtol=0, atol=1e-14)
    assert np.allclose(of_student.numpy(), gradient, rtol=0, atol=1e-14) and of_teacher is None


def test_longer_padding_changes_no_attention_distance():
    torch.manual_seed(0)
    s, t, is_real = attention(2, 3, 4, 5), attention(2, 3, 4, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    padded = (torch.cat([x, torch.rand_like(x)], -1) for x in (s, t))
    found = terms.attention_distance(*padded, torch.cat([is_real, torch.zeros_like(is_real)], -1))
    assert torch.allclose(found, terms.attention_distance(s, t, is_real), rtol=0, atol=1e-15)
    alone = terms.attention_distance(s[1:, :, :, :3], t[1:, :, :, :3], None)  # the second sample cut to its real keys
    assert torch.allclose(found[1:], alone, rtol=0, atol=1e-15)


def test_half_precision_is_widened():
    s, t = torch.randn(2, 3, 4, 5).bfloat16(), torch.randn(2, 3, 4, 5).bfloat16()
    assert torch.equal(terms.attention_distance(s, t, None), terms.attention_distance(s.float(), t.float(), None))
    for distance in DISTANCES:
        assert torch.equal(terms.hidden_distance(s, t, distance), terms.hidden_distance(s.float(), t.float(), distance))


def test_mean_over_real_tokens():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, math.nan, 4.0], [math.inf, 1.0, 2.0]], requires_grad=True)
    found = terms.mean_over(values, torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]]).bool())
    assert found.tolist() == [3.0, 3.5, 0.0]
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(gradient, torch.tensor([[1 / 3] * 3, [0.5, 0.0, 0.5], [0.0] * 3]))
    assert terms.mean_over(values[:0], torch.ones(0, 3).bool()).shape == (0,)
