"""Quantization inside a model's own classes: a mixin over each module's class, and the coverage of the whole model.

A quantized module keeps its parent's `forward`, parameters and state-dict keys; for the time of one call its parameters are
the fake-quantized ones. Nothing dense is kept for backward: the quantized weight is made again from the Parameter, so under
ZeRO-3 only partitions outlive a call. What a quantizer learns is a Parameter of the same module, such as `weight_gamma`, so
that it is gathered together with the weight; a tied weight has one, registered on each module that holds it.

A weight that is read without calling its module escapes: `check_all_ran` says so after the first step.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dqtrain.config import ActivationQuant, Quant, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.quant.activation import ActivationQuantizer, is_one_sided, real_positions, watch_padding
from dqtrain.quant.attention import check_attention_ran, quantize_attention
from dqtrain.quant.grid import Scales, WeightQuantizer, round_to_bf16
from dqtrain.quant.saved import made_again
from dqtrain.quant.scale import initial_learned

POSITION_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "relative_attention_bias"})
"""Names under which an nn.Embedding is a table of positions (GPT-2; BART and OPT; BERT; T5); any other one holds words."""

_SAME_MEMORY = re.compile(r"View|Reshape|Transpose|Permute|BackwardFunction")
"""Names of autograd nodes that give what they got, in another shape; the last one is DeepSpeed's."""

_LEARNED = re.compile(r"_(gamma|clip|step|zero_point)$")


def is_learned_scale(name: str) -> bool:
    """Whether a parameter of this name was put beside a weight by a quantizer, so that the float model knows nothing of it."""
    return _LEARNED.search(name) is not None


def has_unit_of_weights(name: str) -> bool:
    """Whether a learned scale is in the unit of what it quantizes (a clip or a step), rather than a factor or a code."""
    return name.endswith(("_clip", "_step"))


def values_of(parameter: Tensor) -> Tensor:
    """What a parameter holds, without its graph: of one on the meta device what its `read` gives (`models.weights.leave_in_files`)."""
    return parameter.read() if parameter.is_meta else parameter.detach()  # type: ignore[attr-defined]


def float_bytes(model: nn.Module) -> int:
    """Bytes of the float model in fp32, tied weights once."""
    return sum(4 * p.numel() for name, p in model.named_parameters() if not is_learned_scale(name))


