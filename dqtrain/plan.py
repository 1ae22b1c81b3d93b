"""Memory, traffic and time of a run by arithmetic, from config.json and the headers of safetensors files: no torch, no GPU.

Two models and two ZeRO engines (`engine.py`), P the student's parameters, n the ranks. Bytes of a rank between two steps, all weights of the student in fp32:

    student at stage 1, 2   weights 4 P, master copy 4 P / n, moments 8 P / n
    student at stage 3      weights 4 P / n, moments 8 P / n, gradients 4 P / n, and DeepSpeed's bucket for reductions
    teacher                 its dtype's 4, 2 or (matrices of layers in int8) 1 bytes per parameter, / n at stage 3

and on top of them in a step, of which the largest moment counts: what forward keeps for backward (by layer: inputs of norms and products, queries,
keys and values, what activation functions save; or the layers' inputs alone under activation checkpointing), weights that are gathered, the two heads with
the chunks of the loss (`distill/chunked.py`), gradients on their way, AdamW's temporaries. `dqtrain bench memory` holds the sums against real engines.

Time is a roofline: products against the peak of the GPU, what passes over weights and activations against its memory, gathers and reductions against
NVLink and the network, each at the share of the peak that is attained in practice (`ATTAINED`), added up as if nothing overlapped.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dqtrain import hub
from dqtrain.config import RunConfig, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.rundir import model_directory, start_directory

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """What one GPU has and can do at its peak, in bytes and seconds."""

    memory: float
    bf16: float  # FLOP/s, dense, with fp32 sums
    fp32: float  # FLOP/s, without TF32, as torch multiplies fp32 by default
    bandwidth: float  # bytes/s of its memory
    nvlink: float  # bytes/s to the other GPUs of its node, one direction
    network: float  # bytes/s to other nodes: its share of the node's


GPUS = {
    # NVIDIA's data sheets; NVLink is half of the sheets' bidirectional sum; network: one adapter per GPU, as in DGX systems, unless said otherwise.
    "b200": Gpu(180 * GB, 2.25e15, 75e12, 8.0e12, 900e9, 50e9),
    "h200": Gpu(141 * GB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "h100": Gpu(80 * GB, 989e12, 67e12, 3.35e12, 450e9, 50e9),  # SXM; 400 Gb/s
    "a100-80": Gpu(80 * GB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),  # SXM; 200 Gb/s
    "a100-40": Gpu(40 * GB, 312e12, 19.5e12, 1.56e12, 300e9, 25e9),
    "l40s": Gpu(48 * GB, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),  # PCIe 4.0 x16, no NVLink; 100 Gb/s
    "a10": Gpu(24 * GB, 125e12, 31.2e12, 0.6e12, 32e9, 6.25e9),
}

ATTAINED = {"bf16": 0.45, "fp32": 0.75, "bandwidth": 0.75, "nvlink": 0.7, "network": 0.7}
"""Share of the peak that large products, element-wise kernels and NCCL's rings reach; assumed, not measured by dqtrain."""

RESERVE = 0.94
"""Share of a GPU's memory that tensors may take; the rest is lost between the blocks of torch's allocator."""

CONTEXT_BYTES = 1.2e9
"""CUDA's context, kernels of the libraries and NCCL's buffers."""

DISK_BYTES_PER_S = 1e9
"""What one node is taken to write to shared storage."""

NVME_BYTES_PER_S = 2e9
"""What one node is taken to read and write on its local disk, by way of mapped files."""

CHUNK_BYTES = 128 * 2**20
"""distill/chunked.py's."""

LIVE_ELEMENTS, PIECE_ELEMENTS = 10**9, 5 * 10**7
"""engine.py's: what the student keeps gathered, and what is prefetched, reduced (a buffer of so many fp32 elements on a GPU, whatever the model) or, at stage 3, updated at a time."""

DISK_PIECE_ELEMENTS = 10**7
"""engine.py's: what is updated at a time from a local disk."""

QUANTIZER_BYTES = 150
"""Memory traffic of one quantized weight in a micro-batch, its value made twice and its gradient: read and written by torch's operations, counted on a layer
(57 minmax, 140 lsq, 152 dynamic, 174 affine)."""


# Models


Shapes = dict[str, tuple[int, ...]]
"""Parameter -> shape."""


def _linear(name: str, out: int, into: int, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, into)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias")[: 2 if bias else 1]}


@dataclass(frozen=True)
class Stack:
    """The layers of a decoder or an encoder, as far as what they keep for backward depends on it."""

    layers: int
    matrices: int  # elements of those of all layers
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int  # width inside the feed-forward part
    activation: str
    gated: bool
    rms: bool  # RMSNorm, which keeps more than LayerNorm
    norms_behind: bool  # also behind attention and feed-forward part
    normed_heads: bool  # queries and keys have a norm
    joint: bool  # one product for queries, keys and values
    fused: bool  # attention that keeps no probabilities, unless they are asked for
    cross: bool  # reads an encoder
    dropout: float


_ALIASES = {
    "width": ("n_embd", "d_model", "hidden_size"),
    "heads": ("n_head", "decoder_attention_heads", "num_heads", "num_attention_heads"),
    "key_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "inner": ("n_inner", "intermediate_size", "decoder_ffn_dim", "ffn_dim", "d_ff"),
    "layers": ("n_layer", "decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"),
    "encoder_layers": ("encoder_layers", "num_layers"),
    "encoder_heads": ("encoder_attention_heads", "num_heads"),
    "encoder_inner": ("encoder_ffn_dim", "d_ff"),
    "positions": ("n_positions", "max_position_embeddings"),
    "activation": ("activation_function", "hidden_activation", "hidden_act", "feed_forward_proj"),
    "vocabulary": ("vocab_size",),
    "dropout": ("resid_pdrop", "dropout", "dropout_rate"),
    "tied": ("tie_word_embeddings",),
}

