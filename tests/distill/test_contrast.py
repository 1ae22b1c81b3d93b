"""Token-level contrast against loops in float64, its draws against all possible ones, and its bank on ranks of their own."""

import itertools
import math
import os
from collections import Counter

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from torch import distributed, multiprocessing

from dqtrain.config import Contrast
from dqtrain.distill.contrast import TokenContrast

WORDS, WIDTH, POSITIONS = 9, 4, 8
KINDS = [("teacher", "vocabulary"), ("teacher", "position"), ("student", "vocabulary"), ("student", "position"), ("random", "vocabulary")]


def new(negatives_from="teacher", bank="vocabulary", negatives=64, touched=5, momentum=0.4):
    """A term in float64 whose first rows are touched, and by default one that draws nothing, for it takes all negatives."""
    settings = Contrast(weight=1.0, temperature=0.3, momentum=momentum, negatives=negatives, negatives_from=negatives_from, bank=bank)
    term = TokenContrast(settings, WORDS, WIDTH, POSITIONS).double()
    term.touched[:touched] = True
    term.bank[:touched] = torch.randn(min(touched, len(term.bank)), WIDTH, dtype=torch.float64)
    return term


def new_inputs(samples=3, tokens=6):
    student, teacher = (torch.randn(samples, tokens, WIDTH, dtype=torch.float64) for _ in range(2))
    is_target = torch.ones(samples, tokens, dtype=torch.bool)
    is_target[1:, tokens - 2 :] = False  # padding
    return student, teacher, torch.randint(WORDS, (samples, tokens)), is_target


def cosine(a, b):
    return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)


def query(term, student, ids, b, i):
    row = ids[b, i] if term.settings.bank == "vocabulary" else i
    m = term.settings.momentum if term.touched[row] else 0.0
    return m * term.bank[row].numpy() + (1 - m) * student[b, i], 1 - m


def candidates(term, student, teacher, ids, is_target, b, i):
    """All that may be drawn as negatives of a token."""
    if term.settings.negatives_from == "random":
        return [term.bank[word].numpy() for word in range(WORDS) if term.touched[word] and word != ids[b, i]]
    others = [j for j in range(ids.shape[1]) if is_target[b, j] and j != i]
    return [teacher[b, j] if term.settings.negatives_from == "teacher" else query(term, student, ids, b, j)[0] for j in others]


def token_by_hand(term, student, teacher, ids, b, i, negatives):
    """Loss of one token and its gradient for the token's hidden state."""
    q, share = query(term, student, ids, b, i)
    keys = [teacher[b, i], *negatives]
    scores = [cosine(q, key) / term.settings.temperature for key in keys]
    total = sum(math.exp(score) for score in scores)
    gradient = np.zeros(WIDTH)
    for n, key in enumerate(keys):
        of_cosine = (key / math.sqrt(key @ key) - cosine(q, key) * q / math.sqrt(q @ q)) / math.sqrt(q @ q)
        gradient += (math.exp(scores[n]) / total - (n == 0)) * of_cosine / term.settings.temperature * share
    return math.log(total) - scores[0], gradient


def by_hand(term, student, teacher, ids, is_target):
    student, teacher, ids, is_target = (x.detach().numpy() for x in (student, teacher, ids, is_target))
    values, gradient = [], np.zeros(student.shape)
    for b, i in np.argwhere(is_target):
        value, gradient[b, i] = token_by_hand(term, student, teacher, ids, b, i, candidates(term, student, teacher, ids, is_target, b, i))
        values.append(value)
    return values, gradient


