"""The codes of a packed artifact as graphs for ONNX Runtime: GPT-2, OPT, Llama, Mistral, Qwen 2 and 3, BART, mBART, T5.

    model.onnx, or encoder.onnx and decoder.onnx      nodes (`onnx_family`), without weights
    model.onnx.data                                   blocks of 2, 4 or 8 bits (`onnx_blocks`), fp32 for what is not quantized; of all graphs
    config, generation config, tokenizer              as transformers writes them
    onnx.json                                         format version, sizes and hashes of the files above: ONNX itself has none (`description`)
    parity.json                                       what `parity.verify_target` found before the files were published

Floats are never quantized here: digits and scales are those that training used.
"""

import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.description import write_list
from dqtrain.artifact.format import PackedTensors
from dqtrain.artifact.ggml_blocks import as_tensor, rows_of
from dqtrain.artifact.onnx_blocks import Fit, fit, pack, parts
from dqtrain.artifact.onnx_family import check_family, graphs
from dqtrain.artifact.onnx_graph import WEIGHTS, Graph, Stored, Weight, onnx_package
from dqtrain.artifact.onnx_runtime import DESCRIPTION, OnnxRunner, read_values, require_runtime
from dqtrain.artifact.target import names_of, notes_of
from dqtrain.config import Export, Quant, Target
from dqtrain.data.prepare import tokenizer_files
from dqtrain.errors import ConfigError
from dqtrain.quant.modules import Coverage, CoverageRow, is_learned_scale

ALIGNMENT = 64
"""Bytes: a line of a cache."""


