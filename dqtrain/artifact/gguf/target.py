"""The codes of a packed artifact as a GGUF file, which llama.cpp runs: GPT-2, Llama and Mistral, Qwen 2 and 3, T5.

    model.gguf     blocks of ggml's types for what is quantized (`gguf.blocks`), F32 for the rest; the tokenizer; the model's settings
                   over 5 GB in parts, as llama.cpp names them (`gguf.files`): the first has the tokenizer and the settings
    files.json     format version, sizes and hashes of the files above: GGUF has none (`description`)
    parity.json    what `parity.verify_target` found before the files were published

Floats are never quantized here: each block is made of the codes and scales that training used. Of the names that llama.cpp gives to tensors
`gguf.get_tensor_name_map` knows all. What differs from transformers: matrices are [outputs, inputs] throughout, rotary heads of Llama have
their two halves interleaved, a tied head is not stored, and T5's factor d_model^-0.5 before a tied head, which llama.cpp's graph
does not have, is multiplied into the last norm.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain import tensor_file
from dqtrain.artifact.description import LIST, write_list
from dqtrain.artifact.format import PackedTensors
from dqtrain.artifact.gguf.blocks import Fit, as_tensor, fit, num_bytes, pack, rows_of, value
from dqtrain.artifact.gguf.family import family
from dqtrain.artifact.gguf.files import FILE, files_of
from dqtrain.artifact.gguf.llama_cpp import LlamaCpp, require_runtime
from dqtrain.artifact.gguf.tokenizer import tokenizer_fields
from dqtrain.artifact.target import extra, names_of, notes_of
from dqtrain.config import Export, Quant, Target
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.quant.modules import Coverage, is_learned_scale

ALIGNMENT = 32


def gguf_package() -> Any:
    """The `gguf` package, which is an extra. Raises ConfigError without it."""
    return extra("gguf", "the gguf target")


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
        parts.append(f"{names_of([place.name for place in refused])}: {refused[0].fit.why}")
    if rounded:
        parts.append(
            f"{names_of([place.name for place in rounded])}: blocks have fp16 scales, and these are fp32 (up to 5e-4 of each value is rounded away); set quant.scale_dtype to portable"
        )
    if not parts:
        return None
    return f"gguf cannot hold {'; '.join(parts)}. Or allow it: --allow-inexact, or export.allow_inexact: true, rounds those scales and stores the other ones as F32."


def notes(found: list[Placement]) -> list[str]:
    """One line for each reason why a weight has not the smallest type of its grid."""
    return notes_of((place.fit.type, place.fit.why, place.name) for place in found)


def tensor_bytes(config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], fastest: bool = False) -> int:
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


class GgufTarget:
    """A packed artifact as llama.cpp is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that it does not run."""

    name: Target = "gguf"
    program = "llama.cpp"
    has_kernels = True
    tolerance = 1e-3  # its GELU is a table of fp16 values

    @classmethod
    def check(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
        """What a person should know of the file before training, one line each. Raises ConfigError for what it cannot hold and for what is not installed."""
        gguf, found = gguf_package(), placements(config, coverage, asked.gguf == "fastest")
        require_runtime()
        tokenizer_fields(tokenizer, config, gguf.GGUFWriter(None, "check"))
        refused = refusal(found)
        if refused is not None and not asked.allow_inexact:
            raise ConfigError(refused)
        return [f"gguf: {line}" for line in notes(found)]

    @classmethod
    def describe(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
        """What a GGUF file of a student would hold, before there is one: types and bytes, reasons, and what it cannot hold. Raises ConfigError as `placements`."""
        fastest = asked.gguf == "fastest"
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

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, asked: Export) -> None:
        self.packed, self.config, self.family, self.fastest = packed, config, family(config), asked.gguf == "fastest"
        self.placed = {place.name: place for place in placements(config, packed.coverage, self.fastest)}
        self.factors = self.family.factors
        self.rounded = {name for name, place in self.placed.items() if place.fit.rounds_scales}  # blocks hold no fp32 scales

    @property
    def types(self) -> dict[str, str]:
        """Types of blocks."""
        return {name: place.fit.type for name, place in self.placed.items()}

    def write(self, folder: Path) -> None:
        """Write the file, or its parts, into a folder, and what lists them. Raises ConfigError for a tensor or tokenizer that llama.cpp does not have, OSError."""
        self._write(folder / FILE, tensor_file.SHARD_BYTES)
        write_list(folder / LIST)

    def values(self, folder: Path) -> dict[str, Callable[[], Tensor]]:
        """Functions that give each parameter as ggml's own dequantizer reads it."""
        read = read_values(folder)
        return {stored.ours: functools.partial(self._read, stored, read[stored.name]) for stored in self.tensors() if stored.name in read}

    @contextmanager
    def encoder_of_text(self, folder: Path, longest: int) -> Iterator[Callable[[str], list[int]]]:
        """llama.cpp's tokenizer."""
        with LlamaCpp(folder, longest=longest) as runtime:
            yield runtime.encode

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[LlamaCpp]:
        """llama.cpp, whose low-bit kernels always quantize activations, on a larger file of the same values as F32, which is there for so long."""
        as_floats = folder / f".float-{FILE}"
        try:
            self._write(as_floats, values_of=folder)
            with LlamaCpp(as_floats, exact_cache=True, longest=longest) as runtime:
                yield runtime
        finally:
            as_floats.unlink(missing_ok=True)

    def as_shipped(self, folder: Path, longest: int) -> LlamaCpp:
        """llama.cpp on the file."""
        return LlamaCpp(folder, longest=longest)

    def foretold_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """As `tensor_bytes`."""
        return tensor_bytes(self.config, self.packed.coverage, float_shapes, self.fastest)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of the file, or of all parts, of the tensors, and of what is in front of them."""
        files = files_of(folder)
        size, start = sum(file.stat().st_size for file in files), sum(int(gguf_package().GGUFReader(file).data_offset) for file in files)
        return {"file": size, "tensors": size - start, "tokenizer_and_settings": start}

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

    def data(self, stored: _Stored) -> np.ndarray:
        """What the file holds of one tensor: bytes [rows, bytes], or fp32 where its type is F32."""
        ours = stored.ours
        if ours in self.family.extra:
            return self.family.extra[ours].float().numpy()
        if ours not in self.placed:
            matrix = self.packed.floating(ours).float()
            matrix = (matrix.T if self._is_transposed(ours) else matrix) * self.factors.get(ours, 1.0)
            return np.ascontiguousarray(self._reordered(ours, matrix.numpy()))
        codes = self.packed.codes(ours)
        rows = rows_of(codes.codes, codes.scale, codes.zero_point, codes.quantizer)
        if stored.type == "F32":
            return np.ascontiguousarray(self._reordered(ours, value(rows)))
        with np.errstate(over="ignore"):
            if not np.isfinite(rows.unit.astype(np.float16)).all():
                raise ConfigError(f"the gguf target: a scale of {ours} is {rows.unit.max():.3g}, more than fp16 holds. Train with quant.scale_dtype portable.")
        return self._reordered(ours, pack(rows, stored.type))

    def _read(self, stored: _Stored, read: Callable[[], np.ndarray]) -> Tensor:
        """What ggml reads, as transformers has it."""
        ours = stored.ours
        matrix = self._reordered(ours, read(), back=True)
        if ours in self.placed:
            return as_tensor(matrix, self.packed.quantized[ours])
        tensor = torch.from_numpy(matrix)
        return tensor.T if self._is_transposed(ours) else tensor

    def _write(self, path: Path, part_bytes: int | None = None, values_of: Path | None = None) -> None:
        """Write a file, tensor by tensor, or parts of up to `part_bytes` of tensors; of the values that ggml reads out of a folder's, as F32, with `values_of`."""
        gguf = gguf_package()
        wants = self.family
        stored = list(self.tensors())
        types = [s.type for s in stored if s.type != "F32"]
        common = max(set(types), key=types.count) if types and values_of is None else "F32"
        if values_of is not None:
            stored = [_Stored(s.name, s.ours, "F32", s.shape) for s in stored]
        sizes = [num_bytes(tensor.type, tensor.shape) for tensor in stored]
        is_split = part_bytes is not None and sum(sizes) > part_bytes  # it warns where it is told to, and need not
        writer = gguf.GGUFWriter(path, wants.arch, split_max_size=part_bytes if is_split else 0)
        writer.add_block_count(wants.num_layers)
        for key, found in wants.settings.items():
            add = writer.add_float32 if isinstance(found, float) else writer.add_uint32
            add(f"{wants.arch}.{key}", found)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_FILE_TYPES[common])
        tokenizer_fields(self.packed.folder, self.config, writer)
        for tensor, size in zip(stored, sizes, strict=True):
            raw = None if tensor.type == "F32" else gguf.GGMLQuantizationType[tensor.type]
            if raw is None:
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size)
            else:
                writer.add_tensor_info(tensor.name, (*tensor.shape[:-1], size // tensor.shape[0]), np.dtype(np.uint8), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        values = read_values(values_of) if values_of is not None else {}
        for tensor in stored:
            writer.write_tensor_data(values[tensor.name]() if values_of is not None else self.data(tensor))
        writer.close()

    def _is_transposed(self, name: str) -> bool:
        module, _, key = name.rpartition(".")
        return key == "weight" and module.endswith(self.family.transposed) if self.family.transposed else False

    def _reordered(self, name: str, matrix: np.ndarray, back: bool = False) -> np.ndarray:
        heads = next((heads for end, heads in self.family.interleaved.items() if name.rpartition(".")[0].endswith(end)), None)
        if heads is None:
            return matrix
        order = _interleave(len(matrix), heads)
        return matrix[np.argsort(order) if back else order]


_FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "TQ1_0": 36, "TQ2_0": 37}
"""llama_ftype of llama.h: what a person is shown, and no more."""


def read_values(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that give each tensor of a folder's file or parts in fp32, by ggml's own dequantizer. Raises CheckpointError for a file that cannot be read."""
    gguf = gguf_package()

    def opened(path: Path) -> Any:
        try:
            return gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path}: is no GGUF file that can be read ({error}). Export it again.") from None

    def read(tensor: Any) -> np.ndarray:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)  # a copy: the file is mapped read-only

    return {tensor.name: functools.partial(read, tensor) for path in files_of(folder) for tensor in opened(path).tensors}
