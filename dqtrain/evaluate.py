"""Loss, perplexity and agreement with the teacher on a split, shared out over the ranks."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dqtrain.data.stream import IGNORED, Stream
from dqtrain.distill.terms import task
from dqtrain.models import Outputs
from dqtrain.quant.diagnose import Homogeneity
from dqtrain.world import World, gather_objects, sum_over_ranks

Forward = Callable[[Tensor, Tensor], Outputs]
"""(ids, is_target), both [samples, tokens] -> Outputs."""


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


@torch.no_grad()
def evaluate(
    student: Forward,
    stream: Stream,
    micro_batch: int,
    world: World,
    teacher: Forward | None = None,
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
        ids, labels = torch.from_numpy(batch.input_ids).to(world.device), torch.from_numpy(batch.labels).to(world.device)
        if first >= num_samples:
            labels = torch.full_like(labels, IGNORED)
        is_target = labels != IGNORED
        outputs = {"student": student(ids, is_target)}
        if teacher is not None:
            outputs["teacher"] = teacher(ids, is_target)
        for who, output in outputs.items():
            alike.setdefault(who, Homogeneity(output.hidden.shape[-1], world.device)).add(output.hidden[is_target])
        said = outputs["student"].logits
        sums[:2] += task(said, labels[is_target]).double().sum().item(), int(is_target.sum())
        if teacher is not None:
            taught = outputs["teacher"].logits
            sums[2:] += task(taught, labels[is_target]).double().sum().item(), int((taught.argmax(-1) == said.argmax(-1)).sum())
        if progress:
            progress(index + 1, rounds)
    nats, tokens, teacher_nats, agreeing = np.sum(gather_objects(sums), axis=0).tolist()
    loss = nats / tokens
    for homogeneity in alike.values():
        for tensor in homogeneity.tensors:
            sum_over_ranks(tensor)
    own = alike["student"]
    scores = Scores(loss, math.exp(min(loss, 700.0)), int(tokens), own.mean_cosine, own.effective_rank)
    if teacher is None:
        return scores
    other = alike["teacher"]
    return replace(
        scores,
        teacher_loss=teacher_nats / tokens,
        agreement=agreeing / tokens,
        teacher_hidden_cosine=other.mean_cosine,
        teacher_hidden_rank=other.effective_rank,
    )
