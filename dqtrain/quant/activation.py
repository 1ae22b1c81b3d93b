"""Quantization of activations: the equations, which positions are padding, and where learned scales start.

An activation x becomes integer codes c and is read back as s * (c - z), with a scale s in real units per code and a zero point
z, an integer code (0 where codes are symmetric). Dynamic scales come from the x at hand (`per_token`, `per_tensor`, and
llama.cpp's `block_32` and `block_256`); `learned` ones are Parameters and start with `calibrate`.

Rounding is half to even everywhere. Arithmetic is in fp32, or in float64 where x is.

A padded position must not move the scale of real ones. The 2-D `attention_mask` that says which are padded is known to whole
models alone, so `watch_padding` keeps it where every module inside can find it: `real_positions(x, module)`.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dqtrain.errors import ConfigError
from dqtrain.quant.grid import TINY, compute

BLOCKS = {"block_32": 32, "block_256": 256}
"""Inputs that share a scale in llama.cpp's formats of activations, Q8_0 and Q8_K."""

SCALES = ("per_token", "per_tensor", "learned", *BLOCKS)

_FOLLOWS_ACTIVATION = frozenset({"fc2", "fc_out", "down_proj", "wo", "w2", "dense_4h_to_h"})


def is_one_sided(name: str) -> bool:
    """Whether the input of the linear of this module name follows an activation function, alone or in a gated product: then most of it has one sign.

    By the last part of the name: fc2 (OPT, BART), fc_out (GPT-J), down_proj (Llama), wo (T5), w2 (Mixtral's experts), dense_4h_to_h
    (BLOOM), and c_proj of an mlp (GPT-2; attention has a c_proj too).
    """
    *above, last = name.split(".")
    return last in _FOLLOWS_ACTIVATION or (last == "c_proj" and above[-1:] == ["mlp"])


