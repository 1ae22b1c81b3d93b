"""The codes of a packed artifact as a GGUF file, which llama.cpp runs: GPT-2, Llama and Mistral, Qwen 2 and 3, T5.

    model.gguf     blocks of ggml's types for what is quantized (`ggml_blocks`), F32 for the rest; the tokenizer; the model's settings
    parity.json    what `parity.verify_gguf` found before the file was published

Floats are never quantized here: each block is made of the codes and scales that training used. Of the names that llama.cpp gives to tensors
`gguf.get_tensor_name_map` knows all. What differs from transformers: matrices are [outputs, inputs] throughout, rotary heads of Llama have
their two halves interleaved, a tied head is not stored, and T5's factor d_model^-0.5 before a tied head, which llama.cpp's graph
does not have, is multiplied into the last norm.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dqtrain.artifact.format import PackedTensors
from dqtrain.artifact.ggml_blocks import Fit, as_tensor, fit, num_bytes, pack, rows_of, value
from dqtrain.artifact.gguf_tokenizer import tokenizer_fields
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.quant.modules import Coverage, is_learned_scale

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")
ALIGNMENT = 32


def gguf_package() -> Any:
    """The `gguf` package, which is an extra. Raises ConfigError without it."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "the gguf target needs the Python package gguf, which is not installed here. Install it with: pip install 'dqtrain[runtimes]'"
        ) from None
    return gguf


@dataclass(frozen=True)
class Family:
    """What llama.cpp must know of a model, and what it wants otherwise than transformers."""

    arch: str
    num_layers: int
    settings: dict[str, int | float | str]  # keys below `arch`
    interleaved: dict[str, int] = field(default_factory=dict)  # end of a module's name -> heads whose rotary halves are interleaved
    transposed: tuple[str, ...] = ()  # ends of the names of Conv1D modules
    factors: dict[str, float] = field(default_factory=dict)  # name -> what a vector is multiplied by
    extra: dict[str, Tensor] = field(default_factory=dict)  # tensors that transformers computes: llama.cpp's name -> fp32
    float_kinds: tuple[str, ...] = ()  # kinds of weights that stay F32, few as they are


