"""What llama.cpp must know of a model, family by family, and what it wants otherwise than transformers. Of models that it would compute otherwise: a refusal."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dqtrain.errors import ConfigError

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")


@dataclass(frozen=True)
class Family:
    """What llama.cpp must know of a model, and what it wants otherwise than transformers."""

    arch: str
    num_layers: int
    settings: dict[str, int | float | str]  # keys below `arch`
    interleaved: dict[str, int] = field(default_factory=dict)  # end of a module's name -> heads whose rotary halves are interleaved
    transposed: tuple[str, ...] = ()  # ends of the names of Conv1D modules
    factors: dict[str, float] = field(default_factory=dict)  # name -> what a vector is multiplied by
    extra: dict[str, Tensor] = field(default_factory=dict)  # tensors that transformers computes: llama.cpp's name -> fp32
    float_kinds: tuple[str, ...] = ()  # kinds of weights that stay F32, few as they are


def family(config: PretrainedConfig) -> Family:
    """What `config` is to llama.cpp. Raises ConfigError for a model that it cannot run as transformers does."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"the gguf target runs {', '.join(FAMILIES)}, and this model is {kind}. Use the target packed, or hf.")
    return _gpt2(config) if kind == "gpt2" else _t5(config) if kind == "t5" else _rotary(config)


def _require(config: PretrainedConfig, expected: dict[str, tuple[Any, ...]]) -> None:
    for name, values in expected.items():
        found = getattr(config, name, values[0])
        if found not in values:
            raise ConfigError(
                f"the gguf target: {name} of this {config.model_type} is {found}, but llama.cpp computes {values[0]}. Use the target packed, or hf."
            )


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _gpt2(config: Any) -> Family:
    _require(
        config, {"activation_function": _TANH_GELU, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
    )
    settings = {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }
    return Family("gpt2", config.n_layer, settings, transposed=("c_attn", "c_proj", "c_fc"))


def _rotary(config: Any) -> Family:
    arch = "llama" if config.model_type == "mistral" else config.model_type
    _require(config, {"hidden_act": ("silu", "swish")})
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(
            f"the gguf target: sliding_window of this {config.model_type} is {window}, but llama.cpp looks at all positions. Use the target packed, or hf."
        )
    rope = config.rope_parameters or {}
    _require_rope(config, rope.get("rope_type", "default"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    extra = {}
    if rope.get("rope_type", "default") == "llama3":
        base = 1.0 / settings["rope.freq_base"] ** (torch.arange(0, head, 2, dtype=torch.int64).float() / head)
        extra["rope_freqs.weight"] = base / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    return Family(arch, config.num_hidden_layers, settings, interleaved, extra=extra)


def _require_rope(config: PretrainedConfig, kind: str) -> None:
    known = ("default", "llama3") if config.model_type in ("llama", "mistral") else ("default",)
    if kind not in known:
        raise ConfigError(
            f"the gguf target: rope_type of this {config.model_type} is {kind}, but dqtrain writes {' and '.join(known)}. Use the target packed, or hf."
        )


def _t5(config: Any) -> Family:
    _require(config, {"feed_forward_proj": ("relu", "gated-gelu"), "relative_attention_max_distance": (128,)})
    if config.num_decoder_layers > config.num_layers:
        raise ConfigError(
            f"the gguf target: this t5 has {config.num_layers} encoder layers and {config.num_decoder_layers} of its decoder, "
            "but llama.cpp has no room for a deeper decoder. Use the target packed, or hf."
        )
    settings = {
        "context_length": getattr(config, "n_positions", 512),
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "decoder_block_count": config.num_decoder_layers,
        "attention.head_count": config.num_heads,
        "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    factors = {"decoder.final_layer_norm.weight": config.d_model**-0.5} if config.scale_decoder_outputs else {}
    return Family("t5", config.num_layers, settings, factors=factors, float_kinds=("positions",))