_LLAMA = {"vocabulary": 32000, "width": 4096, "inner": 11008, "layers": 32, "heads": 32, "positions": 2048, "activation": "silu", "tied": False}
_GEMMA: dict[str, Any] = {"vocabulary": 256000, "width": 3072, "inner": 24576, "layers": 28, "heads": 16, "key_heads": 16, "head_dim": 256, "tied": True}
_GEMMA |= {"positions": 8192, "activation": "gelu_pytorch_tanh"}
_GEMMA_2 = {**_GEMMA, "width": 2304, "inner": 9216, "layers": 26, "heads": 8, "key_heads": 4}
_BART: dict[str, Any] = {
    "vocabulary": 50265,
    "width": 1024,
    "inner": 4096,
    "layers": 12,
    "heads": 16,
    "encoder_layers": 12,
    "encoder_heads": 16,
    "encoder_inner": 4096,
}
_BART |= {"positions": 1024, "activation": "gelu", "dropout": 0.1, "tied": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocabulary": 50257, "positions": 1024, "width": 768, "layers": 12, "heads": 12, "activation": "gelu_new", "dropout": 0.1, "tied": True},
    "opt": {"vocabulary": 50272, "positions": 2048, "width": 768, "layers": 12, "inner": 3072, "heads": 12, "activation": "relu", "dropout": 0.1, "tied": True},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "inner": 14336, "key_heads": 8},
    "qwen2": {**_LLAMA, "vocabulary": 151936, "inner": 22016, "key_heads": 32},
    "qwen3": {**_LLAMA, "vocabulary": 151936, "inner": 22016, "key_heads": 32, "head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": {**_GEMMA_2, "vocabulary": 262208},
    "bart": _BART,
    "mbart": _BART,
    "t5": {"vocabulary": 32128, "width": 512, "head_dim": 64, "inner": 2048, "encoder_inner": 2048, "layers": 6, "encoder_layers": 6, "heads": 8}
    | {"encoder_heads": 8, "activation": "relu", "dropout": 0.1, "tied": True},
}
"""Families whose parameters are known by arithmetic, with what a config that leaves it out means."""

_LAYER = re.compile(r"(?:^|\.)(?:h|layers|block|blocks)\.(\d+)\.")
_BUFFERS = re.compile(r"(?:^|\.)(?:final_logits_bias|position_ids|inv_freq|masked_bias)$|(?:^|\.)h\.\d+\.attn\.bias$")


_FLOAT_IN_LAYERS = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate|relative_attention_bias)\.|bias$")
"""Matrices of layers that a teacher in int8 keeps in bf16."""


@dataclass(frozen=True)
class Kept:
    """Bytes of a teacher in the dtype that it is kept in."""

    whole: float
    layer: float  # the largest one
    words: float  # embeddings
    tensor: float  # the largest one
    dense: float  # what the codes of a module take while it runs


@dataclass(frozen=True)
class Model:
    """A model's parameters by name, tied ones once, and what its config.json says."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    def of_config(self, key: str) -> Any:
        """A number of the config under any of its families' names, else the family's default; None if there is neither."""
        if key == "tied" and self.config.get("model_type") == "t5":
            return True  # whatever its config says
        for name in _ALIASES[key]:
            if self.config.get(name) is not None:
                return self.config[name]
            if key == "key_heads" and name in self.config:
                return None  # written out as null: as many as heads
        return DEFAULTS.get(self.config.get("model_type", ""), {}).get(key)

    @cached_property
    def elements(self) -> int:
        """Parameters, tied ones once."""
        return sum(map(math.prod, self.tensors.values()))

    @cached_property
    def matrices(self) -> int:
        """Elements of the parameters of two dimensions or more."""
        return sum(math.prod(shape) for shape in self.tensors.values() if len(shape) >= 2)

    @property
    def vocabulary(self) -> int:
        """Word embeddings."""
        return self.of_config("vocabulary")

    @property
    def width(self) -> int:
        """Width of the hidden states that the head reads."""
        return self.config.get("word_embed_proj_dim") or self.of_config("width")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it reads sources with an encoder."""
        return bool(self.config.get("is_encoder_decoder", self.config.get("model_type") in ("bart", "mbart", "t5")))

    @cached_property
    def largest_layer(self) -> int:
        """Elements of the largest layer."""
        return int(self._of_largest_layer({name: math.prod(shape) for name, shape in self.tensors.items()}))

    def _of_largest_layer(self, values: Mapping[str, float]) -> float:
        """The largest sum of a layer's tensors, or the sum of all if there are no layers."""
        sums: dict[str, float] = {}
        for name, value in values.items():
            if found := _LAYER.search(name):
                sums[name[: found.end()]] = sums.get(name[: found.end()], 0) + value
        return max(sums.values(), default=sum(values.values()))

    @cached_property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix of a layer."""
        return max((math.prod(shape) for name, shape in self.tensors.items() if _LAYER.search(name)), default=self.elements)

    def _is_coded(self, name: str) -> bool:
        """Whether a tensor is codes in a teacher in int8: the matrices of layers are, but for routers and tables."""
        return len(self.tensors[name]) >= 2 and _LAYER.search(name) is not None and _FLOAT_IN_LAYERS.search(name) is None

    def kept_in(self, dtype: str) -> Kept:
        """Bytes of the model as a teacher of this `teacher.dtype`; a matrix of int8 codes has 2 bytes more for each output."""
        size = 4.0 if dtype == "fp32" else 2.0
        sizes = {name: size * math.prod(shape) for name, shape in self.tensors.items()}
        dense: dict[str, float] = {}  # by module; experts are one
        for name in filter(self._is_coded, self.tensors) if dtype == "int8" else ():
            elements, last = math.prod(self.tensors[name]), self.tensors[name][-1]
            module = name.partition(".experts.")[0]
            dense[module] = dense.get(module, 0.0) + sizes[name]
            sizes[name] = elements + 2.0 * (last if self.config.get("model_type") == "gpt2" else elements / last)
        return Kept(sum(sizes.values()), self._of_largest_layer(sizes), size * self.words, max(sizes.values()), max(dense.values(), default=0.0))

    @property
    def words(self) -> int:
        """Elements of the word embeddings."""
        return self.vocabulary * self.width

    @cached_property
    def largest_tensor(self) -> int:
        """Elements of the largest parameter."""
        return max(map(math.prod, self.tensors.values()))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Its decoder and, if it has one, its encoder."""
        return tuple(self._stack(is_encoder) for is_encoder in (False, True)[: 2 if self.is_encoder_decoder else 1])

    def _stack(self, encoder: bool) -> Stack:
        kind, side = self.config.get("model_type"), "encoder_" if encoder else ""
        width, heads = self.of_config("width"), self.of_config(f"{side}heads")
        activation = str(self.of_config("activation") or "silu")
        own = {name: found[1] for name in self.tensors if (found := _LAYER.search(name)) and _is_encoder(name) == encoder}
        return Stack(
            layers=len(set(own.values())),
            matrices=sum(math.prod(self.tensors[name]) for name in own if len(self.tensors[name]) >= 2),
            width=width,
            heads=heads,
            key_heads=self.of_config("key_heads") or heads,
            head_dim=self.of_config("head_dim") or width // heads,
            inner=self.of_config(f"{side}inner") or 4 * width,
            activation=activation.removeprefix("gated-") if activation != "gated-gelu" else "gelu_new",
            gated=activation.startswith("gated-") or kind not in ("gpt2", "opt", "bart", "mbart", "t5"),
            rms=kind not in ("gpt2", "opt", "bart", "mbart"),
            norms_behind=kind in ("gemma2", "gemma3_text"),
            normed_heads=kind in ("qwen3", "gemma3_text"),
            joint=kind == "gpt2",
            fused=kind != "t5",
            cross=self.is_encoder_decoder and not encoder,
            dropout=float(self.of_config("dropout") or 0),
        )

    def cut(self, decoder: Sequence[int] | int | None, encoder: Sequence[int] | int | None) -> "Model":
        """The student that keeps these layers, as `models.cut` makes it. Raises ConfigError for layers that are not there."""
        kept = {}
        for is_encoder, layers in ((False, decoder), (True, encoder)):
            numbers = {int(found[1]) for name in self.tensors if (found := _LAYER.search(name)) and _is_encoder(name) == is_encoder}
            key = f"student.{'encoder' if is_encoder else 'decoder'}_layers"
            if layers is not None and not numbers:
                raise ConfigError(f"{key} is set, but {self.name} has no such layers. Remove it.")
            wanted = len(numbers) if layers is None else layers
            count = wanted if isinstance(wanted, int) else len(wanted)
            if count > len(numbers) or (not isinstance(wanted, int) and max(wanted) not in numbers):
                raise ConfigError(f"{key} is {layers}, but {self.name} has {len(numbers)} such layers. Keep some of them.")
            spread = [round(i * (len(numbers) - 1) / max(1, count - 1)) for i in range(count)]
            kept[is_encoder] = set(spread if isinstance(wanted, int) else wanted)

        def stays(name: str) -> bool:
            found = _LAYER.search(name)
            # The bias of relative positions is in T5's first block, whichever becomes the first.
            return found is None or int(found[1]) in kept[_is_encoder(name)] or "relative_attention_bias" in name

        return replace(self, tensors={name: shape for name, shape in self.tensors.items() if stays(name)})


