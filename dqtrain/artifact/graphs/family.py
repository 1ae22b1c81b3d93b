"""Families of transformers as graphs of ONNX, with a cache of keys and values. Of models that a graph would compute otherwise: a refusal.

A causal model is one graph, `model.onnx`:

    input_ids, attention_mask                    int64 [batch, tokens], [batch, past + tokens]: 1 where a token is real; padding is on the left
    past_key_values.I.key, .value                fp32 [batch, heads, past, width of a head]
    logits, present.I.key, .value                fp32 [batch, tokens, vocabulary], [batch, heads, past + tokens, width]

An encoder-decoder is two. `encoder.onnx` gives the keys and values of the source for each layer of the decoder, computed once:

    input_ids, attention_mask                    int64 [batch, source]: padding is on the right
    present.I.encoder.key, .value                fp32 [batch, source, heads x width]

and `decoder.onnx` reads them:

    input_ids, encoder_attention_mask            int64 [batch, tokens], [batch, source]
    past_key_values.I.encoder.key, .value        what the encoder gave
    past_key_values.I.decoder.key, .value        as of a causal model
    logits, present.I.decoder.key, .value        as of a causal model
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention

from dqtrain.artifact.graphs.graph import Graph
from dqtrain.artifact.graphs.layers import ACTIVATIONS, Heads, attention, bias_of, counted, for_each, is_real, layer_norm, logits, rms_norm, sees
from dqtrain.config import Target
from dqtrain.errors import ConfigError

CAUSAL, ENCODER, DECODER = "model.onnx", "encoder.onnx", "decoder.onnx"
"""Files of graphs."""

AnyGraph = TypeVar("AnyGraph", bound=Graph)
Graphs = dict[str, Graph]
New = Callable[[], Graph]
Read = Callable[[Graph, Any], "Prompt"]


def check_family(config: PretrainedConfig, target: Target) -> None:
    """Raise ConfigError for a model that the graphs, written for a target, do not compute as transformers does."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"the {target} target writes {', '.join(FAMILIES)}, and this model is {kind}. Use the target packed, or hf.")
    computed = {name: values for name, values in FAMILIES[kind].computed.items() if hasattr(config, name)}
    rope = getattr(config, "rope_parameters", None) or {}
    found = {name: getattr(config, name) for name in computed} | rope
    for name, values in (computed | (_ROPE if rope else {})).items():
        if name in found and found[name] not in values:
            raise ConfigError(
                f"the {target} target: {name} of this {kind} is {found[name]}, but its graph computes {', '.join(map(str, values))}. Use the target packed, or hf."
            )


def graphs(config: PretrainedConfig, new: Callable[[], AnyGraph], read: Read | None = None) -> dict[str, AnyGraph]:
    """The graphs of a model that `check_family` takes, by their files' names, each begun by `new`. `read`: what gives a causal one its tokens."""
    write = FAMILIES[config.model_type].write
    return write(config, new) if config.is_encoder_decoder else write(config, new, read or _prompt)


# Causal models


class Prompt(NamedTuple):
    """What a causal model reads."""

    ids: str
    positions: str  # int64 [batch, tokens], 0 at the first real token
    bias: Callable[[int | None], str]  # window -> what is added to scores [batch, 1, tokens, total]


def _prompt(g: Graph, config: Any) -> Prompt:
    g.output("logits", ("batch", "tokens", config.vocab_size))
    ids, mask = g.input("input_ids", ("batch", "tokens"), np.int64), g.input("attention_mask", ("batch", "total"), np.int64)
    total, zero, one = g.size(mask, 1), g.constant(0), g.constant([1])
    past = g.op("Sub", total, g.size(ids, 1))
    so_far = g.op("Max", g.op("Sub", g.op("CumSum", mask, g.constant(1)), g.constant(1)), zero)
    positions = g.op("Slice", so_far, g.op("Reshape", past, one), g.op("Reshape", total, one), one)
    keys, queries, real = counted(g, zero, total), counted(g, past, total), is_real(g, mask)
    made: dict[int | None, str] = {}

    def bias(window: int | None = None) -> str:
        if window not in made:
            made[window] = bias_of(g, g.op("And", sees(g, queries, keys, window), real))
        return made[window]

    return Prompt(ids, positions, bias)


