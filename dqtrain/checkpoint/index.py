"""What is where in a checkpoint."""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

FORMAT = 2


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:09d}"


def rank_file(rank: int) -> str:
    """The file with what a rank owned."""
    return f"rank-{rank:05d}.safetensors"


def complete_names(root: Path) -> list[str]:
    """Names of committed checkpoints, oldest first."""
    return sorted(path.name for path in root.glob("step-*")) if root.is_dir() else []


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint, by name."""
    found = {}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved, and `versions`."""
    return json.loads((folder / "state.json").read_text())


class Part(NamedTuple):
    """Elements of a parameter that are asked for and that a rank's file has."""

    rank: int
    offset: int  # in the rank's piece
    start: int  # in what is asked for
    numel: int


def _first_element(piece: Sequence[int]) -> int:
    return piece[1]


class Index:
    """Which rank's file holds which elements of which parameter, and how often the optimizer has stepped."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.optimizer_step_count: int = content["optimizer_step_count"]
        self.parameters: dict[str, dict[str, Any]] = content["parameters"]
        """name -> total (elements), shape, pieces: [rank, first element, elements] each, in the order of their elements."""

    @classmethod
    def join(cls, pieces: Iterable[Mapping[str, tuple[int, int, int, Sequence[int]]]], optimizer_step_count: int) -> "Index":
        """From what each rank owns, in the order of the ranks: name -> (first element, elements, elements of the parameter, its shape)."""
        parameters: dict[str, dict[str, Any]] = {}
        for rank, own in enumerate(pieces):
            for name, (start, numel, total, shape) in own.items():
                parameters.setdefault(name, {"total": total, "shape": list(shape), "pieces": []})["pieces"].append([rank, start, numel])
        for parameter in parameters.values():
            parameter["pieces"].sort(key=_first_element)
        return cls({"optimizer_step_count": optimizer_step_count, "parameters": parameters})

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """That of a checkpoint."""
        return cls(json.loads((folder / "index.json").read_text()))

    def parts(self, name: str, start: int, numel: int) -> Iterator[Part]:
        """Where elements start .. start + numel of a flattened parameter are; nothing for an unknown one."""
        pieces = self.parameters[name]["pieces"] if name in self.parameters else []
        before = bisect.bisect_right(pieces, start, key=_first_element) - 1
        for rank, first, length in itertools.islice(pieces, max(before, 0), None):
            if first >= start + numel:
                break
            low, high = max(first, start), min(first + length, start + numel)
            if low < high:
                yield Part(rank, low - first, low - start, high - low)

    def ranks(self, wanted: Iterable[tuple[str, int, int]]) -> set[int]:
        """Whose files hold any of the elements (name, start, numel)."""
        return {part.rank for interval in wanted for part in self.parts(*interval)}

    def holders(self) -> set[int]:
        """Whose files hold anything."""
        return {rank for parameter in self.parameters.values() for rank, _, _ in parameter["pieces"]}
