"""Terms that compare what is inside the layers: hidden states and attention probabilities, through a layer map (DQ-BART, ACL 2022).

Each is a sum over the student's layers, and over the target tokens of a micro-batch. A decoder's values are those at target positions. An
encoder's are a mean over a sample's source tokens, counted once for each of the sample's target tokens, so that the whole is one mean
per target token however a batch is padded or shared out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqtrain.config import Hidden
from dqtrain.distill import terms
from dqtrain.models.language import Inputs, Outputs
from dqtrain.models.layers import LayerMaps


@dataclass(frozen=True)
class Positions:
    """Which positions of a micro-batch count; all of them, as in DQ-BART's published code, if `padding_counts`."""

    inputs: Inputs
    padding_counts: bool

    @property
    def num_targets(self) -> Tensor:
        """Target tokens of each sample."""
        return self.inputs.is_target.sum(1)

    def over_targets(self, values: Tensor) -> Tensor:
        """Values of the decoder's positions [samples, tokens] -> sum over target tokens."""
        return values.mean() * self.num_targets.sum() if self.padding_counts else values[self.inputs.is_target].sum()

    def over_sources(self, values: Tensor) -> Tensor:
        """Values of the encoder's positions [samples, source tokens] -> sum over target tokens."""
        if self.padding_counts:  # then each sample has as many target positions as any other
            return values.mean() * self.num_targets.sum()
        return (self.mean_of_sources(values) * self.num_targets).sum()

    def mean_of_sources(self, values: Tensor) -> Tensor:
        """Values of the encoder's positions [samples, source tokens] -> mean of each sample [samples]."""
        if self.padding_counts or self.inputs.source_is_real is None:
            return values.mean(1)
        return terms.mean_over(values, self.inputs.source_is_real)

    @property
    def keys(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys that count in attention, of the decoder and of the encoder; None: all."""
        return (None, None) if self.padding_counts else (self.inputs.is_real, self.inputs.source_is_real)


def hidden_term(student: Outputs, teacher: Outputs, positions: Positions, maps: LayerMaps, settings: Hidden) -> Tensor:
    """Distance of the embeddings and of each layer's output, of decoder and encoder, summed over target tokens. Scalar."""

    def distances(ours: Sequence[Tensor], theirs: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        chosen = [theirs[0], *(theirs[layer + 1] for layer in layers)]
        return [terms.hidden_distance(a, b, settings.distance) for a, b in zip(ours, chosen, strict=True)]

    values = [positions.over_targets(value) for value in distances(student.decoder.states, teacher.decoder.states, maps.decoder)]
    if student.encoder.states:
        of_encoder = distances(student.encoder.states, teacher.encoder.states, maps.encoder)
        values += [positions.over_sources(value) for value in of_encoder]
        if settings.last_encoder_state_by_sample:
            last = terms.hidden_distance(student.encoder.states[-1], teacher.encoder.states[-1], settings.distance)
            values.append(positions.mean_of_sources(last).sum() * positions.num_targets.sum())
    return torch.stack(values).sum()


def attention_term(student: Outputs, teacher: Outputs, positions: Positions, maps: LayerMaps) -> Tensor:
    """Distance of each layer's attention probabilities, of decoder, encoder and between them, summed over target tokens. Scalar."""

    def distances(ours: Sequence[Tensor], theirs: Sequence[Tensor], layers: Sequence[int], keys: Tensor | None) -> list[Tensor]:
        return [terms.attention_distance(a, theirs[layer], keys) for a, layer in zip(ours, layers, strict=True)]

    own, source = positions.keys
    of_decoder = distances(student.decoder.attentions, teacher.decoder.attentions, maps.decoder, own)
    if student.encoder.attentions:
        of_decoder += distances(student.decoder.cross, teacher.decoder.cross, maps.decoder, source)
    values = [positions.over_targets(value) for value in of_decoder]
    values += [positions.over_sources(v) for v in distances(student.encoder.attentions, teacher.encoder.attentions, maps.encoder, source)]
    return torch.stack(values).sum()
