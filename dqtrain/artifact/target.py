"""What a program that runs exported students must say and do, so that `parity.verify_target` can hold it to what was trained."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.format import PackedTensors
from dqtrain.config import Export, Quant, Target
from dqtrain.errors import ConfigError
from dqtrain.quant.modules import Coverage


class Runner(Protocol):
    """A program with a student loaded, one sequence at a time."""

    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None, one_by_one: bool = False) -> Tensor:
        """Logits behind each token of a decoder, fp32 [tokens, vocabulary], in one pass or token `one_by_one`; `source` is what the encoder reads first."""
        ...


class RuntimeTarget(Protocol):
    """A packed artifact as another program is to have it. Names and layouts of tensors are transformers' wherever no other is said."""

    @classmethod
    def check(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
        """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
        ...

    @classmethod
    def describe(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
        """What the files of a student would hold, before there is one, and what they cannot hold, one line each; `float_shapes`: those of all that is not quantized.

        Raises ConfigError for a model that the program cannot run.
        """
        ...

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, asked: Export) -> None: ...

    @property
    def name(self) -> Target:
        """As in `export.targets`."""
        ...

    @property
    def program(self) -> str:
        """What a person calls it."""
        ...

    @property
    def tolerance(self) -> float:
        """Largest difference of logits that its float arithmetic may make, relative to the largest logit."""
        ...

    @property
    def types(self) -> Mapping[str, str]:
        """What holds each quantized weight, in the program's words."""
        ...

    @property
    def has_kernels(self) -> bool:
        """Whether the program multiplies by codes, in kernels of its own for each width."""
        ...

    def write(self, folder: Path) -> None:
        """Write its files into an existing folder, tensor by tensor, of codes. Raises ConfigError for what it cannot hold, OSError."""
        ...

    def values(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Functions that give each parameter in fp32, by the program's own dequantizer. Raises CheckpointError for files that cannot be read."""
        ...

    @property
    def factors(self) -> Mapping[str, float]:
        """What float vectors are multiplied by in its files, by name; all others by 1."""
        ...

    @property
    def rounded(self) -> Collection[str]:
        """Weights whose fp32 scales are rounded there, as was allowed."""
        ...

    def encoder_of_text(self, folder: Path, longest: int) -> AbstractContextManager[Callable[[str], list[int]]] | None:
        """The program's own tokenizer, without the tokens that are put around a text; None where it is the one of transformers."""
        ...

    def with_float_activations(self, folder: Path, longest: int) -> AbstractContextManager[Runner]:
        """The program on the values that are read back out of the files, in fp32, nothing quantized on the way; sequences of up to `longest` tokens."""
        ...

    def as_shipped(self, folder: Path, longest: int) -> AbstractContextManager[Runner]:
        """The program on the files as they are; where it has an environment of its own, the nearest thing, which `program` names."""
        ...

    def foretold_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """Bytes of its tensors from shapes alone; `float_shapes`: those of all that is not quantized."""
        ...

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of its files: `file`, all that holds the model, and of that `tensors`, and the rest under a name that says what it is."""
        ...


def extra(module: str, use: str, name: str = "runtimes") -> Any:
    """A package of the extra `name`, with this module of it imported. Raises ConfigError, which names its `use`, without it."""
    try:
        return __import__(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        alone = "" if name == "runtimes" else ", best in an environment of its own,"
        raise ConfigError(
            f"{use} needs the Python package {package}, which is not installed here. Install it{alone} with: pip install 'dqtrain[{name}]'"
        ) from None


def names_of(names: Sequence[str]) -> str:
    """Three of them, and how many more there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def notes_of(placed: Iterable[tuple[str, str | None, str]]) -> list[str]:
    """(type, why it is not the smallest or fastest one, or nothing; name) of weights -> a line for each type and reason."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for type, why, name in placed:
        if why:
            by_reason.setdefault((type, why), []).append(name)
    return [f"{type} for {names_of(names)}: {why}" for (type, why), names in by_reason.items()]
