"""Teacher in, student cut from it: language models of transformers, seen as hidden states and a head.

A model here is a transformers class, unforked: a causal model, or an encoder and a decoder. `LanguageModel` splits its forward in
two, so that the head is applied inside the loss (`distill/chunked.py`), and `load_model` refuses what cannot be split so.
"""

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from dqtrain.config import Data
from dqtrain.data.stream import IGNORED, Batch
from dqtrain.errors import ConfigError, DataError
from dqtrain.quant.activation import padding_of
from dqtrain.quant.attention import show_attention
from dqtrain.quant.modules import keep_in_int8, set_own_class, values_of
from dqtrain.tensor_file import MappedFiles

logging.disable_progress_bar()  # a bar per loaded model would break the run's own


class Inputs(NamedTuple):
    """What a model reads of a micro-batch. The decoder is all there is of a causal model."""

    ids: Tensor  # [samples, tokens], of the decoder
    is_target: Tensor  # bool, as ids: where a word is predicted
    source_ids: Tensor | None = None  # [samples, source tokens], of the encoder
    source_is_real: Tensor | None = None  # bool, as source_ids: no padding
    positions: Tensor | None = None  # as ids: of each token in its document, which it alone attends to; None: to all before it

    @property
    def is_real(self) -> Tensor:
        """Which positions of the decoder are no padding, which is on the right, behind the last target: bool [samples, tokens]."""
        return self.is_target.flip(1).cummax(1).values.flip(1)


def inputs_of(batch: Batch, device: torch.device) -> tuple[Inputs, Tensor]:
    """A batch on a device: (Inputs, labels [samples, tokens], -100 where there is no target)."""
    ids, labels = (torch.from_numpy(array).to(device).contiguous() for array in (batch.input_ids, batch.labels))
    if batch.source_ids is None or batch.source_is_real is None:
        positions = None if batch.positions is None else torch.from_numpy(batch.positions).to(device)
        return Inputs(ids, labels != IGNORED, positions=positions), labels
    return Inputs(ids, labels != IGNORED, torch.from_numpy(batch.source_ids).to(device), torch.from_numpy(batch.source_is_real).to(device)), labels


class Layers(NamedTuple):  # a tuple, as all below, because DeepSpeed looks for tensors in tuples, lists and dicts alone
    """What the layers of an encoder or a decoder give; nothing unless it was asked for."""

    states: tuple[Tensor, ...] = ()  # the embeddings, then each layer's output, the last one after the last norm: [samples, tokens, width]
    attentions: tuple[Tensor, ...] = ()  # probabilities of each layer, before dropout: [samples, heads, tokens, keys]
    cross: tuple[Tensor, ...] = ()  # those of the decoder's attention to the encoder


class Outputs(NamedTuple):
    """What a model says about a micro-batch, but for its head."""

    hidden: Tensor  # [samples, tokens, width] of the decoder, after the last norm, as the head reads them
    decoder: Layers = Layers()
    encoder: Layers = Layers()


class Head(NamedTuple):
    """logits = softcap * tanh((hidden W' + bias) / softcap), the tanh only where there is a softcap."""

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]: GPT-J's, BART's final_logits_bias
    softcap: float | None = None  # Gemma 2's final_logit_softcapping

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [n, width] -> [n, vocabulary], at least fp32; under autocast the product alone is in its dtype. Written to `out`, they have no gradient."""
        device = hidden.device.type
        head = self.cast(device)
        hidden = hidden.to(head.weight.dtype)
        with torch.autocast(device, enabled=False):
            if out is None:
                logits = functional.linear(hidden, head.weight).to(torch.promote_types(head.weight.dtype, torch.float32))
            elif out.dtype == head.weight.dtype:
                logits = torch.mm(hidden, head.weight.T, out=out)
            else:
                logits = out.copy_(hidden @ head.weight.T)
            if self.bias is not None:
                logits.add_(self.bias)
            if self.softcap is None:
                return logits
            return (logits / self.softcap).tanh() * self.softcap if out is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def cast(self, device: str) -> "Head":
        """The same head with its weight in the dtype that it computes in: autocast's, where that is on and the weight is no double."""
        if not torch.is_autocast_enabled(device) or self.weight.dtype == torch.float64:
            return self
        return self._replace(weight=self.weight.to(torch.get_autocast_dtype(device)))


