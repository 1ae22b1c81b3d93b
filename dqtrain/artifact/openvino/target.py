"""The codes of a packed artifact as graphs for OpenVINO, of the families that `graphs.family` has: constants of codes, injected, where other ways quantize floats anew.

model.xml, or encoder.xml and decoder.xml         nodes (`openvino.graph`), without weights
model.bin                                         digits of 2, 4 or 8 bits (`openvino.digits`), fp32 for what is not quantized; of all graphs
config, generation config, tokenizer              as transformers writes them
openvino.json                                     format version, sizes and hashes of the files above: the format itself has none (`description`)
parity.json                                       what `parity.verify_target` found before the files were published
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.gguf.blocks import as_tensor
from dqtrain.artifact.graphs.family import graphs
from dqtrain.artifact.graphs.graph import Weight, onnx_package
from dqtrain.artifact.graphs.target import GraphTarget, aligned, check_graphs, describe_graphs
from dqtrain.artifact.openvino.digits import DIGITS
from dqtrain.artifact.openvino.graph import WEIGHTS, IrGraph, openvino_package, write_ir
from dqtrain.artifact.openvino.runtime import DESCRIPTION, IN_FP32, OpenVinoRunner, read_values
from dqtrain.config import Export, Quant, Target
from dqtrain.quant.modules import Coverage


def check_openvino(quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
    """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
    found = check_graphs(DIGITS, config, coverage, asked)
    openvino_package()
    onnx_package()
    return found


def describe_openvino(quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
    """As `describe_graphs`."""
    return describe_graphs(DIGITS, config, coverage, float_shapes)


class OpenVinoTarget(GraphTarget):
    """A packed artifact as OpenVINO is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target = "openvino"
    program = "OpenVINO"
    digits, weights_file, description = DIGITS, WEIGHTS, DESCRIPTION

    def write_graphs(self, folder: Path, weights: Mapping[str, Weight]) -> None:
        """The intermediate representation."""
        made = graphs(self.config, lambda: IrGraph(self.stored, weights))
        write_ir({(folder / name).with_suffix(".xml"): graph for name, graph in made.items() if isinstance(graph, IrGraph)}, folder / WEIGHTS)

    def values(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Functions that give each parameter as OpenVINO computes it of its constants."""
        return {name: functools.partial(self._value, name, read) for name, read in read_values(folder).items()}

    def _value(self, name: str, read: Callable[[], np.ndarray]) -> Tensor:
        is_float = name not in self.placed or self.placed[name].fit.is_float
        return torch.from_numpy(read()) if is_float else as_tensor(read(), self.packed.quantized[name])

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[OpenVinoRunner]:
        """OpenVINO on the same files, told to quantize nothing."""
        yield OpenVinoRunner(folder, IN_FP32)

    @contextmanager
    def as_shipped(self, folder: Path, longest: int) -> Iterator[OpenVinoRunner]:
        """OpenVINO on the files, with activations of 8 bits."""
        yield OpenVinoRunner(folder)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of all files that hold the model, of what the graphs read of the student, and of the graphs with their own constants."""
        files = [folder / WEIGHTS, *folder.glob("*.xml")]
        layers = [layer for path in files[1:] for layer in ElementTree.parse(path).iterfind("layers/layer") if ":" in layer.attrib["name"]]
        sizes = {data.attrib["offset"]: int(data.attrib["size"]) for layer in layers for data in layer.iterfind("data")}
        file, tensors = sum(path.stat().st_size for path in files), sum(map(aligned, sizes.values()))
        return {"file": file, "tensors": tensors, "graphs": file - tensors}
