"""Quantization inside attention: queries, keys, probabilities and values.

Attention is a function that transformers looks up by name, so that no model file is forked: `quantize_attention` makes a model use the one of
this file, which is each family's own eager attention (GPT-2, OPT, Llama, Qwen2, Mistral, Mixtral, BART, T5, Gemma-2) with
its four operands quantized. `show_attention` makes a float model use it too, for its probabilities.

What is quantized is what the two multiplications read (DQ-BART, section 2.2; TernaryBERT): queries and keys as they arrive, after any rotary
embedding; probabilities after dropout; values. Scores, the softmax and the output stay float.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from dqtrain.errors import ConfigError
from dqtrain.quant.activation import ActivationQuantizer, real_positions
from dqtrain.quant.saved import made_again

NAME, FLOAT = "dqtrain", "dqtrain_float"
"""Under which transformers knows the functions of this file: with quantized operands, and with float ones."""

PLACES = ("query", "key", "probabilities", "value")

WITHOUT_EFFECT = frozenset(
    "cache_position is_causal num_items_in_batch output_attentions output_hidden_states output_router_logits past_key_values position_ids return_dict "
    "sliding_window use_cache".split()
)
"""Arguments that families hand on and that do not change what eager attention computes: what is causal or in a window is in the mask."""


def quantize_attention(model: nn.Module, bits: int, scale: str, asymmetric: bool = True) -> list[str]:
    """Quantize queries, keys, probabilities and values of every attention module of `model`, in place; returns the modules' names.

    `scale` is one of activation.SCALES. `learned` gives each place of each module a step of its own, and probabilities a zero point too, which
    `activation.calibrate` starts. Any other one means dynamic scales: one for each token and head of queries, keys and values,
    symmetric, and one for each query's row of probabilities, asymmetric unless told otherwise (they are >= 0, so that all codes are in use then). It is
    not one for the whole tensor, or for blocks that may not divide a head: a range over the sequence would hold later tokens, and then cached
    decoding, which cannot see them, would compute something else than training did.

    Raises ConfigError, naming the class, where a family's attention is not looked up by name, and for what eager attention cannot say
    (GPT-OSS's sinks, GPT-2's reorder_and_upcast_attn).
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"attention of a {type(model).__name__} cannot be quantized: only transformers models look it up by name. Set quant.activations.attention to false."
        )
    attentions = dict(_attention_modules(model))
    without = next(_own_attention(model), None if attentions else "it")
    if without is not None:
        raise ConfigError(
            f"attention of {type(model).__name__} cannot be quantized: {without} does not use transformers' attention interface. "
            "Set quant.activations.attention to false."
        )
    _check_eager(attentions, "quant.activations.attention to false")
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            raise ConfigError(
                f"{type(module).__name__} does not let its attention be chosen, so that it cannot be quantized. Set quant.activations.attention to false."
            )
    for module in attentions.values():
        scale = scale if scale == "learned" else "per_token"
        quantizers = {place: ActivationQuantizer(place, bits, scale, asymmetric and place == "probabilities") for place in PLACES}
        for quantizer in quantizers.values():
            quantizer.register(module)
        module.attention_quantizers, module.attention_ran = quantizers, False  # type: ignore[assignment]
    return list(attentions)


def check_attention_ran(model: nn.Module) -> None:
    """Raise ConfigError naming the attention modules whose quantizers no forward has used yet."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "attention_quantizers")}
    idle = [name for name, module in found.items() if not module.attention_ran]
    if idle:
        raise ConfigError(
            f"attention of {len(idle)} of {len(found)} modules was never quantized: {', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''}. "
            "Something else than dqtrain's attention ran there; set quant.activations.attention to false, or keep the model's attn_implementation as it is."
        )


def _check_eager(attentions: dict[str, nn.Module], remedy: str) -> None:
    """Raise ConfigError for modules whose attention is more than eager attention."""
    for module in attentions.values():
        if getattr(module, "sinks", None) is not None:
            raise ConfigError(f"{type(module).__name__} has attention sinks, which dqtrain's attention does not know. Set {remedy}.")
        if getattr(module, "reorder_and_upcast_attn", False):
            raise ConfigError(f"reorder_and_upcast_attn of GPT-2 has an attention of its own. Set it to false in the model's config, or {remedy}.")


def _forwards(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__:
            yield inspect.unwrap(cls.__dict__["forward"])


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward looks its attention up by name."""
    for name, module in model.named_modules():
        if any("ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", _attention_modules.__code__).co_names for forward in _forwards(module)):
            yield name, module


