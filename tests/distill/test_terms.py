"""Each term against a float64 reference written by hand, gradient included; padding, accumulation and order change nothing."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dqtrain.config import Contrast, Distill
from dqtrain.distill import terms
from dqtrain.distill.contrast import TokenContrast
from dqtrain.distill.objective import Objective
from dqtrain.models import LanguageModel, Outputs


def numeric_gradient(function, x, step=1e-6):
    flat = x.clone().reshape(-1)
    gradient = torch.zeros_like(flat)
    for i in range(len(flat)):
        up, down = flat.clone(), flat.clone()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up.view_as(x)) - function(down.view_as(x))) / (2 * step)
    return gradient.view_as(x)


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


def test_logits_is_cross_entropy_with_the_teacher():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 6, dtype=torch.float64)
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (t.numpy(), x.detach().numpy()))
    found = terms.logits(x, t)
    assert found.tolist() == pytest.approx((-(p * np.log(q)).sum(-1)).tolist(), abs=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert np.allclose(gradient.numpy(), q - p, atol=1e-12)


def reference_contrast(student, teacher, ids, is_target, bank, touched, momentum, temperature):
    """All other target positions of the sequence as negatives, in loops."""
    values = []
    for b, t in np.argwhere(is_target.numpy()):
        word = int(ids[b, t])
        query = momentum * bank[word] + (1 - momentum) * student[b, t] if touched[word] else student[b, t]
        scores = {}
        for j in range(ids.shape[1]):
            if is_target[b, j]:
                key = teacher[b, j]
                scores[j] = float(query @ key / (query.norm() * key.norm())) / temperature
        values.append(-math.log(math.exp(scores[t]) / sum(math.exp(s) for s in scores.values())))
    return values


@pytest.fixture
def contrast_case():
    torch.manual_seed(0)
    samples, tokens, width, words = 2, 6, 4, 9
    student, teacher = (torch.randn(samples, tokens, width, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(words, (samples, tokens))
    is_target = torch.ones(samples, tokens, dtype=torch.bool)
    is_target[1, 4:] = False  # padding
    term = TokenContrast(Contrast(weight=1.0, temperature=0.3, momentum=0.5, negatives=tokens - 1), words, width).double()
    term.touched[:5] = True
    term.bank[:5] = torch.randn(5, width, dtype=torch.float64)
    return term, student, teacher, ids, is_target


def test_contrast_with_all_negatives_equals_the_loops(contrast_case):
    term, student, teacher, ids, is_target = contrast_case
    expected = reference_contrast(student, teacher, ids, is_target, term.bank, term.touched, 0.5, 0.3)
    assert term.eval()(student, teacher, ids, is_target).tolist() == pytest.approx(expected, abs=1e-12)


def test_contrast_gradient_is_the_numeric_one(contrast_case):
    term, student, teacher, ids, is_target = contrast_case
    term.eval()
    student.requires_grad_(True)
    (gradient,) = torch.autograd.grad(term(student, teacher, ids, is_target).sum(), student)
    numeric = numeric_gradient(lambda x: term(x, teacher, ids, is_target).sum(), student.detach())
    assert torch.allclose(gradient, numeric, atol=1e-7)
    assert gradient[1, 4:].abs().max() == 0  # padding never counts


def test_contrast_draws_negatives_without_replacement_among_targets(contrast_case):
    term, student, teacher, ids, is_target = contrast_case
    term.settings = Contrast(weight=1.0, temperature=0.3, momentum=0.5, negatives=2)
    teacher[1, 4:] = float("inf")  # a padded position would poison the value
    torch.manual_seed(3)
    first = term.eval()(student, teacher, ids, is_target)
    torch.manual_seed(3)
    assert torch.equal(first, term(student, teacher, ids, is_target))
    full = torch.tensor(reference_contrast(student, teacher, ids, is_target, term.bank, term.touched, 0.5, 0.3), dtype=torch.float64)
    assert torch.isfinite(first).all()
    assert (first <= full + 1e-12).all()  # fewer terms in the denominator
    assert (first < full - 1e-6).any()


def test_bank_moves_once_per_step_by_the_mean_per_word(contrast_case):
    term, student, teacher, ids, is_target = contrast_case
    old, touched = term.bank.clone(), term.touched.clone()
    term.train()
    for b in range(2):  # as two micro-batches
        term(student[b : b + 1], teacher[b : b + 1], ids[b : b + 1], is_target[b : b + 1])
    assert torch.equal(term.bank, old)
    term.end_step()
    for word in range(len(old)):
        seen = student[(ids == word) & is_target]
        if len(seen) == 0:
            assert torch.equal(term.bank[word], old[word]) and term.touched[word] == touched[word]
        else:
            expected = 0.5 * old[word] + 0.5 * seen.mean(0) if touched[word] else seen.mean(0)
            assert torch.allclose(term.bank[word], expected, atol=1e-7) and term.touched[word]


def tiny(seed):
    torch.manual_seed(seed)
    return LanguageModel(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)).eval())


@pytest.fixture
def objective():
    negatives = Contrast(weight=0.5, temperature=0.2, momentum=0.5, negatives=31)  # all, so that nothing is drawn
    return Objective(tiny(0), Distill(task=0.7, logits=1.3, contrast=negatives)), tiny(1)


def losses(objective, teacher, ids, labels):
    with torch.no_grad():
        taught: Outputs = teacher(ids, labels != -100)
    loss = objective(ids, labels, taught)
    gradient = torch.autograd.grad(loss.total, objective.student.model.transformer.wte.weight)[0]
    return loss, gradient


def test_objective_is_the_weighted_sum_and_padding_adds_nothing(objective):
    objective, teacher = objective
    ids, labels = torch.randint(31, (3, 8)), torch.randint(31, (3, 8))
    loss, gradient = losses(objective, teacher, ids, labels)
    assert loss.total.item() == pytest.approx(
        0.7 * loss.parts["task"].item() + 1.3 * loss.parts["logits"].item() + 0.5 * loss.parts["contrast"].item(), rel=1e-6
    )
    padded_ids = torch.cat([ids, torch.zeros(3, 8, dtype=torch.long)], 1)
    padded_labels = torch.cat([labels, torch.full((3, 8), -100)], 1)
    padded, padded_gradient = losses(objective, teacher, padded_ids, padded_labels)
    for name, value in loss.parts.items():
        assert padded.parts[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert torch.allclose(padded_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_sums_of_micro_batches_are_those_of_the_batch(objective):
    objective, teacher = objective
    ids, labels = torch.randint(31, (4, 8)), torch.randint(31, (4, 8))
    labels[1, 3:] = -100
    labels[3] = -100  # a micro-batch without any target token
    whole, gradient = losses(objective, teacher, ids, labels)
    parts = [losses(objective, teacher, ids[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert sum(part.total.item() for part, _ in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert torch.allclose(sum(g for _, g in parts), gradient, rtol=1e-4, atol=1e-5)
    assert parts[3][0].total.item() == 0 and parts[3][1].abs().max() == 0


def test_weight_zero_is_not_computed():
    objective = Objective(tiny(0), Distill(task=1.0, logits=0.0, contrast=Contrast(weight=0.0)))
    assert not objective.needs_teacher and objective.contrast is None
    ids = torch.randint(31, (1, 8))
    assert objective(ids, ids, None).parts.keys() == {"task"}