class _RoundToBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return round_to_bf16(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Quantized(nn.Module):
    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle and deepcopy have to be told how to make it.
        return _empty, type(self).__bases__, self.__dict__


def _is_kept_by_its_maker(x: Tensor) -> bool:
    """Whether the operation that gave x has saved it for its own backward, as ReLU, tanh and torch's attention do."""
    node = x.grad_fn
    while node is not None and _SAME_MEMORY.search(node.name()) and node.next_functions:
        node = node.next_functions[0][0]
    # Looked up on the type: reading it from the node would unpack it.
    return node is not None and (hasattr(type(node), "_saved_result") or hasattr(type(node), "_saved_output"))


class QuantizedInput(_Quantized):
    """Mixin: the parent's own forward on a quantized input [..., features]."""

    input_quantizer: ActivationQuantizer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        quantizer, is_real = self.input_quantizer, real_positions(x, self)
        quantized = quantizer(x, self, is_real)
        if quantized is x or not torch.is_grad_enabled() or not (quantizer.learned_names or _is_kept_by_its_maker(x)):
            return super().forward(quantized, *args, **kwargs)
        # Something keeps x: then the quantized one is made again from it rather than kept beside it.
        maker = functools.partial(quantizer.value, learned=quantizer.learned_values(self) if quantizer.learned_names else (), is_real=is_real)
        with made_again({quantized.untyped_storage().data_ptr(): maker}, x):
            return super().forward(quantized, *args, **kwargs)


class QuantizedGate(_Quantized):
    """Mixin for experts: the gated product inside each of them, the input of its second matrix, is quantized."""

    gated_quantizer: ActivationQuantizer

    def _apply_gate(self, gate_up: Tensor) -> Tensor:  # what transformers' implementations of experts call
        return self.gated_quantizer(super()._apply_gate(gate_up), self)  # type: ignore[misc] # of the experts' class


class QuantizedParameters(_Quantized):
    """Mixin: the parent's own forward with its parameters fake-quantized for that one call."""

    weight_quantizers: dict[str, WeightQuantizer]  # by the parameter's name in the module
    weight_names: dict[str, str]  # in the model that was quantized
    rounded: tuple[str, ...] = ()  # parameters that are rounded to bf16 and not quantized
    quantizer_ran = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward. Under autocast a linear multiplies in the lower precision, from a weight quantized in fp32."""
        makers: dict[int, Callable[..., Tensor]] = {}
        try:
            for key in self.rounded:
                self.__dict__[key] = _RoundToBf16.apply(self._parameters[key])  # found before the Parameter
            for key, quantizer in self.weight_quantizers.items():
                weight, scales, quantized = self._fake_quantize(key, quantizer)
                makers[quantized.untyped_storage().data_ptr()] = functools.partial(_value, weight, quantizer, scales, quantized.dtype)
                self.__dict__[key] = quantized
            self.quantizer_ran = True
            if not makers or not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            with made_again(makers):
                return super().forward(*args, **kwargs)
        finally:
            for key in (*self.rounded, *self.weight_quantizers):
                self.__dict__.pop(key, None)

    def _fake_quantize(self, key: str, quantizer: WeightQuantizer) -> tuple[Tensor, Scales, Tensor]:
        weight = self._parameters[key]
        assert weight is not None
        value, scales = quantizer.fake_quantize(weight, *(getattr(self, f"{key}_{name}") for name in quantizer.learned))
        dtype = weight.dtype
        if not isinstance(self, nn.Embedding) and torch.is_autocast_enabled(weight.device.type):
            # Cast here: autocast would cast inside the parent's forward, and the copy that it saves could not be told from others.
            dtype = torch.get_autocast_dtype(weight.device.type)
        return weight, scales, value.to(dtype)


@torch.no_grad()
def _value(weight: Tensor, quantizer: WeightQuantizer, scales: Scales, dtype: torch.dtype) -> Tensor:
    return quantizer.value(weight, scales).to(dtype)


class Int8Parameters(_Quantized):
    """Mixin: the parent's own forward with what it keeps as int8 codes made dense for that one call, in the dtype of the scales."""

    coded: tuple[str, ...]  # parameters of the module that are codes; the scales of KEY are KEY_scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward."""
        try:
            for key in self.coded:
                codes, scale = self._parameters[key], self._parameters[f"{key}_scale"]
                assert codes is not None and scale is not None
                self.__dict__[key] = codes * scale  # found before the Parameter
            return super().forward(*args, **kwargs)
        finally:
            for key in self.coded:
                self.__dict__.pop(key, None)


@functools.cache
def _quantized(*bases: Any) -> type[nn.Module]:
    """The class of mixins over a module's own class, the last one."""
    return type(f"Quantized{bases[-1].__name__}", bases, {})


def _empty(*bases: Any) -> nn.Module:
    cls = _quantized(*bases)
    return cls.__new__(cls)


def _mix_in(module: nn.Module, mixin: type) -> None:
    """Put a mixin in front of a module's class, those already there before or after it."""
    bases = type(module).__bases__ if isinstance(module, _Quantized) else (type(module),)
    if mixin not in bases:
        module.__class__ = _quantized(mixin, *bases)


def set_own_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class of its own, a subclass of the one it has, under whatever mixins it has."""
    bases = type(module).__bases__ if isinstance(module, _Quantized) else ()
    module.__class__ = _quantized(*bases[:-1], cls) if bases else cls


@dataclass(frozen=True)
class CoverageRow:
    """What happens to one parameter of two dimensions or more; `reason` says why it stays float."""

    name: str
    shape: tuple[int, ...]
    kind: str | None = None  # linears, embeddings or positions; None: no such thing
    quantizer: WeightQuantizer | None = None
    input_quantizer: ActivationQuantizer | None = None
    reason: str | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def num_scales(self) -> int:
        """Scales of the weight; 0 where it stays float."""
        return self.quantizer.num_scales(self.shape) if self.quantizer else 0

    @property
    def learned_names(self) -> list[str]:
        """Names of the parameters that the weight's quantizer learns."""
        return [f"{self.name}_{learned}" for learned in self.quantizer.learned] if self.quantizer else []


@dataclass(frozen=True)
class Coverage:
    """Which parameters are quantized and how, and why the others are not: one row for each of two dimensions or more."""

    rows: list[CoverageRow]

    @property
    def fraction(self) -> float:
        """Quantized elements / all elements."""
        return sum(row.numel for row in self.rows if row.quantizer) / max(1, sum(row.numel for row in self.rows))

    def table(self) -> str:
        """Aligned text for a terminal."""
        cells = [("parameter", "shape", "weight", "input", "why float")]
        for row in self._grouped():
            weight, inputs = "float", "float"
            if row.quantizer is not None:
                q = row.quantizer
                width = "ternary" if q.levels.count == 3 else f"{q.bits} bit"
                weight = f"{width} {q.grid} {q.granularity}{f' {q.group_size}' if q.group_size else ''}"
            if row.input_quantizer is not None:
                inputs = f"{row.input_quantizer.bits} bit {row.input_quantizer.scale}{' asymmetric' if row.input_quantizer.asymmetric else ''}"
            cells.append((row.name, " x ".join(map(str, row.shape)), weight, inputs, row.reason or ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, f"{self.fraction:.1%} of the elements of these parameters are quantized."])

    def _grouped(self) -> list[CoverageRow]:
        """Rows that differ in the numbers of their names alone, as one: layers.0-11.fc1.weight."""
        groups: dict[tuple[Any, ...], list[CoverageRow]] = {}
        for row in self.rows:
            groups.setdefault((re.sub(r"\d+", "", row.name), replace(row, name="")), []).append(row)
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
        rows = []
        for row in json.loads(text):
            weight, inputs = row.pop("quantizer"), row.pop("input_quantizer")
            row |= {"shape": tuple(row["shape"]), "quantizer": weight and WeightQuantizer(**weight)}
            rows.append(CoverageRow(**row, input_quantizer=inputs and ActivationQuantizer(**inputs)))
        return cls(rows)


@dataclass(frozen=True)
class _Holder:
    """A module and the name under which it holds a parameter."""

    module_name: str
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.key}" if self.module_name else self.key

    @property
    def is_experts(self) -> bool:
        parameter = self.module._parameters[self.key]
        return type(self.module).__name__.endswith("Experts") and parameter is not None and parameter.ndim == 3

    @property
    def is_router(self) -> bool:
        last = self.module_name.rpartition(".")[2]
        return type(self.module).__name__.endswith("Router") or (last in ("gate", "router", "shared_expert_gate") and isinstance(self.module, nn.Linear))

    @property
    def kind(self) -> str | None:
        if self.is_experts:
            return "linears"
        if self.key != "weight" or self.is_router:
            return None
        if isinstance(self.module, nn.Embedding):
            return "positions" if self.module_name.rpartition(".")[2] in POSITION_TABLES else "embeddings"
        return "linears" if isinstance(self.module, nn.Linear | Conv1D) else None

    @property
    def row_axis(self) -> int:
        """Axis of the outputs, of a matrix's two: some experts (GPT-OSS) store their weights transposed, as Conv1D does."""
        return int(isinstance(self.module, Conv1D) or (self.is_experts and getattr(self.module, "is_transposed", False)))


