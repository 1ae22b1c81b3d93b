"""A transformers model, unforked, seen as hidden states and a head: its forward is split in two, so that the head is applied inside the loss (`distill/chunked.py`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dqtrain.data.stream import IGNORED, Batch
from dqtrain.quant.activation import padding_of
from dqtrain.quant.attention import show_attention
from dqtrain.quant.modules import set_own_class


class Inputs(NamedTuple):
    """What a model reads of a micro-batch. The decoder is all there is of a causal model."""

    ids: Tensor  # [samples, tokens], of the decoder
    is_target: Tensor  # bool, as ids: where a word is predicted
    source_ids: Tensor | None = None  # [samples, source tokens], of the encoder
    source_is_real: Tensor | None = None  # bool, as source_ids: no padding
    positions: Tensor | None = None  # as ids: of each token in its document, which it alone attends to; None: to all before it

    @property
    def is_real(self) -> Tensor:
        """Which positions of the decoder are no padding, which is on the right, behind the last target: bool [samples, tokens]."""
        return self.is_target.flip(1).cummax(1).values.flip(1)


def inputs_of(batch: Batch, device: torch.device) -> tuple[Inputs, Tensor]:
    """A batch on a device: (Inputs, labels [samples, tokens], -100 where there is no target)."""
    ids, labels = (torch.from_numpy(array).to(device).contiguous() for array in (batch.input_ids, batch.labels))
    if batch.source_ids is None or batch.source_is_real is None:
        positions = None if batch.positions is None else torch.from_numpy(batch.positions).to(device)
        return Inputs(ids, labels != IGNORED, positions=positions), labels
    return Inputs(ids, labels != IGNORED, torch.from_numpy(batch.source_ids).to(device), torch.from_numpy(batch.source_is_real).to(device)), labels


class Layers(NamedTuple):  # a tuple, as all below, because DeepSpeed looks for tensors in tuples, lists and dicts alone
    """What the layers of an encoder or a decoder give; nothing unless it was asked for."""

    states: tuple[Tensor, ...] = ()  # the embeddings, then each layer's output, the last one after the last norm: [samples, tokens, width]
    attentions: tuple[Tensor, ...] = ()  # probabilities of each layer, before dropout: [samples, heads, tokens, keys]
    cross: tuple[Tensor, ...] = ()  # those of the decoder's attention to the encoder


class Outputs(NamedTuple):
    """What a model says about a micro-batch, but for its head."""

    hidden: Tensor  # [samples, tokens, width] of the decoder, after the last norm, as the head reads them
    decoder: Layers = Layers()
    encoder: Layers = Layers()


class Head(NamedTuple):
    """logits = softcap * tanh((hidden W' + bias) / softcap), the tanh only where there is a softcap."""

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]: GPT-J's, BART's final_logits_bias
    softcap: float | None = None  # Gemma 2's final_logit_softcapping

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [n, width] -> [n, vocabulary], at least fp32; under autocast the product alone is in its dtype. Written to `out`, they have no gradient."""
        device = hidden.device.type
        head = self.cast(device)
        hidden = hidden.to(head.weight.dtype)
        with torch.autocast(device, enabled=False):
            if out is None:
                logits = functional.linear(hidden, head.weight).to(torch.promote_types(head.weight.dtype, torch.float32))
            elif out.dtype == head.weight.dtype:
                logits = torch.mm(hidden, head.weight.T, out=out)
            else:
                logits = out.copy_(hidden @ head.weight.T)
            if self.bias is not None:
                logits.add_(self.bias)
            if self.softcap is None:
                return logits
            return (logits / self.softcap).tanh() * self.softcap if out is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def cast(self, device: str) -> "Head":
        """The same head with its weight in the dtype that it computes in: autocast's, where that is on and the weight is no double."""
        if not torch.is_autocast_enabled(device) or self.weight.dtype == torch.float64:
            return self
        return self._replace(weight=self.weight.to(torch.get_autocast_dtype(device)))


class Taught(NamedTuple):
    """What a teacher says about a micro-batch: its outputs with its head, or words that were drawn from its distributions."""

    outputs: Outputs | None = None
    head: Head | None = None
    ids: Tensor | None = None  # [target tokens, draws], int64
    shares: Tensor | None = None  # [target tokens, draws]: of the probability of the ids


class Teacher(Protocol):
    """Where a teacher's word comes from: a model beside the student, or a store."""

    def teaching(self, batch: Batch, inputs: Inputs, layers: bool = True) -> AbstractContextManager[Taught]:
        """What it says about a micro-batch, within a context; without `layers` nothing of inner layers, whatever it gives else. Collective."""
        ...

    def figures(self) -> dict[str, float]:
        """How alike its word embeddings are, if it knows them. Collective."""
        ...

    def destroy(self) -> None:
        """Give its memory back."""
        ...


class HeadLinear(nn.Linear):
    """A head that hands what it would multiply to a function instead: the (fake-quantized) weight exists inside its forward alone."""

    def forward(self, hidden: Tensor, then: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        """Logits, or `then(hidden, weight, bias)`."""
        return super().forward(hidden) if then is None else then(hidden, self.weight, self.bias)


def open_head(model: PreTrainedModel) -> None:
    """Make the head of a model one that can be asked for its weight (`HeadLinear`), in place; a quantized one can already."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not isinstance(head, HeadLinear):
        set_own_class(head, HeadLinear)


class LanguageModel(nn.Module):
    """A transformers model as hidden states and a head.

    Decoders are padded on the right, where causal attention never looks, so that they need no attention mask; encoders get one. Quantizers of
    activations that share a scale between tokens are told what is padded. `states` and `attentions` of every layer are given where they are asked for.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "fp32", states: bool = False, attentions: bool = False) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.wanted = {"output_hidden_states": states, "output_attentions": attentions}
        if attentions:
            show_attention(model)
        open_head(model)

    def forward(self, inputs: Inputs, layers: bool = True) -> Outputs:
        """Inputs -> Outputs, hidden states in fp32; without `layers` nothing of inner layers, whatever the constructor was asked for."""
        model: Any = self.model
        wanted = self.wanted if layers else {}
        # Autocast sits inside the module: DeepSpeed switches an outer one off (measured).
        with self._autocast(inputs.ids):
            if inputs.source_ids is None:
                with padding_of(model, inputs.is_real):
                    said = model.base_model(input_ids=inputs.ids, use_cache=False, **self._confined(inputs.positions), **wanted)
                return self._outputs(inputs.ids.device, said)
            mask = inputs.source_is_real
            read = model.get_encoder()(input_ids=inputs.source_ids, attention_mask=mask, **wanted)
            decoder, states = model.get_decoder(), read.last_hidden_state
            with padding_of(decoder, inputs.is_real):
                said = decoder(input_ids=inputs.ids, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False, **wanted)
            return self._outputs(inputs.ids.device, said, read)

    def through_head(self, hidden: Tensor, then: Callable[[Tensor, Head], Any]) -> Any:
        """`then(hidden, head)`: hidden states [n, width], quantized if the head's input is, and the head, whole and fake-quantized. Collective under ZeRO-3."""
        model: Any = self.model
        with self._autocast(hidden):
            return model.get_output_embeddings()(hidden, then=lambda x, weight, bias: then(x, self._head(weight, bias)))

    def plain_head(self) -> Head:
        """The head of a model that is not quantized, as far as its weight is whole."""
        layer: Any = self.model.get_output_embeddings()
        return self._head(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `plain_head` is made of."""
        layer: Any = self.model.get_output_embeddings()
        return list(layer.parameters(recurse=False))

    def logits(self, inputs: Inputs) -> Tensor:
        """Inputs -> logits [target tokens, vocabulary], row-major over the target positions, in fp32."""
        return self.through_head(self(inputs, layers=False).hidden[inputs.is_target], lambda hidden, head: head.logits(hidden))

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        added = getattr(self.model, "final_logits_bias", None)
        if added is not None:
            bias = added[0].to(weight.device) if bias is None else bias + added[0].to(bias.device)
        return Head(weight, bias, getattr(self.model.config, "final_logit_softcapping", None))

    def _outputs(self, device: torch.device, decoder: Any, encoder: Any = None) -> Outputs:
        keys = ("hidden_states", "attentions", "cross_attentions")
        layers = [Layers(*(tuple(x.float() for x in said.get(key) or ()) for key in keys)) for said in (decoder, encoder or {})]
        hidden = decoder.last_hidden_state.float().to(device)  # the last layer of a model that is spread over several may be elsewhere
        if getattr(self.model.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * self.model.config.d_model**-0.5
        return Outputs(hidden, *layers)

    def _confined(self, positions: Tensor | None) -> dict[str, Tensor]:
        """What a causal model is told so that tokens attend to their own document alone: where they are in it, and which keys they may read.

        transformers makes the mask of the positions itself where a family hands them on to it, and only so for layers that look through a window.
        """
        if positions is None:
            return {}
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "sliding_window", None) is not None or kinds != {"full_attention"}:
            return {"position_ids": positions}
        document = (positions == 0).cumsum(1)
        may_read = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        if config._attn_implementation == "sdpa":
            return {"position_ids": positions, "attention_mask": may_read}
        added = torch.zeros(may_read.shape, device=positions.device).masked_fill_(~may_read, torch.finfo(torch.float32).min)
        return {"position_ids": positions, "attention_mask": added}

    def _autocast(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, torch.bfloat16, enabled=self.precision == "bf16")
