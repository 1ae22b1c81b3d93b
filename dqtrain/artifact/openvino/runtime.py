"""OpenVINO on the files of the openvino target: what it reads out of them, logits, and text."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqtrain.artifact.description import check_list
from dqtrain.artifact.graphs.runner import GraphRunner
from dqtrain.artifact.openvino.graph import VALUE, WEIGHTS, openvino_package
from dqtrain.errors import CheckpointError

DESCRIPTION = "openvino.json"
"""What lists the other files (`description.write_list`)."""

CAUSAL, ENCODER, DECODER = "model.xml", "encoder.xml", "decoder.xml"
"""Files of graphs."""

AS_SHIPPED: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
"""Settings of OpenVINO's plugin that differ from its own: where a processor has bf16 that would be used throughout, which moves logits by more than activations of 8 bits do."""

IN_FP32 = AS_SHIPPED | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""With which it rounds nothing on the way, where it quantizes activations to 8 bits else."""


def _read(path: Path) -> Any:
    """A graph and its constants. Raises CheckpointError for what OpenVINO does not read."""
    try:
        return openvino_package().Core().read_model(path, path.with_name(WEIGHTS))
    except RuntimeError as error:
        raise _not_loaded(path, error) from None


def _compiled(model: Any, path: Path, settings: Mapping[str, Any]) -> Any:
    try:
        return openvino_package().Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **settings})
    except RuntimeError as error:
        raise _not_loaded(path, error) from None


def _not_loaded(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{path}: openvino {openvino_package().__version__} does not load it ({reason}). Export it again.")


def read_values(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that give each stored weight of the graphs in fp32, as OpenVINO computes it of its constants: matrices are [outputs, inputs].

    Raises CheckpointError for files that cannot be read, and a function does where two graphs, or a head and its table, differ.
    """
    found: dict[str, list[Callable[[], np.ndarray]]] = {}
    for path in sorted(folder.glob("*.xml")):
        for node in _read(path).get_ordered_ops():
            name = node.friendly_name
            weight = name.partition("/")[2].removesuffix(VALUE) if name.endswith(VALUE) else name.partition(":")[2]
            if name.endswith(VALUE) or name.startswith("float:"):
                found.setdefault(weight, []).append(functools.partial(_value, node))
    return {name: functools.partial(_same, folder / WEIGHTS, name, values) for name, values in found.items()}


def _value(node: Any) -> np.ndarray:
    """What a node gives, which reads constants alone: as OpenVINO folds them."""
    openvino = openvino_package()
    found = openvino.Tensor(openvino.Type.f32, node.output(0).shape)
    openvino.Model([node.output(0)], [], "value").evaluate([found], [])
    return found.data.copy()


def _same(file: Path, name: str, values: list[Callable[[], np.ndarray]]) -> np.ndarray:
    first = values[0]()
    if not all(np.array_equal(first, value()) for value in values[1:]):
        raise CheckpointError(f"{file}: {name} is not the same wherever the graphs read it. Export it again.")
    return first


class OpenVinoSession:
    """A graph in OpenVINO."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        model = _read(path)
        compiled = _compiled(model, path, settings)
        self.inputs = {value.any_name: [size.get_length() if size.is_static else None for size in value.partial_shape] for value in compiled.inputs}
        names = [value.any_name for value in model.outputs]  # which have other names, too, where nothing was left to compute behind them
        self._outputs = list(zip(names, compiled.outputs, strict=True))
        self._request = compiled.create_infer_request()

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its outputs, arrays of numpy."""
        found = self._request.infer(dict(given), share_inputs=True)
        return {name: found[value] for name, value in self._outputs}

    def array(self, value: Any) -> np.ndarray:
        """One of them."""
        return value


class OpenVinoRunner(GraphRunner):
    """The files of the openvino target in OpenVINO on this machine's CPU, as many threads as torch has; `settings` are of its plugin: `AS_SHIPPED` or `IN_FP32`.

    Raises ConfigError without `openvino`, CheckpointError for damaged files.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] = AS_SHIPPED) -> None:
        openvino_package()
        paths = {name: folder / name for name in check_list(folder / DESCRIPTION) if name.endswith(".xml")}
        sessions = {name: OpenVinoSession(path, settings) for name, path in paths.items()}
        super().__init__(folder, sessions[DECODER if DECODER in paths else CAUSAL], sessions.get(ENCODER))
