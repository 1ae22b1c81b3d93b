"""How fast a weight is quantized beside the plain formula and a bare copy, and how much each grid loses."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dqtrain.config import BITS_OF_GRID
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.scale import initial_learned


def run(rows: int = 50257, columns: int = 768, rounds: int = 7) -> str:
    """Two tables as text, on CPUs: milliseconds on a weight [rows, columns], that of GPT-2's words (medians of interleaved rounds), and errors of all grids."""
    torch.manual_seed(0)
    return f"{_speed(torch.randn(rows, columns), rounds)}\n\n{_errors()}"


def plain(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The textbook formula, a new tensor for each operation."""
    return torch.clamp(torch.round(weight / scale), low, high) * scale


def _speed(weight: Tensor, rounds: int) -> str:
    quantizer = WeightQuantizer("dynamic", 2, "per_row", None, 0, True)
    learned = [torch.nn.Parameter(t) for t in initial_learned(weight, quantizer)]
    scales = quantizer.scales(weight, *learned)
    spread, levels = scales.scale[:, None], quantizer.levels
    parameter, grad = torch.nn.Parameter(weight.clone()), torch.randn_like(weight)
    assert torch.equal(plain(weight, spread, levels.low, levels.high), quantizer.value(weight, scales))

    def both_ways() -> None:
        parameter.grad = learned[0].grad = None
        quantizer.fake_quantize(parameter, *learned)[0].backward(grad)

    def plain_both_ways() -> None:
        parameter.grad = learned[0].grad = None
        # Straight-through by autograd: LSQ's formula, with the dynamic grid's scale.
        scale = learned[0][:, None] * weight.abs().mean(1, keepdim=True) / levels.high
        value = (parameter / scale).clamp(levels.low, levels.high)
        ((value + (value.round() - value).detach()) * scale).backward(grad)

    timed: dict[str, Callable[[], object]] = {
        "bare copy": weight.clone,
        "plain formula": lambda: plain(weight, spread, levels.low, levels.high),
        "in place (value)": lambda: quantizer.value(weight, scales),
        "scales": lambda: quantizer.scales(weight, *learned),
        "codes": lambda: quantizer.quantize(weight, scales),
        "forward and backward": both_ways,
        "the same by autograd": plain_both_ways,
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up
    lines = [f"{' x '.join(map(str, weight.shape))}, ternary per_row, {torch.get_num_threads()} threads, median of {rounds} interleaved rounds"]
    lines += [f"  {name:22s} {value:8.1f} ms  {value / medians['bare copy']:5.2f} x copy" for name, value in medians.items()]
    return "\n".join(lines)


def _errors() -> str:
    torch.manual_seed(0)
    samples = {"Gaussian": torch.randn(1000, 1024), "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((1000, 1024))}
    groups = (("per_tensor", None), ("per_row", None), ("per_group", 64))
    lines = ["relative squared error, 1000 x 1024 (groups of 64)", f"  {'grid':14s} {'bits':>7s}  " + "  ".join(f"{name:^32s}" for name in samples)]
    lines += [f"  {'':14s} {'':7s}  " + "  ".join("".join(f"{granularity:>11s}" for granularity, _ in groups)[1:] for _ in samples)]
    for grid, widths in BITS_OF_GRID.items():
        for bits in widths:
            cells = []
            for weight in samples.values():
                for granularity, size in groups:
                    quantizer = WeightQuantizer(grid, bits, granularity, size, 0, True)  # type: ignore[arg-type]
                    value = quantizer.value(weight, quantizer.scales(weight, *initial_learned(weight, quantizer)))
                    cells.append(f"{float((value - weight).square().sum() / weight.square().sum()):11.5f}")
            lines.append(f"  {grid:14s} {bits!s:>7s}  " + "  ".join("".join(cells[i : i + 3])[1:] for i in (0, 3)))
    return "\n".join(lines)
