"""Quantization inside a model's own classes: a mixin over each module's class, and the coverage of the whole model.

A quantized module keeps its parent's `forward`, parameters and state-dict keys; for the time of one call its `weight` is
the fake-quantized one. Nothing dense is kept for backward: the quantized weight is made again from the Parameter, so under
ZeRO-3 only partitions outlive a call. The learned gamma is a Parameter of the same module, `weight_gamma`, so that it is
gathered together with the weight; a tied weight has one gamma, registered on each module that holds it.

A weight that is read without calling its module escapes: `check_all_ran` says so after the first step. Activation
checkpointing is correct but saves less: inputs of quantized modules stay alive, because of two nested saved-tensor hooks
torch runs the inner one alone.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from dqtrain.config import Quant, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.quant.grid import DynamicFakeQuantize, Granularity, dynamic_scale, fake_quantize, fake_quantize_activation, quantize
from dqtrain.quant.scale import initial_gamma

POSITION_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings"})
"""Names under which an nn.Embedding is a table of positions (GPT-2; BART and OPT; BERT); any other one holds words."""


def is_gamma(name: str) -> bool:
    """Whether a parameter of this name is a learned gamma, of which the float model knows nothing."""
    return name.endswith("weight_gamma")


def float_bytes(model: nn.Module) -> int:
    """Bytes of the float model in fp32, tied weights once."""
    return sum(4 * p.numel() for name, p in model.named_parameters() if not is_gamma(name))


@dataclass(frozen=True)
class WeightQuantizer:
    """How one weight matrix becomes codes; the learned part is the gamma beside the weight."""

    bits: int
    granularity: Granularity
    row_axis: int  # axis of the outputs: 0, or 1 in a Conv1D
    portable: bool

    def scale(self, weight: Tensor, gamma: Tensor) -> Tensor:
        """Real units per code, [1] or [rows], those of the forward in training."""
        return dynamic_scale(weight, gamma, self.bits, self.granularity, self.row_axis, self.portable)

    def quantize(self, weight: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8, scale [1] or [rows]), those of the forward in training."""
        scale = self.scale(weight, gamma)
        return quantize(weight, scale, self.bits, self.row_axis), scale


class _Quantized(nn.Module):
    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle and deepcopy have to be told how to make it.
        return _empty, type(self).__bases__, self.__dict__


class QuantizedInput(_Quantized):
    """Mixin: the parent's own forward on an input [..., features] quantized per token."""

    input_bits: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        return super().forward(fake_quantize_activation(x, self.input_bits), *args, **kwargs)


class QuantizedWeight(_Quantized):
    """Mixin: the parent's own forward with its weight fake-quantized for that one call."""

    weight_gamma: nn.Parameter
    weight_quantizer: WeightQuantizer
    weight_name: str  # in the model that was quantized
    quantizer_ran = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward. Under autocast a linear multiplies in the lower precision, from a weight quantized in fp32."""
        weight, quantizer = self._parameters["weight"], self.weight_quantizer
        assert weight is not None
        dtype = weight.dtype
        if isinstance(self, nn.Linear | Conv1D) and torch.is_autocast_enabled(weight.device.type):
            # Cast here: autocast would cast inside the parent's forward, and the copy that it saves could not be told from others.
            dtype = torch.get_autocast_dtype(weight.device.type)
        quantized, scale = DynamicFakeQuantize.apply(weight, self.weight_gamma, quantizer.bits, quantizer.granularity, quantizer.row_axis, quantizer.portable)
        quantized = quantized.to(dtype)
        storage = quantized.untyped_storage().data_ptr()

        def drop(tensor: Tensor) -> Any:  # matches views too, such as the transpose that a linear saves
            is_quantized = tensor.untyped_storage().data_ptr() == storage
            return (tensor.shape, tensor.stride(), tensor.storage_offset()) if is_quantized else tensor

        def make_again(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            with torch.no_grad():
                return fake_quantize(weight, scale, quantizer.bits, quantizer.row_axis).to(dtype).as_strided(*saved)

        self.quantizer_ran = True
        self.__dict__["weight"] = quantized  # found before the Parameter
        try:
            if not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            with saved_tensors_hooks(drop, make_again):
                return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["weight"]


@functools.cache
def _quantized(*bases: Any) -> type[nn.Module]:
    """The class of mixins over a module's own class, the last one."""
    return type(f"Quantized{bases[-1].__name__}", bases, {})


