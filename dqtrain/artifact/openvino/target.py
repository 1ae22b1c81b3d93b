"""The codes of a packed artifact as graphs for OpenVINO, of the families that `graphs.family` has: constants of codes, injected, where other ways quantize floats anew.

model.xml, or encoder.xml and decoder.xml         nodes (`openvino.graph`), without weights
model.bin                                         digits of 2, 4 or 8 bits (`openvino.digits`), fp32 for what is not quantized; of all graphs
config, generation config, tokenizer              as transformers writes them
openvino.json                                     format version, sizes and hashes of the files above: the format itself has none (`description`)
parity.json                                       what `parity.verify_target` found before the files were published
"""

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from dqtrain.artifact.graphs.family import graphs
from dqtrain.artifact.graphs.graph import Weight, onnx_package
from dqtrain.artifact.graphs.target import GraphTarget, aligned
from dqtrain.artifact.openvino.digits import DIGITS
from dqtrain.artifact.openvino.graph import WEIGHTS, IrGraph, openvino_package, write_ir
from dqtrain.artifact.openvino.runtime import DESCRIPTION, IN_FP32, OpenVinoRunner, read_values
from dqtrain.config import Target


class OpenVinoTarget(GraphTarget):
    """A packed artifact as OpenVINO is to have it (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError for a model that is not computed."""

    name: Target = "openvino"
    program = "OpenVINO"
    packages = openvino_package, onnx_package
    digits, weights_file, description = DIGITS, WEIGHTS, DESCRIPTION
    has_parts = False  # an intermediate representation reads one file of constants, of any size
    runner, float_settings = OpenVinoRunner, {"settings": IN_FP32}
    read_values = staticmethod(read_values)

    def write_graphs(self, folder: Path, weights: Mapping[str, Weight]) -> None:
        """The intermediate representation."""
        made = graphs(self.config, lambda: IrGraph(self.stored, weights))
        write_ir({(folder / name).with_suffix(".xml"): graph for name, graph in made.items()}, folder / WEIGHTS)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of all files that hold the model, of what the graphs read of the student, and of the graphs with their own constants."""
        files = [folder / WEIGHTS, *folder.glob("*.xml")]
        layers = [layer for path in files[1:] for layer in ElementTree.parse(path).iterfind("layers/layer") if ":" in layer.attrib["name"]]
        sizes = {data.attrib["offset"]: int(data.attrib["size"]) for layer in layers for data in layer.iterfind("data")}
        file, tensors = sum(path.stat().st_size for path in files), sum(map(aligned, sizes.values()))
        return {"file": file, "tensors": tensors, "graphs": file - tensors}
