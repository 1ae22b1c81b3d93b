"""Graphs of OpenVINO's intermediate representation, made of those of ONNX: every weight is an input at first, and then a constant of codes.

A matrix is Constant (digits) -> Convert -> Subtract -> Multiply -> MatMul, in fp32, which OpenVINO's plugin for CPUs recognizes and multiplies as codes. A table that is a
head, too, has constants for each of the two, at the same place of the file: the plugin makes floats of a 2-bit table that is looked up, and would multiply by them.
All graphs of a model read one file of weights; behind what the target stores there are the small constants of the graphs themselves.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dqtrain.artifact.graphs.graph import Graph
from dqtrain.artifact.graphs.target import aligned
from dqtrain.artifact.target import extra

WEIGHTS = "model.bin"
"""The file that the graphs of a model share."""

VALUE = ".value"
"""Ends the name of what a weight's constants give, in fp32 [outputs, inputs]: USE/WEIGHT.value."""

_FLOAT = "float"
"""The use of what no digits hold."""


@functools.cache
def openvino_package() -> Any:
    """The `openvino` package, which is an extra. Raises ConfigError without it."""
    return extra("openvino", "the openvino target", "openvino")


class IrGraph(Graph):
    """A graph whose weights are inputs, called USE/WEIGHT."""

    def vector(self, name: str) -> str:
        """A stored tensor of floats."""
        return self._read(name, _FLOAT, self.stored[name].shape)

    def _read(self, weight: str, use: str, shape: Sequence[int]) -> str:
        name = f"{use}/{weight}"
        if name not in {given.name for given in self._inputs}:
            self.input(name, shape)
        return name

    def linear(self, x: str, module: str, weight: str | None = None, is_transposed: bool = False, name: str | None = None) -> str:
        """x [..., inputs] -> [..., outputs] of a module, its bias added; with the `weight` of that name, if another. `is_transposed`: a float one is [inputs, outputs]."""
        weight = weight or f"{module}.weight"
        bias = f"{module}.bias" if self.has(f"{module}.bias") else None
        matrix = self._matrix(weight, "linear")
        if self._is_in_digits(weight) or not is_transposed:
            matrix = self.op("Transpose", matrix, perm=[1, 0])
        product = self.op("MatMul", x, matrix, name=name if bias is None else None)
        return product if bias is None else self.op("Add", product, self.vector(bias), name=name)

    def rows(self, ids: str, weight: str) -> str:
        """Rows of a table by their numbers: ids [...] -> [..., columns]."""
        return self.op("Gather", self._matrix(weight, "rows"), ids)

    def _is_in_digits(self, weight: str) -> bool:
        return weight in self.weights and not self.weights[weight].fit.is_float

    def _matrix(self, weight: str, use: str) -> str:
        """A weight, [outputs, inputs] where it is in digits."""
        return self._read(weight, use, self.weights[weight].shape) if self._is_in_digits(weight) else self.vector(weight)

    def converted(self) -> Any:
        """OpenVINO's model, in which inputs called USE:TENSOR stand for what is stored."""
        model = openvino_package().Core().read_model(self.model().SerializeToString())
        for parameter in model.get_parameters():
            use, is_weight, weight = parameter.friendly_name.partition("/")
            if is_weight:
                value, inputs = self._value(use, weight)
                parameter.output(0).replace(value.output(0))
                model.remove_parameter(parameter)
                model.add_parameters(inputs)
        model.validate_nodes_and_infer_types()
        for number, node in enumerate(model.get_ordered_ops()):
            if node.get_type_name() not in ("Parameter", "Result") and not node.friendly_name.endswith(VALUE):
                node.friendly_name = f"{node.get_type_name()}_{number}"  # their own names count what a process made before
        return model

    def _value(self, use: str, weight: str) -> tuple[Any, list[Any]]:
        """A weight in fp32, of the inputs that are also given."""
        opset, element, inputs = openvino_package().opset15, openvino_package().Type, []

        def read(end: str) -> Any:
            tensor = self.stored[f"{weight}{end}"]
            inputs.append(opset.parameter(list(tensor.shape), getattr(element, tensor.dtype), name=f"{use}:{weight}{end}"))
            return inputs[-1] if tensor.dtype == "f32" else opset.convert(inputs[-1], element.f32)

        value = read("")
        if use == _FLOAT:
            return value, inputs
        if self.has(f"{weight}.zero_point"):
            value = opset.subtract(value, read(".zero_point"))
        value = opset.multiply(value, read(".scale"))
        shape = self.weights[weight].shape
        if len(self.stored[weight].shape) > 2:
            value = opset.reshape(value, opset.constant(list(shape), element.i64), False)
        value.friendly_name = f"{use}/{weight}{VALUE}"
        return value, inputs


def write_ir(graphs: Mapping[Path, IrGraph], weights: Path) -> None:
    """Write graphs as files that read their constants from `weights`, to which what it lacks is added. Raises OSError."""
    placed: dict[bytes, int] = {}
    with weights.open("ab") as file:
        for path, graph in graphs.items():
            aside, model = path.with_suffix(".constants"), graph.converted()
            try:
                openvino_package().serialize(model, str(path), str(aside))
                constants, tree = aside.read_bytes(), ElementTree.parse(path)
            except (RuntimeError, ElementTree.ParseError) as error:  # all that it says of a full disk
                raise OSError(f"OpenVINO did not write {path.name}: {error}") from None
            aside.unlink()
            for layer in tree.iterfind("layers/layer"):
                data, tensor = layer.find("data"), graph.stored.get(layer.attrib["name"].partition(":")[2])
                if data is None:
                    continue
                if tensor is not None:
                    layer.attrib["type"] = "Const"
                    data.attrib |= {"offset": str(tensor.offset), "size": str(tensor.num_bytes)}
                elif layer.attrib["type"] == "Const":
                    at, size = int(data.attrib["offset"]), int(data.attrib["size"])
                    content = constants[at : at + size]
                    if content not in placed:
                        placed[content] = file.tell()
                        file.write(content + bytes(aligned(size) - size))
                    data.attrib["offset"] = str(placed[content])
            tree.write(path, encoding="utf-8", xml_declaration=True)
