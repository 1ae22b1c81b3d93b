"""The terms that need no state: one function each, from logits, hidden states or attention to one value per token.

With p = softmax(t / T) of the teacher's logits t and q = softmax(s / T) of the student's logits s at one target position,
v running over the vocabulary:

    task              -log q(label) at T = 1
    cross_entropy     -T^2 sum_v p log q
    forward_kl        T^2 KL(p || q) = T^2 sum_v p (log p - log q)
    reverse_kl        T^2 KL(q || p)
    jensen_shannon    T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q
    confidence_kl     beta reverse_kl + (1 - beta) forward_kl
    mse               mean_v (s - t)^2
    sampled_cross_entropy  -sum_k share_k log q(id_k) at T = 1: `cross_entropy` from ids drawn of p

T^2 keeps the size of the gradient as T grows (Hinton et al., 2015, section 2: the gradient of a softened divergence shrinks
with 1/T^2); it stands in all five divergences, so that a weight means the same in each.

Every one of these takes logits [n, vocabulary] and returns [n]; the objective sums and divides by the global number of target
tokens, so that padding, accumulation and the number of ranks change nothing. Nothing overflows however large the logits are, for all
goes through log-softmax.

`hidden_distance` and `attention_distance` give a value per token or per query, of which the objective takes those of target tokens; what a
sample's source tokens say is one value per sample by `mean_over`.

Inputs are finite, and half precision is widened to fp32. Gradients are autograd's and go to the student alone; the teacher is a constant.

`tsld` and `entropy` are not terms but weights of tokens, >= 0 and without gradient, to be multiplied into a term's values.
They are not normalised: a mean weight of 1 over the global batch, which leaves the learning rate its meaning, takes a sum
over all ranks and micro-batches, which is the caller's.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_EXPONENT = 50.0
"""Where `tsld` stops growing: at 500 nats of the teacher's loss; exp(50) can still be summed in fp32."""

SMALLEST_NORM = 1e-6
"""Shorter hidden states count as this long where they are divided by their length, which keeps the gradient of a state of zeros finite."""


def task(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the corpus: -log q(label), in nats. Logits [n, vocabulary], labels [n] -> [n]."""
    return functional.cross_entropy(_wide(student_logits), labels, reduction="none")


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy with the teacher's probabilities: -T^2 sum_v p log q, in nats (Hinton et al., 2015; QuantGPT's L_dist). Both [n, vocabulary] -> [n].

    Its least value is T^2 times the teacher's entropy, not 0; the gradient T (q - p) is that of `forward_kl`.
    """
    log_q = _log_probabilities(student_logits, temperature)
    p = _log_probabilities(teacher_logits.detach(), temperature).exp_()
    return (p * log_q).sum(-1) * -(temperature**2)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) = T^2 sum_v p (log p - log q), in nats (Hinton et al., 2015): spread over all that the teacher allows. Both [n, vocabulary] -> [n]."""
    log_q, log_p = _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits.detach(), temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p) = T^2 sum_v q (log q - log p), in nats (MiniLLM, Gu et al., ICLR 2024): keep to what the teacher prefers. Both [n, vocabulary] -> [n]."""
    log_q, log_p = _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits.detach(), temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon: T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q, in nats. Both [n, vocabulary] -> [n].

    0 < beta < 1. Divided by beta it becomes `forward_kl` as beta goes to 0; divided by 1 - beta, `reverse_kl` as beta goes to 1;
    it never exceeds T^2 H(beta), log 2 at beta 1/2 (Lin, 1991; GKD, Agarwal et al., ICLR 2024, which has no T^2).
    """
    log_q, log_p = _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits.detach(), temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    from_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    from_student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (beta * from_teacher + (1 - beta) * from_student) * temperature**2


def confidence_kl(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """T^2 (beta KL(q || p) + (1 - beta) KL(p || q)), in nats (CAKLD: BitDistiller, Du et al., ACL 2024). Both [n, vocabulary] -> [n].

    0 <= beta <= 1 is a number given once for a run: the mean of the teacher's `confidence` on some of the corpus. A sure teacher is
    followed to its mode, an unsure one in all its spread. BitDistiller's code has no temperature.
    """
    log_q, log_p = _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits.detach(), temperature)
    mixed = beta * log_q.exp() - (1 - beta) * log_p.exp()  # both divergences share log q - log p
    return (mixed * (log_q - log_p)).sum(-1) * temperature**2


def mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over the vocabulary of (s - t)^2, in squared logits, not nats (DQ-BART, Li et al., ACL 2022). Both [n, vocabulary] -> [n].

    No temperature, and not blind to a shift of all logits, as the divergences are.
    """
    return (_wide(student_logits) - _wide(teacher_logits.detach())).square().mean(-1)