def _empty(*bases: Any) -> nn.Module:
    cls = _quantized(*bases)
    return cls.__new__(cls)


def quantize_input(module: nn.Module, bits: int) -> None:
    """Quantize the inputs of a Linear or Conv1D, in place; its weight stays what it is."""
    module.__class__ = _quantized(QuantizedInput, type(module))  # type: ignore[arg-type]
    module.input_bits = bits  # type: ignore[assignment]


def quantize_inputs(model: nn.Module, names: Collection[str], bits: int) -> None:
    """Quantize the inputs of every Linear and Conv1D whose weight is one of the named parameters, by any of its names: what an artifact needs."""
    weights = {parameter for name, parameter in model.named_parameters() if name in names}
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | Conv1D) and module.weight in weights:
            quantize_input(module, bits)


@dataclass(frozen=True)
class CoverageRow:
    """What happens to one parameter of two dimensions or more; `reason` says why it stays float."""

    name: str
    shape: tuple[int, ...]
    bits: int | None = None
    granularity: Granularity | None = None
    grid: str | None = None
    activation_bits: int | None = None
    reason: str | None = None
    row_axis: int | None = None
    gamma_name: str | None = None


@dataclass(frozen=True)
class Coverage:
    """Which parameters are quantized and how, and why the others are not: one row for each of two dimensions or more."""

    rows: list[CoverageRow]

    @property
    def fraction(self) -> float:
        """Quantized elements / all elements."""
        sizes = [(torch.Size(row.shape).numel(), row.bits is not None) for row in self.rows]
        return sum(size for size, is_quantized in sizes if is_quantized) / sum(size for size, _ in sizes)

    def table(self) -> str:
        """Aligned text for a terminal."""
        cells = [("parameter", "shape", "weight", "input", "why float")]
        for row in self._grouped():
            weight = f"{row.bits} bit {row.granularity}" if row.bits else "float"
            inputs = f"{row.activation_bits} bit" if row.activation_bits else "float"
            cells.append((row.name, " x ".join(map(str, row.shape)), weight, inputs, row.reason or ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, f"{self.fraction:.1%} of the elements of these parameters are quantized; norms and biases stay float."])

    def _grouped(self) -> list[CoverageRow]:
        """Rows that differ in the numbers of their names alone, as one: layers.0-11.fc1.weight."""
        groups: dict[tuple[Any, ...], list[CoverageRow]] = {}
        for row in self.rows:
            key = (re.sub(r"\d+", "", row.name), row.shape, row.bits, row.granularity, row.activation_bits, row.reason)
            groups.setdefault(key, []).append(row)
        result = []
        for rows in groups.values():
            first, last = (re.split(r"(\d+)", row.name) for row in (rows[0], rows[-1]))
            name = "".join(a if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))
            result.append(replace(rows[0], name=name))
        return result

    def to_json(self) -> str:
        """The rows, as JSON that `from_json` reads."""
        return json.dumps([asdict(row) for row in self.rows], indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Coverage":
        """What `to_json` wrote."""
        return cls([CoverageRow(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(text)])


@dataclass
class _Holder:
    """A module and the name under which it holds a parameter."""

    module_name: str
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.key}" if self.module_name else self.key

    @property
    def kind(self) -> str | None:
        if self.key != "weight":
            return None
        if isinstance(self.module, nn.Embedding):
            return "positions" if self.module_name.rpartition(".")[2] in POSITION_TABLES else "embeddings"
        return "linears" if isinstance(self.module, nn.Linear | Conv1D) else None


def quantize_model(model: nn.Module, config: Quant, initialise: bool = True) -> Coverage:
    """Quantize a float model in place.

    Linear and Conv1D weights follow `config.linears`, nn.Embedding ones `config.embeddings`, or `config.positions` where the
    module is called as in `POSITION_TABLES`. A weight tied between an embedding and a head follows the embedding; the
    head's input is quantized like any linear's. Where a weight stays float, so does the input. With `initialise` gammas
    minimise the squared error of the present weights, otherwise they are 1, to be overwritten.

    Raises ConfigError when a `keep_float` glob matches nothing, a weight is not finite, or a weight is shared with a module
    that would read it unquantized.
    """
    matrices = _matrices(model)
    names = [holder.name for holders in matrices for holder in holders]
    for glob in config.keep_float:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ConfigError(f"quant.keep_float has `{glob}`, which matches no matrix of the model; they are called like {names[0]}. Mend or remove it.")
    return Coverage([_quantize_parameter(holders, config, initialise) for holders in matrices])


def _matrices(model: nn.Module) -> list[list[_Holder]]:
    """All holders of each parameter of two dimensions or more, in the order of `named_parameters`."""
    holders: dict[nn.Parameter, list[_Holder]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                holders.setdefault(parameter, []).append(_Holder(module_name, module, key))
    return list(holders.values())


def _quantize_parameter(holders: list[_Holder], config: Quant, initialise: bool) -> CoverageRow:
    first = holders[0]
    weight = first.module._parameters[first.key]
    assert weight is not None
    settings, reason = _settings(holders, config)
    if settings is None:
        return CoverageRow(first.name, tuple(weight.shape), reason=reason)
    unknown = next((holder for holder in holders if holder.kind is None), None)
    if unknown is not None:
        raise ConfigError(
            f"{first.name} is also {unknown.name}, where {type(unknown.module).__name__} would read it unquantized; list {first.name} in quant.keep_float."
        )
    quantizer = WeightQuantizer(settings.bits, settings.granularity, 1 if isinstance(first.module, Conv1D) else 0, config.scale_dtype == "portable")
    if initialise:
        gamma = initial_gamma(weight, quantizer.bits, quantizer.granularity, quantizer.row_axis, quantizer.portable, first.name)
    else:
        gamma = torch.ones(weight.shape[quantizer.row_axis] if quantizer.granularity == "per_row" else 1, device=weight.device)
    shared = nn.Parameter(gamma)
    activation_bits = None
    for holder in holders:
        module = holder.module
        assert not isinstance(module, _Quantized), "a model is quantized once"
        if config.activations is not None and holder.kind == "linears":
            activation_bits = config.activations.bits
            quantize_input(module, activation_bits)
            bases: tuple[Any, ...] = (QuantizedWeight, *type(module).__bases__)
        else:
            bases = (QuantizedWeight, type(module))
        module.__class__ = _quantized(*bases)
        module.register_parameter("weight_gamma", shared)
        module.weight_quantizer, module.weight_name = quantizer, first.name  # type: ignore[assignment]
    return CoverageRow(
        first.name,
        tuple(weight.shape),
        settings.bits,
        settings.granularity,
        config.grid,
        activation_bits,
        None,
        quantizer.row_axis,
        f"{first.name}_gamma",
    )


def _settings(holders: list[_Holder], config: Quant) -> tuple[WeightQuant | None, str | None]:
    """(how a parameter is quantized, None) or (None, why it is not)."""
    glob = next((glob for glob in config.keep_float if any(fnmatchcase(holder.name, glob) for holder in holders)), None)
    if glob is not None:
        return None, f"quant.keep_float has {glob}"
    kinds = {holder.kind for holder in holders}
    for kind, settings in (("embeddings", config.embeddings), ("positions", config.positions), ("linears", config.linears)):
        if kind in kinds:
            return settings, None if settings else f"quant.{kind} is null"
    return None, f"{type(holders[0].module).__name__}.{holders[0].key} is no weight of a Linear, Conv1D or Embedding"


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, WeightQuantizer]]:
    """(name in `model`, weight, gamma, quantizer) of each quantized parameter, a tied one once, in the order of `named_parameters`."""
    seen = set()
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and module.weight_gamma not in seen:
            seen.add(module.weight_gamma)
            weight = module._parameters["weight"]
            assert weight is not None
            yield f"{module_name}.weight" if module_name else "weight", weight, module.weight_gamma, module.weight_quantizer


def check_all_ran(model: nn.Module) -> None:
    """Raise ConfigError naming the quantized parameters that no forward has quantized yet."""
    ran: dict[str, bool] = {}
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            ran[module.weight_name] = ran.get(module.weight_name, False) or module.quantizer_ran
    idle = [name for name, has_run in ran.items() if not has_run]
    if idle:
        raise ConfigError(
            f"{len(idle)} of {len(ran)} quantizers never ran: {', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''}. "
            "Their modules are read without being called; list them in quant.keep_float."
        )
