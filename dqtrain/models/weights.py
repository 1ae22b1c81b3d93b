"""Weights of models without memory: read by slices, from files or from what is there, when somebody asks for them."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqtrain.errors import ConfigError
from dqtrain.models.making import load_model
from dqtrain.quant.modules import values_of
from dqtrain.tensor_file import INDEX, MappedFiles

Reader = Callable[[int, Tensor], None]
"""Copies elements start, start + 1, ... of a flattened tensor into a vector, in the vector's dtype and on its device."""


def readers_of(tensors: Mapping[str, Tensor]) -> dict[str, Reader]:
    """Readers of tensors in memory, such as a state dict."""
    return {name: functools.partial(_read_memory, tensor.detach().reshape(-1)) for name, tensor in tensors.items()}


def _read_memory(flat: Tensor, start: int, out: Tensor) -> None:
    out.copy_(flat[start : start + out.numel()])


def by_names(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each parameter and persistent buffer with all its names."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    for tensor, found in names.items():
        yield found, tensor


def weight_files(folder: Path) -> list[Path]:
    """The files of a directory that decide what its model computes."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") or path.name == "config.json")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> the safetensors file that holds it; empty where there is no such file. Raises ConfigError for files that cannot be read."""
    index = folder / INDEX
    try:
        if (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        return MappedFiles().places(folder / Path(file).name for file in files)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its safetensors files cannot be read ({error}). Save the model again with save_pretrained.") from None


def open_weights(folder: Path, model: PreTrainedModel) -> dict[str, Reader]:
    """Readers of a directory's safetensors by each name of a model's parameters and persistent buffers; no tensor is read yet, and slices are read alone.

    A tied parameter may have any of its names in the files, and all may lack or have the prefix of the model without head. Where names differ otherwise
    (experts that transformers puts together, old names, files of pickles) transformers loads the directory whole, into this rank's memory.
    Raises ConfigError for tensors that are missing, damaged, or of another shape.
    """
    stored, files = stored_tensors(folder), MappedFiles()
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Reader] = {}
    for names, tensor in by_names(model):
        spelt = [spelling for name in names for spelling in (name, name.removeprefix(prefix), prefix + name)]
        key = next((spelling for spelling in spelt if spelling in stored), None)
        if key is None:
            return readers_of(load_model(folder).state_dict())
        shape = files.shape(stored[key], key)
        if shape != tuple(tensor.shape):
            raise ConfigError(f"{folder}: {key} has shape {shape}, but config.json makes it {tuple(tensor.shape)}. Save the model again whole.")
        found |= dict.fromkeys(names, functools.partial(files.fill, stored[key], key))
    return found


def leave_in_files(model: nn.Module, read: Mapping[str, Callable[[], Tensor]]) -> None:
    """Let a model on the meta device compute without ever being whole, in place: a module reads its own parameters when it is called, and drops them behind the call.

    `read`: what gives each parameter and persistent buffer, fp32, by its first name. `quant.modules.values_of` gives what a parameter holds. Buffers and
    single numbers are read at once: a learned step is looked at from outside of its module.
    """
    for names, tensor in list(by_names(model)):
        if not isinstance(tensor, nn.Parameter):
            tensor.copy_(read[names[0]]())
        elif tensor.numel() == 1:
            number = nn.Parameter(read[names[0]](), requires_grad=False)
            for owner, _, key in (name.rpartition(".") for name in names):
                model.get_submodule(owner)._parameters[key] = number
        else:
            tensor.read = read[names[0]]  # type: ignore[attr-defined]
    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            left = dict(module._parameters)
            module.register_forward_pre_hook(functools.partial(_take, left))
            module.register_forward_hook(functools.partial(_drop, left), always_call=True)


def whole_tensors(weights: Mapping[str, Reader], model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """For `leave_in_files`, of readers."""
    return {names[0]: functools.partial(_read_whole, weights[names[0]], tensor.shape) for names, tensor in by_names(model)}


def _read_whole(read: Reader, shape: torch.Size) -> Tensor:
    out = torch.empty(shape)
    read(0, out.view(-1))
    return out


def _take(left: dict[str, nn.Parameter | None], module: nn.Module, inputs: Any) -> None:
    module._parameters.update({key: None if p is None else nn.Parameter(values_of(p), requires_grad=False) for key, p in left.items()})


def _drop(left: dict[str, nn.Parameter | None], module: nn.Module, inputs: Any, output: Any) -> None:
    module._parameters.update(left)