class Placement(NamedTuple):
    """One quantized weight, and what holds it."""

    row: CoverageRow
    shape: tuple[int, int]  # [outputs, inputs]
    fit: Fit

    @property
    def parts(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """As `onnx_blocks.parts`."""
        assert self.row.quantizer is not None
        return parts(self.row.quantizer, self.fit, self.shape, is_table=self.row.kind != "linears")


def placements(config: PretrainedConfig, coverage: Coverage) -> list[Placement]:
    """What holds each quantized weight, from names and shapes alone. Raises ConfigError for a model that the graphs do not compute."""
    check_family(config)
    found = []
    for row in coverage.rows:
        if row.quantizer is not None:
            rows, columns = row.shape if row.quantizer.row_axis == 0 else row.shape[::-1]
            found.append(Placement(row, (rows, columns), fit(row.quantizer, columns)))
    return found


def refusal(found: list[Placement]) -> str | None:
    """Which weights no blocks hold, and why; None where there are none."""
    refused = [place for place in found if place.fit.is_float]
    if not refused:
        return None
    return (
        f"onnx cannot hold {names_of([place.row.name for place in refused])}: {refused[0].fit.why}. "
        "Or allow it: --allow-inexact, or export.allow_inexact: true, stores them as F32, which is exact but large."
    )


def notes(found: list[Placement]) -> list[str]:
    """One line for each reason why a weight has not the smallest digits or the fastest blocks."""
    return notes_of((place.fit.type, place.fit.why, place.row.name) for place in found)


def check_onnx(quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
    """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
    found = placements(config, coverage)
    onnx_package()
    require_runtime()
    refused = refusal(found)
    if refused is not None and not asked.allow_inexact:
        raise ConfigError(refused)
    return [f"onnx: {line}" for line in notes(found)]


def describe_onnx(quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
    """What the files of a student would hold, before there are any: digits and bytes, reasons, and what they cannot hold. Raises ConfigError as `placements`."""
    found = placements(config, coverage)
    counts = Counter(place.fit.type for place in found)
    types = ", ".join(f"{type} for {count}" for type, count in counts.most_common())
    refused = refusal(found)
    return [
        f"onnx: {tensor_bytes(found, float_shapes):,} bytes of tensors; {types} of {len(found)} quantized weights",
        *(f"onnx: {line}" for line in notes(found)),
        *([refused] if refused else []),
    ]


def tensor_bytes(found: list[Placement], float_shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the file of weights: from shapes alone. `float_shapes`: those of all that is not quantized."""
    sizes = [_size(dtype, shape) for place in found for dtype, shape in place.parts.values()] + [_size(np.float32, shape) for shape in float_shapes]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _size(dtype: Any, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class OnnxTarget:
    """A packed artifact as ONNX Runtime is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target = "onnx"
    program = "ONNX Runtime"
    tolerance = 1e-5  # what another order of sums makes of fp32: 1e-6 is measured

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, asked: Export) -> None:
        self.packed, self.config = packed, config
        self.placed = {place.row.name: place for place in placements(config, packed.coverage)}
        listed = {f"{name}{end}": part for name, place in self.placed.items() for end, part in place.parts.items()}
        listed |= {name: (np.float32, packed.shape(name)) for name in packed.floats if not is_learned_scale(name)}
        self.stored: dict[str, Stored] = {}
        end = 0
        for name, (dtype, shape) in listed.items():
            self.stored[name] = Stored(dtype, shape, end, _size(dtype, shape))
            end += -(-self.stored[name].num_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def types(self) -> dict[str, str]:
        """Bits of digits."""
        return {name: place.fit.type for name, place in self.placed.items()}

    def rounds_scales(self, name: str) -> bool:
        """Never: scales are fp32, or fp16 where that holds them."""
        return False

    def factor(self, name: str) -> float:
        """1."""
        return 1.0

    def write(self, folder: Path) -> None:
        """Write the files into a folder, but parity.json. Raises OSError."""
        weights = {name: Weight(place.shape, place.fit) for name, place in self.placed.items()}
        with (folder / WEIGHTS).open("wb") as file:
            for name, array in self._arrays():
                assert file.tell() == self.stored[name].offset and array.nbytes == self.stored[name].num_bytes, name
                file.write(np.ascontiguousarray(array).data)
                file.write(bytes(-array.nbytes % ALIGNMENT))
        for name, graph in graphs(self.config, lambda: Graph(self.stored, weights)).items():
            (folder / name).write_bytes(graph.model().SerializeToString(deterministic=True))
        self.config.save_pretrained(folder)
        for path in [*tokenizer_files(self.packed.folder), self.packed.folder / "generation_config.json"]:
            if path.is_file():
                shutil.copy(path, folder)
        write_list(folder / DESCRIPTION)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, in its order, one weight in memory at a time."""
        for name, place in self.placed.items():
            codes = self.packed.codes(name)
            if place.fit.is_float:
                yield name, codes.value().numpy()
                continue
            rows = rows_of(codes.codes, codes.scale, codes.zero_point, codes.quantizer)
            for end, array in pack(rows, codes.quantizer, place.fit).items():
                yield f"{name}{end}", array
        for name in self.packed.floats:
            if not is_learned_scale(name):
                yield name, self.packed.floating(name).float().numpy()

    def values(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Functions that give each parameter as ONNX Runtime dequantizes it."""
        read = read_values(folder)
        return {name: functools.partial(self._read, name, read[name]) for name in (*self.placed, *self.packed.floats) if name in read}

    def _read(self, name: str, read: Callable[[], np.ndarray]) -> Tensor:
        place = self.placed.get(name)
        if place is None or place.fit.is_float:
            return torch.from_numpy(np.array(read()))  # a copy: protobuf's memory is read-only
        return as_tensor(read()[:, : place.shape[1]], self.packed.quantized[name])

    def encoder_of_text(self, folder: Path, longest: int) -> None:
        """None: its tokenizer is that of transformers."""

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[OnnxRunner]:
        """ONNX Runtime on the same files, told to multiply in fp32."""
        yield OnnxRunner(folder, accuracy_level=0)

    @contextmanager
    def as_shipped(self, folder: Path, longest: int) -> Iterator[OnnxRunner]:
        """ONNX Runtime on the files."""
        yield OnnxRunner(folder)

    def foretold_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """As `tensor_bytes`."""
        return tensor_bytes(list(self.placed.values()), float_shapes)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of all files that hold the model, of its tensors, and of the graphs."""
        tensors = (folder / WEIGHTS).stat().st_size
        nodes = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        return {"file": tensors + nodes, "tensors": tensors, "graphs": nodes}
