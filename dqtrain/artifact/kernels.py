"""Are a program's kernels for few bits worth having? A file is timed beside its sibling, which has the same values in codes of 8 bits.

What is slower is reported, never refused: another machine, or the next version of the program, may have the kernel.
"""

import itertools
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PretrainedConfig

from dqtrain.artifact.format import Codes, PackedTensors
from dqtrain.artifact.target import Runner, RuntimeTarget
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import Coverage

TOKENS, ROUNDS = 32, 3

NOISE = 0.1
"""What a time may be above its sibling's, as a part of that, without a word."""


class Widened(PackedTensors):
    """The same values in codes of 8 bits, read out of a packed artifact that stays open: a level, or twice one that is a half, is an integer."""

    def __init__(self, packed: PackedTensors) -> None:
        vars(self).update(vars(packed))
        self._packed = packed
        self.coverage = Coverage([replace(row, quantizer=row.quantizer and _in_8_bits(row.quantizer)) for row in packed.coverage.rows])
        self.quantized = {row.name: row.quantizer for row in self.coverage.rows if row.quantizer}

    def codes(self, name: str) -> Codes:
        """A quantized weight."""
        codes = self._packed.codes(name)
        if codes.quantizer.bits == 8:
            return codes
        parts = 2 if codes.quantizer.levels.offset else 1
        levels = codes.quantizer.dequantize(codes.codes, torch.full_like(codes.scale, parts), codes.zero_point)
        return Codes(levels.to(torch.int8), codes.scale / parts, None, self.quantized[name])


def _in_8_bits(quantizer: WeightQuantizer) -> WeightQuantizer:
    return quantizer if quantizer.bits == 8 else replace(quantizer, grid="minmax", bits=8)


def measure(target: RuntimeTarget, folder: Path, sibling: RuntimeTarget, config: PretrainedConfig) -> dict[str, float]:
    """Milliseconds a token of what a target wrote into `folder`, and of its sibling, which lies inside it meanwhile; none where both have the same types."""
    if sibling.types == target.types:
        return {}
    count = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    source = ids if config.is_encoder_decoder else None
    with TemporaryDirectory(dir=folder, prefix=".8-bit-") as other, ExitStack() as stack:
        sibling.write(Path(other))
        runners = [stack.enter_context(made.as_shipped(place, count)) for made, place in ((target, folder), (sibling, Path(other)))]
        times: list[list[float]] = [[], []]
        for _, (runner, seconds) in itertools.product(range(1 + ROUNDS), zip(runners, times, strict=True)):  # in turns
            seconds.append(_seconds(runner, ids, source))
    own, wider = (1e3 / count * statistics.median(seconds[1:]) for seconds in times)  # the first round warms up
    return {"ms_per_token": own, "ms_per_token_8_bit": wider}


def _seconds(runner: Runner, ids: list[int], source: list[int] | None) -> float:
    started = time.perf_counter()
    runner.logits(ids, source, one_by_one=True)
    return time.perf_counter() - started


def slower(program: str, kernels: dict[str, Any]) -> list[str]:
    """What to say of the figures: a line where the file is slower than its sibling by more than NOISE."""
    own, wider = kernels.get("ms_per_token", 0.0), kernels.get("ms_per_token_8_bit", 0.0)
    if own <= (1 + NOISE) * wider:
        return []
    return [f"{program} needs {own:.3g} ms a token here, and {wider:.3g} for the same weights in 8 bits: its kernels for fewer bits are slower on this machine"]