def _gpt2(config: Any, new: New, read: Read) -> Graphs:
    g = new()
    prompt, act, table, epsilon = read(g, config), ACTIVATIONS[config.activation_function], "transformer.wte.weight", config.layer_norm_epsilon
    width = config.n_embd // config.n_head
    x = g.op("Add", g.rows(prompt.ids, table), g.rows(prompt.positions, "transformer.wpe.weight"))
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        scale = (width**-0.5 if config.scale_attn_weights else 1.0) / (i + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        together = g.linear(layer_norm(g, x, f"{layer}.ln_1", epsilon), f"{layer}.attn.c_attn", is_transposed=True)
        q, k, v = g.ops("Split", together, names=[f"{layer}.{part}" for part in "qkv"], axis=-1, num_outputs=3)
        out = attention(g, q, k, v, prompt.bias(None), Heads(config.n_head, config.n_head, width, scale), str(i))
        x = g.op("Add", x, g.linear(out, f"{layer}.attn.c_proj", is_transposed=True))
        out = act(g, g.linear(layer_norm(g, x, f"{layer}.ln_2", epsilon), f"{layer}.mlp.c_fc", is_transposed=True))
        x = g.op("Add", x, g.linear(out, f"{layer}.mlp.c_proj", is_transposed=True))
    logits(g, layer_norm(g, x, "transformer.ln_f", epsilon), table)
    return {CAUSAL: g}


def _rotary(config: Any, new: New, read: Read) -> Graphs:
    g = new()
    prompt, act, table, epsilon = read(g, config), ACTIVATIONS[config.hidden_act], "model.embed_tokens.weight", config.rms_norm_eps
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, width, width**-0.5)
    turns = _turns(g, config, width, prompt.positions)
    windowed = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers  # Mistral's has no types: all layers have its window
    x = g.rows(prompt.ids, table)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(g, x, f"{layer}.input_layernorm", epsilon)
        projected = [g.linear(normed, f"{layer}.self_attn.{part}_proj") for part in "qkv"]
        for at, (part, number) in enumerate((("q", heads.queries), ("k", heads.keys))):
            if g.has(f"{layer}.self_attn.{part}_norm.weight"):  # Qwen 3's, of each head
                split = rms_norm(g, g.op("Reshape", projected[at], g.constant([0, 0, number, width])), f"{layer}.self_attn.{part}_norm", epsilon)
                projected[at] = g.op("Reshape", split, g.constant([0, 0, number * width]))
            projected[at] = g.op("RotaryEmbedding", projected[at], *turns, num_heads=number)
        window = getattr(config, "sliding_window", None) if windowed[i] == "sliding_attention" else None
        q, k, v = projected
        out = attention(g, q, k, v, prompt.bias(window), heads, str(i))
        x = g.op("Add", x, g.linear(out, f"{layer}.self_attn.o_proj"))
        normed = rms_norm(g, x, f"{layer}.post_attention_layernorm", epsilon)
        gated = g.op("Mul", act(g, g.linear(normed, f"{layer}.mlp.gate_proj")), g.linear(normed, f"{layer}.mlp.up_proj"))
        x = g.op("Add", x, g.linear(gated, f"{layer}.mlp.down_proj"))
    logits(g, rms_norm(g, x, "model.norm", epsilon), table)
    return {CAUSAL: g}


