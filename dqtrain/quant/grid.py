"""The equations of weight quantization: grids, their codes, and the gradients that pass through them.

A weight w becomes integer codes c and is read back as s * (c - z + offset), with a scale s in real units per code, a zero
point z (an integer code; 0 in most grids) and an offset of 0, or of 1/2 in the grids that have no level at 0. A `Grid` says
where s and z come from and what is learned; `WeightQuantizer` is one grid at one width on one weight.

Several matrices may lie in one weight [experts, rows, columns]; each has scales of its own. `row_axis` is the axis of a
matrix's *outputs*, of its two: 0 for Linear and Embedding, 1 for Conv1D, which stores its weight transposed. Scales are flat,
in the order of the weight: [matrices], [matrices * rows] or [matrices * rows * groups] (rows last where row_axis is 1).

A weight may be rounded to bf16 first, straight-through: then a partitioned one can be gathered in two bytes per element.
Arithmetic is in fp32, or in float64 where the weight is; sums are in float64 and rounded once, so that their order (threads,
device) has next to no chance to move a scale. Training and export share these functions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dqtrain.config import BITS_OF_GRID, Bits, WeightQuant
from dqtrain.errors import ConfigError

Granularity = Literal["per_tensor", "per_row", "per_group"]
"""What shares one scale: a whole matrix, each row of outputs, or each `group_size` inputs of a row."""

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65280.0
"""fp16's smallest normal number, and the largest one it holds that has a bf16 significand."""

TINY = torch.finfo(torch.float32).tiny

CHUNK_ELEMENTS = 2**17
"""Elements worked on at a time on a CPU: few enough to stay in a core's cache, where every pass but the first is cheap."""


@dataclass(frozen=True)
class Levels:
    """Codes low..high, integers; the level of a code is code - zero_point + offset."""

    low: int
    high: int
    offset: float = 0.0

    @property
    def count(self) -> int:
        """Number of codes."""
        return self.high - self.low + 1

    @property
    def largest(self) -> float:
        """Largest magnitude of a level where the zero point is 0."""
        return max(abs(self.low + self.offset), abs(self.high + self.offset))

    @property
    def integers(self) -> tuple[int, int]:
        """Least and largest level as integers where the zero point is 0: of scales, or of half scales where there is an offset."""
        return (2 * self.low + 1, 2 * self.high + 1) if self.offset else (self.low, self.high)


class Scales(NamedTuple):
    """What turns weights into codes and back, each flat [scales]; constants to autograd."""

    scale: Tensor  # real units per code
    step: Tensor  # what a weight is divided by before it is rounded: the scale, but in TWN
    zero_point: Tensor | None  # integers, in a float dtype
    unit: Tensor | float  # d(scale)/d(learned)