def sampled_cross_entropy(student_logits: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """-sum_k share log q(id), in nats (Sparse Logit Sampling: Anshumann et al., ACL 2025). Logits [n, vocabulary], ids and shares [n, k] -> [n].

    With ids drawn from the teacher's distribution and shares of count / draws, it is `cross_entropy` at temperature 1 on average, and so is its
    gradient. With the likeliest ids and their probabilities, which sum to less than 1, it is biased: the student is driven to give
    them all. A row with fewer ids is filled up with any of them at share 0.
    """
    student_logits = _wide(student_logits)
    return (shares.detach() * (student_logits.logsumexp(-1, keepdim=True) - student_logits.gather(-1, ids))).sum(-1)


def hidden_distance(student: Tensor, teacher: Tensor, distance: Literal["mse", "normalised_mse", "cosine"]) -> Tensor:
    """Distance of hidden states. Both [..., width] -> [...].

    mse             mean_w (s - t)^2 over the width (DQ-BART, Li et al., ACL 2022)
    normalised_mse  || s / ||s|| - t / ||t|| ||^2, 0 to 4 (OneBit, Xu et al., NeurIPS 2024)
    cosine          1 - cos(s, t), half of normalised_mse (outlier-friendly feature distillation: TernaryLLM, Chen et al., 2024)
    """
    student, teacher = _wide(student), _wide(teacher.detach())
    if distance == "mse":
        return (student - teacher).square().mean(-1)
    student, teacher = (functional.normalize(hidden, dim=-1, eps=SMALLEST_NORM) for hidden in (student, teacher))
    return (student - teacher).square().sum(-1) if distance == "normalised_mse" else 1 - (student * teacher).sum(-1)


def attention_distance(student: Tensor, teacher: Tensor, keys_are_real: Tensor | None) -> Tensor:
    """Mean of (s - t)^2 over heads and real keys (DQ-BART, Li et al., ACL 2022). Probabilities [samples, heads, queries, keys] -> [samples, queries].

    Probabilities are those after softmax. `keys_are_real` [samples, keys], None for all, are the source tokens of a sample or, where a decoder looks at
    itself, its own: all of them, also those that a query cannot see, so that longer padding changes nothing. 0 where a sample has none.
    """
    squares = (_wide(student) - _wide(teacher.detach())).square().mean(1)
    return squares.mean(-1) if keys_are_real is None else mean_over(squares, keys_are_real[:, None])


def mean_over(values: Tensor, is_real: Tensor) -> Tensor:
    """Mean over a sample's real tokens. Values [..., tokens] and a mask that broadcasts to them -> [...]; 0 where nothing is real."""
    return values.masked_fill(~is_real, 0.0).sum(-1) / is_real.sum(-1).clamp(min=1)


@torch.no_grad()
def confidence(teacher_logits: Tensor) -> Tensor:
    """The teacher's largest probability. [n, vocabulary] -> [n] in (0, 1], without gradient."""
    return _log_probabilities(teacher_logits, 1.0).amax(-1).exp_()


def token_weights(kind: Literal["tsld", "entropy"], teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """`tsld` or `entropy`: logits [n, vocabulary], labels [n] -> [n]."""
    return tsld(teacher_logits, labels) if kind == "tsld" else entropy(teacher_logits)


@torch.no_grad()
def tsld(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Weight of a token: exp(c / 10), c the teacher's own `task` in nats: more where the label surprises the teacher. Logits [n, vocabulary], labels [n] -> [n].

    Divided by its sum over the batch it is the softmax of c / 10 of TSLD (Kim et al., NeurIPS 2023). From 1 up; no larger than exp(50).
    """
    return (task(teacher_logits, labels) / 10).clamp_(max=LARGEST_EXPONENT).exp_()


@torch.no_grad()
def entropy(teacher_logits: Tensor) -> Tensor:
    """Weight of a token: the entropy of the teacher's distribution at T = 1, -sum_v p log p, in nats, 0 to log(vocabulary). [n, vocabulary] -> [n].

    The idea of DB-LLM's deviation-aware distillation (Chen et al., Findings of ACL 2024): tokens whose prediction is ambiguous, where quantization
    distorts most, weigh more. Theirs is an indicator of teacher and student together; this one is the teacher's alone, and so no
    function of what is trained.
    """
    log_p = _log_probabilities(teacher_logits, 1.0)
    return (log_p.exp() * log_p).sum(-1).neg_().clamp_(min=0.0)


def _wide(values: Tensor) -> Tensor:
    """At least fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    logits = _wide(logits)
    return functional.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