def _is_encoder(name: str) -> bool:
    return "encoder" in name.split(".")


def read_model(folder: Path) -> Model:
    """A Hugging Face directory, of which config.json and the headers of its safetensors files are read. Raises ConfigError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(f"{file}: cannot be read as the config of a model ({error}). Give a directory written by transformers' save_pretrained.") from None
    stored = _headers(folder)
    if not stored:
        return _by_arithmetic(str(folder), config)
    model = Model(str(folder), config, {})
    tied = model.of_config("tied") is not False
    words = {"lm_head.weight"} | {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")} if tied else set()
    untied = len(stored) > 1 and not any(name.endswith(("embed_tokens.weight", "shared.weight", "wte.weight")) and name not in words for name in stored)
    tensors = {name: shape for name, shape in stored.items() if not _BUFFERS.search(name) and (untied or name not in words)}
    return replace(model, tensors=tensors)


def _headers(folder: Path) -> Shapes:
    """Tensor -> shape of a directory's safetensors files, sharded ones by their index; empty where there are none."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            wanted = json.loads(index.read_text())["weight_map"]
            found = {name: shape for file in sorted(set(wanted.values())) for name, shape in _header(folder / file).items()}
            missing = sorted(set(wanted) - set(found))
            if missing:
                raise ConfigError(f"{index}: names {missing[0]}, but {folder / wanted[missing[0]]} does not hold it. Copy the model again, whole.")
            return found
        return _header(whole) if whole.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ConfigError(f"{folder}: its safetensors files cannot be read ({error}). Copy the model again, whole.") from None


def _header(file: Path) -> Shapes:
    """https://github.com/huggingface/safetensors#format: 8 bytes, the length of the header; the header, JSON."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > 100 * 2**20:
            raise ValueError(f"{file.name} has a header of {length} bytes")
        header = json.loads(opened.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def new_model(architecture: Mapping[str, Any], vocabulary: int | None) -> Model:
    """The model of `student.architecture`; a vocabulary that it leaves out is the tokenizer's. Raises ConfigError."""
    given = {} if vocabulary is None else {"vocab_size": vocabulary}
    return _by_arithmetic("student.architecture", {**given, **architecture})


def _by_arithmetic(name: str, config: Mapping[str, Any]) -> Model:
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise ConfigError(
            f"{name}: there are no safetensors files, and the parameters of model_type {kind} are not known without them, but of {', '.join(DEFAULTS)} alone. "
            "Put the files beside config.json."
        )
    model = Model(name, config, {})
    return replace(model, tensors=dict(_parameters(kind, model)))


