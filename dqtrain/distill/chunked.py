"""The loss of hidden states, made without ever holding the logits of all of them.

Logits of n target positions are n x vocabulary numbers: 1 GB for each 2,048 positions of a vocabulary of 128,256 in fp32, and a loss
keeps several tensors of that size for backward. Here the head is applied to a few rows at a time, and what backward would want of
them is made at once (Liger Kernel, Hsu et al., 2024: fused linear cross-entropy):

    z = head(h)    of a chunk's rows        g = d loss / d z    by autograd, on the chunk alone
    d loss / d h = g W      d loss / d W = sum over chunks of g' h      d loss / d bias = sum over chunks of g's rows

so that logits and g die with their chunk, and backward is a product with the scalar that comes in. Memory beyond the hidden
states, the heads and their gradients does not depend on n: it is what the function holds for one chunk, six times `chunk_bytes`
for task and soft cross-entropy, eleven for Jensen-Shannon (and, under autocast, both heads in its dtype while the loss is made).

Numbers: a head computes in autocast's dtype where autocast is on, else in its weight's; logits are of that dtype widened to at least
fp32, and so are the loss, its gradient for the logits, and the sums over chunks of the gradients for the weight and the bias, which are
returned in the dtype of the tensor that they belong to. The products that make them have both factors in the head's dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dqtrain.models.language import Head

Function = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(student's logits, teacher's logits or None, whatever else has such rows) -> (scalar, named scalars): sums over the rows, 0 for no rows.

Called once per chunk, so nothing but sums (and no mean) gives the same for any chunking; the next chunk's logits overwrite those handed in. The
gradient goes to the student's logits alone: a tensor with gradient that the function brings along gets none.
"""

CHUNK_BYTES = 128 * 2**20
"""Logits of one model for one chunk: 261 rows of a vocabulary of 128,256. Each chunk reads the heads and the weight's gradient once more, which 66 rows
do not pay for and 261 nearly do (bench/head.py). Under 32 MiB, where glibc takes memory from its heap, fragments make the peak grow with n."""


def chunked_loss(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    rows: Sequence[Tensor],
    function: Function,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`plain_loss` in the memory of a chunk: hidden states [n, width] (the teacher's of another width) and `rows`, each [n, ...], such as labels -> (total, parts).

    Gradients go to `student_hidden`, `student.weight` and `student.bias`, as far as they require one, and are made in this call, unless under
    `no_grad`; backward hands them out once (no double backward, no `retain_graph`). With n = 0 the total is 0 and the gradients are zeros, so
    that collectives hung on the graph stay in step. Chunks have at most `chunk_bytes` of fp32 logits, and at least one row.
    """
    work = _Pass(student_hidden, student, teacher_hidden, teacher, rows, function, max(1, chunk_bytes // (4 * len(student.weight))))
    if torch.is_grad_enabled():
        total = _GradientsInForward.apply(work, student_hidden, student.weight, student.bias)
    else:
        total, _ = work.run((False, False, False))
    return total, work.parts


def plain_loss(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    rows: Sequence[Tensor],
    function: Function,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference: full logits, and autograd. `chunk_bytes` is not used."""
    with torch.no_grad():
        teacher_logits = teacher.logits(teacher_hidden) if teacher is not None and teacher_hidden is not None else None
    student_logits = student.logits(student_hidden)
    with torch.autocast(student_hidden.device.type, enabled=False):
        total, parts = function(student_logits, teacher_logits, *rows)
    return total, {name: value.detach() for name, value in parts.items()}


class _GradientsInForward(torch.autograd.Function):
    """The total of a pass, with the gradients that the pass made for hidden states, weight and bias."""

    @staticmethod
    def forward(ctx: Any, work: "_Pass", *tensors: Tensor | None) -> Tensor:
        total, gradients = work.run(ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, or there would be a second tensor of the head's size; autograd refuses to go back twice, for the saved tensors have changed.
        return None, *(None if gradient is None else gradient.mul_(scale).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


@dataclass
class _Pass:
    """One pass over the rows, a chunk at a time, and what it adds up."""

    student_hidden: Tensor
    student: Head
    teacher_hidden: Tensor | None
    teacher: Head | None
    rows: Sequence[Tensor]
    function: Function
    num_rows: int  # of a chunk
    parts: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The total, and its gradients for the student's hidden states, weight and bias where they are wanted."""
        device = self.student_hidden.device.type
        student, teacher = self.student.cast(device), None if self.teacher is None else self.teacher.cast(device)
        dtype = _sum_dtype(student.weight)
        total = torch.zeros((), dtype=dtype, device=self.student_hidden.device)
        gradients = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if tensor is not None and is_wanted else None
            for tensor, is_wanted in zip((self.student_hidden, self.student.weight, self.student.bias), wanted, strict=True)
        ]
        # The same memory for each chunk: asking the system for new pages costs as much as a product with the head.
        rows = min(self.num_rows, len(self.student_hidden))
        room = [None if head is None else total.new_empty((rows, len(head.weight)), dtype=_sum_dtype(head.weight)) for head in (student, teacher)]
        with torch.autocast(device, enabled=False):
            for start in range(0, max(1, len(self.student_hidden)), self.num_rows):  # without rows, one empty chunk names the parts
                total += self._chunk(slice(start, start + self.num_rows), student, teacher, room, gradients)
        return total, gradients

    def _chunk(self, chunk: slice, student: Head, teacher: Head | None, room: list[Tensor | None], gradients: list[Tensor | None]) -> Tensor:
        """Add a chunk to `parts` and `gradients`; its loss. What is as large as its logits is overwritten by the next one's, or dropped on return."""
        for_hidden, for_weight, for_bias = gradients
        hidden = self.student_hidden[chunk]
        of_student, of_teacher = (None if memory is None else memory[: len(hidden)] for memory in room)
        logits = student.logits(hidden, of_student)
        teacher_logits = teacher.logits(self.teacher_hidden[chunk], of_teacher) if teacher is not None and self.teacher_hidden is not None else None
        live = any(gradient is not None for gradient in gradients)
        with torch.set_grad_enabled(live):
            total, parts = self.function(logits.requires_grad_(live), teacher_logits, *(row[chunk] for row in self.rows))
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0) + value.detach()
        if live:
            (slope,) = torch.autograd.grad(total, logits)
            if student.softcap is not None:
                slope = slope * (1 - (logits.detach() / student.softcap).square())  # of tanh
            if for_bias is not None:
                for_bias += slope.sum(0)
            slope = slope.to(student.weight.dtype)
            if for_hidden is not None:
                for_hidden[chunk] = slope @ student.weight
            if for_weight is not None:
                _add_product(for_weight, slope, hidden.to(student.weight.dtype), self.num_rows)
        return total.detach()


def _add_product(target: Tensor, left: Tensor, right: Tensor, rows: int) -> None:
    """target += left' right; a target wider than the product takes it in slabs, each as large as a chunk's logits."""
    if target.dtype == left.dtype:
        target.addmm_(left.T, right)
        return
    slab = max(1, rows * len(target) // target.shape[1])
    for start in range(0, len(target), slab):
        target[start : start + slab] += left[:, start : start + slab].T @ right


def _sum_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