def quantize_model(model: nn.Module, config: Quant, initialise: bool = True, rounded: bool = False) -> Coverage:
    """Quantize a float model in place.

    Linear, Conv1D and experts' weights follow `config.linears`, nn.Embedding ones `config.embeddings`, or `config.positions` where
    the module is called as in `POSITION_TABLES`; `config.overrides` come after. A weight tied between an embedding and a head
    follows the embedding; the head's input is quantized like any linear's. Where a weight stays float, so does the input, and
    routers do unless an override names them. With `rounded` every matrix is rounded to bf16 first, those that stay float too. With
    `initialise` the learned scales minimise the squared error of the present weights, otherwise they are 1, to be overwritten (a model
    on the meta device can only be quantized so). Learned activation steps start with `activation.calibrate`.

    Raises ConfigError when a glob matches nothing, a group size does not divide, a weight is not finite, or a weight is shared
    with a module that would read it unquantized.
    """
    matrices = _matrices(model)
    names = [holder.name for holders in matrices for holder in holders]
    for override in config.overrides:
        if not any(fnmatchcase(name, override.match) for name in names):
            raise ConfigError(
                f"quant.overrides has `{override.match}`, which matches no matrix of the model; they are called like {names[0]}. Mend or remove it."
            )
    coverage = Coverage([_quantize_parameter(holders, config, rounded) for holders in matrices])
    if config.float_head and not any(latent_heads(model)):
        raise ConfigError(f"quant.float_head is true, but {type(model).__name__} has no head that is tied to quantized word embeddings. Set it to false.")
    if config.vectors == "bf16":
        _round(model, lambda key, parameter: parameter.ndim < 2 and not is_learned_scale(key))
    if rounded:
        round_matrices(model)
    for override in config.overrides:
        matched = [row for row, holders in zip(coverage.rows, matrices, strict=True) if any(fnmatchcase(holder.name, override.match) for holder in holders)]
        if override.activations is not None and not any(row.input_quantizer for row in matched):
            raise ConfigError(
                f"quant.overrides has activations for `{override.match}`, but no quantized linear layer is called so. Give it weights too, or remove it."
            )
    quantize_activations(model, coverage, config.activations)
    if initialise:
        initialise_scales(model)
    return coverage


