"""What targets share whose models are dqtrain's own graphs (`graphs.family`): digits that hold each weight, files of tensors that all graphs read, what lies beside them, who runs them."""

import functools
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.description import write_list
from dqtrain.artifact.format import PackedTensors
from dqtrain.artifact.gguf.blocks import Rows, as_tensor, rows_of
from dqtrain.artifact.graphs.family import check_family
from dqtrain.artifact.graphs.graph import Stored, Weight
from dqtrain.artifact.graphs.runner import GraphRunner
from dqtrain.artifact.target import names_of, notes_of
from dqtrain.config import Export, Quant, Target
from dqtrain.data.prepare import tokenizer_files
from dqtrain.errors import ConfigError
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import Coverage, CoverageRow, is_learned_scale
from dqtrain.tensor_file import in_parts

ALIGNMENT = 64
"""Bytes: a line of a cache."""

Part = tuple[Any, tuple[int, ...]]
"""Type, in the words of the format, and shape of a tensor."""


class Digits(NamedTuple):
    """How a target holds codes."""

    target: Target
    fit: Callable[[WeightQuantizer, int], Any]  # grid, inputs of a row -> what holds it: `type`, `why` it is no better one, whether it `is_float`
    parts: Callable[[WeightQuantizer, Any, tuple[int, int], bool], dict[str, Part]]  # and [outputs, inputs], whether it is a table -> end of the name -> part
    pack: Callable[[Rows, WeightQuantizer, Any], dict[str, np.ndarray]]  # the arrays of these parts
    num_bytes: Callable[[Any, tuple[int, ...]], int]  # of a part
    floating: Any  # its type of fp32


class Placement(NamedTuple):
    """One quantized weight, and what holds it."""

    row: CoverageRow
    shape: tuple[int, int]  # [outputs, inputs]
    fit: Any  # as `Digits.fit` gives it
    parts: dict[str, Part]


def placements(digits: Digits, config: PretrainedConfig, coverage: Coverage) -> list[Placement]:
    """What holds each quantized weight, from names and shapes alone. Raises ConfigError for a model that the graphs do not compute."""
    check_family(config, digits.target)
    found = []
    for row in coverage.rows:
        if row.quantizer is not None:
            rows, columns = row.shape if row.quantizer.row_axis == 0 else row.shape[::-1]
            fit = digits.fit(row.quantizer, columns)
            found.append(Placement(row, (rows, columns), fit, digits.parts(row.quantizer, fit, (rows, columns), row.kind != "linears")))
    return found


def _refusal(target: Target, found: list[Placement]) -> str | None:
    refused = [place for place in found if place.fit.is_float]
    if not refused:
        return None
    return (
        f"{target} cannot hold {names_of([place.row.name for place in refused])}: {refused[0].fit.why}. "
        "Or allow it: --allow-inexact, or export.allow_inexact: true, stores them as F32, which is exact but large."
    )


def _notes(target: Target, found: list[Placement]) -> list[str]:
    return [f"{target}: {line}" for line in notes_of((place.fit.type, place.fit.why, place.row.name) for place in found)]


def _tensor_bytes(digits: Digits, found: list[Placement], float_shapes: Sequence[tuple[int, ...]]) -> int:
    parts = [part for place in found for part in place.parts.values()] + [(digits.floating, shape) for shape in float_shapes]
    return sum(aligned(digits.num_bytes(dtype, shape)) for dtype, shape in parts)


