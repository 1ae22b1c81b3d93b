"""ONNX Runtime on the files of the onnx target: what it reads out of them, logits, and text."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqtrain.artifact.description import check_list
from dqtrain.artifact.graphs.family import CAUSAL, DECODER, ENCODER
from dqtrain.artifact.graphs.graph import CONTRIB, in_model, onnx_package
from dqtrain.artifact.graphs.runner import GraphRunner
from dqtrain.artifact.target import extra
from dqtrain.errors import CheckpointError

DESCRIPTION = "onnx.json"
"""What lists the other files (`description.write_list`)."""


def require_runtime() -> Any:
    """The `onnxruntime` package, which is an extra. Raises ConfigError without it."""
    return extra("onnxruntime", "running an ONNX graph")


def _session(folder: Path, graph: Path | Any) -> Any:
    """A graph, of a file or a ModelProto, with the weights of a folder. Raises CheckpointError for what does not load."""
    runtime = require_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # what it complains of is in the exception
    if not isinstance(graph, Path):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return runtime.InferenceSession(str(graph) if isinstance(graph, Path) else graph.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # each kind is a class of its own
        name = graph.name if isinstance(graph, Path) else "a graph"
        raise CheckpointError(f"{folder}: onnxruntime {runtime.__version__} does not load {name} ({str(error)[:300]}). Export it again.") from None


# Its dequantizer


def read_values(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that give each stored tensor of the graphs in fp32, as ONNX Runtime dequantizes it: matrices are [outputs, inputs], the last block whole.

    What is known of a weight is what the graph's own nodes say. Raises CheckpointError for graphs that cannot be read.
    """
    found: dict[str, Callable[[], np.ndarray]] = {}
    for path in sorted(folder.glob("*.onnx")):
        graph = _load(path).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        for name, tensor in stored.items():
            if tensor.data_location == onnx_package().TensorProto.EXTERNAL and tensor.data_type == onnx_package().TensorProto.FLOAT:
                found.setdefault(name, functools.partial(onnx_package().numpy_helper.to_array, tensor, str(folder)))
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                codes = node.input[1] if node.op_type == "MatMulNBits" else node.input[0]
                codes = makers[codes].input[0] if codes in makers else codes  # behind a Reshape where both read it
                found[codes] = functools.partial(_dequantized, folder, node, stored[codes], stored, makers)
    return found


def _load(path: Path) -> Any:
    onnx = onnx_package()
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf's making
        raise CheckpointError(f"{path}: is no graph that can be read ({error}). Export it again.") from None


def _dequantized(folder: Path, node: Any, codes: Any, stored: Mapping[str, Any], makers: Mapping[str, Any]) -> np.ndarray:
    """All rows of what a node reads, by GatherBlockQuantized with its attributes and with the same nodes in front of it."""
    helper = onnx_package().helper
    form = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    others = [name for name in node.input[2:4] if name]  # scales, and zero points
    nodes: list[Any] = []
    wanted = [codes.name, *others]
    for name in wanted:
        if name in makers and makers[name] not in nodes:
            nodes.insert(0, makers[name])
            wanted += [source for source in makers[name].input if source]
    read = ["rows", "numbers", *others]
    nodes.append(helper.make_node("Reshape", [codes.name, "form"], ["rows"]))
    settings = {"bits": form["bits"], "block_size": form["block_size"], "gather_axis": 0, "quantize_axis": 1}
    nodes.append(helper.make_node("GatherBlockQuantized", read, ["values"], domain=CONTRIB, **settings))
    kind = onnx_package().TensorProto
    constants = [onnx_package().numpy_helper.from_array(np.array([codes.dims[0], -1]), "form"), *(stored[name] for name in set(wanted) if name in stored)]
    numbers, values = helper.make_tensor_value_info("numbers", kind.INT64, ["rows"]), helper.make_tensor_value_info("values", kind.FLOAT, None)
    graph = helper.make_graph(nodes, "values", [numbers], [values], constants)
    return _session(folder, in_model(graph)).run(None, {"numbers": np.arange(codes.dims[0])})[0]


# Its logits


class OnnxSession:
    """A graph in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {found.name: found.shape for found in session.get_inputs()}
        self._names = [found.name for found in session.get_outputs()]
        self._value = require_runtime().OrtValue.ortvalue_from_numpy

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its outputs, OrtValues, which are not copied."""
        feeds = {name: self._value(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
        return dict(zip(self._names, self.session.run_with_ort_values(self._names, feeds), strict=True))

    def array(self, value: Any) -> np.ndarray:
        """One of them."""
        return value.numpy()


class OnnxRunner(GraphRunner):
    """The files of the onnx target in ONNX Runtime on this machine's CPU, as many threads as torch has.

    With an `accuracy_level` of 0 products are of fp32, where the files' own 4 lets the runtime quantize activations to 8 bits in blocks. Raises ConfigError
    without `onnxruntime`, CheckpointError for damaged files.
    """

    def __init__(self, folder: Path, accuracy_level: int | None = None) -> None:
        require_runtime()
        graphs = {name: self._graph(folder / name, accuracy_level) for name in check_list(folder / DESCRIPTION) if name.endswith(".onnx")}
        sessions = {name: OnnxSession(_session(folder, graph)) for name, graph in graphs.items()}
        super().__init__(folder, sessions[DECODER if DECODER in graphs else CAUSAL], sessions.get(ENCODER))

    @staticmethod
    def _graph(path: Path, accuracy_level: int | None) -> Any:
        if accuracy_level is None:
            return path
        model = _load(path)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = accuracy_level
        return model
