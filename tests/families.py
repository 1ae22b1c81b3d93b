"""Small models of every family that dqtrain quantizes, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dqtrain.build import student_model
from dqtrain.config import RunConfig
from dqtrain.engine import materialise
from dqtrain.models.layers import LayerMaps
from dqtrain.models.making import cut
from dqtrain.models.weights import readers_of
from dqtrain.world import World

IDS = torch.arange(24).reshape(2, 12) * 3 % 97


def _make(model: Any, config: Any, dropouts: tuple[str, ...], **keys: Any) -> Callable[..., PreTrainedModel]:
    def make(**more: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return model(config(**{"vocab_size": 97, **ids, **dict.fromkeys(dropouts, 0.0), **keys, **more}))

    return make


LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "max_position_embeddings": 32, "decoder_start_token_id": 2}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": _make(GPT2LMHeadModel, GPT2Config, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), n_positions=32, n_embd=32, n_layer=2, n_head=2),
    "opt": _make(OPTForCausalLM, OPTConfig, ("dropout",), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16),
    "llama": _make(LlamaForCausalLM, LlamaConfig, (), **LLAMA),
    "qwen2": _make(Qwen2ForCausalLM, Qwen2Config, (), **LLAMA, tie_word_embeddings=True),
    "mistral": _make(MistralForCausalLM, MistralConfig, (), **LLAMA),
    "mixtral": _make(MixtralForCausalLM, MixtralConfig, (), **LLAMA, num_local_experts=3, num_experts_per_tok=2),
    "bart": _make(BartForConditionalGeneration, BartConfig, ("dropout",), **BART, scale_embedding=True),
    "mbart": _make(MBartForConditionalGeneration, MBartConfig, ("dropout",), **BART),
    "t5": _make(T5ForConditionalGeneration, T5Config, (), d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=1, dropout_rate=0.0),
}


def cut_copy(model: PreTrainedModel, maps: LayerMaps) -> PreTrainedModel:
    """A model of the layers that `maps` names, with copies of their weights."""
    student, names = cut(model, maps)
    weights = model.state_dict()
    materialise(student, readers_of({name: weights[source] for name, source in names.items()}))
    return student


ALONE = World(0, 1, 0, torch.device("cpu"))


def whole_student(config: RunConfig) -> tuple[PreTrainedModel, LayerMaps]:
    """The student of a config on this process, and its layer maps."""
    student = student_model(config, 97, 0, ALONE)
    materialise(student.model, student.weights)
    return student.model, student.maps


def logits_of(model: Callable[..., Any], ids: Tensor = IDS) -> Tensor:
    """Logits of a causal model, or of an encoder-decoder model that reads and writes `ids`."""
    config = getattr(model, "config", None)
    return model(input_ids=ids, **({"decoder_input_ids": ids} if config is not None and config.is_encoder_decoder else {})).logits