@dataclass(frozen=True)
class ActivationQuantizer:
    """How one tensor [..., features] that enters a multiplication is quantized: each of its tokens, or the whole of it.

    `place` says which one of its module, and names what is learned; `scale` is one of `SCALES`; `asymmetric` adds a zero point,
    but in blocks, which are symmetric in llama.cpp. Configurations offer 8 and 4 bits; any width from 2 to 16 works but in
    blocks. Raises ConfigError for blocks of another width than 8 bits and for an unknown scale.

    - Symmetric, dynamic: s = max|x| / qmax, qmax = 2^(bits-1) - 1, c = round(x / s) (Jacob et al., CVPR 2018, eq. 1 with zero
      point 0; the max|x| of DQ-BART and TernaryBERT).
    - Asymmetric, dynamic: low = min(x, 0), high = max(x, 0), s = (high - low) / (2^bits - 1), z = round(-low / s),
      c = clamp(round(x / s) + z, 0, 2^bits - 1) (same, section 3.1; BinaryBERT and TBT use it after GELU and softmax).
    - `learned`, symmetric: c = clamp(round(x / s), -2^(bits-1), qmax) (Esser et al., ICLR 2020, "Learned Step Size Quantization", eq. 1-3).
    - `learned`, asymmetric: c = clamp(round(x / s) + round(z), 0, 2^bits - 1) (Bhalgat et al., 2020, "LSQ+"; EfficientQAT, eq. 1-4).
    - `block_32`, Q8_0: d = max|x| / 127, c = round(x * (1 / d)), and d is rounded to fp16 for the value. `block_256`, Q8_K:
      i = 127 / max|x|, c = round(x * i), value = c * (1 / i) in fp32. Both are ggml's of
      https://github.com/ggml-org/llama.cpp/blob/01243c58/ggml/src/ggml-quants.c (`quantize_row_q8_0_ref`, `quantize_row_q8_K_ref`). Ties: Q8_K
      rounds half to even, as here. For Q8_0 the reference function rounds them away from 0 (`roundf`), the AVX and NEON code that runs on activations
      half to even (ggml-cpu/arch/x86/quants.c, arch/arm/quants.c), which is what is done here; AVX multiplies by 127 / max|x| for 1 / d, which may move a code by one where
      x / d is within an ulp of a half.

    A gradient passes a dynamic quantizer as if it were not there, and nothing is kept for it. For a learned one it passes where c
    was not clamped, and with v = x / s, per token and summed over all real ones,
    dL/ds = g * sum of dL/dy * (c - z - v where not clamped, c - z where clamped), dL/dz = g * sum of -s dL/dy where clamped;
    g = 1 / sqrt(features * qmax) (qmax: the largest code). LSQ counts all elements of x in g; features alone are
    counted here, so that the batch and the length of its texts do not change the learning rate of a step.

    An activation that is not finite makes its token NaN, or the tensor, and with it the loss: a run stops there by itself.

    A learned step is used as max(step, tiny), with the gradient passing straight through, as for weights; a zero point is rounded and kept within
    0..2^bits - 1, so that 0 has a code.
    """

    place: str
    bits: int
    scale: str
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(f"activations have scale `{self.scale}`, which is none of {', '.join(SCALES)}; set it to one of them.")
        if self.scale in BLOCKS and self.bits != 8:
            raise ConfigError(f"activations have scale {self.scale}, llama.cpp's 8-bit arithmetic, but {self.bits} bits; set bits to 8 or scale to per_token.")

    @property
    def has_zero_point(self) -> bool:
        """Whether codes are 0..2^bits - 1, beside a zero point."""
        return self.asymmetric and self.scale not in BLOCKS

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and largest code."""
        if self.has_zero_point:
            return 0, 2**self.bits - 1
        largest = 2 ** (self.bits - 1) - 1
        return (-largest - 1 if self.scale == "learned" else -largest), largest

    @property
    def learned_names(self) -> tuple[str, ...]:
        """Names of the module's Parameters [1] that are learned for this place: its step, in real units per code, and its zero point, a code."""
        if self.scale != "learned":
            return ()
        return (f"{self.place}_step", f"{self.place}_zero_point") if self.has_zero_point else (f"{self.place}_step",)

    def register(self, module: nn.Module) -> None:
        """Put what is learned on the module: fp32 [1] on the device of its other parameters, NaN until `calibrate` has seen the place."""
        if not self.learned_names:
            return
        device = next((p.device for p in module.parameters()), None)
        for name in self.learned_names:
            module.register_parameter(name, nn.Parameter(torch.full((1,), math.nan, device=device)))
        module.__dict__.setdefault("learned_quantizers", {})[self.place] = self

    def learned_values(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The (step,) or (step, zero_point) that count now, each [1] and constant: copies, which ZeRO-3 does not empty after the forward."""
        step, *zero_point = (compute(getattr(module, name).detach()) for name in self.learned_names)
        return step.clamp_min(TINY), *(z.round().clamp(*self.code_range) for z in zero_point)

    def __call__(self, x: Tensor, module: nn.Module, is_real: Tensor | None = None) -> Tensor:
        """The fake-quantized x [..., features], in its dtype, with the gradients above.

        `module` holds what is learned. `is_real`, bool over the leading axes of x ([batch, tokens] or [batch * tokens]), says which
        positions are no padding: the others move no `per_tensor` scale, whose range clamps them, and no learned one. None: all are real.
        Of several calls on one x (queries, keys and values read the same) dynamic scales give one and the same memory.
        Raises ConfigError where blocks do not divide the features.
        """
        if x.numel() == 0 and self.scale != "learned":  # a learned step takes part in backward even so: ZeRO waits for its gradient on every rank
            return x
        if self.scale == "learned":
            if _Calibration.running is not None:
                _Calibration.running.see(self, x, module, is_real)
                return x
            calibrated = module.__dict__.setdefault("calibrated_places", set())
            if self.place not in calibrated:
                check_calibrated(module)
                calibrated.add(self.place)
            return _Learned.apply(x, self, self.learned_values(module), is_real, *(getattr(module, name) for name in self.learned_names))
        self.check_features(x.shape[-1], f"{type(module).__name__}'s {self.place}")
        value = _remembered(self, x, is_real)
        return _StraightThrough.apply(x, value) if torch.is_grad_enabled() and x.requires_grad else value

    def check_features(self, features: int, name: str) -> None:
        """Raise ConfigError, with `name`, where blocks do not divide the features."""
        block = BLOCKS.get(self.scale, 1)
        if features % block:
            raise ConfigError(
                f"{name} has {features} input features, which blocks of {block} do not divide. Set the scale of activations to "
                f"{'block_32 or ' if block == 256 and features % 32 == 0 else ''}per_token, for all or with quant.overrides for these layers alone."
            )

    @torch.no_grad()
    def value(self, x: Tensor, learned: tuple[Tensor, ...] = (), is_real: Tensor | None = None) -> Tensor:
        """What `__call__` gives, with the present `learned_values`; not differentiable, and made anew at each call."""
        v = compute(x)
        if self.scale in BLOCKS:
            return self._block_value(v).to(x.dtype)
        if self.scale == "learned":
            scale, zero_point = learned[0], learned[1] if len(learned) > 1 else None
        else:
            scale, zero_point = self._dynamic(v, is_real)
        low, high = self.code_range
        level = (v / scale).round_()  # code - zero_point
        if zero_point is None:
            level.clamp_(low, high)
        else:
            level = torch.clamp(level, low - zero_point, high - zero_point)
        return level.mul_(scale).to(x.dtype)

    def _dynamic(self, v: Tensor, is_real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point) of a `per_token` or `per_tensor` x."""
        if self.scale == "per_tensor":
            # 0 lies in every range, so that what is padded may be seen as 0.
            low, high = torch.aminmax(v if is_real is None else torch.where(_over(is_real, v), v, 0))
        else:
            low, high = torch.aminmax(v, dim=-1, keepdim=True)
        low, high = low.clamp_max(0), high.clamp_min(0)
        if not self.has_zero_point:
            return _divided(torch.maximum(-low, high), self.code_range[1]).clamp_min(TINY), None
        scale = _divided(high - low, self.code_range[1]).clamp_min(TINY)
        return scale, (-low / scale).round_()

    def _block_value(self, v: Tensor) -> Tensor:
        blocks = v.unflatten(-1, (-1, BLOCKS[self.scale]))
        largest = blocks.abs().amax(-1, keepdim=True)
        if self.scale == "block_32":
            scale = _divided(largest, 127)
            per_unit = 1 / scale
            scale = scale.half().to(v.dtype)
        else:
            per_unit = torch.full_like(largest, 127) / largest
            scale = 1 / per_unit
        # Where all is 0, or so little that 1 / d overflows, codes are 0 (and ggml's d is 0).
        per_unit = torch.where(per_unit.isinf(), 0, per_unit)
        return (blocks * per_unit).round_().mul_(torch.where(per_unit == 0, 0, scale)).view(v.shape)


def _divided(x: Tensor, number: int) -> Tensor:
    """x / number, rounded once: by a Python number torch multiplies with its reciprocal on a GPU, and codes would depend on the device."""
    return x / torch.full_like(x, number)


def _over(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over the leading axes of x, so shaped that it broadcasts over all of them."""
    return mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim))


class _StraightThrough(torch.autograd.Function):
    """The value, with the gradient of x: each call has its own node, so that gradients arrive where that call's x came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: ActivationQuantizer, learned: tuple[Tensor, ...], is_real: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quantizer, ctx.learned, ctx.is_real, ctx.dtypes = quantizer, learned, is_real, [p.dtype for p in parameters]
        return quantizer.value(x, learned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (low, high) = ctx.saved_tensors, ctx.quantizer.code_range
        scale, zero_point = ctx.learned[0], ctx.learned[1] if len(ctx.learned) > 1 else None
        v, g = compute(x) / scale, compute(grad)
        if zero_point is None:
            level = v.round().clamp_(low, high)
            inside = (v > low) & (v < high)
        else:
            level = torch.clamp(v.round(), low - zero_point, high - zero_point)
            inside = level == v.round()
        grad_x = torch.where(inside, g, 0).to(x.dtype)
        if ctx.is_real is not None:
            g = torch.where(_over(ctx.is_real, g), g, 0)
        slopes = [torch.where(inside, level - v, level)]
        if zero_point is not None:
            slopes.append(torch.where(inside, 0, -scale))
        factor = 1 / math.sqrt(x.shape[-1] * high)
        sums = [(slope * g).sum(dtype=torch.float64).mul_(factor).to(dtype).view(1) for slope, dtype in zip(slopes, ctx.dtypes, strict=True)]
        return grad_x, None, None, None, *sums


class _Remembered(NamedTuple):
    memory: "weakref.ref[Any]"  # storage of the values
    stride: tuple[int, ...]
    is_real: Tensor | None  # kept, so that its address, which is in the key, stays its own


def _remembered(quantizer: ActivationQuantizer, x: Tensor, is_real: Tensor | None) -> Tensor:
    """The quantized values of x, those of an earlier call while something else keeps them: three layers that read one x keep one copy for backward.

    They are remembered on the memory of x rather than on the Tensor, since DeepSpeed gives each layer a Tensor of its own, and
    weakly, so that memory that outlives the layers (what activation checkpointing keeps) holds no copy.
    """
    if x.is_inference():  # nothing says whether it was changed
        return quantizer.value(x, (), is_real)
    seen = is_real if quantizer.scale == "per_tensor" else None
    mask = None if seen is None else (seen.data_ptr(), seen.shape, seen.stride(), seen._version)
    rule = (quantizer.bits, quantizer.scale, quantizer.has_zero_point)
    key = (rule, x.dtype, x.shape, x.stride(), x.storage_offset(), x._version, mask)
    memory: Any = x.untyped_storage()
    memo: dict[Any, _Remembered] = memory.__dict__.setdefault("_dqtrain_quantized", {})
    kept = memo[key].memory() if key in memo else None
    if kept is not None:
        with torch.no_grad():
            return torch.empty(0, dtype=x.dtype, device=x.device).set_(kept, 0, x.shape, memo[key].stride)
    value = quantizer.value(x, (), is_real)
    for old in [old for old, remembered in memo.items() if remembered.memory() is None]:
        del memo[old]
    memo[key] = _Remembered(weakref.ref(value.untyped_storage()), value.stride(), seen)
    return value


class PaddingWatch:
    """Which positions of a module's latest forward are real, by the 2-D masks that it was called with; put on it by `watch_padding`.

    A decoder's own mask counts, that of its encoder where x is what the encoder gave. They stay until the next forward of that module, since
    activation checkpointing runs the layers again in backward, after it. So a second forward of the same module must not come between the two.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names  # of the arguments of the module's forward, in order
        self.told: Tensor | None = None  # by `padding_of`
        self._forget()

    def _forget(self) -> None:
        self.mask: Tensor | None = None  # bool [batch, tokens]
        self.memory_mask: Tensor | None = None  # bool [batch, tokens of the encoder]
        self.memory: tuple[int, torch.Size] | None = None  # what the encoder gave; its address, which a detached Tensor shares

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: remember the masks."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        # What an encoder-decoder model itself holds, its head, reads what the decoder gave.
        prefix = "decoder_" if "decoder_attention_mask" in self.names else ""
        ids = given.get(f"{prefix}input_ids")
        ids = given.get(f"{prefix}inputs_embeds") if ids is None else ids
        self._forget()
        self.mask = _as_bool(given.get(f"{prefix}attention_mask")) if self.told is None else self.told
        if self.mask is not None and isinstance(ids, Tensor) and 0 < ids.shape[1] < self.mask.shape[1]:
            self.mask = self.mask[:, -ids.shape[1] :]  # the mask has the tokens in the cache too
        states = given.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            self.memory, self.memory_mask = (states.data_ptr(), states.shape), _as_bool(given.get("encoder_attention_mask"))

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Which leading positions of x [batch, tokens, ...] or [batch * tokens, ...] are real; None: all, or the shape does not fit."""
        mask = self.mask
        if self.memory is not None and self.memory == (x.data_ptr(), x.shape):
            mask = self.memory_mask
        if mask is None or x.ndim < 2:
            return None
        if x.ndim > 2 and x.shape[:2] == mask.shape:
            return mask
        return mask.reshape(-1) if x.shape[0] == mask.numel() else None


@contextmanager
def padding_of(model: nn.Module, is_real: Tensor) -> Iterator[None]:
    """For forwards of a causal model without an attention mask: within it these positions [batch, tokens] are real, the others padding."""
    watches = {watch for module in model.modules() if (watch := module.__dict__.get("padding_watch")) is not None}
    for watch in watches:
        watch.told = is_real
    try:
        yield
    finally:
        for watch in watches:
            watch.told = None


def _as_bool(mask: Any) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def watch_padding(model: nn.Module) -> None:
    """Let every module inside `model` find the padding mask of the forward that runs it (`real_positions`).

    Masks are taken from the calls of `model` and of each transformers model within it (BartEncoder, BartDecoder, T5Stack, GPT2Model,
    LlamaModel, ...) whose forward has an argument `attention_mask`; a module follows the innermost one that holds it. The
    hooks go with a copy of the model and with its pickle, the masks do not. Calling it again changes nothing.
    """
    _watch(model, None, is_root=True)


def _watch(module: nn.Module, outer: PaddingWatch | None, is_root: bool = False) -> None:
    watch = outer
    if is_root or isinstance(module, PreTrainedModel):
        names = _arguments(module)
        if "attention_mask" in names:
            owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
            watch = next((owner for owner in owners if isinstance(owner, PaddingWatch)), None)
            if watch is None:
                watch = PaddingWatch(names)
                module.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
    module.__dict__["padding_watch"] = watch
    for child in module.children():
        _watch(child, watch)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order: of the class itself where a mixin's forward takes anything."""
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__:
            names = tuple(inspect.signature(cls.__dict__["forward"]).parameters)[1:]
            if "attention_mask" in names:
                return names
    return ()


def real_positions(x: Tensor, module: nn.Module) -> Tensor | None:
    """Which positions of x, an input of `module`, are no padding in the forward that runs it.

    Bool over the leading axes of x: [batch, tokens] for [batch, tokens, ...], [batch * tokens] for a flattened x; None where all are, or where nothing
    is known of a tensor of this shape.
    """
    watch = module.__dict__.get("padding_watch")
    return None if watch is None else watch.mask_for(x)


@dataclass
class _Seen:
    """What one learned quantizer has seen."""

    sum_of_steps: Tensor | float = 0.0
    num_forwards: int = 0
    low: Tensor | float = 0.0
    high: Tensor | float = 0.0


@dataclass
class _Calibration:
    """What all learned quantizers have seen, by (id of the module, place)."""

    running: ClassVar["_Calibration | None"] = None
    seen: dict[tuple[int, str], _Seen] = field(default_factory=dict)

    @torch.no_grad()
    def see(self, quantizer: ActivationQuantizer, x: Tensor, module: nn.Module, is_real: Tensor | None) -> None:
        v = compute(x) if is_real is None else compute(x)[is_real]
        if v.numel() == 0:
            return
        if not bool(v.isfinite().all()):
            raise ConfigError(
                f"{type(module).__name__}'s {quantizer.place} holds NaN or infinite values while calibrating. Start from a model and data that are sound."
            )
        seen = self.seen.setdefault((id(module), quantizer.place), _Seen())
        if quantizer.has_zero_point:
            low, high = torch.aminmax(v)
            seen.low, seen.high = low.clamp_max(seen.low), high.clamp_min(seen.high)
        else:
            seen.sum_of_steps = seen.sum_of_steps + _best_step(v, quantizer)
        seen.num_forwards += 1

    def result(self, quantizer: ActivationQuantizer, module: nn.Module) -> tuple[Tensor | float, ...] | None:
        """(step,) or (step, zero_point); None where it never ran."""
        seen = self.seen.get((id(module), quantizer.place))
        if seen is None:
            return None
        if not quantizer.has_zero_point:
            return (seen.sum_of_steps / seen.num_forwards,)
        step = torch.as_tensor((seen.high - seen.low) / quantizer.code_range[1]).clamp_min(TINY)
        return step, -seen.low / step


STEPS_TRIED = 16
"""Steps that `calibrate` tries for what one forward brings."""


def _best_step(v: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Of the steps between LSQ's start, 2 mean|v| / sqrt(qmax), and max|v| / qmax, the one with the least squared error."""
    low, high = quantizer.code_range
    size = v.abs()
    start, end = 2 * size.mean() / math.sqrt(high), size.max() / high
    steps = [(start + (end - start) * i / (STEPS_TRIED - 1)).clamp_min(TINY) for i in range(STEPS_TRIED)]
    errors = torch.stack([(torch.round(v / step).clamp_(low, high) * step - v).square_().mean() for step in steps])
    return torch.stack(steps)[errors.argmin()]


def _learned_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module, ActivationQuantizer]]:
    for name, module in model.named_modules():
        for quantizer in module.__dict__.get("learned_quantizers", {}).values():
            yield f"{name}." if name else "", module, quantizer


def calibrate(model: nn.Module, run: Callable[[], None]) -> None:
    """Set every learned step and zero point that is not set yet, of a model that is whole, to what `calibrated` finds."""
    names = {prefix + name for prefix, module, q in _learned_quantizers(model) for name in q.learned_names if bool(getattr(module, name).isnan())}
    for name, value in calibrated(model, run, names).items():
        model.get_parameter(name).data.copy_(value)


def calibrated(model: nn.Module, run: Callable[[], None], names: Collection[str]) -> dict[str, Tensor]:
    """Where the learned steps and zero points of these names start, each [1], by what `run` shows them: forwards of `model` on real data, padding as in training.

    Runs once, in eval mode and without gradients; places with learned scales stay float meanwhile. A step starts where the squared error is least,
    between LSQ's own start and max|x| / qmax (at 8 bits LSQ's clips far too much), in the mean over the forwards; with a zero point both
    follow the least and largest value seen, with 0 between them. On several ranks give each the same data.
    Raises ConfigError for a quantizer that no forward ran.
    """
    unset = [(prefix, module, q) for prefix, module, q in _learned_quantizers(model) if any(prefix + name in names for name in q.learned_names)]
    if not unset:
        return {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    _Calibration.running = calibration = _Calibration()
    try:
        with torch.no_grad():
            run()
    finally:
        _Calibration.running = None
        for module, mode in modes.items():
            module.training = mode
    idle, starts = [], {}
    for prefix, module, quantizer in unset:
        found = calibration.result(quantizer, module)
        if found is None:
            idle += [prefix + name for name in quantizer.learned_names]
            continue
        for name, value in zip(quantizer.learned_names, found, strict=True):
            starts[prefix + name] = torch.as_tensor(value).view(1)
    if idle:
        raise ConfigError(
            f"{len(idle)} learned activation scales saw nothing real while calibrating: {_first(idle)}. "
            "Run the whole model on texts that are not all padding, or set the activations of these layers to scale: per_token."
        )
    return starts


def check_calibrated(model: nn.Module) -> None:
    """Raise ConfigError naming the first learned steps and zero points that are not set yet."""
    unset = [
        prefix + name for prefix, module, quantizer in _learned_quantizers(model) for name in quantizer.learned_names if getattr(module, name).isnan().any()
    ]
    if unset:
        raise ConfigError(
            f"{len(unset)} learned activation scales are not set: {_first(unset)}. Call dqtrain.quant.activation.calibrate with some real batches first."
        )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
