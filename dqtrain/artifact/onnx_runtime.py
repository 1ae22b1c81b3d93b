"""ONNX Runtime on the files of the onnx target: what it reads out of them, logits, and text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from dqtrain.artifact.description import check_list
from dqtrain.artifact.load import read_prompt
from dqtrain.artifact.onnx_family import CAUSAL, DECODER, ENCODER
from dqtrain.artifact.onnx_graph import CONTRIB, in_model, onnx_package
from dqtrain.data.prepare import encode_sources, load_tokenizer
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.making import read_model_config

DESCRIPTION = "onnx.json"
"""What lists the other files (`description.write_list`)."""


def require_runtime() -> Any:
    """The `onnxruntime` package, which is an extra. Raises ConfigError without it."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "running an ONNX graph needs the Python package onnxruntime, which is not installed here. Install it with: pip install 'dqtrain[runtimes]'"
        ) from None
    return onnxruntime


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


class OnnxRunner:
    """The files of the onnx target in ONNX Runtime on this machine's CPU, as many threads as torch has.

    With an `accuracy_level` of 0 products are of fp32, where the files' own 4 lets the runtime quantize activations to 8 bits in blocks. Raises ConfigError
    without `onnxruntime`, CheckpointError for damaged files.
    """

    def __init__(self, folder: Path, accuracy_level: int | None = None) -> None:
        self.folder = folder
        require_runtime()
        graphs = {name: self._graph(folder / name, accuracy_level) for name in check_list(folder / DESCRIPTION) if name.endswith(".onnx")}
        self.config = read_model_config(folder)
        self.decoder = _session(folder, graphs[DECODER if DECODER in graphs else CAUSAL])
        self.encoder = _session(folder, graphs[ENCODER]) if ENCODER in graphs else None

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

    def start(self, source: Sequence[Sequence[int]] | None = None, batch: int = 1) -> "Reading":
        """Begin texts, for an encoder-decoder with the ids of their sources, all of one length."""
        return Reading(self, source, batch)

    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None, one_by_one: bool = False) -> Tensor:
        """Logits behind each token of a decoder, fp32 [tokens, vocabulary], in one pass or token `one_by_one`; `source` is what the encoder reads first."""
        reading = self.start(None if source is None else [source])
        parts = [[token] for token in ids] if one_by_one else [list(ids)]
        return torch.cat([torch.from_numpy(reading.read([part])[0]) for part in parts])

    def generate(self, prompt: str, tokens: int, stream: bool = False) -> str:
        """The prompt and its greedy continuation of up to `tokens` tokens, as `load.complete` gives it; printed as it is written with `stream`. Raises ConfigError."""
        tokenizer, longest = load_tokenizer(self.folder), getattr(self.config, "max_position_embeddings", None)
        file = self.folder / "generation_config.json"
        search: Any = GenerationConfig.from_pretrained(self.folder) if file.is_file() else GenerationConfig.from_model_config(self.config)
        is_chat, forced = False, None
        if self.encoder is not None:
            source = encode_sources(tokenizer, [prompt], longest or 2**20, True)
            start = getattr(self.config, "decoder_start_token_id", None)
            ids = [search.decoder_start_token_id if start is None else start]
            ends, forced, room = [tokenizer.eos_token_id], search.forced_bos_token_id, tokens
            forced = None if forced == tokenizer.bos_token_id else forced
            reading = self.start(source)
        else:
            ids, is_chat = read_prompt(tokenizer, prompt)
            ends = search.eos_token_id if isinstance(search.eos_token_id, list) else [search.eos_token_id]
            reading, room = self.start(), len(ids) + tokens
        if longest is not None and room > longest:
            read = "" if self.encoder is not None else f"the prompt has {len(ids)} tokens and "
            raise ConfigError(f"{read}{tokens} tokens are asked, but {self.folder} has {longest} positions; ask for fewer.")
        shown = [] if is_chat or self.encoder is not None else ids
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
        if streamer is not None and shown:
            streamer.put(torch.tensor(shown))
        written: list[int] = []
        while len(written) < tokens and not set(written[-1:]) & set(ends):
            scores = reading.read([written[-1:] or ids])[0, -1]
            written.append(int(scores.argmax()) if forced is None or written else forced)
            if streamer is not None:
                streamer.put(torch.tensor(written[-1:]))
        if streamer is not None:
            streamer.end()
        return tokenizer.decode([*shown, *written], skip_special_tokens=True)


class Reading:
    """Texts that are read on, with the keys and values of what was read."""

    def __init__(self, runner: OnnxRunner, source: Sequence[Sequence[int]] | None, batch: int) -> None:
        self._value = require_runtime().OrtValue.ortvalue_from_numpy
        self._decoder = runner.decoder
        self._num_read, self._batch = 0, batch if source is None else len(source)
        self._kept = {}  # what every pass is given as it is
        if source is not None:
            assert runner.encoder is not None, "a causal model reads no source"
            mask = np.ones((len(source), len(source[0])), np.int64)
            names = [output.name for output in runner.encoder.get_outputs()]
            given = {"input_ids": self._value(np.array(source, np.int64)), "attention_mask": self._value(mask)}
            found = runner.encoder.run_with_ort_values(names, given)
            self._kept = {name.replace("present", "past_key_values"): value for name, value in zip(names, found, strict=True)}
            self._kept["encoder_attention_mask"] = self._value(mask)
        inputs = {found.name: found.shape for found in self._decoder.get_inputs()}
        self._names = [found.name for found in self._decoder.get_outputs()]
        self._has_mask = "attention_mask" in inputs
        empty = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values") and name not in self._kept}
        self._past = {name: self._value(np.zeros((self._batch, shape[1], 0, shape[3]), np.float32)) for name, shape in empty.items()}

    def read(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits behind each of these tokens, fp32 [batch, tokens, vocabulary]."""
        given = np.array(ids, np.int64)
        self._num_read += given.shape[1]
        feeds = {"input_ids": self._value(given), **self._kept, **self._past}
        if self._has_mask:
            feeds["attention_mask"] = self._value(np.ones((self._batch, self._num_read), np.int64))
        found = dict(zip(self._names, self._decoder.run_with_ort_values(self._names, feeds), strict=True))
        logits = found.pop("logits").numpy()
        self._past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits
