"""The codes of a packed artifact as graphs for ONNX Runtime: GPT-2, OPT, Llama, Mistral, Qwen 2 and 3, BART, mBART, T5.

    model.onnx, or encoder.onnx and decoder.onnx      nodes (`graphs.family`), without weights
    model.onnx.data                                   blocks of 2, 4 or 8 bits (`onnx.blocks`), fp32 for what is not quantized; of all graphs; over 5 GB in parts
                                                      (model-00001-of-00002.onnx.data, ...), and each tensor of a graph says its part
    config, generation config, tokenizer              as transformers writes them
    onnx.json                                         format version, sizes and hashes of the files above: ONNX itself has none (`description`)
    parity.json                                       what `parity.verify_target` found before the files were published

Floats are never quantized here: digits and scales are those that training used.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dqtrain.artifact.graphs.family import graphs
from dqtrain.artifact.graphs.graph import WEIGHTS, Graph, Weight, onnx_package
from dqtrain.artifact.graphs.target import Digits, GraphTarget
from dqtrain.artifact.onnx.blocks import fit, pack, parts
from dqtrain.artifact.onnx.runtime import DESCRIPTION, OnnxRunner, read_values, require_runtime
from dqtrain.config import Target


def _num_bytes(dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


DIGITS = Digits("onnx", fit, parts, pack, _num_bytes, np.float32)
"""Blocks of ONNX Runtime's operators."""


class OnnxTarget(GraphTarget):
    """A packed artifact as ONNX Runtime is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target = "onnx"
    program = "ONNX Runtime"
    packages = onnx_package, require_runtime
    digits, weights_file, description = DIGITS, WEIGHTS, DESCRIPTION
    runner, float_settings = OnnxRunner, {"accuracy_level": 0}
    read_values = staticmethod(read_values)

    def write_graphs(self, folder: Path, weights: Mapping[str, Weight]) -> None:
        """Protobufs."""
        for name, graph in graphs(self.config, lambda: Graph(self.stored, weights)).items():
            (folder / name).write_bytes(graph.model().SerializeToString(deterministic=True))

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of all files that hold the model, of its tensors, and of the graphs."""
        tensors = sum((folder / name).stat().st_size for name in self.files)
        nodes = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        return {"file": tensors + nodes, "tensors": tensors, "graphs": nodes}
