"""What families of language models share, as nodes of ONNX: activations, norms, attention with a cache, and who sees whom."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqtrain.artifact.graphs.graph import Graph

LOWEST = float(np.finfo(np.float32).min)
"""What is added to the score of a key that is not to be seen."""


def _gelu(approximate: str) -> Callable[[Graph, str], str]:
    return lambda g, x: g.op("Gelu", x, approximate=approximate)


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), _gelu("tanh")),
    "gelu": _gelu("none"),
    "relu": lambda g, x: g.op("Relu", x),
    **dict.fromkeys(("silu", "swish"), lambda g, x: g.op("Mul", x, g.op("Sigmoid", x))),
}
"""transformers' names of those that are computed."""


def layer_norm(g: Graph, x: str, module: str, epsilon: float = 1e-5) -> str:
    """LayerNorm of a module."""
    return g.op("LayerNormalization", x, g.vector(f"{module}.weight"), g.vector(f"{module}.bias"), axis=-1, epsilon=epsilon)


def rms_norm(g: Graph, x: str, module: str, epsilon: float) -> str:
    """LlamaRMSNorm and T5LayerNorm of a module."""
    return g.op("RMSNormalization", x, g.vector(f"{module}.weight"), axis=-1, epsilon=epsilon)


def counted(g: Graph, start: str, stop: str) -> str:
    """start, start + 1, ..., stop - 1."""
    return g.op("Range", start, stop, g.constant(1))


def sees(g: Graph, queries: str, keys: str, window: int | None = None) -> str:
    """Whether each token sees each key: itself and those before it, the last `window` of them; bool [tokens, keys] of their numbers."""
    rows = g.op("Unsqueeze", queries, g.constant([1]))
    seen = g.op("LessOrEqual", keys, rows)
    return seen if window is None else g.op("And", seen, g.op("Less", g.op("Sub", rows, keys), g.constant(window)))


def is_real(g: Graph, mask: str) -> str:
    """bool [batch, 1, 1, keys] of a mask int64 [batch, keys]."""
    return g.op("Unsqueeze", g.op("Cast", mask, to=g.BOOL), g.constant([1, 2]))


def bias_of(g: Graph, seen: str, otherwise: str | None = None) -> str:
    """What is added to scores: nothing (or `otherwise`) where a key is seen."""
    return g.op("Where", seen, otherwise or g.constant(0, np.float32), g.constant(LOWEST, np.float32))


def for_each(g: Graph, bias: str, tokens: str) -> str:
    """A bias [batch, 1, 1, keys] for each of so many tokens, as the kernel of Attention wants it."""
    one = g.constant([1])
    return g.op("Expand", bias, g.op("Concat", one, one, g.op("Reshape", tokens, one), one, axis=0))


@dataclass(frozen=True)
class Heads:
    """The shape of attention."""

    queries: int
    keys: int
    width: int
    scale: float


def attention(g: Graph, q: str, k: str, v: str, bias: str, heads: Heads, cache: str | None = None) -> str:
    """Attention of q [batch, tokens, heads x width] to k and v; with a `cache` of that name, which gets them, to those in it, too."""
    form: dict[str, Any] = {"q_num_heads": heads.queries, "kv_num_heads": heads.keys, "scale": heads.scale}
    if cache is None:
        return g.op("Attention", q, k, v, bias, **form)
    shape = ("batch", heads.keys, "past", heads.width)
    past = [g.input(f"past_key_values.{cache}.{part}", shape) for part in ("key", "value")]
    present = [f"present.{cache}.{part}" for part in ("key", "value")]
    out, *_ = g.ops("Attention", q, k, v, bias, *past, names=[f"attention.{cache}", *present], **form)
    for name in present:
        g.output(name, ("batch", heads.keys, "total", heads.width))
    return out


def logits(g: Graph, x: str, table: str, bias: str | None = None) -> None:
    """The value `logits`, of the head: a module of its own, or the table of word embeddings; and a stored vector of this name behind it, if there is one."""
    head = "lm_head.weight" if g.has("lm_head.weight") else table
    if bias is not None and g.has(bias):
        g.op("Add", g.linear(x, "lm_head", head), g.vector(bias), name="logits")
    else:
        g.linear(x, "lm_head", head, name="logits")
