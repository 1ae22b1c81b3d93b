"""Which layers of a teacher a student keeps."""

import copy
from typing import NamedTuple

from transformers import PretrainedConfig

from dqtrain.errors import ConfigError


class LayerMaps(NamedTuple):
    """Teacher layer, from 0, of each layer of the student."""

    decoder: tuple[int, ...]
    encoder: tuple[int, ...] = ()


DQ_BART_MAPS = {1: (5,), 2: (0, 5), 3: (0, 2, 5), 4: (0, 2, 3, 5), 5: (0, 1, 3, 4, 5)}
"""Layers kept of 6 (DQ-BART, Li et al., ACL 2022; its code's distill_mappings)."""


def layer_map(kept: int | tuple[int, ...] | None, num_layers: int, key: str) -> tuple[int, ...]:
    """Which of so many layers a student keeps, ascending: `kept` itself, or so many, spaced as far as they go (DQ-BART's choice of 6).

    Raises ConfigError, naming the config's `key`, for layers that are not there, and layers out of order.
    """
    if kept is None:
        return tuple(range(num_layers))
    if isinstance(kept, tuple):
        if list(kept) != sorted(set(kept)) or kept[-1] >= num_layers:
            raise ConfigError(f"{key} is {list(kept)}, but must be ascending layers from 0 to {num_layers - 1}, each once.")
        return kept
    if kept > num_layers:
        raise ConfigError(f"{key} is {kept}, but there are {num_layers} layers to keep; give {num_layers} or less.")
    if kept == 1:
        return (num_layers - 1,)
    if num_layers == 6 and kept in DQ_BART_MAPS:
        return DQ_BART_MAPS[kept]
    return tuple(round(i * (num_layers - 1) / (kept - 1)) for i in range(kept))


def all_layers(config: PretrainedConfig) -> LayerMaps:
    """Every layer of a model: the identity maps."""
    return LayerMaps(*(tuple(range(getattr(config, names[0]))) for names in stacks(config)))


def stacks(config: PretrainedConfig) -> list[tuple[str, ...]]:
    """Keys of the config that hold the number of layers, of the decoder and, if there is one, of the encoder."""
    if not config.is_encoder_decoder:
        return [("num_hidden_layers",)]
    if hasattr(config, "decoder_layers"):
        return [("decoder_layers",), ("encoder_layers", "num_hidden_layers")]
    return [("num_decoder_layers",), ("num_layers",)]


def config_of_layers(config: PretrainedConfig, maps: LayerMaps) -> PretrainedConfig:
    """The config of a model of these layers alone."""
    config = copy.deepcopy(config)
    for names, kept in zip(stacks(config), maps, strict=False):
        for name in names:
            setattr(config, name, len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in maps.decoder]
    return config