class Taught(NamedTuple):
    """What a teacher says about a micro-batch: its outputs with its head, or words that were drawn from its distributions."""

    outputs: Outputs | None = None
    head: Head | None = None
    ids: Tensor | None = None  # [target tokens, draws], int64
    shares: Tensor | None = None  # [target tokens, draws]: of the probability of the ids


class Teacher(Protocol):
    """Where a teacher's word comes from: a model beside the student, or a store."""

    def teaching(self, batch: Batch, inputs: Inputs, layers: bool = True) -> AbstractContextManager[Taught]:
        """What it says about a micro-batch, within a context; without `layers` nothing of inner layers, whatever it gives else. Collective."""
        ...

    def figures(self) -> dict[str, float]:
        """How alike its word embeddings are, if it knows them. Collective."""
        ...

    def destroy(self) -> None:
        """Give its memory back."""
        ...


class HeadLinear(nn.Linear):
    """A head that hands what it would multiply to a function instead: the (fake-quantized) weight exists inside its forward alone."""

    def forward(self, hidden: Tensor, then: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        """Logits, or `then(hidden, weight, bias)`."""
        return super().forward(hidden) if then is None else then(hidden, self.weight, self.bias)


def open_head(model: PreTrainedModel) -> None:
    """Make the head of a model one that can be asked for its weight (`HeadLinear`), in place; a quantized one can already."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not isinstance(head, HeadLinear):
        set_own_class(head, HeadLinear)


class LanguageModel(nn.Module):
    """A transformers model as hidden states and a head.

    Decoders are padded on the right, where causal attention never looks, so that they need no attention mask; encoders get one. Quantizers of
    activations that share a scale between tokens are told what is padded. `states` and `attentions` of every layer are given where they are asked for.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "fp32", states: bool = False, attentions: bool = False) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.wanted = {"output_hidden_states": states, "output_attentions": attentions}
        if attentions:
            show_attention(model)
        open_head(model)

    def forward(self, inputs: Inputs, layers: bool = True) -> Outputs:
        """Inputs -> Outputs, hidden states in fp32; without `layers` nothing of inner layers, whatever the constructor was asked for."""
        model: Any = self.model
        wanted = self.wanted if layers else {}
        # Autocast sits inside the module: DeepSpeed switches an outer one off (measured).
        with self._autocast(inputs.ids):
            if inputs.source_ids is None:
                with padding_of(model, inputs.is_real):
                    said = model.base_model(input_ids=inputs.ids, use_cache=False, **self._confined(inputs.positions), **wanted)
                return self._outputs(inputs.ids.device, said)
            mask = inputs.source_is_real
            read = model.get_encoder()(input_ids=inputs.source_ids, attention_mask=mask, **wanted)
            decoder, states = model.get_decoder(), read.last_hidden_state
            with padding_of(decoder, inputs.is_real):
                said = decoder(input_ids=inputs.ids, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False, **wanted)
            return self._outputs(inputs.ids.device, said, read)

    def through_head(self, hidden: Tensor, then: Callable[[Tensor, Head], Any]) -> Any:
        """`then(hidden, head)`: hidden states [n, width], quantized if the head's input is, and the head, whole and fake-quantized. Collective under ZeRO-3."""
        model: Any = self.model
        with self._autocast(hidden):
            return model.get_output_embeddings()(hidden, then=lambda x, weight, bias: then(x, self._head(weight, bias)))

    def plain_head(self) -> Head:
        """The head of a model that is not quantized, as far as its weight is whole."""
        layer: Any = self.model.get_output_embeddings()
        return self._head(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `plain_head` is made of."""
        layer: Any = self.model.get_output_embeddings()
        return list(layer.parameters(recurse=False))

    def logits(self, inputs: Inputs) -> Tensor:
        """Inputs -> logits [target tokens, vocabulary], row-major over the target positions, in fp32."""
        return self.through_head(self(inputs, layers=False).hidden[inputs.is_target], lambda hidden, head: head.logits(hidden))

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        added = getattr(self.model, "final_logits_bias", None)
        if added is not None:
            bias = added[0].to(weight.device) if bias is None else bias + added[0].to(bias.device)
        return Head(weight, bias, getattr(self.model.config, "final_logit_softcapping", None))

    def _outputs(self, device: torch.device, decoder: Any, encoder: Any = None) -> Outputs:
        keys = ("hidden_states", "attentions", "cross_attentions")
        layers = [Layers(*(tuple(x.float() for x in said.get(key) or ()) for key in keys)) for said in (decoder, encoder or {})]
        hidden = decoder.last_hidden_state.float().to(device)  # the last layer of a model that is spread over several may be elsewhere
        if getattr(self.model.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * self.model.config.d_model**-0.5
        return Outputs(hidden, *layers)

    def _confined(self, positions: Tensor | None) -> dict[str, Tensor]:
        """What a causal model is told so that tokens attend to their own document alone: where they are in it, and which keys they may read.

        transformers makes the mask of the positions itself where a family hands them on to it, and only so for layers that look through a window.
        """
        if positions is None:
            return {}
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "sliding_window", None) is not None or kinds != {"full_attention"}:
            return {"position_ids": positions}
        document = (positions == 0).cumsum(1)
        may_read = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        if config._attn_implementation == "sdpa":
            return {"position_ids": positions, "attention_mask": may_read}
        added = torch.zeros(may_read.shape, device=positions.device).masked_fill_(~may_read, torch.finfo(torch.float32).min)
        return {"position_ids": positions, "attention_mask": added}

    def _autocast(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, torch.bfloat16, enabled=self.precision == "bf16")


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
    return _checked(model, str(folder))


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
    return _checked(model, "student.architecture")


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a directory's config, weights to be filled in by the caller."""
    config = read_model_config(folder)
    return _checked(model_class(config).from_config(config, dtype=torch.float32), str(folder))


def meta_model(source: Path | PretrainedConfig) -> PreTrainedModel:
    """A model of a directory's config, or of a config, in eval mode: its parameters are on the meta device, without memory or values, its buffers are real.

    Raises ConfigError.
    """
    config = _float_config(source) if isinstance(source, Path) else source
    _checked(_small(config), str(source) if isinstance(source, Path) else "student.architecture")
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(config, dtype=torch.float32).eval()
    model.tie_weights()  # accelerate makes a Parameter of each name
    if isinstance(source, Path) and (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _small(config: PretrainedConfig) -> PreTrainedModel:
    """A model of one layer per stack and few words that does what one of this config does, with random weights."""
    config = _of_layers(config, LayerMaps(*((0,) for _ in _stacks(config))))
    config.vocab_size = min(config.vocab_size, max(64, 1 + (config.pad_token_id or 0)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = model_class(config).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # a new model's logits are near 0, where nothing would show
            parameter.normal_(0, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    return model


Reader = Callable[[int, Tensor], None]
"""Copies elements start, start + 1, ... of a flattened tensor into a vector, in the vector's dtype and on its device."""


def readers_of(tensors: Mapping[str, Tensor]) -> dict[str, Reader]:
    """Readers of tensors in memory, such as a state dict."""
    return {name: functools.partial(_read_memory, tensor.detach().reshape(-1)) for name, tensor in tensors.items()}


def _read_memory(flat: Tensor, start: int, out: Tensor) -> None:
    out.copy_(flat[start : start + out.numel()])


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


_ROWS_BYTES = 2**26
"""Rows of a slice that are read at a time."""

BLOCK_ELEMENTS = 2**18
"""Elements of a matrix that are looked at together while its int8 codes are made: 1 MB in fp32, which fits a core's cache."""


def in_int8(model: PreTrainedModel, weights: Mapping[str, Reader]) -> dict[str, Reader]:
    """`quant.modules.keep_in_int8` of a model on the meta device, and readers of what it then has, made of readers of its float weights; nothing is read yet.

    code = round(w / scale), scale = max |w| of an output / 127, rounded to bf16. A reader reads the rows that its slice touches twice, a block of BLOCK_ELEMENTS at a
    time; where outputs are columns (Conv1D, some experts) every rank reads the whole matrix for its scales. Raises ConfigError, when read, for weights
    that are not finite.
    """
    readers = dict(weights)
    for name, axis in keep_in_int8(model).items():
        coded = _Coded(name, weights[name], model.get_parameter(name).shape, axis)
        readers |= {name: coded.read_codes, f"{name}_scale": coded.read_scales}
    return readers


class _Coded:
    """A float tensor, read as int8 codes and scales. It is a row of units [inputs, width], each with `width` scales: rows of a matrix, or matrices whose outputs are columns."""

    def __init__(self, name: str, read: Reader, shape: torch.Size, axis: int) -> None:
        self._name, self._read = name, read
        self._width = shape[-1] if axis == 1 else 1
        self._size = math.prod(shape[-1 - axis :])  # of a unit
        self._largest = torch.zeros(shape.numel() // self._size, self._width)  # |w| by output
        self._is_known = torch.zeros(len(self._largest), dtype=torch.bool)

    def read_codes(self, start: int, out: Tensor) -> None:
        """As a Reader."""
        stop = start + out.numel()
        first, last = start // self._size, -(-stop // self._size)
        self._look(first, last)
        for units, begin, end in self._pieces(first, last):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                codes = self._values(begin, end).div_(self._scales(units)[:, None]).round_().to(torch.int8)
                out[low - start : high - start] = codes.view(-1)[low - begin : high - begin]

    def read_scales(self, start: int, out: Tensor) -> None:
        """As a Reader."""
        stop = start + out.numel()
        first, last = start // self._width, -(-stop // self._width)
        self._look(first, last)
        out.copy_(self._scales(slice(first, last)).view(-1)[start - first * self._width : stop - first * self._width])

    def _look(self, first: int, last: int) -> None:
        """Find the largest |w| of units first, ..., last - 1, unless they are known."""
        for units, begin, end in self._pieces(first, last):
            if not self._is_known[units].all():
                self._largest[units] = torch.maximum(self._largest[units], self._values(begin, end).abs_().amax(1))
        self._is_known[first:last] = True
        if not self._largest[first:last].isfinite().all():
            raise ConfigError(f"{self._name} holds NaN or infinite values, so that it has no int8 scale. Mend the teacher, or set teacher.dtype to bf16.")

    def _scales(self, units: slice) -> Tensor:
        return (self._largest[units] / 127).bfloat16().float().clamp_min_(torch.finfo(torch.bfloat16).tiny)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[slice, int, int]]:
        """(units, first element, last element + 1) of a block of whole units, or of inputs of one that is larger than a block."""
        if self._size <= BLOCK_ELEMENTS:
            step = BLOCK_ELEMENTS // self._size
            for unit in range(first, last, step):
                units = slice(unit, min(unit + step, last))
                yield units, units.start * self._size, units.stop * self._size
            return
        step = max(1, BLOCK_ELEMENTS // self._width) * self._width
        for unit in range(first, last):
            for begin in range(unit * self._size, (unit + 1) * self._size, step):
                yield slice(unit, unit + 1), begin, min(begin + step, (unit + 1) * self._size)

    def _values(self, begin: int, end: int) -> Tensor:
        """Elements of a piece: [units, inputs, width] in fp32."""
        values = torch.empty(end - begin)
        self._read(begin, values)
        return values.view(-1, min(self._size, end - begin) // self._width, self._width)


def weight_files(folder: Path) -> list[Path]:
    """The files of a directory that decide what its model computes."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") or path.name == "config.json")


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
        shape = tuple(files.open(stored[key]).get_slice(key).get_shape())
        if shape != tuple(tensor.shape):
            raise ConfigError(f"{folder}: {key} has shape {shape}, but config.json makes it {tuple(tensor.shape)}. Save the model again whole.")
        found |= dict.fromkeys(names, functools.partial(_read_slice, files, stored[key], key, shape))
    return found


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> the safetensors file that holds it; empty where there is no such file. Raises ConfigError for files that cannot be read."""
    index = folder / "model.safetensors.index.json"
    try:
        if (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        return {key: path for path in (folder / Path(file).name for file in files) for key in MappedFiles().open(path).keys()}  # noqa: SIM118 - no dict
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its safetensors files cannot be read ({error}). Save the model again with save_pretrained.") from None


def by_names(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each parameter and persistent buffer with all its names."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    for tensor, found in names.items():
        yield found, tensor


def _read_slice(files: MappedFiles, path: Path, key: str, shape: tuple[int, ...], start: int, out: Tensor) -> None:
    """Read the rows that hold these elements, and no others, so few at a time that the file's pages do not fill the memory."""
    if not shape:
        out.copy_(files.read(path, key).reshape(-1))
        return
    inner, end = math.prod(shape[1:]), start + out.numel()
    step = max(1, _ROWS_BYTES // (4 * inner)) * inner
    for begin in range(start // inner * inner, end, step):
        low, high = max(begin, start), min(begin + step, end)
        part = files.read_part(path, key, begin // inner, -(-high // inner))
        out[low - start : high - start].copy_(part.reshape(-1)[low - begin : high - begin])


@torch.no_grad()
def _checked(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Refuse a model whose logits are not head(last hidden states), whose losses would be of another function, and one that sees what comes after."""
    model.eval()
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ConfigError(f"{name}: the head of {type(model).__name__} is no linear layer; this family is not supported.")
    inputs = _few_words(model)
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


def _few_words(model: PreTrainedModel) -> Inputs:
    """Something that any model can read."""
    ids = torch.arange(4)[None] % model.config.vocab_size
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Inputs(ids, everything, ids, everything) if model.config.is_encoder_decoder else Inputs(ids, everything)


class LayerMaps(NamedTuple):
    """Teacher layer, from 0, of each layer of the student."""

    decoder: tuple[int, ...]
    encoder: tuple[int, ...] = ()


DQ_BART_MAPS = {1: (5,), 2: (0, 5), 3: (0, 2, 5), 4: (0, 2, 3, 5), 5: (0, 1, 3, 4, 5)}
"""Layers kept of 6 (DQ-BART, Li et al., ACL 2022; its code's distill_mappings)."""


@torch.no_grad()
def has_norm_behind(config: PretrainedConfig, encoder: bool = False) -> bool:
    """Whether the last states of a model's decoder, or encoder, are more than what its last layer gives: those of models with a norm behind all layers."""
    model = _small(config).eval()
    stack: Any = model.get_encoder() if encoder else model.get_decoder()
    blocks = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
    given: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: given.append(output[0] if isinstance(output, tuple) else output))
    said = LanguageModel(model, states=True)(_few_words(model))
    hook.remove()
    return not torch.equal((said.encoder if encoder else said.decoder).states[-1], given[0])


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
    return LayerMaps(*(tuple(range(getattr(config, names[0]))) for names in _stacks(config)))


def _stacks(config: PretrainedConfig) -> list[tuple[str, ...]]:
    """Keys of the config that hold the number of layers, of the decoder and, if there is one, of the encoder."""
    if not config.is_encoder_decoder:
        return [("num_hidden_layers",)]
    if hasattr(config, "decoder_layers"):
        return [("decoder_layers",), ("encoder_layers", "num_hidden_layers")]
    return [("num_decoder_layers",), ("num_layers",)]


def cut(model: PreTrainedModel, maps: LayerMaps) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of the layers that `maps` names (DQ-BART, section 3.3), on the meta device, and the name in `model` that each of its tensors is copied from.

    Raises ConfigError where a layer depends on its number.
    """
    depths = {len(layers) for layers in all_layers(model.config)}
    for key, value in model.config.to_dict().items():
        by_number = key in ("scale_attn_by_inverse_layer_idx", "mlp_only_layers") and value
        of_layers = isinstance(value, list) and len(value) in depths and key not in ("layer_types", "architectures") and not key.endswith("_token_id")
        if by_number or of_layers:
            raise ConfigError(f"{type(model).__name__} has {key}, by which a layer depends on its number, so that it cannot be cut. Keep all layers.")
    student = meta_model(_of_layers(model.config, maps))
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


def _of_layers(config: PretrainedConfig, maps: LayerMaps) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for names, kept in zip(_stacks(config), maps, strict=False):
        for name in names:
            setattr(config, name, len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in maps.decoder]
    return config


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
    model = _small(config).eval()
    ids = torch.arange(8)[None] * 3 % model.config.vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    reads = LanguageModel(model)
    alone = torch.cat([reads(Inputs(ids[:, part], everything[:, part])).hidden for part in (slice(3), slice(3, 8))], 1)
    try:
        packed = reads(Inputs(ids, everything, positions=positions)).hidden
        is_confined = torch.allclose(packed, alone, rtol=1e-4, atol=1e-5)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a family that knows no positions, or no such mask
        is_confined = False
    if not is_confined:
        raise ConfigError(
            f"data.attention is within, but the attention of {type(model).__name__} ({name}) cannot be confined to a document. "
            "Set data.attention to across, or data.samples to documents."
        )


def check_vocabulary(config: PretrainedConfig, tokenizer_size: int, name: str, tokenizer: Path) -> None:
    """Raise DataError when the tokenizer can give ids that the model has no embedding for."""
    if tokenizer_size > config.vocab_size:
        raise DataError(
            f"{tokenizer}: this tokenizer has {tokenizer_size} entries, but {name} has {config.vocab_size} word embeddings; "
            "set data.tokenizer to the tokenizer that the model was trained with."
        )
