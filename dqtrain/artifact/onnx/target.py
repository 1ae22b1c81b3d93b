"""The codes of a packed artifact as graphs for ONNX Runtime: GPT-2, OPT, Llama, Mistral, Qwen 2 and 3, BART, mBART, T5.

    model.onnx, or encoder.onnx and decoder.onnx      nodes (`graphs.family`), without weights
    model.onnx.data                                   blocks of 2, 4 or 8 bits (`onnx.blocks`), fp32 for what is not quantized; of all graphs
    config, generation config, tokenizer              as transformers writes them
    onnx.json                                         format version, sizes and hashes of the files above: ONNX itself has none (`description`)
    parity.json                                       what `parity.verify_target` found before the files were published

Floats are never quantized here: digits and scales are those that training used.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.gguf.blocks import as_tensor
from dqtrain.artifact.graphs.family import graphs
from dqtrain.artifact.graphs.graph import WEIGHTS, Graph, Weight, onnx_package
from dqtrain.artifact.graphs.target import Digits, GraphTarget, check_graphs, describe_graphs
from dqtrain.artifact.onnx.blocks import fit, pack, parts
from dqtrain.artifact.onnx.runtime import DESCRIPTION, OnnxRunner, read_values, require_runtime
from dqtrain.config import Export, Quant, Target
from dqtrain.quant.modules import Coverage


def _num_bytes(dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


DIGITS = Digits("onnx", fit, parts, pack, _num_bytes, np.float32)
"""Blocks of ONNX Runtime's operators."""


def check_onnx(quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
    """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
    found = check_graphs(DIGITS, config, coverage, asked)
    onnx_package()
    require_runtime()
    return found


def describe_onnx(quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
    """As `describe_graphs`."""
    return describe_graphs(DIGITS, config, coverage, float_shapes)


class OnnxTarget(GraphTarget):
    """A packed artifact as ONNX Runtime is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target = "onnx"
    program = "ONNX Runtime"
    digits, weights_file, description = DIGITS, WEIGHTS, DESCRIPTION

    def write_graphs(self, folder: Path, weights: Mapping[str, Weight]) -> None:
        """Protobufs."""
        for name, graph in graphs(self.config, lambda: Graph(self.stored, weights)).items():
            (folder / name).write_bytes(graph.model().SerializeToString(deterministic=True))

    def values(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Functions that give each parameter as ONNX Runtime dequantizes it."""
        read = read_values(folder)
        return {name: functools.partial(self._read, name, read[name]) for name in (*self.placed, *self.packed.floats) if name in read}

    def _read(self, name: str, read: Callable[[], np.ndarray]) -> Tensor:
        place = self.placed.get(name)
        if place is None or place.fit.is_float:
            return torch.from_numpy(np.array(read()))  # a copy: protobuf's memory is read-only
        return as_tensor(read()[:, : place.shape[1]], self.packed.quantized[name])

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[OnnxRunner]:
        """ONNX Runtime on the same files, told to multiply in fp32."""
        yield OnnxRunner(folder, accuracy_level=0)

    @contextmanager
    def as_shipped(self, folder: Path, longest: int) -> Iterator[OnnxRunner]:
        """ONNX Runtime on the files."""
        yield OnnxRunner(folder)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of all files that hold the model, of its tensors, and of the graphs."""
        tensors = (folder / WEIGHTS).stat().st_size
        nodes = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        return {"file": tensors + nodes, "tensors": tensors, "graphs": nodes}