def family(config: PretrainedConfig) -> Family:
    """What `config` is to llama.cpp. Raises ConfigError for a model that it cannot run as transformers does."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"the gguf target runs {', '.join(FAMILIES)}, and this model is {kind}. Use the target packed, or hf.")
    return _gpt2(config) if kind == "gpt2" else _t5(config) if kind == "t5" else _rotary(config)


def _require(config: PretrainedConfig, expected: dict[str, tuple[Any, ...]]) -> None:
    for name, values in expected.items():
        found = getattr(config, name, values[0])
        if found not in values:
            raise ConfigError(
                f"the gguf target: {name} of this {config.model_type} is {found}, but llama.cpp computes {values[0]}. Use the target packed, or hf."
            )


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _gpt2(config: Any) -> Family:
    _require(
        config, {"activation_function": _TANH_GELU, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
    )
    settings = {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }
    return Family("gpt2", config.n_layer, settings, transposed=("c_attn", "c_proj", "c_fc"))


def _rotary(config: Any) -> Family:
    arch = "llama" if config.model_type == "mistral" else config.model_type
    _require(config, {"hidden_act": ("silu", "swish")})
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(
            f"the gguf target: sliding_window of this {config.model_type} is {window}, but llama.cpp looks at all positions. Use the target packed, or hf."
        )
    rope = config.rope_parameters or {}
    _require_rope(config, rope.get("rope_type", "default"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    extra = {}
    if rope.get("rope_type", "default") == "llama3":
        base = 1.0 / settings["rope.freq_base"] ** (torch.arange(0, head, 2, dtype=torch.int64).float() / head)
        extra["rope_freqs.weight"] = base / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    return Family(arch, config.num_hidden_layers, settings, interleaved, extra=extra)


def _require_rope(config: PretrainedConfig, kind: str) -> None:
    known = ("default", "llama3") if config.model_type in ("llama", "mistral") else ("default",)
    if kind not in known:
        raise ConfigError(
            f"the gguf target: rope_type of this {config.model_type} is {kind}, but dqtrain writes {' and '.join(known)}. Use the target packed, or hf."
        )


def _t5(config: Any) -> Family:
    _require(config, {"feed_forward_proj": ("relu", "gated-gelu"), "relative_attention_max_distance": (128,)})
    if config.num_decoder_layers > config.num_layers:
        raise ConfigError(
            f"the gguf target: this t5 has {config.num_layers} encoder layers and {config.num_decoder_layers} of its decoder, "
            "but llama.cpp has no room for a deeper decoder. Use the target packed, or hf."
        )
    settings = {
        "context_length": getattr(config, "n_positions", 512),
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "decoder_block_count": config.num_decoder_layers,
        "attention.head_count": config.num_heads,
        "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    factors = {"decoder.final_layer_norm.weight": config.d_model**-0.5} if config.scale_decoder_outputs else {}
    return Family("t5", config.num_layers, settings, factors=factors, float_kinds=("positions",))


@functools.cache
def _interleave(num_rows: int, heads: int) -> np.ndarray:
    """Which row of a projection llama.cpp has at each place: halves of heads side by side become neighbours."""
    return np.arange(num_rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


class Placement(NamedTuple):
    """One quantized weight, and what holds it."""

    name: str  # as transformers says it
    shape: tuple[int, int]  # [outputs, inputs]
    fit: Fit


def placements(config: PretrainedConfig, coverage: Coverage, fastest: bool = False) -> list[Placement]:
    """What holds each quantized weight, from names and shapes alone. Raises ConfigError for a model that llama.cpp cannot run."""
    wants = family(config)
    found = []
    for row in coverage.rows:
        if row.quantizer is None:
            continue
        rows, columns = row.shape if row.quantizer.row_axis == 0 else row.shape[::-1]
        if row.kind in wants.float_kinds:
            found.append(Placement(row.name, (rows, columns), Fit("F32", "llama.cpp reads this table as floats")))
        else:
            found.append(Placement(row.name, (rows, columns), fit(row.quantizer, columns, fastest)))
    return found


def refusal(found: list[Placement]) -> str | None:
    """Which weights the file would not hold as they are trained, and what does; None where there are none."""
    refused = [place for place in found if place.fit.is_refused]
    rounded = [place for place in found if place.fit.rounds_scales]
    parts = []
    if refused:
        parts.append(f"{_names(refused)}: {refused[0].fit.why}")
    if rounded:
        parts.append(
            f"{_names(rounded)}: blocks have fp16 scales, and these are fp32 (up to 5e-4 of each value is rounded away); set quant.scale_dtype to portable"
        )
    if not parts:
        return None
    return f"gguf cannot hold {'; '.join(parts)}. Or allow it: --allow-inexact, or export.allow_inexact: true, rounds those scales and stores the other ones as F32."


def notes(found: list[Placement]) -> list[str]:
    """One line for each reason why a weight has not the smallest type of its grid."""
    by_reason: dict[tuple[str, str], list[Placement]] = {}
    for place in found:
        if place.fit.why:
            by_reason.setdefault((place.fit.type, place.fit.why), []).append(place)
    return [f"{type} for {_names(places)}: {why}" for (type, why), places in by_reason.items()]


def _names(found: list[Placement]) -> str:
    names = [place.name for place in found]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def describe_gguf(config: PretrainedConfig, coverage: Coverage, float_shapes: list[tuple[int, ...]], fastest: bool = False) -> list[str]:
    """What a GGUF file of a student would hold, before there is one: types and bytes, reasons, and what it cannot hold. Raises ConfigError as `placements`."""
    found = placements(config, coverage, fastest)
    counts = Counter(place.fit.type for place in found)
    size = tensor_bytes(config, coverage, float_shapes, fastest)
    types = ", ".join(f"{type} for {count}" for type, count in counts.most_common())
    refused = refusal(found)
    return [
        f"gguf: {size:,} bytes of tensors; {types} of {len(found)} quantized weights",
        *(f"gguf: {line}" for line in notes(found)),
        *([refused] if refused else []),
    ]


def tensor_bytes(config: PretrainedConfig, coverage: Coverage, float_shapes: list[tuple[int, ...]], fastest: bool = False) -> int:
    """Bytes of the file's tensors, each filled up to 32: from shapes alone, before there are weights. `float_shapes`: those of all that is not quantized."""
    sizes = [num_bytes(place.fit.type, place.shape) for place in placements(config, coverage, fastest)]
    sizes += [num_bytes("F32", shape) for shape in float_shapes]
    sizes += [4 * tensor.numel() for tensor in family(config).extra.values()]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file before it is made."""

    name: str  # llama.cpp's
    ours: str  # transformers'; the same for what transformers computes
    type: str
    shape: tuple[int, ...]


class GgufModel:
    """A packed artifact as llama.cpp is to see it, one tensor at a time."""

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, fastest: bool = False) -> None:
        self.packed, self.config, self.family, self.fastest = packed, config, family(config), fastest
        self.coverage = packed.coverage
        self.placed = {place.name: place for place in placements(config, self.coverage, fastest)}

    def tensors(self) -> Iterator[_Stored]:
        """What the file holds, in its order. Raises ConfigError for a tensor that llama.cpp does not know."""
        gguf = gguf_package()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch)
        names = gguf.get_tensor_name_map(arch, max(self.family.num_layers, getattr(self.config, "num_decoder_layers", 0) or 0))
        for ours in [*self.packed.quantized, *(name for name in self.packed.floats if not is_learned_scale(name))]:
            name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ConfigError(f"the gguf target: llama.cpp knows no {ours} of a {self.config.model_type}. Use the target packed, or hf.")
            if ours in self.placed:
                yield _Stored(name, ours, self.placed[ours].fit.type, self.placed[ours].shape)
            else:
                shape = self.packed.shape(ours)
                yield _Stored(name, ours, "F32", shape[::-1] if self._is_transposed(ours) else shape)
        for name, tensor in self.family.extra.items():
            yield _Stored(name, name, "F32", tuple(tensor.shape))

    def data(self, stored: _Stored, as_float: bool = False) -> np.ndarray:
        """What the file holds of one tensor: bytes [rows, bytes], or fp32 where its type is F32 or all is asked `as_float`."""
        ours = stored.ours
        if ours in self.family.extra:
            return self.family.extra[ours].float().numpy()
        if ours not in self.placed:
            matrix = self.packed.floating(ours).float()
            matrix = (matrix.T if self._is_transposed(ours) else matrix) * self.family.factors.get(ours, 1.0)
            return np.ascontiguousarray(self._reordered(ours, matrix.numpy()))
        codes = self.packed.codes(ours)
        rows = rows_of(codes.codes, codes.scale, codes.zero_point, codes.quantizer)
        if stored.type == "F32" or as_float:
            return np.ascontiguousarray(self._reordered(ours, value(rows)))
        with np.errstate(over="ignore"):
            if not np.isfinite(rows.unit.astype(np.float16)).all():
                raise ConfigError(f"the gguf target: a scale of {ours} is {rows.unit.max():.3g}, more than fp16 holds. Train with quant.scale_dtype portable.")
        return self._reordered(ours, pack(rows, stored.type))

    def ours(self, stored: _Stored, matrix: np.ndarray) -> Tensor:
        """What was read back, fp32 as llama.cpp has it, as transformers has it."""
        ours = stored.ours
        matrix = self._reordered(ours, matrix, back=True)
        if ours in self.placed:
            return as_tensor(matrix, self.packed.quantized[ours])
        tensor = torch.from_numpy(matrix)
        return tensor.T if self._is_transposed(ours) else tensor

    def factor(self, name: str) -> float:
        """What a float vector is multiplied by in the file."""
        return self.family.factors.get(name, 1.0)

    def _is_transposed(self, name: str) -> bool:
        module, _, key = name.rpartition(".")
        return key == "weight" and module.endswith(self.family.transposed) if self.family.transposed else False

    def _reordered(self, name: str, matrix: np.ndarray, back: bool = False) -> np.ndarray:
        heads = next((heads for end, heads in self.family.interleaved.items() if name.rpartition(".")[0].endswith(end)), None)
        if heads is None:
            return matrix
        order = _interleave(len(matrix), heads)
        return matrix[np.argsort(order) if back else order]


def write_gguf(model: GgufModel, tokenizer: Path, path: Path, as_float: Path | None = None) -> None:
    """Write a file, tensor by tensor. With `as_float`, a file of the same model: as F32, of the values that ggml reads out of that one.

    Raises ConfigError for a model or tokenizer that llama.cpp does not have, OSError.
    """
    gguf = gguf_package()
    wants = model.family
    writer = gguf.GGUFWriter(path, wants.arch)
    writer.add_block_count(wants.num_layers)
    for key, found in wants.settings.items():
        add = writer.add_float32 if isinstance(found, float) else writer.add_uint32
        add(f"{wants.arch}.{key}", found)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    stored = list(model.tensors())
    types = [s.type for s in stored if s.type != "F32"]
    common = max(set(types), key=types.count) if types and as_float is None else "F32"
    writer.add_file_type(_FILE_TYPES[common])
    tokenizer_fields(tokenizer, model.config, writer)
    if as_float is not None:
        stored = [_Stored(s.name, s.ours, "F32", s.shape) for s in stored]
    for tensor in stored:
        raw = None if tensor.type == "F32" else gguf.GGMLQuantizationType[tensor.type]
        size = num_bytes(tensor.type, tensor.shape)
        if raw is None:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size)
        else:
            writer.add_tensor_info(tensor.name, (*tensor.shape[:-1], size // tensor.shape[0]), np.dtype(np.uint8), size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = read_values(as_float) if as_float is not None else {}
    for tensor in stored:
        writer.write_tensor_data(values[tensor.name]() if as_float is not None else model.data(tensor))
    writer.close()


_FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "TQ1_0": 36, "TQ2_0": 37}
"""llama_ftype of llama.h: what a person is shown, and no more."""


def data_start(path: Path) -> int:
    """Bytes in front of a file's tensors: settings, tokenizer and names."""
    return int(gguf_package().GGUFReader(path).data_offset)


def read_values(path: Path) -> dict[str, Any]:
    """Functions that give each tensor of a file in fp32, by ggml's own dequantizer. Raises CheckpointError for a file that cannot be read."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: is no GGUF file that can be read ({error}). Export it again.") from None

    def read(tensor: Any) -> np.ndarray:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)  # a copy: the file is mapped read-only

    return {tensor.name: functools.partial(read, tensor) for tensor in reader.tensors}