def keep_in_int8(model: nn.Module) -> dict[str, int]:
    """Let a frozen model on the meta device keep the matrices of its repeated blocks as int8 codes with bf16 scales, to be filled in by the caller; in place.

    Those are the weights of Linear, Conv1D and experts; routers, and what is shared with a module outside of the blocks, stay float. Each NAME becomes
    codes of the same shape and NAME_scale, of 1 along its inputs. Returns the axis of the outputs, of a matrix's two, by each name.
    """
    blocks = (block for parent in model.modules() if isinstance(parent, nn.ModuleList) for block in parent)
    inside = {module for block in blocks for module in block.modules()}
    axes = {}
    for holders in _matrices(model):
        axis = holders[0].row_axis
        if any(holder.kind != "linears" or holder.module not in inside or holder.row_axis != axis for holder in holders):
            continue
        weight = holders[0].module._parameters[holders[0].key]
        assert weight is not None
        codes = nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
        scale = nn.Parameter(torch.empty_like(weight.detach().amax(-1 - axis, keepdim=True), dtype=torch.bfloat16), requires_grad=False)
        for holder in holders:
            _mix_in(holder.module, Int8Parameters)
            holder.module.coded = (*holder.module.__dict__.get("coded", ()), holder.key)  # type: ignore[assignment]
            holder.module.register_parameter(holder.key, codes)
            holder.module.register_parameter(f"{holder.key}_scale", scale)
            axes[holder.name] = axis
    return axes


def _matrices(model: nn.Module) -> list[list[_Holder]]:
    """All holders of each parameter of two dimensions or more, in the order of `named_parameters`."""
    holders: dict[nn.Parameter, list[_Holder]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, _Quantized):
            raise ConfigError(f"{module_name} of this model is quantized already, and quantizing it again would hide that. Start from the float model.")
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                holders.setdefault(parameter, []).append(_Holder(module_name, module, key))
    return list(holders.values())


def _quantize_parameter(holders: list[_Holder], config: Quant, rounded: bool) -> CoverageRow:
    first = holders[0]
    weight = first.module._parameters[first.key]
    assert weight is not None
    kind, settings, inputs, reason = _settings(holders, config)
    row = CoverageRow(first.name, tuple(weight.shape), kind, reason=reason)
    if settings is None:
        return row
    unknown = next((holder for holder in holders if holder.kind is None and len(holders) > 1), None)
    if unknown is not None:
        raise ConfigError(
            f"{first.name} is also {unknown.name}, where {type(unknown.module).__name__} would read it unquantized; "
            f"keep it float with an entry of quant.overrides: match: {first.name}, keep_float: true."
        )
    portable = config.scale_dtype == "portable"
    quantizer = WeightQuantizer(settings.grid, settings.bits, settings.granularity, settings.group_size, first.row_axis, portable, rounded)
    num_scales = quantizer.num_scales(row.shape, first.name)
    learned = {name: nn.Parameter(torch.ones(num_scales, device=weight.device)) for name in quantizer.learned}
    if config.float_head and kind == "embeddings":
        for head in [holder for holder in holders if holder.kind == "linears"]:
            head.module.reads_latent = True  # type: ignore[assignment]
            holders = [holder for holder in holders if holder is not head]
    for holder in holders:
        _mix_in(holder.module, QuantizedParameters)
        holder.module.__dict__.setdefault("weight_quantizers", {})[holder.key] = quantizer
        holder.module.__dict__.setdefault("weight_names", {})[holder.key] = first.name
        for name, parameter in learned.items():
            holder.module.register_parameter(f"{holder.key}_{name}", parameter)
    reader = next((holder for holder in holders if holder.kind == "linears"), None)
    if inputs is None or reader is None:
        return replace(row, quantizer=quantizer)
    is_gated = reader.is_experts and reader.key.startswith("down")
    asymmetric = inputs.asymmetric == "everywhere" or (inputs.asymmetric == "one_sided" and is_one_sided(reader.key if is_gated else reader.module_name))
    # Inside experts tokens are sorted, so that which are padded is not known: each has a scale of its own.
    scale = "per_token" if is_gated and inputs.scale == "per_tensor" else inputs.scale
    input_quantizer = ActivationQuantizer("gated" if is_gated else "input", inputs.bits, scale, asymmetric)
    input_quantizer.check_features(row.shape[-1 - reader.row_axis], first.name)
    return replace(row, quantizer=quantizer, input_quantizer=input_quantizer)