def _turns(g: Graph, config: Any, width: int, positions: str) -> tuple[str, str]:
    """Cosines and sines of each position, fp32 [batch, tokens, width / 2]."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        frequencies, factor = 1.0 / rope.get("rope_theta", 10000.0) ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = g.op("Mul", g.op("Unsqueeze", g.op("Cast", positions, to=g.FLOAT), g.constant([2])), g.constant(frequencies.numpy(), np.float32))
    turned = [g.op(name, angles) for name in ("Cos", "Sin")]
    cos, sin = turned if factor == 1.0 else [g.op("Mul", value, g.constant(factor, np.float32)) for value in turned]
    return cos, sin


def _opt(config: Any, new: New, read: Read) -> Graphs:
    g = new()
    prompt, act, table = read(g, config), ACTIVATIONS[config.activation_function], "model.decoder.embed_tokens.weight"
    width, is_first = config.hidden_size // config.num_attention_heads, config.do_layer_norm_before
    heads = Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)
    x = g.rows(prompt.ids, table)
    if g.has("model.decoder.project_in.weight"):
        x = g.linear(x, "model.decoder.project_in")
    x = g.op("Add", x, g.rows(g.op("Add", prompt.positions, g.constant(2)), "model.decoder.embed_positions.weight"))
    for i in range(config.num_hidden_layers):
        layer = f"model.decoder.layers.{i}"

        def attend(x: str, layer: str = layer, cache: str = str(i)) -> str:
            q, k, v = (g.linear(x, f"{layer}.self_attn.{part}_proj") for part in "qkv")
            return g.linear(attention(g, q, k, v, prompt.bias(None), heads, cache), f"{layer}.self_attn.out_proj")

        x = _sublayer(g, x, f"{layer}.self_attn_layer_norm", is_first, attend)
        x = _sublayer(g, x, f"{layer}.final_layer_norm", is_first, _feed_forward(g, layer, act))
    if g.has("model.decoder.final_layer_norm.weight"):
        x = layer_norm(g, x, "model.decoder.final_layer_norm")
    if g.has("model.decoder.project_out.weight"):
        x = g.linear(x, "model.decoder.project_out")
    logits(g, x, table)
    return {CAUSAL: g}


def _sublayer(g: Graph, x: str, norm: str, is_first: bool, inner: Callable[[str], str]) -> str:
    """x + inner(norm(x)) where the norm is first, else norm(x + inner(x))."""
    if is_first:
        return g.op("Add", x, inner(layer_norm(g, x, norm)))
    return layer_norm(g, g.op("Add", x, inner(x)), norm)


def _feed_forward(g: Graph, layer: str, act: Callable[[Graph, str], str]) -> Callable[[str], str]:
    return lambda x: g.linear(act(g, g.linear(x, f"{layer}.fc1")), f"{layer}.fc2")


# Encoder-decoders


def _source(g: Graph) -> tuple[str, str]:
    """What an encoder reads: ids, and which are real, bool [batch, 1, 1, source]."""
    ids = g.input("input_ids", ("batch", "source"), np.int64)
    return ids, is_real(g, g.input("attention_mask", ("batch", "source"), np.int64))


class _Target(NamedTuple):
    """What a decoder reads."""

    ids: str
    queries: str  # numbers of its tokens
    keys: str  # and of all so far
    of_source: str  # what is added to scores of the source, [batch, 1, tokens, source]


def _target(g: Graph, config: Any) -> _Target:
    g.output("logits", ("batch", "tokens", config.vocab_size))
    ids = g.input("input_ids", ("batch", "tokens"), np.int64)
    real = is_real(g, g.input("encoder_attention_mask", ("batch", "source"), np.int64))
    tokens, past = g.size(ids, 1), g.size("past_key_values.0.decoder.key", 2)
    total = g.op("Add", past, tokens)
    return _Target(ids, counted(g, past, total), counted(g, g.constant(0), total), for_each(g, bias_of(g, real), tokens))


def _give_to_decoder(g: Graph, x: str, layer: int, width: int, key: str, value: str) -> None:
    """Keys and values of the source for a layer of the decoder, outputs of the encoder."""
    for part, module in (("key", key), ("value", value)):
        name = f"present.{layer}.encoder.{part}"
        g.linear(x, module, name=name)
        g.output(name, ("batch", "source", width))


def _of_source(g: Graph, q: str, bias: str, heads: Heads, layer: int) -> str:
    """A decoder's attention to the source."""
    k, v = (g.input(f"past_key_values.{layer}.encoder.{part}", ("batch", "source", heads.keys * heads.width)) for part in ("key", "value"))
    return attention(g, q, k, v, bias, heads)