def _parameters(kind: str, model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as transformers' named_parameters gives them, in no order."""
    width, heads, inner, layers = (model.of_config(key) for key in ("width", "heads", "inner", "layers"))
    key_heads, head_dim = model.of_config("key_heads") or heads, model.of_config("head_dim") or width // heads
    words, tied, config = model.of_config("vocabulary"), bool(model.of_config("tied")), model.config
    found: Shapes = {}
    if kind == "gpt2":
        inner = inner or 4 * width
        found |= {"transformer.wte.weight": (words, width), "transformer.wpe.weight": (model.of_config("positions"), width)} | _norm("transformer.ln_f", width)
        for i in range(layers):
            p = f"transformer.h.{i}."
            found |= _norm(p + "ln_1", width) | _norm(p + "ln_2", width)
            for part, into, out in (("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width), ("mlp.c_fc", width, inner), ("mlp.c_proj", inner, width)):
                found |= {f"{p}{part}.weight": (into, out), f"{p}{part}.bias": (out,)}
    elif kind == "opt":
        narrow, bias, p = config.get("word_embed_proj_dim") or width, config.get("enable_bias", True), "model.decoder."
        affine = config.get("layer_norm_elementwise_affine", True)
        found |= {f"{p}embed_tokens.weight": (words, narrow), f"{p}embed_positions.weight": (model.of_config("positions") + 2, width)}
        if narrow != width:
            found |= _linear(p + "project_in", width, narrow) | _linear(p + "project_out", narrow, width)
        if affine and config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
            found |= _norm(p + "final_layer_norm", width)
        for i in range(layers):
            q = f"{p}layers.{i}."
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= _linear(f"{q}self_attn.{part}", width, width, bias)
            found |= _linear(q + "fc1", inner, width, bias) | _linear(q + "fc2", width, inner, bias)
            found |= (_norm(q + "self_attn_layer_norm", width) | _norm(q + "final_layer_norm", width)) if affine else {}
    elif kind in ("bart", "mbart"):
        found |= {"model.shared.weight": (words, width)}
        for side, count, ffn in (("decoder", layers, inner), ("encoder", model.of_config("encoder_layers"), model.of_config("encoder_inner"))):
            p = f"model.{side}."
            found |= {f"{p}embed_positions.weight": (model.of_config("positions") + 2, width)} | _norm(p + "layernorm_embedding", width)
            found |= _norm(p + "layer_norm", width) if kind == "mbart" else {}
            for i in range(count):
                q = f"{p}layers.{i}."
                for attention in ("self_attn", "encoder_attn")[: 2 if side == "decoder" else 1]:
                    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                        found |= _linear(f"{q}{attention}.{part}", width, width, True)
                    found |= _norm(f"{q}{attention}_layer_norm", width)
                found |= _linear(q + "fc1", ffn, width, True) | _linear(q + "fc2", width, ffn, True) | _norm(q + "final_layer_norm", width)
    elif kind == "t5":
        found |= {"shared.weight": (words, width)}
        gated = str(model.of_config("activation")).startswith("gated-")
        for side, count in (("decoder", layers), ("encoder", model.of_config("encoder_layers"))):
            found |= _norm(f"{side}.final_layer_norm", width, False)
            found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (config.get("relative_attention_num_buckets", 32), heads)
            for i in range(count):
                parts = ["SelfAttention", "EncDecAttention"][: 2 if side == "decoder" else 1]
                for j, attention in enumerate(parts):
                    q = f"{side}.block.{i}.layer.{j}."
                    for part in "qkv":
                        found |= _linear(f"{q}{attention}.{part}", heads * head_dim, width)
                    found |= _linear(f"{q}{attention}.o", width, heads * head_dim) | _norm(q + "layer_norm", width, False)
                q = f"{side}.block.{i}.layer.{len(parts)}."
                for part in ("wi_0", "wi_1") if gated else ("wi",):
                    found |= _linear(f"{q}DenseReluDense.{part}", inner, width)
                found |= _linear(q + "DenseReluDense.wo", width, inner) | _norm(q + "layer_norm", width, False)
    else:
        found |= {"model.embed_tokens.weight": (words, width)} | _norm("model.norm", width, False)
        bias = bool(config.get("attention_bias", False)) and kind != "mistral"
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind in ("gemma2", "gemma3_text") else []
        for i in range(layers):
            p = f"model.layers.{i}."
            for part, out in (("q_proj", heads), ("k_proj", key_heads), ("v_proj", key_heads)):
                found |= _linear(f"{p}self_attn.{part}", out * head_dim, width, bias or kind == "qwen2")
            found |= _linear(p + "self_attn.o_proj", width, heads * head_dim, bias)
            found |= _linear(p + "mlp.gate_proj", inner, width, mlp := bool(config.get("mlp_bias", False)) and kind == "llama")
            found |= _linear(p + "mlp.up_proj", inner, width, mlp) | _linear(p + "mlp.down_proj", width, inner, mlp)
            for norm in norms:
                found |= _norm(p + norm, width, False)
            if kind in ("qwen3", "gemma3_text"):
                found |= _norm(p + "self_attn.q_norm", head_dim, False) | _norm(p + "self_attn.k_norm", head_dim, False)
    if not tied:
        found["lm_head.weight"] = (words, model.width)
    yield from found.items()


@dataclass(frozen=True)
class Models:
    """The student of a config, what its quantizers learn included, and the teacher that runs beside it, if one does."""

    student: Model
    teacher: Model | None
    scales: int  # learned ones


def read_models(config: RunConfig) -> Models:
    """The two models of a config. Raises ConfigError where their directories do not say what they are."""
    teacher = None if config.teacher is None else read_model(model_directory(config.teacher.path))
    if config.student.architecture is not None:
        student = new_model(config.student.architecture, _vocabulary(config))
    else:
        start = read_model(start_directory(config.student.init_from)) if config.student.init_from else teacher
        assert start is not None, "config.py asks for one of them"
        student = start.cut(config.student.decoder_layers, config.student.encoder_layers)
    online = config.teacher is not None and config.teacher.source == "online" and config.distill.teacher_terms
    return Models(student, teacher if online else None, _learned_scales(config, student))


def _vocabulary(config: RunConfig) -> int | None:
    """Entries of the tokenizer of a new model; None if it cannot be told."""
    if config.data.train_tokenizer is not None:
        return config.data.train_tokenizer.vocab_size
    file = (hub.directory(config.data.tokenizer) if config.data.tokenizer else Path()) / "tokenizer.json"
    try:
        read = json.loads(file.read_text())
        vocabulary = read["model"]["vocab"]
        names = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
        return len(names | {added["content"] for added in read["added_tokens"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _learned_scales(config: RunConfig, student: Model) -> int:
    """Scales and zero points of weights that are trained beside them."""
    if config.quant is None:
        return 0
    total = 0
    for name, shape in student.tensors.items():
        settings = config.quant.linears if _LAYER.search(name) else config.quant.embeddings
        if len(shape) < 2 or settings is None:
            continue
        scales = {"per_tensor": 1, "per_row": max(shape) if settings.group_size is None else 0}.get(settings.granularity, 0)
        scales = math.prod(shape) // (settings.group_size or 1) if settings.granularity == "per_group" else scales
        total += scales * _learned_per_scale(settings)
    return total


def _learned_per_scale(settings: WeightQuant) -> int:
    return {"dynamic": 1, "pact": 1, "lsq": 1, "seq": 1, "affine": 2}.get(settings.grid, 0)


# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by moment and part, and what it takes of its node's host memory and local disk."""

    moments: dict[str, dict[str, float]]  # "start", "rest" (between two steps), "forward", "backward", "update"
    host_per_rank: dict[str, float]
    disk_per_rank: float

    @property
    def peak(self) -> dict[str, float]:
        """The parts of the moment that takes most."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def bytes(self) -> float:
        """Of that moment."""
        return sum(self.peak.values())


def kept_by_layer(stack: Stack, config: RunConfig, tokens: int, sources: int, mask_bytes: int = 1) -> float:
    """Bytes that one layer keeps for backward of one sample of `tokens`, whose encoder reads `sources`.

    Norms read and keep fp32; products keep what they multiply in the compute dtype, and where autocast makes that, a copy for each product. Fused
    attention keeps its operands and its output. What a quantizer gives takes the place of what it read, so that quantizing keeps no more.
    """
    number = 2 if config.train.computes_in == "bf16" else 4
    width, query, key = stack.width, stack.heads * stack.head_dim, stack.key_heads * stack.head_dim
    fused = stack.fused and not _is_eager(config)
    norm = (8 if stack.rms else 4) * width
    mask = mask_bytes * width if stack.dropout else 0  # of dropout

    def attention(keys: int) -> float:
        kept: float = norm + number * width * (3 if number == 2 and not stack.joint else 1) + mask
        kept += 2 * number * query + 2 * number * (key if fused else query) * keys / tokens  # queries and output, keys and values
        kept += (number + 4) * (query + key) if stack.normed_heads else 0
        if fused:
            return kept + 4 * stack.heads
        dropped = number + mask_bytes if stack.dropout else number % 4  # the probabilities that are multiplied, where they are others
        return kept + stack.heads * keys * (4 + dropped)

    # Bytes per element that the activation function keeps, beside the input of the product behind it.
    function = {"gelu_new": 16 if number == 4 else 14, "relu": 0}.get(stack.activation, number)
    if stack.gated:
        function += 2 * number  # both factors of the product
    feed_forward = norm + number * width * (2 if stack.gated and number == 2 else 1) + (function + number) * stack.inner
    behind = 2 * (number + 4) * width if stack.norms_behind else 0
    return tokens * (attention(tokens) + (attention(sources) if stack.cross else 0) + feed_forward + mask + behind)


def _is_eager(config: RunConfig) -> bool:
    """Whether attention probabilities are kept: those that are compared or quantized."""
    compared = config.distill.attention is not None and config.distill.attention.weight > 0
    return compared or (config.quant is not None and config.quant.activations is not None and config.quant.activations.attention)


def _lengths(config: RunConfig, model: Model) -> tuple[int, int]:
    """Tokens of a sample that the decoder and the encoder read, at most."""
    sources = config.data.pairs.source_tokens if config.data.pairs is not None and model.is_encoder_decoder else 0
    return config.data.longest(model.is_encoder_decoder), sources


def _live(config: RunConfig, student: Model) -> int:
    """Elements of the student that stay gathered at stage 3."""
    return LIVE_ELEMENTS + PIECE_ELEMENTS if config.zero.live_layers is None else config.zero.live_layers * student.largest_layer


def memory_of(config: RunConfig, world_size: int, device: str = "gpu", models: Models | None = None) -> Memory:
    """The bytes of a rank among `world_size`; on "cpu" (gloo) buffers count as far as they are written to. Raises ConfigError as `read_models` does."""
    models = models or read_models(config)
    student, teacher, stage = models.student, models.teacher, config.zero.student
    on_cpu, samples = device == "cpu", config.train.micro_batch
    number = 2 if config.train.computes_in == "bf16" else 4
    parameters = student.elements + models.scales
    whole, part, words = 4.0 * parameters, 4.0 * parameters / world_size, 4.0 * student.words
    largest = 4.0 * student.largest_tensor
    in_bucket = 4.0 * min(PIECE_ELEMENTS, parameters)
    bucket = in_bucket if on_cpu else 4.0 * PIECE_ELEMENTS
    offloads_optimizer = config.zero.offload_optimizer != "none" and not on_cpu
    offloads_weights = config.zero.offload_parameters != "none" and not on_cpu and stage == 3

    # Between two steps.
    start = {"weights": 0.0 if offloads_weights else part if stage == 3 else whole}
    start |= {} if offloads_optimizer else {"gradients": part} if stage == 3 else {"master weights": part}
    kept = Kept(0.0, 0.0, 0.0, 0.0, 0.0)
    teacher_layers = 0.0
    if teacher is not None and config.teacher is not None:
        kept = teacher.kept_in(config.teacher.dtype)
        start["teacher"] = kept.whole / (world_size if config.zero.teacher == 3 else 1)
        if config.zero.teacher == 3:
            teacher_layers = min(kept.whole, max((config.teacher.live_layers + 1) * kept.layer, kept.words + kept.layer))
        teacher_layers += kept.dense
    if "contrast" in config.distill.teacher_terms and config.distill.contrast is not None:
        rows = student.vocabulary if config.distill.contrast.bank == "vocabulary" else config.data.longest(student.is_encoder_decoder)
        start["contrast bank"] = rows * (4.0 * student.width + 1)
    if not on_cpu:
        start["CUDA, NCCL"] = CONTEXT_BYTES
    rest = start | ({} if offloads_optimizer else {"moments": 2 * part}) | ({"reduction bucket": bucket} if stage == 3 else {})

    # Forward, at its end: the loss.
    in_step = rest | ({"reduction bucket": bucket} if not on_cpu else {})
    gathered = {"gathered weights": 4.0 * min(parameters, max(_live(config, student) + student.largest_layer, student.words)) if stage == 3 else 0.0}
    said = {"teacher's outputs": _said(config, teacher, samples) if teacher is not None else 0.0}
    activations = {"activations": _activations(config, student, samples, on_cpu)}
    forward = in_step | gathered | said | activations
    if config.distill.task > 0 or "logits" in config.distill.teacher_terms:
        is_quantized = config.quant is not None and config.quant.embeddings is not None
        heads = (number / 4 * words if is_quantized or number == 2 else 0.0) + (kept.words if config.zero.teacher == 3 else 0.0)
        heads += 2.0 * teacher.words if teacher is not None and number == 2 and kept.words > 2.0 * teacher.words else 0.0
        forward |= {"heads": heads, "head's gradient": words, "loss chunks": _chunks(config, models)}
    of_teacher = in_step | said | {"gathered teacher": teacher_layers}

    # Backward, where most is kept, where most gradients are there, and where they are reduced; gloo works on a copy.
    copies = 2 if on_cpu else 1
    working = 12.0 * samples * config.data.longest(student.is_encoder_decoder) * student.stacks[0].inner + 12.0 * student.largest_matrix
    moments_of_backward = (
        in_step | gathered | said | activations | {"head's gradient": 2 * words, "products of backward": working},
        in_step
        | gathered
        | said
        | {"arriving gradients": {1: whole, 2: in_bucket if on_cpu else 0.0, 3: 0.0}[stage] - (words if stage < 3 else 0), "head's gradient": 4 * words},
        in_step | gathered | {"arriving gradients": {1: whole, 2: (in_bucket if on_cpu else 0.0) + copies * part + largest, 3: copies * in_bucket}[stage]},
    )

    # Update: stage 1 reduces here; AdamW's temporaries, two where it goes tensor by tensor (CPU), else one.
    flat = {1: 2 * part, 2: 2 * part, 3: part}[stage] + largest
    updated = min(part, max(4.0 * PIECE_ELEMENTS, largest / world_size)) if stage == 3 else part  # groups of whole parameters' partitions
    update = rest | {"arriving gradients": flat, "AdamW": 0.0 if offloads_optimizer else copies * updated}
    if stage == 1:
        update = max(update, in_step | {"arriving gradients": whole + copies * part + largest}, key=_total)

    moments = {
        "start": start,
        "rest": rest,
        "forward": max(forward, of_teacher, key=_total),
        "backward": max(moments_of_backward, key=_total),
        "update": update,
    }
    moments = {moment: {name: value for name, value in parts.items() if value > 0} for moment, parts in moments.items()}

    on_disk = config.zero.offload_optimizer == "nvme"
    host = {} if on_disk else {"checkpoint being written": 3 * part}
    host["student while loading"] = whole if stage != 3 else largest
    if teacher is not None:
        host["teacher while loading"] = kept.tensor if config.zero.teacher == 3 else kept.whole
    # On a disk are masters and moments; beside the gradients only what is updated at a time is in memory: masters, both moments, a temporary or two.
    updated = min(part, max(4.0 * DISK_PIECE_ELEMENTS, largest / world_size))
    in_memory = {"weights": part} if offloads_weights and config.zero.offload_parameters == "cpu" else {}
    masters = 0.0 if in_memory else part  # with the weights beside them, one is enough
    host |= {"optimizer": part + 5 * updated if on_disk else 4 * part + masters} if offloads_optimizer else {}
    host |= in_memory
    return Memory(moments, host, part * (3 if on_disk else 2 if config.zero.offload_parameters == "nvme" else 0))


def _total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def _chunks(config: RunConfig, models: Models) -> float:
    """Bytes of the loss at work: what it holds for one chunk, and the hidden states of both models with the gradient of the student's."""
    student, teacher, logits = models.student, models.teacher, config.distill.logits
    rows = config.train.micro_batch * config.data.longest(student.is_encoder_decoder)
    tensors = 3 if config.distill.task > 0 else 2
    if teacher is not None and logits is not None and logits.weight > 0:
        tensors = 11 if logits.divergence in ("jensen_shannon", "confidence_kl") else 6 if config.distill.task > 0 else 5
    hidden = 4.0 * rows * (3 * student.width + (teacher.width if teacher is not None else 0))
    return tensors * min(CHUNK_BYTES, 4.0 * student.vocabulary * rows) + hidden


def _activations(config: RunConfig, student: Model, samples: int, on_cpu: bool) -> float:
    """Bytes that the student's forward keeps for backward."""
    tokens, sources = _lengths(config, student)
    mask_bytes = 4 if on_cpu else 1
    # Autocast's copies of weights are kept too, but those of quantized weights are made again.
    copied = 2 if config.train.computes_in == "bf16" and (config.quant is None or config.quant.linears is None) else 0
    total = 0.0
    for stack, length in zip(student.stacks, (tokens, sources), strict=False):
        kept = samples * kept_by_layer(stack, config, length, sources, mask_bytes) + copied * stack.matrices / stack.layers
        inputs = 4.0 * stack.width * length * samples
        total += stack.layers * inputs + kept if config.train.activation_checkpointing else stack.layers * kept
        total += (3 if stack.rms else 2) * inputs  # the embeddings' mask, the last norm, the hidden states
        if "hidden" in config.distill.teacher_terms:
            total += (stack.layers + 1) * inputs  # differences from the teacher's
        if "attention" in config.distill.teacher_terms:
            total += stack.layers * 4.0 * stack.heads * length * (length + (sources if stack.cross else 0)) * samples
    if "contrast" in config.distill.teacher_terms:
        total += samples * tokens * 4.0 * (4 * student.width + 2 * tokens)
    return total


def _said(config: RunConfig, teacher: Model, samples: int) -> float:
    """Bytes of what the teacher's forward leaves: its last hidden states and what the terms compare."""
    tokens, sources = _lengths(config, teacher)
    total = 4.0 * teacher.width * tokens * samples
    layer = config.distill.contrast is not None and config.distill.contrast.layer is not None
    for stack, length in zip(teacher.stacks, (tokens, sources), strict=False):
        if "hidden" in config.distill.teacher_terms or layer:
            total += (stack.layers + 1) * 4.0 * stack.width * length * samples
        if "attention" in config.distill.teacher_terms:
            total += stack.layers * 4.0 * stack.heads * length * (length + (sources if stack.cross else 0)) * samples
    return total


# Time


@dataclass(frozen=True)
class Cost:
    """What one step of one rank takes."""

    seconds: dict[str, float]
    traffic: dict[str, float]  # bytes that the rank receives

    @property
    def step(self) -> float:
        """Seconds of a step, nothing overlapped."""
        return sum(self.seconds.values())


def cost_of(config: RunConfig, nodes: int, gpus: int, gpu: Gpu, models: Models | None = None) -> Cost:
    """Seconds and bytes of a step on `nodes` of `gpus` each, by the roofline."""
    models = models or read_models(config)
    student, teacher, stage, world_size = models.student, models.teacher, config.zero.student, nodes * gpus
    micro_batches = math.ceil(config.train.global_batch // config.train.micro_batch / world_size)
    passes = 4 if config.train.activation_checkpointing else 3
    samples = micro_batches * config.train.micro_batch
    rows = samples * config.data.longest(student.is_encoder_decoder)
    heads = config.distill.task > 0 or "logits" in config.distill.teacher_terms
    products = passes * _forward_flops(config, student) * samples + (6.0 * student.words * rows if heads else 0.0)
    parameters = student.elements + models.scales
    whole = 4.0 * parameters
    # Stages 1 and 2 reduce buckets by an all-reduce, which brings every element twice; stage 3 scatters.
    traffic = {"reductions": whole * {1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]}
    if stage == 3:
        saved = 2.0 * student.matrices if config.train.rounds_matrices else 0.0
        traffic["student's gathers"] = micro_batches * (whole - saved) * (1 + max(0, parameters - _live(config, student)) / parameters)
    else:
        traffic["student's gathers"] = whole
    if teacher is not None and config.teacher is not None:
        products += _forward_flops(config, teacher) * samples + (2.0 * teacher.words * rows if heads else 0.0)
        if config.zero.teacher == 3:
            kept = teacher.kept_in(config.teacher.dtype)
            traffic["teacher's gathers"] = micro_batches * (kept.whole + (kept.words if heads else 0.0))
    traffic = {name: value * (world_size - 1) / world_size for name, value in traffic.items()}

    quantized = 0.0
    if config.quant is not None:
        quantized = sum(stack.matrices for stack in student.stacks) * (config.quant.linears is not None) + 2.0 * student.words * (
            config.quant.embeddings is not None
        )
    # A kept activation is written and read, and so is what leads to it; each logit is passed over some twenty times.
    passed = QUANTIZER_BYTES * quantized * micro_batches + 8.0 * micro_batches * passes / 3 * _activations(config, student, config.train.micro_batch, False)
    passed += 80.0 * student.vocabulary * rows * (1 if teacher is None else 2) if heads else 0.0
    bandwidth = gpu.bandwidth * ATTAINED["bandwidth"]
    total = sum(traffic.values())
    across = total * (nodes - 1) / nodes / gpus if nodes > 1 else 0.0  # what a node lacks comes once, through all of its adapters
    seconds = {
        "products": products / (getattr(gpu, config.train.computes_in) * ATTAINED[config.train.computes_in]),
        "GPU memory": passed / bandwidth,
        "optimizer": 14 * whole / world_size / (bandwidth if config.zero.offload_optimizer == "none" else 30e9),
        "links": max(total / (gpu.nvlink * ATTAINED["nvlink"]), across / (gpu.network * ATTAINED["network"])),
    }
    on_disk = 6 * whole if config.zero.offload_optimizer == "nvme" else 0.0  # masters and moments, read and written
    if config.zero.offload_parameters == "nvme":
        on_disk += whole * (1 + micro_batches * (1 + max(0, parameters - _live(config, student)) / parameters))
    if on_disk:
        seconds["local disk"] = on_disk / nodes / NVME_BYTES_PER_S
    return Cost(seconds, traffic)


def _forward_flops(config: RunConfig, model: Model) -> float:
    """Operations of one sample's forward without the head: two per weight and token, and attention, of which a fused causal one does half."""
    tokens, sources = _lengths(config, model)
    total = 0.0
    for stack, length in zip(model.stacks, (tokens, sources), strict=False):
        seen = length * (1.0 if _is_eager(config) or stack is not model.stacks[0] else 0.5) + (sources if stack.cross else 0)
        total += length * (2.0 * stack.matrices + 4.0 * stack.layers * stack.heads * stack.head_dim * seen)
    return total


# Plans


@dataclass(frozen=True)
class Plan:
    """A config on so many GPUs."""

    config: RunConfig
    gpu: str
    nodes: int
    gpus: int  # of a node
    memory: Memory
    cost: Cost
    models: Models

    @property
    def fits(self) -> bool:
        """Whether the peak fits into a GPU."""
        return self.memory.bytes <= RESERVE * GPUS[self.gpu].memory

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus

    @property
    def checkpoint_bytes(self) -> float:
        """fp32 weights and two moments, and the contrast bank."""
        return 12.0 * (self.models.student.elements + self.models.scales) + self.memory.moments["rest"].get("contrast bank", 0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """What a plan may choose, as it is written in a config."""
        config = self.config
        found: dict[str, Any] = {"zero.student": config.zero.student}
        found |= {"zero.teacher": config.zero.teacher} if self.models.teacher is not None else {}
        return found | {"train.micro_batch": config.train.micro_batch, "train.activation_checkpointing": config.train.activation_checkpointing}

    def as_dict(self) -> dict[str, Any]:
        """All figures; bytes and seconds."""
        config, step = self.config, self.cost.step
        micro_batches = config.train.global_batch // config.train.micro_batch
        tokens = config.train.global_batch * config.data.longest(self.models.student.is_encoder_decoder)
        return {
            "fits": self.fits,
            "gpu": self.gpu,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "settings": self.settings | {"micro_batches_per_gpu_and_step": math.ceil(micro_batches / self.world_size)},
            "parameters": {"student": self.models.student.elements, "teacher": self.models.teacher.elements if self.models.teacher else 0},
            "memory": {
                "gpu_bytes": GPUS[self.gpu].memory,
                "usable_bytes": RESERVE * GPUS[self.gpu].memory,
                "peak_bytes": self.memory.bytes,
                "peak_moment": next(moment for moment, parts in self.memory.moments.items() if parts is self.memory.peak),
                "moments": self.memory.moments,
            },
            "host_bytes_per_node": {name: value * self.gpus for name, value in self.memory.host_per_rank.items()},
            "disk_bytes_per_node": self.memory.disk_per_rank * self.gpus,
            "step": {"seconds": step, "bound_by": max(self.cost.seconds, key=lambda name: self.cost.seconds[name]), "parts": self.cost.seconds},
            "traffic_bytes_per_gpu_and_step": self.cost.traffic,
            "tokens_per_step": tokens,
            "tokens_per_day": tokens / step * 86400,
            "run_seconds": step * config.train.steps,
            "checkpoint": {"bytes": self.checkpoint_bytes, "save_seconds": self.checkpoint_bytes / self.nodes / DISK_BYTES_PER_S},
        }

    def table(self, best: "Plan | None") -> str:
        """One screen of text; `best` is the fastest of the same GPUs."""
        told, memory = self.as_dict(), self.memory
        verdict = "fits" if self.fits else "DOES NOT FIT"
        where = f"{self.world_size} {self.gpu} ({self.nodes} node{'s' if self.nodes > 1 else ''} of {self.gpus})"
        usable, moment = told["memory"]["usable_bytes"], told["memory"]["peak_moment"]
        student, teacher = told["parameters"].values()
        lines = [
            f"{verdict}: {memory.bytes / GB:.1f} GB of {usable / GB:.1f} usable on each of {where}, at the peak of the {moment if moment != 'rest' else 'pause'}",
            f"a step of {told['tokens_per_step']:,} tokens takes {_duration(self.cost.step)}, bound by {told['step']['bound_by']}; "
            f"{self.config.train.steps:,} steps {_duration(told['run_seconds'])}; {told['tokens_per_day'] / 1e6:,.0f} M tokens/day",
            f"student {student / 1e6:,.0f} M parameters{f', teacher {teacher / 1e6:,.0f} M' if teacher else ''}; "
            + ", ".join(f"{name}={_yaml(value)}" for name, value in self.settings.items())
            + f", {told['settings']['micro_batches_per_gpu_and_step']} micro-batches per GPU and step",
            "",
            f"{'GB per GPU':26s}" + "".join(f"{name:>10s}" for name in memory.moments),
        ]
        names = dict.fromkeys(name for parts in memory.moments.values() for name in parts)
        for name in names:
            lines.append(f"  {name:24s}" + "".join(f"{parts[name] / GB:10.2f}" if name in parts else f"{'':10s}" for parts in memory.moments.values()))
        lines.append(f"  {'total':24s}" + "".join(f"{_total(parts) / GB:10.2f}" for parts in memory.moments.values()))
        lines += ["", f"{'step':26s}{'s':>10s}{'share':>10s}"]
        lines += [f"  {name:24s}{value:10.3f}{value / self.cost.step:10.0%}" for name, value in self.cost.seconds.items()]
        lines += ["", "traffic per GPU and step: " + ", ".join(f"{name} {value / GB:.2f} GB" for name, value in self.cost.traffic.items())]
        lines += ["host memory per node: " + ", ".join(f"{name} {value / GB:.1f} GB" for name, value in told["host_bytes_per_node"].items())]
        if self.memory.disk_per_rank:
            lines += [f"local disk per node (zero.nvme): {told['disk_bytes_per_node'] / GB:.1f} GB"]
        lines += [
            f"checkpoint: {self.checkpoint_bytes / GB:.1f} GB, {_duration(told['checkpoint']['save_seconds'])} to write at {DISK_BYTES_PER_S / GB:.0f} GB/s per node"
        ]
        if best is not None and best.settings != self.settings:
            changes = " ".join(f"{name}={_yaml(value)}" for name, value in best.settings.items() if self.settings.get(name) != value)
            lines += [f"faster on these GPUs: {changes}: {_duration(best.cost.step)} per step, {best.memory.bytes / GB:.1f} GB"]
        elif best is not None:
            lines += ["no other ZeRO stage, micro-batch or checkpointing is faster on these GPUs"]
        return "\n".join(lines)

    def refusal(self, cheapest: "Plan | None") -> str:
        """What to say of a plan that does not fit: its largest parts, and the cheapest that does."""
        parts = sorted(self.memory.peak.items(), key=lambda part: -part[1])[:3]
        usable = RESERVE * GPUS[self.gpu].memory
        text = f"this does not fit: {self.memory.bytes / GB:.1f} GB per GPU, but {usable / GB:.1f} of a {self.gpu}'s {GPUS[self.gpu].memory / GB:.0f} GB are usable; "
        text += "the largest parts are " + ", ".join(f"{name} {value / GB:.1f}" for name, value in parts) + " GB. "
        if cheapest is None:
            limit = f"Nothing up to {MOST_NODES} nodes fits, and {self.config.train.global_batch} samples per step are work for as many GPUs at most; "
            return text + limit + "take a GPU with more memory, a larger train.global_batch, shorter samples, or a smaller student."
        settings = " ".join(f"{name}={_yaml(value)}" for name, value in cheapest.settings.items())
        return (
            text
            + f"The cheapest that does: --nodes {cheapest.nodes} --gpus {cheapest.gpus} {settings} ({cheapest.memory.bytes / GB:.1f} GB, {_duration(cheapest.cost.step)} per step)."
        )


MOST_NODES = 128
"""Where the search for a plan that fits ends."""


def plan(config: RunConfig, nodes: int, gpus: int, gpu: str, models: Models | None = None) -> Plan:
    """What a config takes on `nodes` of `gpus` GPUs each. Raises ConfigError for an unknown GPU and for models that cannot be read."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu is {gpu}, which is none of {', '.join(GPUS)}. Take the one that is nearest.")
    models = models or read_models(config)
    return Plan(config, gpu, nodes, gpus, memory_of(config, nodes * gpus, models=models), cost_of(config, nodes, gpus, GPUS[gpu], models), models)


def fastest(asked: Plan) -> Plan | None:
    """The fastest plan on the same GPUs that fits, of all ZeRO stages, micro-batches, and with or without activation checkpointing; None: none fits."""
    config, best = asked.config, None
    for micro_batch in (d for d in range(1, config.train.global_batch + 1) if config.train.global_batch % d == 0):
        if config.train.global_batch // micro_batch < asked.world_size:
            break  # config.check_ranks
        for checkpointing in (False, True):
            train = config.train.model_copy(update={"micro_batch": micro_batch, "activation_checkpointing": checkpointing})
            for student in (1, 2, 3):
                for teacher in (0, 3) if asked.models.teacher is not None else (config.zero.teacher,):
                    zero = config.zero.model_copy(update={"student": student, "teacher": teacher})
                    tried = plan(config.model_copy(update={"train": train, "zero": zero}), asked.nodes, asked.gpus, asked.gpu, asked.models)
                    if tried.fits and (best is None or tried.cost.step < best.cost.step):
                        best = tried
    return best


def cheapest(asked: Plan) -> Plan | None:
    """The plan that fits on the fewest GPUs of the kind, and of those the fastest; None where none up to MOST_NODES does."""
    in_a_node = [(1, gpus) for gpus in range(1, asked.gpus + 1) if asked.gpus % gpus == 0]
    for nodes, gpus in [*in_a_node, *((nodes, asked.gpus) for nodes in range(2, MOST_NODES + 1))]:
        found = fastest(replace(asked, nodes=nodes, gpus=gpus))
        if found is not None:
            return found
    return None


def _yaml(value: Any) -> str:
    return str(value).lower()


def _duration(seconds: float) -> str:
    for limit, unit, size in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.1f} days"
