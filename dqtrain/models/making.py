"""Models of a directory, of a config, or cut from another one; what `LanguageModel` cannot split is refused."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from dqtrain.errors import ConfigError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.models.layers import LayerMaps, all_layers, config_of_layers, stacks

logging.disable_progress_bar()  # a bar per loaded model would break the run's own


def read_model_config(folder: Path) -> PretrainedConfig:
    """The config of a language model's directory. Raises ConfigError for anything else."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there. Give a directory written by transformers' save_pretrained, or a finished unquantized run.")
    try:
        written = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json: transformers cannot read it ({error}). Save the model again with save_pretrained.") from None
    names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known: Any = names.get(config.model_type)
    expected = (known,) if isinstance(known, str) else tuple(known or ())
    architectures = written.get("architectures") or list(expected)
    if not set(architectures) & set(expected):
        wanted = f", which for {config.model_type} is {' or '.join(expected)}" if expected else ""
        raise ConfigError(f"{folder}: holds {', '.join(architectures)}, but a language model is needed{wanted}. Give another directory.")
    return config


def model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a language model of a config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _float_config(folder: Path) -> PretrainedConfig:
    """As `read_model_config`, of a directory whose tensors are weights: int8 codes have the shapes of weights, and would be read as such."""
    config = read_model_config(folder)
    if (folder / "artifact.json").is_file():
        raise ConfigError(f"{folder}: is a packed artifact, but a float model is needed here. Give the directory, or the unquantized run, of one.")
    written = getattr(config, "quantization_config", None)
    if written is not None:
        method = written.get("quant_method") if isinstance(written, dict) else type(written).__name__
        raise ConfigError(f"{folder}: holds weights in the format of {method}, but a float model is needed here. Give the directory, or the run, of one.")
    return config


def load_model(folder: Path) -> PreTrainedModel:
    """Weights and config of a directory, in fp32, in eval mode. Raises ConfigError."""
    config = _float_config(folder)
    try:
        loaded: Any = model_class(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it ({error}). Save the model again with save_pretrained.") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{folder}: its files lack {len(missing)} tensors, such as {missing[0]}; a model with random tensors would be used. Save it again whole."
        )
    return checked(model, str(folder))


def new_model(architecture: dict[str, Any], vocab_size: int, eos_token_id: int, seed: int) -> PreTrainedModel:
    """A model with random weights drawn from `seed`, from the keys of a transformers config. Raises ConfigError for an unknown key.

    Ids of special tokens that `architecture` does not give are all `eos_token_id`.
    """
    try:
        defaults = AutoConfig.for_model(architecture["model_type"])
        special = ["bos_token_id", "eos_token_id"]
        if defaults.is_encoder_decoder:
            special += ["pad_token_id", "decoder_start_token_id"] + ["forced_eos_token_id"] * (getattr(defaults, "forced_eos_token_id", None) is not None)
        config = AutoConfig.for_model(**{"vocab_size": vocab_size, **dict.fromkeys(special, eos_token_id), **architecture})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"student.architecture: {error}. Use the keys of that model's transformers config.") from None
    unknown = [key for key in architecture if not hasattr(defaults, key)]
    if unknown:
        raise ConfigError(f"student.architecture.{unknown[0]}: {type(config).__name__} has no such key. Use the keys of that config.")
    torch.manual_seed(seed)
    try:
        model = model_class(config).from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ConfigError(f"student.architecture: {type(config).__name__} makes no language model of these values ({error}). Mend them.") from None
    return checked(model, "student.architecture")


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a directory's config, weights to be filled in by the caller."""
    config = read_model_config(folder)
    return checked(model_class(config).from_config(config, dtype=torch.float32), str(folder))


def meta_model(source: Path | PretrainedConfig) -> PreTrainedModel:
    """A model of a directory's config, or of a config, in eval mode: its parameters are on the meta device, without memory or values, its buffers are real.

    Raises ConfigError.
    """
    config = _float_config(source) if isinstance(source, Path) else source
    checked(small_model(config), str(source) if isinstance(source, Path) else "student.architecture")
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(config, dtype=torch.float32).eval()
    model.tie_weights()  # accelerate makes a Parameter of each name
    if isinstance(source, Path) and (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of one layer per stack and few words that does what one of this config does, with random weights."""
    config = config_of_layers(config, LayerMaps(*((0,) for _ in stacks(config))))
    config.vocab_size = min(config.vocab_size, max(64, 1 + (config.pad_token_id or 0)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = model_class(config).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # a new model's logits are near 0, where nothing would show
            parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    return model


def cut(model: PreTrainedModel, maps: LayerMaps) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of the layers that `maps` names (DQ-BART, section 3.3), on the meta device, and the name in `model` that each of its tensors is copied from.

    Raises ConfigError where a layer depends on its number.
    """
    depths = {len(layers) for layers in all_layers(model.config)}
    for key, value in model.config.to_dict().items():
        by_number = key in ("scale_attn_by_inverse_layer_idx", "mlp_only_layers") and value
        by_layer = isinstance(value, list) and len(value) in depths and key not in ("layer_types", "architectures") and not key.endswith("_token_id")
        if by_number or by_layer:
            raise ConfigError(f"{type(model).__name__} has {key}, by which a layer depends on its number, so that it cannot be cut. Keep all layers.")
    student = meta_model(config_of_layers(model.config, maps))
    chosen = {}
    for side, kept in zip((model.get_decoder(), model.get_encoder() if maps.encoder else None), maps, strict=False):
        if side is None:
            continue
        prefix = next(name for name, module in model.named_modules() if module is side)
        blocks = next(name for name, module in side.named_modules() if isinstance(module, nn.ModuleList))
        chosen[f"{prefix}.{blocks}." if prefix else f"{blocks}."] = kept

    def source(name: str) -> str:
        for prefix, kept in chosen.items():
            if name.startswith(prefix):
                index, rest = name[len(prefix) :].split(".", 1)
                moved = f"{prefix}{kept[int(index)]}.{rest}"
                return name if "relative_attention_bias" in name else moved  # T5's is in its first block alone
        return name

    student.generation_config = model.generation_config
    return student, {name: source(name) for name in student.state_dict()}


@torch.no_grad()
def checked(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Refuse a model whose logits are not head(last hidden states), whose losses would be of another function, and one that sees what comes after."""
    model.eval()
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ConfigError(f"{name}: the head of {type(model).__name__} is no linear layer; this family is not supported.")
    inputs = few_words(model)
    ids = inputs.ids

    def logits(read: Tensor) -> Tensor:
        given = {"input_ids": read} if inputs.source_ids is None else {"input_ids": inputs.source_ids, "decoder_input_ids": read}
        return model(**given, use_cache=False).logits[0]

    ours = LanguageModel(model).logits(inputs)
    theirs, changed = logits(ids), logits(torch.cat([ids[:, :-1], ids[:, :1]], 1))
    if not torch.allclose(changed[:-1], theirs[:-1], rtol=1e-5, atol=1e-5, equal_nan=True):
        raise ConfigError(f"{name}: {type(model).__name__} looks at later tokens, but a language model must not. Give another directory.")
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True):
        raise ConfigError(f"{name}: {type(model).__name__} does more than apply its head to the last hidden states; this family is not supported.")
    return model


def few_words(model: PreTrainedModel) -> Inputs:
    """Something that any model can read."""
    ids = torch.arange(4)[None] % model.config.vocab_size
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Inputs(ids, everything, ids, everything) if model.config.is_encoder_decoder else Inputs(ids, everything)