def _own_attention(model: nn.Module) -> Iterator[str]:
    """Names of classes that are called attention and neither look one up nor hold a module that does."""
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and not any(True for _ in _attention_modules(module)):
            yield type(module).__name__


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **scoring: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention with quantized operands: (output [batch, tokens, heads, head_dim], float probabilities [batch, heads, tokens, keys], before dropout).

    query [batch, heads, tokens, head_dim], key and value [batch, key heads, keys, head_dim] where query heads share key heads in equal groups;
    `scoring` is what else transformers gives: scaling, position_bias, which like attention_mask is added to the scores, softcap as in
    Gemma-2. The softmax is in fp32 whatever the dtype.

    For backward one copy of each operand is kept, as in eager attention: the quantized queries, keys and values alone, and the float
    probabilities alone, from which the quantized ones are made again, unless dropout is active.

    Raises ConfigError for an argument that changes the result of some other attention and is not known here.
    """
    quantizers: dict[str, ActivationQuantizer] | None = getattr(module, "attention_quantizers", None)
    if quantizers is None:
        raise ConfigError(
            f"{type(module).__name__} has attn_implementation {NAME} and no quantizers. Call quantize_attention on its model, set another attn_implementation, "
            "or, where it shares the config object of a quantized model, give it a copy."
        )
    module.attention_ran = True  # type: ignore[assignment]
    is_real_query, is_real_key = _real_tokens(module, query, attention_mask) if quantizers["query"].scale == "learned" else (None, None)
    query = _by_token(quantizers["query"], query, module, is_real_query)
    key = _by_token(quantizers["key"], key, module, is_real_key)
    value = _for_each_head(_by_token(quantizers["value"], value, module, is_real_key), query)
    probabilities = _probabilities(module, query, key, attention_mask, **scoring)
    dropped = F.dropout(probabilities.to(value.dtype), p=dropout, training=module.training)
    output = _weighted_sum(quantizers["probabilities"], probabilities, dropped, value, module, is_real_query, dropout)
    return output.transpose(1, 2).contiguous(), probabilities


def float_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **scoring: Any
) -> tuple[Tensor, Tensor]:
    """`quantized_attention` without quantizers."""
    probabilities = _probabilities(module, query, key, attention_mask, **scoring)
    value = _for_each_head(value, query)
    output = torch.matmul(F.dropout(probabilities.to(value.dtype), p=dropout, training=module.training), value)
    return output.transpose(1, 2).contiguous(), probabilities


def show_attention(model: PreTrainedModel) -> None:
    """Make a model's attention give its probabilities, those before dropout, where transformers is asked for `output_attentions`.

    Raises ConfigError, naming the class, where a family's attention is not looked up by name: a fused kernel would give none.
    """
    attentions = dict(_attention_modules(model))
    without = next(_own_attention(model), None if attentions else "it")
    if without is not None:
        raise ConfigError(
            f"{type(model).__name__} gives no attention probabilities: {without} does not use transformers' attention interface. Set distill.attention to null."
        )
    _check_eager(attentions, "distill.attention to null")
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(FLOAT)


def _probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """The softmax of the scores, in fp32 at least."""
    unknown = [name for name, argument in others.items() if argument is not None and name not in WITHOUT_EFFECT]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} gives its attention {', '.join(unknown)}, which dqtrain's attention does not know. "
            "Set quant.activations.attention to false and distill.attention to null."
        )
    key = _for_each_head(key, query)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    return F.softmax(scores, dim=-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)


def _by_token(quantizer: ActivationQuantizer, x: Tensor, module: nn.Module, is_real: Tensor | None) -> Tensor:
    """Quantized x [batch, heads, tokens, features], with a mask [batch, tokens]."""
    return quantizer(x.transpose(1, 2), module, is_real).transpose(1, 2)


def _for_each_head(x: Tensor, query: Tensor) -> Tensor:
    """Key heads [batch, key heads, keys, head_dim], each repeated for the query heads that share it."""
    batch, heads, keys, size = x.shape
    groups = query.shape[1] // heads
    return x if groups == 1 else x[:, :, None].expand(batch, heads, groups, keys, size).reshape(batch, heads * groups, keys, size)


def _real_tokens(module: nn.Module, query: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which queries [batch, tokens] and which keys [batch, keys] are no padding; None: all."""
    is_real_query = real_positions(query.transpose(1, 2), module)
    if attention_mask is None or attention_mask.ndim != 4:
        return is_real_query, None
    # The mask says it for keys, of another sequence and in a cache too: a padded one is what no query may read.
    may_read = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return is_real_query, may_read.any(1).any(1).expand(query.shape[0], -1)


def _weighted_sum(
    quantizer: ActivationQuantizer, probabilities: Tensor, dropped: Tensor, value: Tensor, module: nn.Module, is_real: Tensor | None, dropout: float
) -> Tensor:
    """The quantized `dropped` times value. For backward it is made again from `probabilities`, which the softmax keeps anyway, where dropout changes nothing."""
    quantized = _by_token(quantizer, dropped, module, is_real).contiguous()
    pointer = quantized.untyped_storage().data_ptr()
    if (dropout and module.training) or not torch.is_grad_enabled() or pointer == dropped.untyped_storage().data_ptr():
        return torch.matmul(quantized, value)
    dtype, learned = dropped.dtype, quantizer.learned_values(module) if quantizer.learned_names else ()

    def make(probabilities: Tensor) -> Tensor:
        return quantizer.value(probabilities.to(dtype).transpose(1, 2), learned).transpose(1, 2).contiguous()

    with made_again({pointer: make}, probabilities.detach()):
        return torch.matmul(quantized, value)


for _name, _attention in ((NAME, quantized_attention), (FLOAT, float_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, eager_mask)
