"""What a config asks of a model, held to one of its kind before the run starts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dqtrain.config import Data
from dqtrain.errors import ConfigError, DataError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.models.making import few_words, small_model


@torch.no_grad()
def has_norm_behind(config: PretrainedConfig, encoder: bool = False) -> bool:
    """Whether the last states of a model's decoder, or encoder, are more than what its last layer gives: those of models with a norm behind all layers."""
    model = small_model(config).eval()
    stack: Any = model.get_encoder() if encoder else model.get_decoder()
    blocks = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
    given: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: given.append(output[0] if isinstance(output, tuple) else output))
    said = LanguageModel(model, states=True)(few_words(model))
    hook.remove()
    return not torch.equal((said.encoder if encoder else said.decoder).states[-1], given[0])


def check_length(config: PretrainedConfig, data: Data, name: str) -> None:
    """Raise ConfigError when samples are longer than the model's positions, or are text where an encoder wants a source."""
    longest = getattr(config, "max_position_embeddings", None)
    if data.pairs is None and config.is_encoder_decoder:
        raise ConfigError(f"{name} has an encoder and a decoder, which read sources and write targets, but data.pairs is null; say there where they are.")
    if data.pairs is None:
        asked = {"data.tokens_per_sample": data.tokens_per_sample}
    elif config.is_encoder_decoder:
        asked = {"data.pairs.source_tokens": data.pairs.source_tokens, "data.pairs.target_tokens": data.pairs.target_tokens}
    else:
        asked = {"data.pairs.source_tokens + target_tokens": data.pairs.source_tokens + data.pairs.target_tokens}
    for key, tokens in asked.items():
        if longest is not None and tokens is not None and tokens > longest:
            raise ConfigError(f"{key} is {tokens}, but {name} has {longest} positions; set it to {longest} or less.")


@torch.no_grad()
def check_confined(config: PretrainedConfig, name: str) -> None:
    """Raise ConfigError for a model whose tokens see more of a sample than their own document, however it is asked: one of its kind is tried."""
    model = small_model(config).eval()
    ids = torch.arange(8)[None] * 3 % model.config.vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    reads = LanguageModel(model)
    alone = torch.cat([reads(Inputs(ids[:, part], everything[:, part])).hidden for part in (slice(3), slice(3, 8))], 1)
    try:
        packed = reads(Inputs(ids, everything, positions=positions)).hidden
        problem = None if torch.allclose(packed, alone, rtol=1e-4, atol=1e-5) else "tokens see those of other documents"
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # a family that knows no positions, or no such mask
        problem = str(error)
    if problem is not None:
        raise ConfigError(
            f"data.attention is within, but the attention of {type(model).__name__} ({name}) cannot be confined to a document ({problem}). "
            "Set data.attention to across, or data.samples to documents."
        )


def check_vocabulary(config: PretrainedConfig, tokenizer_size: int, name: str, tokenizer: Path) -> None:
    """Raise DataError when the tokenizer can give ids that the model has no embedding for."""
    if tokenizer_size > config.vocab_size:
        raise DataError(
            f"{tokenizer}: this tokenizer has {tokenizer_size} entries, but {name} has {config.vocab_size} word embeddings; "
            "set data.tokenizer to the tokenizer that the model was trained with."
        )
