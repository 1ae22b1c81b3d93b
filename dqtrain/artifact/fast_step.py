"""One more token of causal models in mode `fast`: a list of torch's operators, in place of the family's modules.

With the weights in codes, half the time of a word went to what is around the products: transformers' modules, masks and caches. The operators are
those of the family's graph (`graphs.family`), of which the onnx target makes a file. Prompts, whatever is asked beside logits, caches of other
kinds than transformers' plain one and families without a graph go through the modules, as before. Hooks on modules are called for those alone.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from dqtrain.artifact.fast import FastEmbedding, FastLinear, product
from dqtrain.artifact.graphs.family import Prompt, check_family, graphs
from dqtrain.artifact.graphs.graph import Graph
from dqtrain.errors import ConfigError

PLAIN = {"input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"}
"""What a call may give for one more token; anything else that is set is left to the modules."""

ROOM = 256
"""Tokens for which keys and values get memory at a time."""


def shorten_steps(model: PreTrainedModel) -> None:
    """Let a model that `fast.fill` filled read single tokens by its family's graph, if there is one, in place."""
    cls: Any = type(model)
    try:
        step = Step(model)
    except ConfigError:
        return

    @functools.wraps(cls.forward)
    def forward(self: Any, *arguments: Any, **given: Any) -> Any:
        if arguments or not self._step.reads(self, given):
            return cls.forward(self, *arguments, **given)
        return CausalLMOutputWithPast(logits=self._step.read(**given), past_key_values=given["past_key_values"])

    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    model._step = step  # type: ignore[assignment]


