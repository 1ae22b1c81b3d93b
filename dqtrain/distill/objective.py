"""loss = sum of weight x term, and which of the teacher's outputs the live terms need.

Terms are means per target token of the *global* batch: `Objective` returns sums, and whoever calls it divides by the
step's number of target tokens over all ranks and micro-batches. What moves once per optimizer step (`end_step`) is equal on all ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dqtrain.config import Distill
from dqtrain.config import Logits as LogitsSettings
from dqtrain.distill import terms
from dqtrain.distill.chunked import chunked_loss
from dqtrain.distill.contrast import TokenContrast
from dqtrain.distill.layers import Positions, attention_term, hidden_term
from dqtrain.models.language import Inputs, LanguageModel, Outputs, Taught
from dqtrain.models.layers import LayerMaps
from dqtrain.world import sum_over_ranks


class Loss(NamedTuple):
    """Sums over the target tokens of one micro-batch."""

    total: Tensor  # scalar, weighted, with gradient
    parts: dict[str, Tensor]  # term -> scalar, unweighted, detached


def needed_outputs(settings: Distill) -> dict[str, bool]:
    """Which outputs of every layer the live terms need, of teacher and student: the arguments `states` and `attentions` of LanguageModel."""
    live = settings.teacher_terms
    layer = settings.contrast is not None and settings.contrast.layer is not None
    return {"states": "hidden" in live or ("contrast" in live and layer), "attentions": "attention" in live}


class TokenWeights(nn.Module):
    """Weights of target tokens, divided by their mean over the steps before (a tenth of the way to each step's mean): about 1 on average.

    The mean of the present step would take a second pass through the teacher's head, over all micro-batches of all ranks, before the first
    backward. `mean` is a buffer, hence in every checkpoint.
    """

    mean: Tensor

    def __init__(self, kind: Literal["tsld", "entropy"], mean: float) -> None:
        """`mean`: what the first step's weights are divided by."""
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.full((1,), mean))
        self._seen: list[Tensor] = []

    def forward(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [n, vocabulary] and labels [n] -> weights [n], without gradient."""
        weights = terms.token_weights(self.kind, teacher_logits, labels)
        if self.training:
            self._seen.append(torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))]))
        return weights / self.mean

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the mean. Collective; call once per optimizer step."""
        total, count = sum_over_ranks(torch.stack(self._seen or [self.mean.new_zeros(2)]).double().sum(0)).float()
        self.forget_step()
        self.mean.lerp_(torch.where(count > 0, total / count.clamp(min=1), self.mean), 0.1)

    def forget_step(self) -> None:
        """What was seen since the last step counts no more."""
        self._seen.clear()


class Objective(nn.Module):
    """The student and the loss that trains it. Weight 0 means not computed."""

    def __init__(
        self, student: LanguageModel, settings: Distill, maps: LayerMaps | None = None, positions: int = 0, beta: float | None = None, weight: float = 1.0
    ) -> None:
        """`maps`: for terms of layers; `positions`: the longest sequence, for a bank keyed by position.

        As measured on some samples, for the logits term: `beta`, the teacher's mean confidence, and `weight`, the mean weight of tokens.
        """
        super().__init__()
        self.student = student
        self.settings = settings
        self.maps = maps
        live = settings.teacher_terms
        self.contrast = self.token_weights = None
        self.divergence: Callable[[Tensor, Tensor], Tensor] | None = None
        if settings.contrast is not None and "contrast" in live:
            config, layer = student.model.config, settings.contrast.layer
            is_last = layer is None or (maps is not None and layer == len(maps.decoder) - 1)
            head: Any = student.model.get_output_embeddings()
            width = head.in_features if is_last else config.hidden_size  # OPT-350m's head is narrower than its layers
            self.contrast = TokenContrast(settings.contrast, config.vocab_size, width, positions)
        if settings.logits is not None and "logits" in live:
            self.divergence = _divergence(settings.logits, beta)
            self.token_weights = TokenWeights(settings.logits.tokens, weight) if settings.logits.tokens != "equal" else None

    def forward(self, inputs: Inputs, labels: Tensor, taught: Taught | None) -> Loss:
        """Inputs, labels [samples, tokens] (already shifted, -100 ignored) and what the teacher says about them -> Loss."""
        student = self.student(inputs)
        total, parts = self._through_head(student, inputs, labels, taught)
        teacher = taught.outputs if taught else None
        if teacher is not None:
            for name, weight, value in self._of_states(student, teacher, inputs):
                total, parts[name] = total + weight * value, value.detach()
        return Loss(total, parts)

    def _through_head(self, student: Outputs, inputs: Inputs, labels: Tensor, taught: Taught | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What is made of logits: chunk by chunk, never of all positions at once."""
        if self.settings.task == 0 and self.divergence is None:
            return student.hidden.new_zeros(()), {}
        where = torch.ones_like(inputs.is_target) if self.settings.padding_counts else inputs.is_target
        share = inputs.is_target.sum() / max(1, where.numel()) if self.settings.padding_counts else 1.0
        rows = [labels[where]]
        if taught is not None and taught.ids is not None and taught.shares is not None:
            rows += [taught.ids, taught.shares]
        teacher = taught.outputs.hidden[where] if taught and taught.outputs and taught.head else None
        settings = self.settings

        def of_logits(
            said: Tensor, theirs: Tensor | None, labels: Tensor, ids: Tensor | None = None, shares: Tensor | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            total, parts = said.new_zeros(()), {}
            if settings.task > 0:
                parts["task"] = terms.task(said, labels).sum()
                total = total + settings.task * parts["task"]
            if settings.logits is not None and self.divergence is not None:
                if theirs is not None:
                    values = self.divergence(said, theirs)
                    if self.token_weights is not None:
                        values = values * self.token_weights(theirs, labels)
                else:
                    assert ids is not None and shares is not None, "a live logits term has a teacher"
                    values = terms.sampled_cross_entropy(said, ids, shares)
                parts["logits"] = values.sum() * share
                total = total + settings.logits.weight * parts["logits"]
            return total, parts

        head = taught.head if taught else None
        return self.student.through_head(student.hidden[where], lambda hidden, own: chunked_loss(hidden, own, teacher, head, rows, of_logits))

    def _of_states(self, student: Outputs, teacher: Outputs, inputs: Inputs) -> Iterator[tuple[str, float, Tensor]]:
        """(term, weight, sum over target tokens) of the terms that compare hidden states and attention."""
        settings, maps = self.settings, self.maps
        positions = Positions(inputs, settings.padding_counts)
        if settings.hidden is not None and settings.hidden.weight > 0:
            assert maps is not None
            yield "hidden", settings.hidden.weight, hidden_term(student, teacher, positions, maps, settings.hidden)
        if settings.attention is not None and settings.attention.weight > 0:
            assert maps is not None
            yield "attention", settings.attention.weight, attention_term(student, teacher, positions, maps)
        if settings.contrast is not None and self.contrast is not None:
            ours, theirs, layer = student.hidden, teacher.hidden, settings.contrast.layer
            if layer is not None:
                assert maps is not None
                ours, theirs = student.decoder.states[layer + 1], teacher.decoder.states[maps.decoder[layer] + 1]
            yield "contrast", settings.contrast.weight, self.contrast(ours, theirs, inputs.ids, inputs.is_target).sum()

    def end_step(self, was_made: bool = True) -> None:
        """What moves once per optimizer step: the contrastive bank, the mean weight of tokens; nothing where the step was not made. Collective."""
        for part in (self.contrast, self.token_weights):
            if part is not None:
                part.end_step() if was_made else part.forget_step()


def _divergence(settings: LogitsSettings, beta: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of (student's logits, teacher's logits) that the settings name."""
    temperature = settings.temperature
    if settings.divergence == "mse":
        return terms.mse
    if settings.divergence in ("jensen_shannon", "confidence_kl"):
        share = settings.beta if settings.beta is not None else 0.5 if settings.divergence == "jensen_shannon" else beta
        assert share is not None, "build.py measures the teacher's confidence"
        mixed = terms.jensen_shannon if settings.divergence == "jensen_shannon" else terms.confidence_kl
        return lambda student, teacher: mixed(student, teacher, share, temperature)
    plain = {"cross_entropy": terms.cross_entropy, "forward_kl": terms.forward_kl, "reverse_kl": terms.reverse_kl}[settings.divergence]
    return lambda student, teacher: plain(student, teacher, temperature)