def _settings(holders: list[_Holder], config: Quant) -> tuple[str | None, WeightQuant | None, ActivationQuant | None, str | None]:
    """(kind, how a parameter is quantized, how its input is, None) or (kind, None, None, why it is not)."""
    kinds = {holder.kind for holder in holders}
    kind = next((kind for kind in ("embeddings", "positions", "linears") if kind in kinds), None)
    settings = getattr(config, kind) if kind else None
    inputs, reason = config.activations, None if settings else f"quant.{kind} is null"
    if kind is None:
        owner = type(holders[0].module)
        name = owner.__bases__[-1].__name__ if issubclass(owner, _Quantized) else owner.__name__
        reason = f"{name}.{holders[0].key} is no weight of a Linear, Conv1D, Embedding or of experts"
    if any(holder.is_router for holder in holders):
        reason = "routers stay float unless quant.overrides names them: a changed choice of experts costs more than it saves"
    for override in config.overrides:
        if any(fnmatchcase(holder.name, override.match) for holder in holders):
            if override.keep_float:
                settings, reason = None, f"quant.overrides has {override.match}"
            elif override.weights is not None:
                settings, reason = override.weights, None
            inputs = override.activations or inputs
    return kind, settings, inputs, reason


def round_matrices(model: nn.Module) -> None:
    """Round every parameter of two dimensions or more that is not quantized to bf16, straight-through, in every forward of the modules that hold it."""
    _round(model, lambda key, parameter: parameter.ndim >= 2)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None and "weight" in head.__dict__.get("rounded", ()):
        head.quantizer_ran = True  # the loss calls it, or nothing reads it


def _round(model: nn.Module, is_meant: Callable[[str, nn.Parameter], bool]) -> None:
    for module in model.modules():
        quantizers = module.__dict__.get("weight_quantizers", {})
        keys = tuple(key for key, p in module._parameters.items() if p is not None and key not in quantizers and is_meant(key, p))
        if keys:
            _mix_in(module, QuantizedParameters)
            module.__dict__.setdefault("weight_quantizers", {})
            module.__dict__.setdefault("weight_names", {})
            module.rounded = (*module.__dict__.get("rounded", ()), *keys)  # type: ignore[assignment]


def quantize_activations(model: nn.Module, coverage: Coverage, settings: ActivationQuant | None) -> None:
    """Quantize the inputs of linear layers as their weights' rows say, by any name of a weight, and attention as the settings do: what an artifact needs too."""
    inputs = {row.name: row.input_quantizer for row in coverage.rows if row.input_quantizer}
    by_weight = {parameter: inputs[name] for name, parameter in model.named_parameters() if name in inputs}
    for module in list(model.modules()):
        for quantizer in [by_weight[p] for p in module._parameters.values() if p is not None and p in by_weight and not isinstance(module, nn.Embedding)]:
            _mix_in(module, QuantizedGate if quantizer.place == "gated" else QuantizedInput)
            quantizer.register(module)
            setattr(module, f"{quantizer.place}_quantizer", quantizer)
            if quantizer.place == "gated":
                model.set_experts_implementation("grouped_mm")  # type: ignore[operator] # the eager one of some families does not call _apply_gate
    if settings is not None and settings.attention:
        quantize_attention(model, settings.bits, settings.scale, settings.asymmetric != "nowhere")
    watch_padding(model)


@dataclass(frozen=True)
class QuantizedParameter:
    """A weight, how it is quantized, and what is learned for it."""

    name: str
    weight: nn.Parameter
    quantizer: WeightQuantizer
    learned: tuple[nn.Parameter, ...]

    def read(self) -> tuple[Tensor, Scales]:
        """The weight itself, and its scales."""
        weight = values_of(self.weight)
        return weight, self.quantizer.scales(weight, *map(values_of, self.learned))

    def scales(self) -> Scales:
        """Those of the forward in training."""
        return self.read()[1]

    def value(self) -> Tensor:
        """What forward computes with."""
        return self.quantizer.value(*self.read())