class Growing(DynamicLayer):
    """Keys and values of a layer in fp32, with room behind them, where transformers copies all that was read for each token."""

    room: tuple[Tensor, Tensor] | None = None
    last: Tensor | None = None  # what `keys` was made; something else where beams were sorted or texts cut since

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """As transformers' modules want them: in the dtype of these."""
        keys, values = self.grow(key_states, value_states)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def grow(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [batch, heads, tokens, width], fp32, these behind those that were there."""
        assert self.keys is not None and self.values is not None, "a prompt was read"
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if self.room is None or self.keys is not self.last or end > self.room[0].shape[2]:
            batch, heads, _, width = self.keys.shape
            self.room = torch.empty(batch, heads, end + ROOM, width), torch.empty(batch, heads, end + ROOM, self.values.shape[3])
            self.room[0].narrow(2, 0, start).copy_(self.keys)
            self.room[1].narrow(2, 0, start).copy_(self.values)
        keys, values = self.room
        keys.narrow(2, start, end - start).copy_(key_states)
        values.narrow(2, start, end - start).copy_(value_states)
        self.keys, self.values = self.last, _ = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self.keys, self.values


class Step(Graph):
    """A graph that torch computes with the modules of a model, for one token of each sequence. Raises ConfigError for a model that has no graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__({}, {})
        if model.config.is_encoder_decoder:
            raise ConfigError("its decoder reads a source")
        self._modules = dict(model.named_modules())
        self._values: dict[str, Any] = {}  # that are the same for all tokens
        self._nodes: list[tuple[Callable[..., Any], Sequence[str], str]] = []  # function, inputs, output
        self._num_layers = 0
        check_family(model.config, "packed")
        graphs(model.config, lambda: self, lambda g, config: Prompt("ids", "positions", _seen))

    def reads(self, model: Any, given: dict[str, Any]) -> bool:
        """Whether a call of the model asks for nothing but the logits behind one more token."""
        ids, cache, mask = given.get("input_ids"), given.get("past_key_values"), given.get("attention_mask")
        if ids is None or ids.shape[1] != 1 or given.get("position_ids") is None or not given.get("use_cache") or model.training:
            return False
        if not isinstance(cache, DynamicCache) or len(cache.layers) != self._num_layers or {*map(type, cache.layers)} - {DynamicLayer, Growing}:
            return False
        if not cache.get_seq_length():  # the prompt has a single token
            return False
        if mask is not None and tuple(mask.shape) != (len(ids), cache.get_seq_length() + 1):
            return False
        wanted = {name for name, value in given.items() if value is not None and value is not False}
        config = model.config
        return wanted <= PLAIN and given.get("return_dict") is not False and not (config.output_attentions or config.output_hidden_states)

    def read(self, input_ids: Tensor, position_ids: Tensor, past_key_values: DynamicCache, attention_mask: Tensor | None = None, **given: Any) -> Tensor:
        """Logits [batch, 1, vocabulary] behind ids [batch, 1]; the cache gets their keys and values."""
        seen = None if attention_mask is None or attention_mask.all() else attention_mask[:, None, None].bool()
        values = {**self._values, "ids": input_ids, "positions": position_ids, "seen": seen, "cache": past_key_values}
        for function, inputs, output in self._nodes:
            values[output] = function(*[values[name] for name in inputs])
        logits: Tensor = values["logits"]
        return logits

    def ops(self, kind: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> list[str]:
        """As in the graph of a file."""
        if kind == "Attention":
            function: Any = functools.partial(_attention, layer=self._num_layers, **attributes)
            self._num_layers += 1
            self._nodes.append((function, (*inputs[:4], "cache"), names[0]))
        elif kind == "Split":
            for i, name in enumerate(names):
                self._nodes.append((functools.partial(_part, number=len(names), i=i), inputs, name))
        else:
            self._nodes.append((functools.partial(OPERATORS[kind], **attributes) if attributes else OPERATORS[kind], inputs, names[0]))
        return list(names)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small tensor."""
        name = f"constant_{len(self._values)}"
        self._values[name] = torch.as_tensor(np.asarray(value, dtype))
        return name

    def input(self, name: str, shape: Iterable[int | str], dtype: Any = np.float32) -> str:
        """Nothing: keys and values are in the cache."""
        return name

    def output(self, name: str, shape: Iterable[int | str]) -> None:
        """Nothing."""

    def has(self, name: str) -> bool:
        """Whether the model has such a parameter, or codes in its place."""
        path, _, key = name.rpartition(".")
        return getattr(self._modules.get(path), key, None) is not None

    def vector(self, name: str) -> str:
        """A parameter."""
        path, _, key = name.rpartition(".")
        self._values[name] = getattr(self._modules[path], key)
        return name

    def linear(self, x: str, module: str, weight: str | None = None, is_transposed: bool = False, name: str | None = None) -> str:
        """A module's product, its bias added."""
        layer = self._modules[module]
        if isinstance(layer, FastLinear):  # looking up its tensors takes as long as adding its bias
            operands = layer.operands
            self._nodes.append((lambda x: product(x, *operands), (x,), name or module))
        else:
            self._nodes.append((layer.forward, (x,), name or module))
        return name or module

    def rows(self, ids: str, weight: str) -> str:
        """Rows of a table."""
        module: Any = self._modules[weight.rpartition(".")[0]]
        table = FastEmbedding if isinstance(module, FastEmbedding) else nn.Embedding
        self._nodes.append((functools.partial(table.forward, module), (ids,), weight))
        return weight


def _seen(window: int | None) -> str:
    if window is not None:
        raise ConfigError("one of its layers has a window")
    return "seen"


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, cache: Any, *, layer: int, q_num_heads: int, kv_num_heads: int, scale: float) -> Tensor:
    """[batch, 1, heads x width]; heads that share keys are as tokens of one head. In fp32: of one token in bf16 torch's kernel for CPUs takes five times as long."""
    batch = q.shape[0]
    shape = (batch, kv_num_heads, 1, -1)
    of_layer = cache.layers[layer]
    if type(of_layer) is DynamicLayer:
        of_layer.__class__ = Growing
    keys, values = of_layer.grow(k.view(shape), v.view(shape))
    q32 = q.view(batch, kv_num_heads, q_num_heads // kv_num_heads, -1).float()
    return nn.functional.scaled_dot_product_attention(q32, keys, values, seen, scale=scale).to(q.dtype).reshape(batch, 1, -1)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    left, right = x.view(*x.shape[:2], num_heads, -1).float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype).view(x.shape)


def _part(x: Tensor, number: int, i: int) -> Tensor:
    width = x.shape[-1] // number
    return x.narrow(-1, i * width, width)


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([size or x.shape[i] for i, size in enumerate(shape.tolist())])


def _cast(x: Tensor, to: int) -> Tensor:
    assert to == Graph.FLOAT, "families cast positions alone"
    return x.float()


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Cast": _cast,
    "Cos": torch.cos,
    "Gelu": nn.functional.gelu,
    "LayerNormalization": lambda x, weight, bias, axis, epsilon: torch.layer_norm(x, weight.shape, weight, bias, epsilon),
    "Mul": torch.mul,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "RMSNormalization": lambda x, weight, axis, epsilon: torch.rms_norm(x, weight.shape, weight, epsilon),
    "RotaryEmbedding": _rotary,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Unsqueeze": lambda x, axes: x.unsqueeze(int(axes)),
}
"""ONNX's operators, as far as causal families need them for one token."""
