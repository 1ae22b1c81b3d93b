"""The terms that need no state: one function each, from logits to nats per target token.

Every function returns one value for each target token; the objective sums them and divides by the global number of
target tokens, so that padding, accumulation and the number of ranks change nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional


def task(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the corpus: -log q(label). Logits [n, vocabulary], labels [n] -> [n]."""
    return functional.cross_entropy(student_logits, labels, reduction="none")


def logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities: -sum_v p(v) log q(v) (QuantGPT, ACL 2022, L_dist). Both [n, vocabulary] -> [n].

    Its least value is the teacher's entropy, not 0; the gradient is that of the forward KL divergence.
    """
    return torch.logsumexp(student_logits, -1) - (teacher_logits.softmax(-1) * student_logits).sum(-1)
