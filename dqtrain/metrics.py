"""Numbers of a run: sums on the device, one reduction per log line, then log.jsonl, TensorBoard and one line on the console.

A rank adds its contribution to a step's value without waiting for the device: the value of a step is the sum of the contributions of
all ranks and micro-batches, and the logged value is the mean over the steps since the last log line. Sums are float64 and logged with
nine significant digits, those of a float32, so that neither the order of the ranks nor an interruption shows in the log.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dqtrain.files import write_text
from dqtrain.rundir import RunDir, append_line
from dqtrain.world import World, largest_of_ranks, sum_over_ranks

TIMING = ("tokens_per_s", "data_wait", "eta_s", "time")
"""The last fields of a log line, which differ between two runs of the same config; all others are equal bit for bit."""

BAR_CHARACTERS = 20


class Progress:
    """One console line: rewritten in place on a terminal, printed as plain lines elsewhere."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._is_open = False

    def show(self, line: dict[str, Any]) -> None:
        """Show a log line: bar and percent, step, the values, tokens per second, and the time left as h:mm:ss."""
        step = line["step"]
        values = "  ".join(f"{name} {value:<9.4g}" for name, value in line.items() if name not in ("step", "tokens", *TIMING) and not name.startswith("lr_"))
        text = f"{step / self._total_steps:4.0%} {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        text += f"  {values}  {line['tokens_per_s']:,.0f} tokens/s  {_clock(line['eta_s'])} left"
        if self._in_place:
            filled = BAR_CHARACTERS * step // self._total_steps
            bar = "=" * filled + " " * (BAR_CHARACTERS - filled)
            # A line that wraps cannot be rewritten in place.
            self._stream.write("\r" + f"[{bar}] {text}"[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
            self._is_open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that is rewritten in place, so that others may print."""
        if self._is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_open = False


class Phase:
    """A console line of done, total and time left: rewritten in place on a terminal, a few plain lines elsewhere."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name, self._stream, self._started, self._shown = name, sys.stdout if stream is None else stream, time.monotonic(), 0

    def __call__(self, done: int, total: int) -> None:
        """Show the progress, if enough has changed."""
        share = 4 * done // total if not self._stream.isatty() else 100 * done // total
        if share == self._shown and done < total:
            return
        self._shown = share
        left = (time.monotonic() - self._started) / done * (total - done)
        text = f"{done / total:4.0%} {self._name}: {done:,} of {total:,}  {_clock(left)} left"
        if self._stream.isatty():
            text = f"\r[{'=' * (BAR_CHARACTERS * done // total):<{BAR_CHARACTERS}}] {text}\x1b[K" + ("\n" if done == total else "")
        else:
            text += "\n"
        self._stream.write(text)
        self._stream.flush()


class Metrics:
    """Sums of this rank's contributions since the last log line; rank 0 writes what all ranks add up to."""

    def __init__(self, run: RunDir, world: World, total_steps: int) -> None:
        self._run, self._world, self._total_steps = run, world, total_steps
        self._sums: dict[str, Tensor] = {}
        self._logged_step = self._left_out = 0
        self._first_step = self._timed_step = 0
        self._first_time = self._timed_time = time.monotonic()
        self._progress = Progress(total_steps) if world.rank == 0 else None
        self._writer: SummaryWriter | None = None

    def add(self, name: str, value: Tensor | float) -> None:
        """Add this rank's contribution (a scalar) to the step's value. Every rank adds the same names between two log lines."""
        self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(value, dtype=torch.float64, device=self._world.device).detach()

    def leave_out(self, step: int) -> None:
        """A step to which nothing was added counts in no mean."""
        self._left_out += 1
        if self._world.rank == 0:
            self._run.event("skipped", step=step)

    def log(self, step: int, tokens_seen: int, waited_s: float = 0.0, **scalars: float) -> dict[str, Any]:
        """Write one log line after a step: the means of what was added, and the scalars as they are. Collective.

        tokens_seen counts the tokens of all ranks since the start of the run, the same number in every step; waited_s, how long this rank waited for data since the last
        line: `data_wait` is the share of the time that the rank waited which waited most. Returns the line: step, tokens, the added names in alphabetical order, the
        scalars, and TIMING. Raises OSError when the disk is full.
        """
        num_steps = step - self._logged_step - self._left_out
        line: dict[str, Any] = {"step": step, "tokens": tokens_seen}
        line |= {name: _nine_digits(total / num_steps) for name, total in self._totals().items()}
        line |= {name: _nine_digits(value) for name, value in scalars.items()}
        waited_s = largest_of_ranks(waited_s, self._world.device)
        now = time.monotonic()
        steps_per_s = (step - self._timed_step) / max(now - self._timed_time, 1e-9)
        data_wait = waited_s / max(now - self._timed_time, 1e-9)
        s_per_step = (now - self._first_time) / max(step - self._first_step, 1)
        timing = (
            steps_per_s * tokens_seen / max(step, 1),
            _nine_digits(data_wait),
            s_per_step * (self._total_steps - step),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        line |= dict(zip(TIMING, timing, strict=True))
        self._sums.clear()
        self._logged_step = self._timed_step = step
        self._left_out, self._timed_time = 0, now
        if self._progress is not None:
            append_line(self._run.log, json.dumps(line))
            writer = self._tensorboard()
            for name, value in line.items():
                if name not in ("step", "eta_s", "time"):
                    writer.add_scalar(name, value, step)
            writer.flush()
            self._progress.show(line)
        return line

    def log_scores(self, step: int, **scores: float) -> None:
        """Write a line of their own for values that are equal on all ranks, such as those of a validation."""
        if self._progress is not None:
            append_line(self._run.log, json.dumps({"step": step, **{name: _nine_digits(value) for name, value in scores.items()}}))
            for name, value in scores.items():
                self._tensorboard().add_scalar(name, value, step)
            self.say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show values that are equal on all ranks in TensorBoard alone; the other ranks may have none."""
        if self._world.rank == 0:
            for name, value in values.items():
                self._tensorboard().add_scalar(name, value, step)

    def phase(self, name: str) -> Callable[[int, int], None]:
        """A console line for work outside of the steps: call what is returned with (done, total). Nothing on other ranks than 0."""
        return Phase(name) if self._progress is not None else lambda done, total: None

    def say(self, message: str) -> None:
        """Print a message on rank 0, below the console line."""
        if self._progress is not None:
            self._progress.close()
            print(message, flush=True)

    def show_quantization(self, step: int, weights: dict[str, dict[str, Any]]) -> None:
        """Show figures of weights (name -> figure -> number, tensor or None) in TensorBoard as FIGURE/NAME, each figure's weights side by side.

        Of a tensor the mean, and how its values are spread where it has several; of a tuple, (lowest code, how often each one occurs), bars.
        """
        if self._world.rank != 0:
            return
        for name, figures in weights.items():
            for figure, value in figures.items():
                if isinstance(value, tuple):
                    lowest, counts = value
                    self._show_counts(f"{figure}/{name}", lowest, counts, step)
                elif isinstance(value, Tensor):
                    self._tensorboard().add_scalar(f"{figure}/{name}", value.mean(), step)
                    if value.numel() > 1:
                        self._tensorboard().add_histogram(f"{figure}/{name}", value, step)
                elif value is not None:
                    self._tensorboard().add_scalar(f"{figure}/{name}", value, step)

    def _show_counts(self, name: str, lowest: int, counts: Tensor, step: int) -> None:
        codes = torch.arange(lowest, lowest + len(counts), dtype=torch.float64)
        counts = counts.double()
        moments = {"num": counts.sum(), "sum": (counts * codes).sum(), "sum_squares": (counts * codes.square()).sum()}
        limits = {"bucket_limits": (codes + 0.5).tolist(), "bucket_counts": counts.tolist()}
        self._tensorboard().add_histogram_raw(name, min=codes[0], max=codes[-1], **moments, **limits, global_step=step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the steps that are not logged yet, as plain values, equal on every rank. Collective."""
        return {"logged_step": self._logged_step, "left_out": self._left_out, "sums": self._totals()}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Continue after a checkpoint of that step, on any world size: the log ends as it did then. Before the first `add`.

        A run that was interrupted before its first checkpoint resumes at step 0, with the state of new metrics.
        """
        self._logged_step, self._left_out = state["logged_step"], state["left_out"]
        self._first_step = self._timed_step = step
        self._first_time = self._timed_time = time.monotonic()
        for name, total in state["sums"].items():
            self.add(name, total if self._world.rank == 0 else 0.0)
        if self._world.rank == 0 and self._run.log.exists():
            text = self._run.log.read_text()
            kept = [line for line in text.splitlines(keepends=True) if line.endswith("}\n") and json.loads(line)["step"] <= step]  # a crash may tear the last
            if "".join(kept) != text:
                write_text(self._run.log, "".join(kept))

    def close(self) -> None:
        """End the console line and the TensorBoard file."""
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def _totals(self) -> dict[str, float]:
        """Sums over all ranks, by sorted name, in one reduction."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        return dict(zip(names, sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist(), strict=True))

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            # TensorBoard hides what an interrupted run wrote from this step on.
            self._writer = SummaryWriter(str(self._run.tensorboard), purge_step=self._first_step + 1)
        return self._writer


def _nine_digits(value: float) -> float:
    return float(f"{value:.9g}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