def quantized_parameters(model: nn.Module) -> Iterator[QuantizedParameter]:
    """Each quantized parameter by its first name in `model`, a tied one once, in the order of `named_parameters`."""
    seen = set()
    for module_name, module in model.named_modules():
        for key, quantizer in module.__dict__.get("weight_quantizers", {}).items():
            weight = module._parameters[key]
            if weight not in seen:
                seen.add(weight)
                name = f"{module_name}.{key}" if module_name else key
                yield QuantizedParameter(name, weight, quantizer, tuple(module._parameters[f"{key}_{learned}"] for learned in quantizer.learned))


@torch.no_grad()
def initialise_scales(model: nn.Module) -> None:
    """Set every learned weight scale to where the squared error is least. Raises ConfigError for a weight that is not finite."""
    for parameter in quantized_parameters(model):
        for target, found in zip(parameter.learned, initial_learned(parameter.weight.detach(), parameter.quantizer, parameter.name), strict=True):
            target.data.copy_(found)


@torch.no_grad()
def initial_scales(parameters: Iterable[QuantizedParameter], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Where the learned scales of weights start, by name: as `initialise_scales`, of weights that are read by name, one at a time."""
    scales: dict[str, Tensor] = {}
    for parameter in parameters:
        found = initial_learned(read(parameter.name), parameter.quantizer, parameter.name)
        scales |= {f"{parameter.name}_{learned}": value for learned, value in zip(parameter.quantizer.learned, found, strict=True)}
    return scales


@torch.no_grad()
def served_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What forward computes with for each parameter by its first name: the quantized weight, the rounded parameter, or the parameter; no scales of weights.

    One at a time: of a model whose parameters are in files (`models.weights.leave_in_files`) no other is in memory.
    """
    quantized = {parameter.name: parameter for parameter in quantized_parameters(model)}
    scales = {f"{name}_{learned}" for name, parameter in quantized.items() for learned in parameter.quantizer.learned}
    rounded = rounded_parameters(model)

    def float_value(name: str, parameter: Tensor) -> Tensor:
        return round_to_bf16(values_of(parameter)) if name in rounded else values_of(parameter)

    for name, parameter in model.named_parameters():
        if name in quantized:
            yield name, quantized[name].value()
        elif name not in scales:
            yield name, float_value(name, parameter)
    for name, parameter in latent_heads(model):
        yield name, float_value(name, parameter)


def latent_heads(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Heads that read a tied, quantized table before rounding (`quant.float_head`), by the name that the table has there."""
    for name, module in model.named_modules():
        if module.__dict__.get("reads_latent"):
            yield f"{name}.weight", module._parameters["weight"]


def rounded_parameters(model: nn.Module) -> set[str]:
    """Names, tied ones too, of the parameters that forward rounds to bf16 and does not quantize."""
    return {f"{name}.{key}" if name else key for name, module in model.named_modules() if isinstance(module, QuantizedParameters) for key in module.rounded}


def read_in_bf16(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that every module which holds them rounds to bf16 before anything else, so that bf16 is all that it needs of them."""
    reads: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        quantizers, rounded = module.__dict__.get("weight_quantizers", {}), module.__dict__.get("rounded", ())
        for key, parameter in module._parameters.items():
            if parameter is not None:
                is_rounded = quantizers[key].rounded if key in quantizers else key in rounded
                reads[parameter] = reads.get(parameter, True) and is_rounded
    return [parameter for parameter, is_rounded in reads.items() if is_rounded]


def check_all_ran(model: nn.Module) -> None:
    """Raise ConfigError naming the quantized parameters that no forward has quantized yet, or the attention modules."""
    names: dict[nn.Parameter, str] = {}
    ran: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedParameters):
            for key in module.weight_names or module.rounded:
                parameter = module._parameters[key]
                assert parameter is not None
                names.setdefault(parameter, module.weight_names.get(key, f"{module_name}.{key}"))
                if module.quantizer_ran:
                    ran.add(parameter)
    idle = [name for parameter, name in names.items() if parameter not in ran]
    if idle:
        raise ConfigError(
            f"{len(idle)} of {len(names)} quantizers never ran: {', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''}. "
            "Their modules are read without being called; keep them float with entries of quant.overrides (match: NAME, keep_float: true), norms with vectors: fp32, "
            "and all with precision: bf16 where they are float and it is bf16_weights."
        )
    check_attention_ran(model)