def _bart(config: Any, new: New) -> Graphs:
    is_first, act = config.model_type == "mbart", ACTIVATIONS[config.activation_function]
    encoder, decoder = new(), new()

    def embedded(g: Graph, side: str, ids: str, numbers: str) -> str:
        x = g.rows(ids, _table(g, f"model.{side}.embed_tokens.weight", "model.shared.weight"))
        if config.scale_embedding:
            x = g.op("Mul", x, g.constant(config.d_model**0.5, np.float32))
        positions = g.rows(g.op("Add", numbers, g.constant(2)), f"model.{side}.embed_positions.weight")
        return layer_norm(g, g.op("Add", x, positions), f"model.{side}.layernorm_embedding")

    def heads_of(number: int) -> Heads:
        return Heads(number, number, config.d_model // number, (config.d_model // number) ** -0.5)

    def attend(g: Graph, module: str, bias: str, heads: Heads, cache: str | None = None) -> Callable[[str], str]:
        def inner(x: str) -> str:
            q, k, v = (g.linear(x, f"{module}.{part}_proj") for part in "qkv")
            return g.linear(attention(g, q, k, v, bias, heads, cache), f"{module}.out_proj")

        return inner

    def attend_to_source(g: Graph, module: str, bias: str, heads: Heads, layer: int) -> Callable[[str], str]:
        return lambda x: g.linear(_of_source(g, g.linear(x, f"{module}.q_proj"), bias, heads, layer), f"{module}.out_proj")

    g, heads = encoder, heads_of(config.encoder_attention_heads)
    ids, real = _source(g)
    tokens = g.size(ids, 1)
    bias = for_each(g, bias_of(g, real), tokens)
    x = embedded(g, "encoder", ids, counted(g, g.constant(0), tokens))
    for i in range(config.encoder_layers):
        layer = f"model.encoder.layers.{i}"
        x = _sublayer(g, x, f"{layer}.self_attn_layer_norm", is_first, attend(g, f"{layer}.self_attn", bias, heads))
        x = _sublayer(g, x, f"{layer}.final_layer_norm", is_first, _feed_forward(g, layer, act))
    x = layer_norm(g, x, "model.encoder.layer_norm") if is_first else x
    for i in range(config.decoder_layers):
        module = f"model.decoder.layers.{i}.encoder_attn"
        _give_to_decoder(g, x, i, config.d_model, f"{module}.k_proj", f"{module}.v_proj")

    g, heads = decoder, heads_of(config.decoder_attention_heads)
    target = _target(g, config)
    bias = bias_of(g, sees(g, target.queries, target.keys))
    x = embedded(g, "decoder", target.ids, target.queries)
    for i in range(config.decoder_layers):
        layer = f"model.decoder.layers.{i}"
        x = _sublayer(g, x, f"{layer}.self_attn_layer_norm", is_first, attend(g, f"{layer}.self_attn", bias, heads, f"{i}.decoder"))
        x = _sublayer(g, x, f"{layer}.encoder_attn_layer_norm", is_first, attend_to_source(g, f"{layer}.encoder_attn", target.of_source, heads, i))
        x = _sublayer(g, x, f"{layer}.final_layer_norm", is_first, _feed_forward(g, layer, act))
    x = layer_norm(g, x, "model.decoder.layer_norm") if is_first else x
    logits(g, x, "model.shared.weight", "final_logits_bias")
    return {ENCODER: encoder, DECODER: decoder}


def _table(g: Graph, own: str, shared: str) -> str:
    return own if g.has(own) else shared


def _t5(config: Any, new: New) -> Graphs:
    act, epsilon = ACTIVATIONS[config.dense_act_fn], config.layer_norm_epsilon
    heads = Heads(config.num_heads, config.num_heads, config.d_kv, 1.0)
    encoder, decoder = new(), new()

    def attend(g: Graph, x: str, layer: str, bias: str, cache: str | None = None) -> str:
        normed = rms_norm(g, x, f"{layer}.layer_norm", epsilon)
        q, k, v = (g.linear(normed, f"{layer}.SelfAttention.{part}") for part in "qkv")
        return g.op("Add", x, g.linear(attention(g, q, k, v, bias, heads, cache), f"{layer}.SelfAttention.o"))

    def feed_forward(g: Graph, x: str, layer: str) -> str:
        inner, normed = f"{layer}.DenseReluDense", rms_norm(g, x, f"{layer}.layer_norm", epsilon)
        if config.is_gated_act:
            between = g.op("Mul", act(g, g.linear(normed, f"{inner}.wi_0")), g.linear(normed, f"{inner}.wi_1"))
        else:
            between = act(g, g.linear(normed, f"{inner}.wi"))
        return g.op("Add", x, g.linear(between, f"{inner}.wo"))

    g = encoder
    ids, real = _source(g)
    numbers = counted(g, g.constant(0), g.size(ids, 1))
    bias = bias_of(g, real, _relative_bias(g, config, "encoder", numbers, numbers))
    x = g.rows(ids, _table(g, "encoder.embed_tokens.weight", "shared.weight"))
    for i in range(config.num_layers):
        x = attend(g, x, f"encoder.block.{i}.layer.0", bias)
        x = feed_forward(g, x, f"encoder.block.{i}.layer.1")
    x = rms_norm(g, x, "encoder.final_layer_norm", epsilon)
    for i in range(config.num_decoder_layers):
        module = f"decoder.block.{i}.layer.1.EncDecAttention"
        _give_to_decoder(g, x, i, config.num_heads * config.d_kv, f"{module}.k", f"{module}.v")

    g = decoder
    target = _target(g, config)
    bias = bias_of(g, sees(g, target.queries, target.keys), _relative_bias(g, config, "decoder", target.queries, target.keys))
    x = g.rows(target.ids, _table(g, "decoder.embed_tokens.weight", "shared.weight"))
    for i in range(config.num_decoder_layers):
        x = attend(g, x, f"decoder.block.{i}.layer.0", bias, f"{i}.decoder")
        layer = f"decoder.block.{i}.layer.1"
        q = g.linear(rms_norm(g, x, f"{layer}.layer_norm", epsilon), f"{layer}.EncDecAttention.q")
        x = g.op("Add", x, g.linear(_of_source(g, q, target.of_source, heads, i), f"{layer}.EncDecAttention.o"))
        x = feed_forward(g, x, f"decoder.block.{i}.layer.2")
    x = rms_norm(g, x, "decoder.final_layer_norm", epsilon)
    if config.scale_decoder_outputs:
        x = g.op("Mul", x, g.constant(config.d_model**-0.5, np.float32))
    logits(g, x, "shared.weight")
    return {ENCODER: encoder, DECODER: decoder}


def _relative_bias(g: Graph, config: Any, side: str, queries: str, keys: str) -> str:
    """What T5 adds to scores for the distance of tokens: [1, heads, tokens, keys]. Buckets of all distances are transformers', from a table: logarithms round."""
    furthest = config.relative_attention_max_distance  # beyond it there is one bucket
    distances = torch.arange(-furthest, furthest + 1)
    of_distance: Any = T5Attention._relative_position_bucket
    buckets = of_distance(distances, bidirectional=side == "encoder", num_buckets=config.relative_attention_num_buckets, max_distance=furthest)
    away = g.op("Sub", keys, g.op("Unsqueeze", queries, g.constant([1])))
    away = g.op("Add", g.op("Clip", away, g.constant(-furthest), g.constant(furthest)), g.constant(furthest))
    bucket = g.op("Gather", g.constant(buckets.numpy()), away)
    of_pairs = g.rows(bucket, f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")  # [tokens, keys, heads]
    return g.op("Unsqueeze", g.op("Transpose", of_pairs, perm=[2, 0, 1]), g.constant([0]))


class _Family(NamedTuple):
    write: Callable[..., dict[str, Any]]  # of graphs, which are those that it begins
    computed: Mapping[str, tuple[Any, ...]]  # settings -> values that the graphs compute


_ROPE = {"rope_type": ("default", "linear", "llama3", "yarn"), "partial_rotary_factor": (None, 1.0)}  # turns that are the same for texts of any length
_GATED = _Family(_rotary, {"hidden_act": tuple(ACTIVATIONS)})
_BART = _Family(_bart, {"activation_function": tuple(ACTIVATIONS)})
FAMILIES: dict[str, _Family] = {
    "gpt2": _Family(_gpt2, {"activation_function": tuple(ACTIVATIONS), "add_cross_attention": (False,)}),
    "opt": _Family(_opt, {"activation_function": tuple(ACTIVATIONS), "layer_norm_elementwise_affine": (True,)}),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _GATED),
    **dict.fromkeys(("bart", "mbart"), _BART),
    "t5": _Family(_t5, {"dense_act_fn": tuple(ACTIVATIONS)}),
}
"""By transformers' model_type."""
