"""What of compressed-tensors' format holds each weight of a student, for transformers and for vLLM, from names and shapes alone.

transformers runs nn.Linear, with activations, and beside it neither tables nor tied heads in codes; anything else it can only make dense again while
it loads (`dequantize`), which reads all weights by the first scheme and forgets activations without a word. vLLM wants [outputs, inputs] throughout, but int8 codes of Conv1D as
transformers has the weight, since it transposes whatever is called weight; projections that it fuses must agree; tables and heads are floats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from dqtrain.artifact.target import names_of
from dqtrain.config import Export
from dqtrain.errors import ConfigError
from dqtrain.models.making import model_class
from dqtrain.quant.activation import BLOCKS, ActivationQuantizer
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import Coverage, CoverageRow
from dqtrain.tensor_file import num_bytes

TYPES_OF_FLOATS = {torch.bfloat16: "BF16", torch.float32: "F32"}
RUN_BY_VLLM = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that vLLM makes one of; of several schemes it takes the first one's for all."""


@dataclass(frozen=True)
class Scheme:
    """What the modules of one config group share."""

    bits: int
    symmetric: bool
    group_size: int | None  # None: a scale for each output
    inputs: ActivationQuantizer | None = None

    @property
    def format(self) -> str:
        """Of the codes, in the format's words."""
        return "int-quantized" if self.inputs and self.bits == 8 and self.symmetric and self.group_size is None else "pack-quantized"

    @property
    def name(self) -> str:
        """For people."""
        return f"W{self.bits}A{self.inputs.bits if self.inputs else 16}"


