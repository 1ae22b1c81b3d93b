"""Graphs of ONNX, node by node, over weights that lie in files beside them.

A graph names the weights that it reads by transformers' names. What blocks hold is multiplied by `MatMulNBits` and looked up by `GatherBlockQuantized`; the same
stored tensors serve both, through a Reshape where a head is tied. Scales are stored as they were trained, one for a row or for a whole matrix, and
spread over the blocks by nodes on constants, which ONNX Runtime computes once, when it loads the file.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dqtrain.artifact.target import extra

WEIGHTS = "model.onnx.data"
"""The file that the graphs of a model share, or what its parts are named after: protobufs end at 2 GB, encoder and decoder share a table, and a file that is mapped is not copied."""

OPSET, CONTRIB, IR_VERSION = 23, "com.microsoft", 11
"""Attention and RotaryEmbedding are of opset 23; operators on blocks are ONNX Runtime's own."""


@functools.cache
def onnx_package() -> Any:
    """The `onnx` package, which is an extra and makes the graphs of all targets that have some. Raises ConfigError without it."""
    return extra("onnx", "making graphs, for the targets onnx and openvino,")


class Stored(NamedTuple):
    """A tensor in a file of weights."""

    dtype: Any  # of numpy for ONNX, the name of its type for OpenVINO
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int


class Weight(NamedTuple):
    """A quantized weight and what holds it: blocks, digits, or floats where these hold it not."""

    shape: tuple[int, int]  # [outputs, inputs]
    fit: Any  # as its target's `graphs.target.Digits.fit` gives it


class Graph:
    """A graph that grows. Values are names; nodes are called after the value that they give."""

    FLOAT, BOOL = 1, 9  # of TensorProto.DataType

    def __init__(self, stored: Mapping[str, Stored], weights: Mapping[str, Weight]) -> None:
        self.stored, self.weights = stored, weights
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._spread: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; its name."""
        return self.ops(kind, *inputs, names=[name or f"{kind}_{len(self._nodes)}"], domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with outputs of these names."""
        node = onnx_package().helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes)
        self._nodes.append(node)
        return list(names)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant in the graph itself."""
        array = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex() if array.nbytes <= 64 else len(self._initializers)}"
        self._initializers.setdefault(name, onnx_package().numpy_helper.from_array(array, name))
        return name

    def input(self, name: str, shape: Iterable[int | str], dtype: Any = np.float32) -> str:
        """An input."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, shape: Iterable[int | str]) -> None:
        """Make a value of fp32 an output."""
        self._outputs.append(_value(name, np.float32, shape))

    def size(self, value: str, axis: int) -> str:
        """Size of a value along an axis, int64 without dimensions."""
        return self.op("Squeeze", self.op("Shape", value, start=axis, end=axis + 1))

    def has(self, name: str) -> bool:
        """Whether such a tensor is stored."""
        return name in self.stored

    def vector(self, name: str) -> str:
        """A stored tensor, as it is."""
        if name not in self._initializers:
            onnx, tensor = onnx_package(), self.stored[name]
            proto = onnx.TensorProto(name=name, dims=tensor.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in {"location": tensor.file, "offset": tensor.offset, "length": tensor.num_bytes}.items():
                proto.external_data.add(key=key, value=str(value))
            self._initializers[name] = proto
        return name

    def linear(self, x: str, module: str, weight: str | None = None, is_transposed: bool = False, name: str | None = None) -> str:
        """x [..., inputs] -> [..., outputs] of a module, its bias added; with the `weight` of that name, if another. `is_transposed`: a float one is [inputs, outputs]."""
        weight = weight or f"{module}.weight"
        bias = f"{module}.bias" if self.has(f"{module}.bias") else None
        place = self.weights.get(weight)
        if place is not None and not place.fit.is_float:
            return self._matmul_of_blocks(x, weight, place, bias, name)
        whole = name if bias is None else None
        if is_transposed:
            product = self.op("MatMul", x, self.vector(weight), name=whole)
        else:
            product = self.op("FusedMatMul", x, self.vector(weight), name=whole, domain=CONTRIB, transB=1)
        return product if bias is None else self.op("Add", product, self.vector(bias), name=name)

    def _matmul_of_blocks(self, x: str, weight: str, place: Weight, bias: str | None, name: str | None) -> str:
        (rows, columns), fit = place
        codes = self.vector(weight)
        if len(self.stored[weight].shape) == 2:  # a table
            blocks = fit.num_blocks(columns)
            codes = self.op("Reshape", codes, self.constant([rows, blocks, fit.row_bytes(columns) // blocks]))
        inputs = [x, codes, self._scales(weight, place), self._zero_points(weight), "", self.vector(bias) if bias else ""]
        while not inputs[-1]:
            inputs.pop()
        form: dict[str, Any] = {"K": columns, "N": rows, "bits": fit.bits, "block_size": fit.block}
        return self.op("MatMulNBits", *inputs, name=name, domain=CONTRIB, accuracy_level=4, **form)

    def rows(self, ids: str, weight: str) -> str:
        """Rows of a table by their numbers: ids [...] -> [..., columns]."""
        place = self.weights.get(weight)
        if place is None or place.fit.is_float:
            return self.op("Gather", self.vector(weight), ids)
        (_, columns), fit = place
        inputs = [self.vector(weight), ids, self._scales(weight, place), self._zero_points(weight)]
        form: dict[str, Any] = {"bits": fit.bits, "block_size": fit.block, "gather_axis": 0, "quantize_axis": 1}
        found = self.op("GatherBlockQuantized", *inputs[: 4 if inputs[3] else 3], domain=CONTRIB, **form)
        if columns % fit.block == 0:
            return found
        return self.op("Slice", found, self.constant([0]), self.constant([columns]), self.constant([-1]))

    def _scales(self, weight: str, place: Weight) -> str:
        """Scales of a weight's blocks, fp32 [rows, blocks]."""
        if weight not in self._spread:
            (rows, columns), fit = place
            stored = self.stored[f"{weight}.scale"]
            blocks, groups = fit.num_blocks(columns), stored.shape[1]
            scale = self.vector(f"{weight}.scale")
            if stored.dtype != np.float32:
                scale = self.op("Cast", scale, to=self.FLOAT)
            scale = self.op("Expand", scale, self.constant([rows, groups, blocks // groups]))
            self._spread[weight] = self.op("Reshape", scale, self.constant([rows, blocks]))
        return self._spread[weight]

    def _zero_points(self, weight: str) -> str:
        return self.vector(f"{weight}.zero_point") if self.has(f"{weight}.zero_point") else ""

    def model(self) -> Any:
        """The ModelProto."""
        graph = onnx_package().helper.make_graph(self._nodes, "dqtrain", self._inputs, self._outputs, list(self._initializers.values()))
        return in_model(graph)


def in_model(graph: Any) -> Any:
    """A GraphProto as a ModelProto of the versions that dqtrain writes."""
    helper = onnx_package().helper
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dqtrain")


def _value(name: str, dtype: Any, shape: Iterable[int | str]) -> Any:
    helper = onnx_package().helper
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