def value_and_gradient(term, student, teacher, ids, is_target):
    student = student.clone().requires_grad_()
    value = term(student, teacher, ids, is_target)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    kind=strategies.sampled_from(KINDS),
    seed=strategies.integers(0, 2**31),
    samples=strategies.integers(0, 3),
    tokens=strategies.integers(1, POSITIONS),
    touched=strategies.integers(0, POSITIONS),
)
def test_value_and_gradient_with_all_negatives_are_those_of_the_loops(kind, seed, samples, tokens, touched):
    torch.manual_seed(seed)
    term = new(*kind, touched=touched)
    student, teacher, ids, _ = new_inputs(samples, tokens)
    is_target = torch.rand(samples, tokens) < 0.7  # also none, or one that has no other
    value, gradient = value_and_gradient(term, student, teacher, ids, is_target)
    expected, of_student = by_hand(term, student, teacher, ids, is_target)
    assert value.tolist() == pytest.approx(expected, abs=1e-12)
    assert np.allclose(gradient.numpy(), of_student, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_are_a_uniform_draw_without_replacement(kind):
    torch.manual_seed(0)
    term = new(*kind, negatives=2).eval()
    student, teacher, ids, is_target = new_inputs(samples=2)
    arrays = [x.numpy() for x in (student, teacher, ids, is_target)]
    tokens = np.argwhere(arrays[3])
    losses = []  # of each token: what each pair of its candidates would give
    for b, i in tokens:
        pairs = itertools.combinations(candidates(term, *arrays, b, i), 2)
        losses.append([token_by_hand(term, *arrays[:3], b, i, pair)[0] for pair in pairs])
    found = torch.stack([term(student, teacher, ids, is_target) for _ in range(2000)]).numpy()
    for n, possible in enumerate(losses):
        drawn = np.abs(found[:, n, None] - np.array(possible)).argmin(1)
        assert np.abs(found[:, n] - np.array(possible)[drawn]).max() < 1e-9
        expected = len(found) / len(possible)
        chi_square = sum((Counter(drawn)[k] - expected) ** 2 for k in range(len(possible))) / expected
        assert len(possible) >= 3 and chi_square < 50  # at most 14 degrees of freedom: 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_samples_padding_and_micro_batches_do_not_touch_each_other(kind):
    torch.manual_seed(0)
    term = new(*kind)
    inputs = new_inputs()
    value, gradient = value_and_gradient(term, *inputs)
    parts = [value_and_gradient(term, *(x[b : b + 1] for x in inputs)) for b in (2, 0, 1)]
    assert torch.allclose(torch.cat([parts[k][0] for k in (1, 2, 0)]), value, rtol=0, atol=1e-12)
    assert torch.allclose(torch.cat([parts[k][1] for k in (1, 2, 0)]), gradient, rtol=0, atol=1e-12)
    student, teacher, ids, is_target = (torch.cat([x, torch.zeros_like(x[:, :2])], 1) for x in inputs)
    student[~is_target], teacher[~is_target] = math.nan, math.inf
    padded, padded_gradient = value_and_gradient(term, student, teacher, ids, is_target)
    assert torch.allclose(padded, value, rtol=0, atol=1e-12)
    assert torch.allclose(padded_gradient[:, :6], gradient, rtol=0, atol=1e-12) and padded_gradient[~is_target].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_result_and_the_teacher_a_constant(kind):
    torch.manual_seed(0)
    term = new(*kind, negatives=2)
    student, teacher, ids, is_target = new_inputs()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(value_and_gradient(term, student, teacher.requires_grad_(), ids, is_target))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    term(student.requires_grad_(), teacher, ids, is_target).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_random_negatives_before_the_first_step_are_a_loss_of_0_that_can_be_differentiated():
    torch.manual_seed(0)
    term = new("random", touched=0, negatives=3)
    inputs = new_inputs()
    value, gradient = value_and_gradient(term, *inputs)
    assert value.abs().max() == 0 and gradient.abs().max() == 0
    term.end_step()
    assert value_and_gradient(term, *inputs)[0].min() > 0


def test_states_of_zeros_and_half_precision():
    torch.manual_seed(0)
    term = new(touched=0).float()
    student, teacher, ids, is_target = new_inputs()
    student[0, 0], teacher[0, 1] = 0, 0
    value, gradient = value_and_gradient(term, student.bfloat16(), teacher.bfloat16(), ids, is_target)
    assert value.dtype == torch.float32 and torch.isfinite(value).all() and torch.isfinite(gradient).all()
    wide = term(student.bfloat16().float(), teacher.bfloat16().float(), ids, is_target)
    assert torch.equal(value, wide)


@pytest.mark.parametrize("bank", ["vocabulary", "position"])
def test_bank_moves_once_per_step_by_the_mean_per_row(bank):
    torch.manual_seed(0)
    term = new(bank=bank, negatives=2)
    student, teacher, ids, is_target = new_inputs(samples=4)
    rows = ids if bank == "vocabulary" else torch.arange(6).expand(4, 6)
    old, touched = term.bank.clone(), term.touched.clone()
    for b in range(0, 4, 2):  # as two micro-batches
        term(*(x[b : b + 2] for x in (student, teacher, ids, is_target)))
    term(student[:1], teacher[:1], ids[:1], torch.zeros_like(is_target[:1]))  # and one without target tokens
    with torch.no_grad():
        term.eval()(2 * student, teacher, ids, is_target)  # evaluation leaves no trace
    assert torch.equal(term.bank, old)
    term.end_step()
    for row in range(len(old)):
        seen = student[(rows == row) & is_target]
        expected = old[row] if len(seen) == 0 else 0.4 * old[row] + 0.6 * seen.mean(0) if touched[row] else seen.mean(0)
        assert torch.allclose(term.bank[row], expected, rtol=0, atol=1e-12)
        assert term.touched[row] == (touched[row] or len(seen) > 0)
    moved = term.bank.clone()
    term.end_step()  # nothing was seen since
    assert torch.equal(term.bank, moved)
    other = new(bank=bank)
    other.load_state_dict(term.state_dict())
    assert torch.equal(other.bank, moved) and torch.equal(other.touched, term.touched)


def steps(rank, world_size):
    """The bank after three steps of six samples, of which a rank takes every world_size-th: one sample has targets in the first, none in the second."""
    torch.manual_seed(0)
    term = new(touched=0).float()
    inputs = [new_inputs(samples=6) for _ in range(3)]
    inputs[0][3][1:], inputs[1][3][:] = False, False
    for step in range(3):
        for b in range(rank, 6, world_size):
            if step == 2 or b % 3 != 1:  # else a rank has seen nothing, not even padding
                term(*(x[b : b + 1] for x in inputs[step]))
        before = term.bank.clone()
        term.end_step()
        assert torch.equal(term.bank, before) == (step == 1)
    return term.bank, term.touched


def work(rank, world_size, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=world_size)
    torch.save(steps(rank, world_size), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_banks_of_all_ranks_hold_the_same_bits(tmp_path):
    multiprocessing.spawn(work, (3, str(tmp_path)), nprocs=3)
    (bank, touched), *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for other_bank, other_touched in others:
        assert torch.equal(other_bank, bank) and torch.equal(other_touched, touched)
    alone, touched_alone = steps(0, 1)
    assert torch.allclose(bank, alone, atol=1e-6) and torch.equal(touched, touched_alone) and touched.any()