def aligned(num_bytes: int) -> int:
    """Bytes of a tensor in the file."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class GraphTarget(ABC):
    """A packed artifact as graphs and files of tensors (most of a `target.RuntimeTarget`), written one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target
    digits: Digits
    packages: Sequence[Callable[[], Any]]  # of which each raises ConfigError where it is not installed
    weights_file: str
    has_parts = True  # whether what is over 5 GB may be in several files
    description: str  # what lists the other files
    has_kernels = True
    runner: Callable[..., GraphRunner]  # of a folder
    float_settings: Mapping[str, Any]  # with which it quantizes nothing
    read_values: Callable[[Path], Mapping[str, Callable[[], np.ndarray]]]  # folder -> what gives each matrix [outputs, inputs], perhaps filled up
    tolerance = 1e-5  # what another order of sums makes of fp32: 1e-6 is measured
    factors: Mapping[str, float] = {}
    rounded: Collection[str] = ()  # scales are fp32, or fp16 where that holds them

    @classmethod
    def check(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
        """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
        found = placements(cls.digits, config, coverage)
        refused = _refusal(cls.name, found)
        if refused is not None and not asked.allow_inexact:
            raise ConfigError(refused)
        for package in cls.packages:
            package()
        return _notes(cls.name, found)

    @classmethod
    def describe(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
        """What the files of a student would hold, before there are any: digits and bytes, reasons, and what they cannot hold. Raises ConfigError as `placements`."""
        found = placements(cls.digits, config, coverage)
        counts = Counter(place.fit.type for place in found)
        types = ", ".join(f"{type} for {count}" for type, count in counts.most_common())
        refused = _refusal(cls.name, found)
        return [
            f"{cls.name}: {_tensor_bytes(cls.digits, found, float_shapes):,} bytes of tensors; {types} of {len(found)} quantized weights",
            *_notes(cls.name, found),
            *([refused] if refused else []),
        ]

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, asked: Export) -> None:
        self.packed, self.config = packed, config
        self.placed = {place.row.name: place for place in placements(self.digits, config, packed.coverage)}
        listed = {f"{name}{end}": part for name, place in self.placed.items() for end, part in place.parts.items()}
        listed |= {name: (self.digits.floating, packed.shape(name)) for name in packed.floats if not is_learned_scale(name)}
        sizes = {name: self.digits.num_bytes(dtype, shape) for name, (dtype, shape) in listed.items()}
        files = in_parts(self.weights_file, {name: aligned(size) for name, size in sizes.items()}) if self.has_parts else {self.weights_file: list(sizes)}
        self.stored: dict[str, Stored] = {}
        for file, names in files.items():
            end = 0
            for name in names:
                self.stored[name] = Stored(*listed[name], file, end, sizes[name])
                end += aligned(sizes[name])

    @property
    def types(self) -> dict[str, str]:
        """Types of digits."""
        return {name: place.fit.type for name, place in self.placed.items()}

    @property
    def files(self) -> list[str]:
        """Names of the files of tensors."""
        return list(dict.fromkeys(stored.file for stored in self.stored.values()))

    def encoder_of_text(self, folder: Path, longest: int) -> None:
        """None: its tokenizer is that of transformers."""
        return None

    def write(self, folder: Path) -> None:
        """Write the files into a folder, but parity.json. Raises OSError."""
        with ExitStack() as opened:
            files = {name: opened.enter_context((folder / name).open("wb")) for name in self.files}
            for name, array in self._arrays():
                stored = self.stored[name]
                assert files[stored.file].tell() == stored.offset and array.nbytes == stored.num_bytes, name
                files[stored.file].write(np.ascontiguousarray(array).data)
                files[stored.file].write(bytes(aligned(array.nbytes) - array.nbytes))
        self.write_graphs(folder, {name: Weight(place.shape, place.fit) for name, place in self.placed.items()})
        self.config.save_pretrained(folder)
        for path in [*tokenizer_files(self.packed.folder), self.packed.folder / "generation_config.json"]:
            if path.is_file():
                shutil.copy(path, folder)
        write_list(folder / self.description)

    @abstractmethod
    def write_graphs(self, folder: Path, weights: Mapping[str, Weight]) -> None:
        """Write the graphs beside the files of tensors. Raises OSError."""

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What is stored, in its order, one weight in memory at a time."""
        for name, place in self.placed.items():
            codes = self.packed.codes(name)
            if place.fit.is_float:
                yield name, codes.value().numpy()
                continue
            rows = rows_of(codes.codes, codes.scale, codes.zero_point, codes.quantizer)
            for end, array in self.digits.pack(rows, codes.quantizer, place.fit).items():
                yield f"{name}{end}", array
        for name in self.packed.floats:
            if not is_learned_scale(name):
                yield name, self.packed.floating(name).float().numpy()

    def values(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Functions that give each parameter as the program dequantizes it."""
        read = self.read_values(folder)
        return {name: functools.partial(self._value, name, read[name]) for name in (*self.placed, *self.packed.floats) if name in read}

    def _value(self, name: str, read: Callable[[], np.ndarray]) -> Tensor:
        place = self.placed.get(name)
        if place is None or place.fit.is_float:
            return torch.from_numpy(np.array(read()))  # a copy: the program's memory may be read-only
        return as_tensor(read()[:, : place.shape[1]], self.packed.quantized[name])

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[GraphRunner]:
        """The program on the same files, told to quantize nothing."""
        yield self.runner(folder, **self.float_settings)

    @contextmanager
    def as_shipped(self, folder: Path, longest: int) -> Iterator[GraphRunner]:
        """The program on the files, with activations of 8 bits."""
        yield self.runner(folder)

    def foretold_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """Bytes of what is stored of the student: from shapes alone."""
        return _tensor_bytes(self.digits, list(self.placed.values()), float_shapes)