def compute(tensor: Tensor) -> Tensor:
    """In the precision of this file's arithmetic: float64 stays, anything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def round_to_bf16(tensor: Tensor) -> Tensor:
    """Nearest bf16 values, ties to even, in the tensor's own dtype."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def snap(scale: Tensor) -> Tensor:
    """Nearest values that fp32, fp16 and bf16 all hold exactly, ties to even, within [2^-14, 65280]; 0 and below become 2^-14."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).to(scale.dtype)


@dataclass(frozen=True)
class Blocks:
    """Which elements of a weight share one scale."""

    granularity: Granularity
    row_axis: int = 0
    group_size: int | None = None

    def view(self, weight: Tensor) -> Tensor:
        """[..., a, b] -> [matrices, rows, groups, inputs], or [matrices, groups, inputs, rows] where row_axis is 1: whole axes share a scale, or none."""
        a, b = weight.shape[-2:]
        size = self.group_size or (b if self.row_axis == 0 else 1)
        return weight.reshape(-1, a, b // size, size) if self.row_axis == 0 else weight.reshape(-1, a // size, size, b)

    def scale_shape(self, view: Tensor) -> list[int]:
        """Shape of the scales of a `view`, over which it broadcasts."""
        if self.granularity == "per_tensor":
            shared: tuple[int, ...] = (1, 2, 3)
        elif self.granularity == "per_row":
            shared = (2, 3) if self.row_axis == 0 else (1, 2)
        else:
            shared = (3,) if self.row_axis == 0 else (2,)
        return [1 if axis in shared else size for axis, size in enumerate(view.shape)]

    def spread(self, values: Tensor, view: Tensor) -> Tensor:
        """Flat values, one for each scale, shaped so that they broadcast over a `view`."""
        return values.view(self.scale_shape(view))

    def pieces(self, *views: Tensor) -> Iterator[list[Tensor]]:
        """Corresponding pieces [rows, ., .] of views and what is spread over them, small enough for a core's cache; the first one sets the shape."""
        matrices, rows, *rest = views[0].shape
        size = max(1, CHUNK_ELEMENTS // max(1, math.prod(rest))) if views[0].device.type == "cpu" else max(1, rows)
        for matrix in range(matrices):
            for start in range(0, rows, size):
                yield [(v[matrix] if len(v) > 1 else v[0])[slice(start, start + size) if v.shape[1] > 1 else slice(None)] for v in views]

    def reduce(self, function: Callable[..., Tensor], *views: Tensor, largest: bool = False) -> Tensor:
        """Sum, or largest value, of `function` of the views over what shares a scale: float64, flat [scales]."""
        result = torch.full(self.scale_shape(views[0]), -torch.inf if largest else 0.0, dtype=torch.float64, device=views[0].device)
        for *pieces, out in self.pieces(*views, result):
            axes = [axis for axis in range(3) if out.shape[axis] == 1]
            values = function(*pieces)
            if largest:
                torch.maximum(out, values.amax(axes, keepdim=True), out=out)
            else:
                out += values.sum(axes, keepdim=True, dtype=torch.float64)
        return result.flatten()

    def count(self, view: Tensor) -> int:
        """Elements that share a scale."""
        return view.numel() // math.prod(self.scale_shape(view))

    def mean_abs(self, view: Tensor) -> Tensor:
        """Mean of |w| over what shares a scale, flat [scales]."""
        return (self.reduce(torch.abs, view) / self.count(view)).to(view.dtype)

    def max_abs(self, view: Tensor) -> Tensor:
        """Largest |w| of what shares a scale, flat [scales]."""
        return self.reduce(torch.abs, view, largest=True).to(view.dtype)


class Grid:
    """Where scales come from. A grid either computes its scale from the weight, or learns a parameter: scale = learned * `unit`.

    Unless a grid says otherwise the gradient of a weight passes straight through everywhere.
    """

    learned: ClassVar[tuple[str, ...]] = ()
    """Names of the learned parameters, each [scales]; the scale's own first."""

    def levels(self, bits: Bits) -> Levels:
        """Codes at a width: symmetric around 0, 2^bits - 1 of them, 3 for 2 bits."""
        high = 1 if bits == "ternary" else 2 ** (bits - 1) - 1
        return Levels(-high, high)

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:
        """Scale of a grid that learns none, flat [scales]."""
        raise NotImplementedError

    def step(self, view: Tensor, blocks: Blocks, scale: Tensor) -> Tensor:
        """What weights are divided by before rounding, flat [scales]."""
        return scale

    def zero_point(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor | None:
        """Zero point of a grid that learns none, flat [scales]; also where a learned one starts."""
        return None

    def unit(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor | float:
        """The scale for a learned parameter of 1: a number, or flat [scales], held constant in backward."""
        return 1.0

    def reach(self, levels: Levels) -> tuple[float, float] | None:
        """The values of w / s between which the gradient of a weight passes; None: everywhere."""
        return None

    def gradient_scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> float:
        """Factor of the learned parameters' gradient."""
        return 1.0


class Dynamic(Grid):
    """clip alpha = gamma * mean|w| with gamma learned, s = alpha / qmax (QuantGPT: Tao et al., ACL 2022, section 3.2).

    dL/dgamma = mean|w| / qmax * sum of dL/dw_q * (c - w/s inside the clip, c outside); mean|w| is held constant.
    """

    learned = ("gamma",)

    def unit(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102 - said in Grid
        return blocks.mean_abs(view) / levels.high

    def reach(self, levels: Levels) -> tuple[float, float]:  # noqa: D102
        return levels.low, levels.high


class Twn(Grid):
    """Ternary: codes of |w| > 0.7 mean|w| are not 0, and s = mean|w| of those (Li and Liu, 2016, "Ternary Weight Networks", eq. 5-6; DQ-BART, without its fixed clamp to +-2.5)."""

    def step(self, view: Tensor, blocks: Blocks, scale: Tensor) -> Tensor:  # noqa: D102
        return 2 * 0.7 * blocks.mean_abs(view)  # round(w / step) is 0 up to half a step

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        threshold = blocks.spread(0.7 * blocks.mean_abs(view), view)
        total = blocks.reduce(lambda w, t: w.abs() * (w.abs() > t), view, threshold)
        return (total / blocks.reduce(lambda w, t: w.abs() > t, view, threshold).clamp_min(1)).to(view.dtype)


class MinMax(Grid):
    """s = max|w| / qmax: nothing is clipped (Jacob et al., CVPR 2018, eq. 1 with zero point 0; DQ-BART's 8 bits)."""

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        return blocks.max_abs(view) / levels.high


class MinMaxAffine(Grid):
    """s = (max w - min w) / (2^bits - 1), z = round(low - min w / s), with 0 inside the range (Jacob et al., CVPR 2018, eq. 1 and section 3.1)."""

    def levels(self, bits: Bits) -> Levels:  # noqa: D102
        assert isinstance(bits, int)
        return Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def _range(self, view: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        return blocks.reduce(torch.neg, view, largest=True).clamp_min(0), blocks.reduce(torch.clone, view, largest=True).clamp_min(0)

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        below, above = self._range(view, blocks)
        return ((below + above) / (levels.count - 1)).to(view.dtype)

    def zero_point(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        below, above = self._range(view, blocks)
        return (levels.low + below / ((below + above) / (levels.count - 1)).clamp_min(TINY)).to(view.dtype)


class Pact(Grid):
    """A learned clip alpha, s = alpha / qmax (Choi et al., 2018, "PACT", eq. 3, one clip for both signs).

    dL/dalpha = sum of dL/dw_q * sign(w) over the clipped weights alone; those have no gradient of their own. The paper's fixed
    start of 2.5 suits activations: here alpha starts where the squared error is least.
    """

    learned = ("clip",)

    def unit(self, view: Tensor, blocks: Blocks, levels: Levels) -> float:  # noqa: D102
        return 1 / levels.high

    def reach(self, levels: Levels) -> tuple[float, float]:  # noqa: D102
        return levels.low, levels.high


class Lsq(Grid):
    """A learned step s, codes -2^(bits-1)..2^(bits-1)-1 (Esser et al., ICLR 2020, "Learned Step Size Quantization", eq. 1-3); ternary -1..1.

    dL/ds = g * sum of dL/dw_q * (c - w/s inside the range, c outside), g = 1 / sqrt(weights per scale * high).
    """

    learned = ("step",)

    def levels(self, bits: Bits) -> Levels:  # noqa: D102
        return Levels(-1, 1) if bits == "ternary" else Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def reach(self, levels: Levels) -> tuple[float, float]:  # noqa: D102
        return levels.low, levels.high

    def gradient_scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> float:  # noqa: D102
        return 1 / math.sqrt(blocks.count(view) * levels.high)


class Laq(Grid):
    """s that minimises the squared error by alternation: codes for the scale, then s = sum(c w) / sum(c c), ten times.

    Loss-aware quantization (Hou and Kwok, ICLR 2018, section 3.2) with the identity as curvature, as QuantGPT's baseline.
    """

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        if levels.high > 7:  # ten times hardly move so fine a scale: what clips nothing is nearer
            scale = blocks.max_abs(view) / levels.high
        else:
            scale = blocks.mean_abs(view) * ({1: 1.55, 3: 2.3, 7: 3.1}[levels.high] / levels.high)
        for _ in range(10):
            spread = blocks.spread(scale.clamp_min(TINY), view)
            above = blocks.reduce(lambda w, s: w * level_of(w, s, None, levels), view, spread)
            below = blocks.reduce(lambda w, s: level_of(w, s, None, levels).square_(), view, spread)
            scale = torch.where(below > 0, above / below.clamp_min(1), scale).to(view.dtype)
        return scale


class Mean43(Grid):
    """Ternary: s = 4/3 mean|w|; binary: levels +-mean|w| by sign, 0 being positive (TBT: Liu et al., ACL 2023)."""

    def levels(self, bits: Bits) -> Levels:  # noqa: D102
        return Levels(-1, 0, 0.5) if bits == 1 else super().levels(bits)

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        return blocks.mean_abs(view) * (2 if levels.offset else 4 / 3)


class AbsMean(Grid):
    """Ternary: s = mean|w| (BitNet b1.58: Ma et al., 2024, eq. 1-3)."""

    def scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> Tensor:  # noqa: D102
        return blocks.mean_abs(view)


class Seq(Grid):
    """A learned clip alpha that the levels stretch over: 4 at +-alpha/4 and +-3 alpha/4, or 3 at 0 and +-2 alpha/3 (ParetoQ: Liu et al., 2025, section 3.2).

    s = alpha / n with n = 2, or 3/2 for ternary; gradients pass where |w| < 0.99 alpha. dL/dalpha = g / n * sum of dL/dw_q *
    (level - w/s inside, level outside), g = 1 / sqrt(weights of the whole matrix * high).
    """

    learned = ("clip",)

    def levels(self, bits: Bits) -> Levels:  # noqa: D102
        return Levels(-2, 1, 0.5) if bits == 2 else Levels(-1, 1)

    def _stretch(self, levels: Levels) -> float:
        return 2.0 if levels.offset else 1.5

    def unit(self, view: Tensor, blocks: Blocks, levels: Levels) -> float:  # noqa: D102
        return 1 / self._stretch(levels)

    def reach(self, levels: Levels) -> tuple[float, float]:  # noqa: D102
        return -0.99 * self._stretch(levels), 0.99 * self._stretch(levels)

    def gradient_scale(self, view: Tensor, blocks: Blocks, levels: Levels) -> float:  # noqa: D102
        return 1 / math.sqrt(view[0].numel() * levels.high)


class Affine(MinMaxAffine):
    """Learned step s and zero point z, c = clamp(round(w / s) + round(z)) (EfficientQAT: Chen et al., ACL 2025, eq. 1-4).

    Where nothing is clamped, dL/ds = sum of dL/dw_q * (c - z - w/s), else (c - z); dL/dz = sum of -s dL/dw_q where clamped.
    """

    learned = ("step", "zero_point")

    def reach(self, levels: Levels) -> tuple[float, float]:  # noqa: D102
        return levels.low - 0.5, levels.high + 0.5  # before the zero point is added


GRIDS: dict[str, Grid] = {
    "dynamic": Dynamic(),
    "twn": Twn(),
    "minmax": MinMax(),
    "minmax_affine": MinMaxAffine(),
    "pact": Pact(),
    "lsq": Lsq(),
    "laq": Laq(),
    "mean43": Mean43(),
    "absmean": AbsMean(),
    "seq": Seq(),
    "affine": Affine(),
}
assert GRIDS.keys() == BITS_OF_GRID.keys() == set(get_args(WeightQuant.model_fields["grid"].annotation))


def level_of(weight: Tensor, step: Tensor, zero_point: Tensor | None, levels: Levels, out: Tensor | None = None) -> Tensor:
    """code - zero_point + offset of each weight, in the weight's float dtype; round half to even, or to the half-step between two codes."""
    level = torch.div(weight, step, out=out)
    if levels.offset:
        return level.floor_().clamp_(levels.low, levels.high).add_(levels.offset)
    if zero_point is None:
        return level.round_().clamp_(levels.low, levels.high)
    return torch.clamp(level.round_(), levels.low - zero_point, levels.high - zero_point, out=level)


@dataclass(frozen=True)
class WeightQuantizer:
    """How one weight [rows, columns] or [matrices, rows, columns] becomes codes. What is learned lies beside the weight, one vector for each name in `learned`."""

    grid: str
    bits: Bits
    granularity: Granularity
    group_size: int | None
    row_axis: int  # of the two axes of a matrix, that of its outputs
    portable: bool
    rounded: bool = False  # the weight is rounded to bf16 before anything else

    @property
    def levels(self) -> Levels:
        """Codes and offset."""
        return GRIDS[self.grid].levels(self.bits)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of what is learned."""
        return GRIDS[self.grid].learned

    @property
    def has_zero_points(self) -> bool:
        """Whether each scale has a zero point, which is one of its codes."""
        return isinstance(GRIDS[self.grid], MinMaxAffine)

    @property
    def dtype(self) -> torch.dtype:
        """The smaller of bf16 and fp32 that holds its values: a snapped scale has the 8 significant bits of bf16, so that its multiples by up to 2, a power, have them too."""
        low, high = self.levels.integers
        return torch.bfloat16 if self.portable and not self.has_zero_points and max(-low, high) <= 2 else torch.float32

    @property
    def blocks(self) -> Blocks:
        """What shares a scale."""
        return Blocks(self.granularity, self.row_axis, self.group_size)

    def num_scales(self, shape: tuple[int, ...], name: str = "weight") -> int:
        """Scales of a weight of this shape. Raises ConfigError, with `name`, when the group size does not divide its inputs."""
        inputs = shape[-1 - self.row_axis]
        if self.group_size and inputs % self.group_size:
            sizes = [size for size in range(1, inputs + 1) if inputs % size == 0]
            nearest = min(sizes, key=lambda size: abs(size - self.group_size))  # type: ignore[operator]
            raise ConfigError(f"{name} has {inputs} inputs, which a group_size of {self.group_size} does not divide. Set it to {nearest}, or use per_row.")
        return math.prod(self.blocks.scale_shape(self.blocks.view(torch.empty(shape, device="meta"))))

    def as_read(self, weight: Tensor) -> Tensor:
        """The weight that is quantized: rounded to bf16 if `rounded`, in its own dtype."""
        return round_to_bf16(weight) if self.rounded else weight

    def view(self, weight: Tensor) -> Tensor:
        """What is quantized as `Blocks.view` shows it, in the precision of this file's arithmetic."""
        return self.blocks.view(compute(self.as_read(weight)))

    @torch.no_grad()
    def scales(self, weight: Tensor, *learned: Tensor) -> Scales:
        """Scales of a weight with what was learned beside it, those of the forward in training; always > 0."""
        grid, blocks, levels = GRIDS[self.grid], self.blocks, self.levels
        view = self.view(weight)
        zero_point = learned[1] if len(learned) > 1 else grid.zero_point(view, blocks, levels)
        unit = grid.unit(view, blocks, levels)
        scale = self.settle(learned[0] * unit if learned else grid.scale(view, blocks, levels))
        step = grid.step(view, blocks, scale).clamp_min(TINY)
        return Scales(scale, step, None if zero_point is None else zero_point.round().clamp_(levels.low, levels.high), unit)

    def settle(self, scale: Tensor) -> Tensor:
        """The scale that is used for one that was computed or learned: snapped if `portable`, and above 0."""
        return snap(scale) if self.portable else scale.clamp_min(TINY)

    @torch.no_grad()
    def quantize(self, weight: Tensor, scales: Scales) -> Tensor:
        """Codes, int8, of the weight's shape."""
        blocks, levels = self.blocks, self.levels
        view = self.view(weight)
        codes = torch.empty(view.shape, dtype=torch.int8, device=view.device)
        spread = [blocks.spread(t, view) for t in (scales.step, scales.zero_point) if t is not None]
        for out, piece, step, *zero in blocks.pieces(codes, view, *spread):
            level = level_of(piece, step, zero[0] if zero else None, levels)
            out.copy_(level.add_(zero[0]) if zero else level.sub_(levels.offset))
        return codes.view(weight.shape)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes -> real values in the scale's dtype."""
        view = self.blocks.view(codes)
        level = view.to(scale.dtype)
        level = level.add_(self.levels.offset) if zero_point is None else level.sub_(self.blocks.spread(zero_point, view))
        return level.mul_(self.blocks.spread(scale, view)).view(codes.shape)

    @torch.no_grad()
    def value(self, weight: Tensor, scales: Scales) -> Tensor:
        """`dequantize(quantize(weight))`, equal in every bit, without the integers in between; not differentiable."""
        blocks, levels = self.blocks, self.levels
        view = self.view(weight)
        values = torch.empty(view.shape, dtype=view.dtype, device=view.device)
        zeros = [] if scales.zero_point is None else [blocks.spread(scales.zero_point, view)]
        for out, piece, scale, step, *zero in blocks.pieces(values, view, blocks.spread(scales.scale, view), blocks.spread(scales.step, view), *zeros):
            level = level_of(piece, step, zero[0] if zero else None, levels, out=out)
            # Adding 0 turns -0, which rounding gives and integers do not have, into +0: then the bits are equal too.
            level.add_(0.0).mul_(scale)
        return values.view(weight.shape)

    def fake_quantize(self, weight: Tensor, *learned: Tensor) -> tuple[Tensor, Scales]:
        """(`value` with the grid's gradients for the weight and for what is learned, its scales)."""
        scales = self.scales(weight.detach(), *(parameter.detach() for parameter in learned))
        return _FakeQuantize.apply(weight, self, scales, *learned), scales


class _FakeQuantize(torch.autograd.Function):
    """Keeps nothing for backward but the weight and a few values per scale.

    With g = dL/dw_q and l = code - zero_point + offset: dL/dw = g where w / s is within the grid's reach, else 0, and
    ds = sum of g * (l - w/s inside, l outside) per scale, which each grid multiplies by d(scale)/d(learned). Snapping, and
    rounding the weight to bf16, are passed straight through.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantizer: WeightQuantizer, scales: Scales, *learned: Tensor) -> Tensor:
        # The weight itself is saved, never a view or a copy: ZeRO-3 empties the Parameter after forward and fills it again for backward.
        ctx.save_for_backward(weight)
        ctx.quantizer, ctx.scales = quantizer, scales
        return quantizer.value(weight, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), quantizer, scales = ctx.saved_tensors, ctx.quantizer, ctx.scales
        grid, blocks, levels = GRIDS[quantizer.grid], quantizer.blocks, quantizer.levels
        reach = grid.reach(levels)
        if reach is None:
            return grad, None, None
        low, high = reach
        view, grads = quantizer.view(weight), blocks.view(compute(grad))
        zeros = [] if scales.zero_point is None else [blocks.spread(scales.zero_point, view)]
        step = blocks.spread(scales.step, view)
        grad_weight = torch.empty_like(grads, memory_format=torch.contiguous_format)
        sums = [torch.zeros(blocks.scale_shape(view), dtype=torch.float64, device=view.device) for _ in grid.learned]
        for out, g, w, s, *rest in blocks.pieces(grad_weight, grads, view, step, *sums, *zeros):
            totals, zero = rest[: len(sums)], rest[len(sums)] if zeros else None
            value = w / s
            level = level_of(w, s, zero, levels)
            if zero is None:
                inside = (value > low) & (value < high)
            else:  # what the clamp left as it was
                inside = level == value.round()
            torch.mul(g, inside, out=out)
            axes = [axis for axis in range(3) if totals[0].shape[axis] == 1]
            slope = level.mul_(~inside) if isinstance(grid, Pact) else level.sub_(value.masked_fill_(~inside, 0.0))  # a scale near 0 makes values infinite
            totals[0] += slope.mul_(g).sum(axes, keepdim=True, dtype=torch.float64)
            if zero is not None:
                totals[1] -= (g * ~inside * s).sum(axes, keepdim=True, dtype=torch.float64)
        factor = grid.gradient_scale(view, blocks, levels)
        grad_learned = [total.flatten().to(view.dtype) * factor for total in sums]
        grad_learned[0] *= scales.unit
        return grad_weight.view(weight.shape), None, None, *grad_learned
