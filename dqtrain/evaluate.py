"""Loss, perplexity and agreement with the teacher on a split, shared out over the ranks."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dqtrain.data.stream import AnyStream
from dqtrain.distill.chunked import chunked_loss
from dqtrain.distill.terms import task
from dqtrain.generation import Writing
from dqtrain.models.language import Head, LanguageModel, Teacher, inputs_of
from dqtrain.quant.diagnose import Homogeneity
from dqtrain.world import World, gather_objects, sum_over_ranks


@dataclass(frozen=True)
class Scores:
    """Means over the target tokens of a split."""

    loss: float  # nats per target token
    perplexity: float  # exp(loss)
    num_tokens: int
    hidden_cosine: float  # mean cosine of all pairs of last hidden states: near 1 they have collapsed
    hidden_rank: float  # effective rank of the last hidden states, from 1 to the width
    teacher_loss: float | None = None
    agreement: float | None = None  # share of target tokens where student and teacher rank the same word first
    teacher_hidden_cosine: float | None = None
    teacher_hidden_rank: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The fields that were measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Evaluation:
    """What a student is examined on: held-out samples, a teacher to compare with, and text of its own."""

    validation: AnyStream | None
    test: AnyStream | None
    teacher: Teacher | None  # None too where what it says is stored, for the training split alone
    writing: Writing | None
    micro_batch: int
    max_samples: int | None  # of validation
    world: World
    teacher_is_known: bool = False

    def validate(self, student: LanguageModel) -> dict[str, float]:
        """Scores on the validation split; the teacher's are in the first ones alone, for they stay what they are. Collective."""
        assert self.validation is not None
        teacher, self.teacher_is_known = None if self.teacher_is_known else self.teacher, True
        scores = evaluate(student, self.validation, self.micro_batch, self.world, teacher, self.max_samples).as_dict()
        if self.writing and self.writing.settings.validation_samples:
            student.train(self.writing.settings.dropout)
            scores |= self.writing.scores(student.model, "validation", self.writing.settings.validation_samples)
        return scores

    def final(self, student: LanguageModel, texts: Path, phase: Callable[[str], Callable[[int, int], None]]) -> dict[str, float] | None:
        """Scores on the whole test split, if there is one; what the student wrote is left in `texts`. `phase(name)` gives a `progress`. Collective."""
        if self.test is None:
            return None
        scores = evaluate(student, self.test, self.micro_batch, self.world, self.teacher, progress=phase("testing")).as_dict()
        if self.writing:
            scores |= self.writing.scores(student.model, "test", out=texts, progress=phase("writing text for the test sources"))
        return scores


@torch.no_grad()
def evaluate(
    student: LanguageModel,
    stream: AnyStream,
    micro_batch: int,
    world: World,
    teacher: Teacher | None = None,
    max_samples: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a model on the first `max_samples` of a split that is not shuffled. Collective.

    Every rank makes the same number of forwards, as ZeRO-3 needs: a rank without samples left passes one without targets.
    `progress` is called with (rounds done, rounds).
    """
    num_samples = min(stream.num_samples, max_samples or stream.num_samples)
    rounds = math.ceil(num_samples / (micro_batch * world.world_size))
    sums = np.zeros(4)  # nats, tokens, teacher's nats, agreeing tokens
    alike: dict[str, Homogeneity] = {}
    for index in range(rounds):
        first = (index * world.world_size + world.rank) * micro_batch
        batch = stream.batch(np.arange(first, min(first + micro_batch, num_samples)) if first < num_samples else np.zeros(1, dtype=np.int64))
        if first >= num_samples:
            batch = batch.without_targets()
        inputs, labels = inputs_of(batch, world.device)
        hidden = {"student": student(inputs, layers=False).hidden[inputs.is_target]}
        with teacher.teaching(batch, inputs, layers=False) if teacher else nullcontext() as taught:
            if taught is not None and taught.outputs is not None:
                hidden["teacher"] = taught.outputs.hidden[inputs.is_target]
            parts = _compare(student, hidden["student"], hidden.get("teacher"), taught.head if taught else None, labels[inputs.is_target])
        for who, states in hidden.items():
            alike.setdefault(who, Homogeneity(states.shape[-1], world.device)).add(states)
        sums[:2] += parts["nats"].item(), int(inputs.is_target.sum())
        if "teacher_nats" in parts:
            sums[2:] += parts["teacher_nats"].item(), parts["agreeing"].item()
        if progress:
            progress(index + 1, rounds)
    nats, tokens, teacher_nats, agreeing = np.sum(gather_objects(sums), axis=0).tolist()
    loss = nats / tokens
    for homogeneity in alike.values():
        for tensor in homogeneity.tensors:
            sum_over_ranks(tensor)
    own = alike["student"]
    scores = Scores(loss, math.exp(min(loss, 700.0)), int(tokens), own.mean_cosine, own.effective_rank)
    if "teacher" not in alike:
        return scores
    other = alike["teacher"]
    return replace(
        scores,
        teacher_loss=teacher_nats / tokens,
        agreement=agreeing / tokens,
        teacher_hidden_cosine=other.mean_cosine,
        teacher_hidden_rank=other.effective_rank,
    )


def _compare(student: LanguageModel, hidden: Tensor, teacher_hidden: Tensor | None, teacher: Head | None, labels: Tensor) -> dict[str, Tensor]:
    """Sums over the target tokens of a batch, in fp64: nats, teacher_nats, agreeing."""

    def compare(said: Tensor, taught: Tensor | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sums = {"nats": task(said, labels).double().sum()}
        if taught is not None:
            sums |= {"teacher_nats": task(taught, labels).double().sum(), "agreeing": (taught.argmax(-1) == said.argmax(-1)).double().sum()}
        return said.new_zeros(()), sums

    return student.through_head(hidden, lambda x, own: chunked_loss(x, own, teacher_hidden, teacher, [labels.to(x.device)], compare))[1]