class Placement(NamedTuple):
    """One quantized weight, and what holds it."""

    row: CoverageRow
    scheme: Scheme | None  # None: floats
    is_transposed: bool = False  # the codes are [inputs, outputs]

    @property
    def quantizer(self) -> WeightQuantizer:
        """How it was trained."""
        assert self.row.quantizer is not None
        return self.row.quantizer

    @property
    def module(self) -> str:
        """Name of the module whose weight it is."""
        return self.row.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]."""
        rows, columns = self.row.shape if self.quantizer.row_axis == 0 else self.row.shape[::-1]
        return rows, columns

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the file holds of it."""
        if self.scheme is None:
            return {self.row.name: (self.quantizer.dtype, self.row.shape)}
        (rows, columns), bits = self.shape, self.scheme.bits
        groups = columns // self.scheme.group_size if self.scheme.group_size else 1
        first, second = (columns, rows) if self.is_transposed else (rows, columns)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.scheme.format == "int-quantized":
            found[f"{self.module}.weight"] = torch.int8, (first, second)
        else:
            found[f"{self.module}.weight_packed"] = torch.int32, (first, math.ceil(second * bits / 32))
            found[f"{self.module}.weight_shape"] = torch.int64, (2,)
            if self.is_transposed:  # one scale for all is one for each row, whatever rows are
                rows, groups = (columns, 1) if self.quantizer.granularity == "per_tensor" else (1, rows)
        found[f"{self.module}.weight_scale"] = torch.float32, (rows, groups)
        if not self.scheme.symmetric:
            found[f"{self.module}.weight_zero_point"] = torch.int32, (math.ceil(rows * bits / 32), groups)
        return found | stored_inputs(self.module, self.scheme.inputs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(num_bytes(*tensor) for tensor in self.stored.values())


def stored_inputs(module: str, inputs: ActivationQuantizer | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What the file holds of learned activation scales, as `Placement.stored`."""
    if inputs is None or inputs.scale != "learned":
        return {}
    zero_point = {f"{module}.input_zero_point": (torch.int8, (1,))} if inputs.has_zero_point else {}
    return {f"{module}.input_scale": (torch.float32, (1,)), **zero_point}


def _scheme(quantizer: WeightQuantizer, inputs: ActivationQuantizer | None = None) -> Scheme:
    """The least bits that hold a grid. Every one fits in 8."""
    low, high = quantizer.levels.integers
    return Scheme(1 + max((-low - 1).bit_length(), high.bit_length()), not quantizer.has_zero_points, quantizer.group_size, inputs)


@dataclass(frozen=True)
class Plan:
    """What holds a student, from names and shapes alone."""

    placements: list[Placement]
    head: str  # module of the head
    architecture: str  # transformers' class
    dequantize: bool  # transformers makes the model dense while it loads
    head_inputs: ActivationQuantizer | None  # of a head that is a table of floats
    refused: list[str]  # why this is not the student, unless inexact is allowed
    notes: list[str]

    @property
    def groups(self) -> dict[Scheme, list[str]]:
        """Modules of each scheme."""
        found: dict[Scheme, list[str]] = {}
        for place in self.placements:
            if place.scheme is not None:
                found.setdefault(place.scheme, []).append(place.module)
        return found

    def refusal(self) -> str:
        """All that is refused, for people."""
        return (
            f"compressed-tensors cannot hold this student: {'; '.join(self.refused)}. Or allow it: --allow-inexact, or export.allow_inexact: true, "
            "leaves those activations float and stores those weights as floats."
        )

    def tensor_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """Bytes of all tensors; `float_shapes`: those of all that is not quantized."""
        head = sum(num_bytes(*tensor) for tensor in stored_inputs(self.head, self.head_inputs).values())
        return sum(place.num_bytes for place in self.placements) + head + sum(4 * math.prod(shape) for shape in float_shapes)


def plan(config: PretrainedConfig, coverage: Coverage, asked: Export) -> Plan:
    """What holds each weight in the layout that is asked for. Raises ConfigError for a model that has none."""
    rows = [row for row in coverage.rows if row.quantizer is not None]
    experts = [row.name for row in rows if len(row.shape) != 2]
    if experts:
        raise ConfigError(f"the compressed-tensors target has no layout for experts such as {experts[0]}. Use the target packed, or hf.")
    if asked.compressed_tensors == "transformers":
        return _for_transformers(config, rows, *_head(config))
    if config.model_type not in RUN_BY_VLLM:
        raise ConfigError(
            f"compressed-tensors for vLLM is written for {', '.join(RUN_BY_VLLM)}, and this model is {config.model_type}. "
            "Set export.compressed_tensors to transformers, or use the target packed."
        )
    return _for_vllm(config, rows, *_head(config))


def _head(config: PretrainedConfig) -> tuple[str, str]:
    """Name of the module of a model's head, and of the model's class."""
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings()), type(model).__name__


def _for_transformers(config: PretrainedConfig, rows: list[CoverageRow], head: str, architecture: str) -> Plan:
    linears = [row for row in rows if row.kind == "linears"]
    what = None
    if any(_quantizer(row).row_axis for row in linears):
        what = "Conv1D"
    elif config.model_type == "t5" and any(_scheme(_quantizer(row), row.input_quantizer).format == "pack-quantized" for row in linears):
        what = "T5"  # its layers set up their linears' weights before anything is loaded, which packed codes are none of
    has_inputs = any(row.input_quantizer for row in rows)
    if what or not has_inputs and len({_scheme(_quantizer(row)) for row in linears}) <= 1:
        return _dequantized(rows, linears, has_inputs, what or "all", head, architecture)
    refused, notes = [], []
    inputs: dict[str, ActivationQuantizer | None] = {}
    for why, found in _by_reason(rows, lambda row: _unknown_inputs(row.input_quantizer, config.model_type)).items():
        refused.append(f"inputs of {names_of([row.name for row in found])}: {why}")
        inputs |= {row.name: None for row in found}
    placed = [Placement(row, _scheme(_quantizer(row), inputs.get(row.name, row.input_quantizer)) if row.kind == "linears" else None) for row in rows]
    tied = next((row for row in rows if row.kind == "embeddings" and row.input_quantizer), None)
    if len({scheme.bits for place in placed if (scheme := place.scheme)}) > 1:
        notes.append("weights of several widths: load it as it is, since transformers' dequantize=True would read them all at the first one")
    notes += _costs(placed, "transformers has no tables and tied heads in codes beside quantized linears")
    return Plan(placed, head, architecture, False, inputs.get(tied.name, tied.input_quantizer) if tied else None, refused, notes)


def _dequantized(rows: list[CoverageRow], linears: list[CoverageRow], has_inputs: bool, what: str, head: str, architecture: str) -> Plan:
    """One scheme for all that has codes."""
    refused, notes = [], []
    if has_inputs:
        mend = "export.compressed_tensors to vllm" if what == "Conv1D" else "quant.linears to 8 bits and per_row"
        refused.append(
            f"quantized activations of {what}, which transformers drops without a word where it dequantizes; set quant.activations to null, or {mend}"
        )
    sizes: dict[Scheme, int] = {}
    for row in linears or rows:
        scheme = _scheme(_quantizer(row))
        sizes[scheme] = sizes.get(scheme, 0) + row.numel
    for why, found in _by_reason(rows, lambda row: _conv1d_problem(_quantizer(row))).items():
        refused.append(f"{names_of([row.name for row in found])}: {why}")
    taken = {row.name for row in rows if not _conv1d_problem(_quantizer(row))}
    common = max(sizes, key=lambda scheme: sizes[scheme], default=None)
    others = [row for row in linears if row.name in taken and _scheme(_quantizer(row)) != common]
    if others:
        refused.append(
            f"{names_of([row.name for row in others])}: transformers dequantizes {what}, and then reads every weight as {common.name if common else None}; train one width"
        )
    placed = []
    for row in rows:
        scheme = _scheme(_quantizer(row))
        placed.append(Placement(row, scheme if scheme == common and row.name in taken else None, bool(_quantizer(row).row_axis)))
    notes += _costs(
        [place for place in placed if place.row.kind != "linears"], "transformers dequantizes all weights by one scheme, which is that of the linears"
    )
    return Plan(placed, head, architecture, True, None, refused, notes)


def _conv1d_problem(quantizer: WeightQuantizer) -> str | None:
    if quantizer.row_axis == 1 and quantizer.granularity == "per_group":
        return "codes of Conv1D are [inputs, outputs] for transformers, where groups of inputs are no neighbours; train per_row, or set export.compressed_tensors to vllm"
    if quantizer.row_axis == 1 and quantizer.granularity == "per_row" and quantizer.has_zero_points:
        return "zero points of rows have no place where codes of Conv1D are [inputs, outputs]; train a symmetric grid, or set export.compressed_tensors to vllm"
    return None


def _for_vllm(config: PretrainedConfig, rows: list[CoverageRow], head: str, architecture: str) -> Plan:
    refused, placed = [], []
    notes = []
    problems: dict[str, list[CoverageRow]] = {}
    is_fused = config.model_type != "gpt2"
    for row in rows:
        if row.kind != "linears" or row.name == f"{head}.weight":
            placed.append(Placement(row, None))
            continue
        scheme = _scheme(_quantizer(row), row.input_quantizer)
        why = _unknown_inputs(scheme.inputs, config.model_type) or _vllm_problem(scheme, is_fused)
        if why:
            problems.setdefault(f"inputs, {why}", []).append(row)
            scheme = replace(scheme, inputs=None)
        if scheme.format == "pack-quantized" and not _quantizer(row).portable:
            problems.setdefault("vLLM rounds these fp32 scales to bf16; set quant.scale_dtype to portable", []).append(row)
        placed.append(Placement(row, scheme, scheme.format == "int-quantized" and bool(_quantizer(row).row_axis)))
    refused += [f"{names_of([row.name for row in found])}: {why}" for why, found in problems.items()]
    by_module = {place.module: place.scheme for place in placed if place.scheme}
    for module in by_module:
        above, _, last = module.rpartition(".")
        shards = next((shards for shards in FUSED if last in shards), ()) if is_fused else ()
        if last == (shards or (None,))[-1] and len({by_module.get(f"{above}.{shard}") for shard in shards}) > 1:
            refused.append(f"{', '.join(shards)} of {above} differ, and vLLM, which fuses them, takes the first one's scheme for all; train them alike")
            break
    schemes = set(by_module.values())
    by_cpu = {scheme for scheme in schemes if scheme.format == "int-quantized" or scheme.bits == 4 and scheme.inputs is None}
    if schemes - by_cpu:
        notes.append(f"vLLM has kernels for {', '.join(sorted({scheme.name for scheme in schemes - by_cpu}))} on GPUs alone")
    if any(place.scheme is None and place.row.input_quantizer for place in placed):
        notes.append("the head reads float inputs in vLLM")
    notes += _costs(placed, "vLLM reads tables and heads as floats")
    return Plan(placed, head, architecture, False, None, refused, notes)


def _unknown_inputs(inputs: ActivationQuantizer | None, model_type: str) -> str | None:
    """Why the format, or the program, does not compute these activations."""
    if inputs is None:
        return None
    if inputs.bits != 8:
        return f"{inputs.bits}-bit activations are nothing that its programs run; train 8 bits"
    if inputs.scale in BLOCKS:
        return f"{inputs.scale} is llama.cpp's arithmetic; train per_token"
    if inputs.scale == "per_token" and model_type == "opt":
        return "OPT flattens them, and compressed-tensors then takes one scale for all tokens; train learned or per_tensor"
    return None


def _vllm_problem(scheme: Scheme, is_fused: bool) -> str | None:
    """Why vLLM does not run a scheme with these activations."""
    if scheme.inputs is None:
        return None
    if scheme.inputs.scale == "per_tensor":
        return "of which vLLM has no scale for a whole tensor that is computed while it runs; train per_token"
    if scheme.inputs.scale == "learned" and is_fused:
        return "whose learned scales vLLM makes one of where it fuses projections; train per_token"
    if scheme.format == "pack-quantized" and (scheme.inputs.scale != "per_token" or scheme.inputs.has_zero_point):
        return f"which vLLM runs beside {scheme.bits}-bit weights per token and without zero points alone; set quant.activations.asymmetric to nowhere and scale to per_token"
    return None


def _quantizer(row: CoverageRow) -> WeightQuantizer:
    assert row.quantizer is not None
    return row.quantizer


def _by_reason(rows: list[CoverageRow], reason: Callable[[CoverageRow], str | None]) -> dict[str, list[CoverageRow]]:
    found: dict[str, list[CoverageRow]] = {}
    for row in rows:
        if why := reason(row):
            found.setdefault(why, []).append(row)
    return found


def _costs(placed: list[Placement], why: str) -> list[str]:
    """What is said of weights that are floats there, and what that costs."""
    floats = [place for place in placed if place.scheme is None]
    if not floats:
        return []
    taken = sum(place.num_bytes for place in floats)
    in_codes = sum(Placement(place.row, _scheme(place.quantizer)).num_bytes for place in floats)
    types = " and ".join(sorted({TYPES_OF_FLOATS[place.quantizer.dtype] for place in floats}))
    return [f"{types} for {names_of([place.row.name for place in floats])}, exactly, {taken:,} bytes where codes take {in_codes:,}: {why}"]
