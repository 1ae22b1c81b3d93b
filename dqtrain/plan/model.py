"""A model's parameters and layers from its config.json and the headers of its safetensors files, or by arithmetic; no torch."""

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
        """The student that keeps these layers, as `models.making.cut` makes it. Raises ConfigError for layers that are not there."""
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
