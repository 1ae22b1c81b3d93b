"""Teacher in, student out: causal language models of transformers, seen as hidden states and a head.

A model here is a transformers class, unforked. `LanguageModel` splits its forward in two, so that the head is applied
to target positions alone, and `load_model` refuses what is not a causal language model.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from dqtrain.errors import ConfigError, DataError
from dqtrain.quant.activation import padding_of

logging.disable_progress_bar()  # a bar per loaded model would break the run's own


class Outputs(NamedTuple):  # a tuple, because DeepSpeed looks for tensors in tuples, lists and dicts alone
    """What a model says about a micro-batch."""

    hidden: Tensor  # [samples, tokens, width], after the last norm
    logits: Tensor  # [target tokens, vocabulary], row-major over the target positions


class LanguageModel(nn.Module):
    """A transformers causal model, its head applied at target positions only.

    Samples are padded on the right, where causal attention never looks, so no attention mask is needed. Quantizers of activations
    that share a scale between tokens are told what is padded.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, input_ids: Tensor, is_target: Tensor) -> Outputs:
        """Token ids [samples, tokens] and a mask of the same shape -> Outputs; logits in fp32."""
        # Autocast sits inside the module: DeepSpeed switches an outer one off (measured).
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            with padding_of(self.model, is_target):  # every real position has a target here
                hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[is_target])
        return Outputs(hidden.float(), logits.float())


def read_model_config(folder: Path) -> PretrainedConfig:
    """The config of a causal language model's directory. Raises ConfigError for anything else."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there. Give a directory written by transformers' save_pretrained, or a finished unquantized run.")
    try:
        written = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json: transformers cannot read it ({error}). Save the model again with save_pretrained.") from None
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    expected = (known,) if isinstance(known, str) else tuple(known or ())
    architectures = written.get("architectures") or list(expected)
    if config.is_encoder_decoder or not set(architectures) & set(expected):
        wanted = f", which for {config.model_type} is {' or '.join(expected)}" if expected and not config.is_encoder_decoder else ""
        raise ConfigError(f"{folder}: holds {', '.join(architectures)}, but a causal language model is needed{wanted}. Give another directory.")
    return config


def load_model(folder: Path) -> PreTrainedModel:
    """Weights and config of a directory, in fp32, in eval mode. Raises ConfigError."""
    read_model_config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it ({error}). Save the model again with save_pretrained.") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{folder}: its files lack {len(missing)} tensors, such as {missing[0]}; a model with random tensors would be used. Save it again whole."
        )
    return _checked(model, str(folder))


def new_model(architecture: dict[str, Any], vocab_size: int, eos_token_id: int, seed: int) -> PreTrainedModel:
    """A model with random weights drawn from `seed`, from the keys of a transformers config. Raises ConfigError for an unknown key."""
    keys = {**architecture, "vocab_size": architecture.get("vocab_size", vocab_size), "bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    try:
        config = AutoConfig.for_model(**keys)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"student.architecture: {error}. Use the keys of that model's transformers config.") from None
    defaults = AutoConfig.for_model(keys["model_type"])
    unknown = [key for key in architecture if not hasattr(defaults, key)]
    if unknown:
        raise ConfigError(f"student.architecture.{unknown[0]}: {type(config).__name__} has no such key. Use the keys of that config.")
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ConfigError(f"student.architecture: {type(config).__name__} makes no causal language model of these values ({error}). Mend them.") from None
    return _checked(model, "student.architecture")


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a directory's config, weights to be filled in by the caller."""
    return _checked(AutoModelForCausalLM.from_config(read_model_config(folder), dtype=torch.float32), str(folder))


def _checked(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Refuse a model whose logits are not head(last hidden states), whose losses would be of another function, and one that sees what comes after."""
    model.eval()
    ids = torch.arange(4)[None] % model.config.vocab_size
    with torch.no_grad():
        ours = LanguageModel(model)(ids, torch.ones_like(ids, dtype=torch.bool)).logits
        theirs = model(input_ids=ids, use_cache=False).logits[0]
        changed = model(input_ids=torch.cat([ids[:, :-1], ids[:, :1]], 1), use_cache=False).logits[0]
    if not torch.allclose(changed[:-1], theirs[:-1], rtol=1e-5, atol=1e-5, equal_nan=True):
        raise ConfigError(f"{name}: {type(model).__name__} looks at later tokens, but a causal language model is needed. Give another directory.")
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True):
        raise ConfigError(f"{name}: {type(model).__name__} does more than apply its head to the last hidden states; this family is not supported.")
    return model


def check_length(config: PretrainedConfig, tokens_per_sample: int, name: str) -> None:
    """Raise ConfigError when samples are longer than the model's positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens_per_sample > longest:
        raise ConfigError(f"data.tokens_per_sample is {tokens_per_sample}, but {name} has {longest} positions; set it to {longest} or less.")


def check_vocabulary(config: PretrainedConfig, tokenizer_size: int, name: str, tokenizer: Path) -> None:
    """Raise DataError when the tokenizer can give ids that the model has no embedding for."""
    if tokenizer_size > config.vocab_size:
        raise DataError(
            f"{tokenizer}: this tokenizer has {tokenizer_size} entries, but {name} has {config.vocab_size} word embeddings; "
            "set data.tokenizer to the tokenizer that the model was trained with."
        )
