"""loss = sum of weight x term, and which of the teacher's outputs the live terms need.

Terms are means per target token of the *global* batch: `Objective` returns sums, and whoever calls it divides by the
step's number of target tokens over all ranks and micro-batches.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dqtrain.config import Distill
from dqtrain.data.stream import IGNORED
from dqtrain.distill import terms
from dqtrain.distill.contrast import TokenContrast
from dqtrain.models import LanguageModel, Outputs


class Loss(NamedTuple):
    """Sums over the target tokens of one micro-batch."""

    total: Tensor  # scalar, weighted, with gradient
    parts: dict[str, Tensor]  # term -> scalar, unweighted, detached


class Objective(nn.Module):
    """The student and the loss that trains it. Weight 0 means not computed."""

    def __init__(self, student: LanguageModel, settings: Distill) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        config = student.model.config
        live = settings.contrast is not None and settings.contrast.weight > 0
        self.contrast = TokenContrast(settings.contrast, config.vocab_size, config.hidden_size) if live and settings.contrast else None

    @property
    def needs_teacher(self) -> bool:
        """Whether any live term asks for the teacher's outputs."""
        return self.settings.logits > 0 or self.contrast is not None

    def forward(self, input_ids: Tensor, labels: Tensor, teacher: Outputs | None) -> Loss:
        """Ids and labels [samples, tokens] (labels already shifted, -100 ignored) and the teacher's outputs on them -> Loss."""
        is_target = labels != IGNORED
        student = self.student(input_ids, is_target)
        weighted: dict[str, tuple[float, Tensor]] = {}
        if self.settings.task > 0:
            weighted["task"] = (self.settings.task, terms.task(student.logits, labels[is_target]))
        if teacher is not None and self.settings.logits > 0:
            weighted["logits"] = (self.settings.logits, terms.logits(student.logits, teacher.logits))
        if teacher is not None and self.contrast is not None and self.settings.contrast is not None:
            value = self.contrast(student.hidden, teacher.hidden, input_ids, is_target)
            weighted["contrast"] = (self.settings.contrast.weight, value)
        total = torch.stack([weight * value.sum() for weight, value in weighted.values()]).sum()
        return Loss(total, {name: value.detach().sum() for name, (_, value) in weighted.items()})

    def end_step(self) -> None:
        """What moves once per optimizer step: the contrastive bank. Collective."""
        if self.contrast is not None:
            self.contrast.end_step()
