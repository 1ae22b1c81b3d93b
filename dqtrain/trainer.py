"""The loop: everything that happens in a run, in the order in which it happens."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqtrain import checkpoint
from dqtrain.artifact.export import export
from dqtrain.config import RunConfig
from dqtrain.data.reader import Reader
from dqtrain.data.stream import IGNORED, Batch, write_batches
from dqtrain.engine import StudentEngine
from dqtrain.errors import NumericsError, Stopped
from dqtrain.evaluate import Evaluation
from dqtrain.files import write_text
from dqtrain.metrics import Metrics
from dqtrain.models.language import Teacher, inputs_of
from dqtrain.quant.modules import check_all_ran
from dqtrain.rundir import RunDir
from dqtrain.schedule import learning_rate_factor, seed_micro_batch
from dqtrain.signals import Requests, stop_at_once
from dqtrain.world import World, barrier, on_rank_0, sum_over_ranks


@dataclass
class Trainer:
    """One run on one rank. Every method that says so is collective: all ranks call it together."""

    config: RunConfig
    run: RunDir
    world: World
    student: StudentEngine
    teacher: Teacher | None
    batches: Callable[[int], Iterator[list[tuple[int, Batch]]]]  # from a step on, (number, batch) of this rank's micro-batches of each step
    tokens_per_step: float
    evaluation: Evaluation
    metrics: Metrics
    step: int = 0
    skipped_steps: int = 0
    best: dict[str, Any] | None = None  # {"step", "loss"} of the lowest validation loss
    saved_step: int | None = None  # of the last save, which may be in flight
    saver: checkpoint.Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = checkpoint.Saver(self.run.checkpoints, self.world, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every, self.run.event)

    def train(self) -> None:
        """Run to the last step from wherever the run stands; raises Stopped after a complete checkpoint when asked to stop. Collective."""
        self.resume()
        requests = Requests(*((self.run.stop, self.run.save) if self.world.rank == 0 else ()))
        with closing(Reader(self.batches(self.step))) as reader:
            while self.step < self.config.train.steps:
                batches = next(reader)
                num_tokens, stop, save = self.agree(batches, requests)
                if stop or save:
                    self.save()
                    self.saver.wait()
                    requests.done(partial(self.run.event, step=self.step))
                if stop:
                    barrier()
                    raise Stopped(f"stopped after step {self.step} of {self.config.train.steps}; saved. `dqtrain resume {self.run.path}` continues.")
                self.one_step(batches, num_tokens)
                if self.due(self.config.log.every_steps):
                    self.metrics.log(self.step, round(self.step * self.tokens_per_step), reader.waited_s(), **self.student.learning_rates())
                if self.evaluation.validation and self.due(self.config.eval.every_steps):
                    self.validate()
                if self.due(self.config.checkpoint.every_steps):
                    self.save()
                if self.due(self.config.log.weights_every_steps or self.config.checkpoint.every_steps):
                    self.look_at_weights()

    def due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens now."""
        return self.step == self.config.train.steps or (every_steps is not None and self.step % every_steps == 0)

    def agree(self, batches: list[tuple[int, Batch]], requests: Requests) -> tuple[int, bool, bool]:
        """(target tokens of the global batch, whether any rank was asked to stop, to save). Collective. Raises CheckpointError when a save has failed anywhere."""
        own = [sum(int((batch.labels != IGNORED).sum()) for _, batch in batches), *requests.pending(), self.saver.failed]
        total, stops, saves, failures = sum_over_ranks(torch.tensor(own, dtype=torch.int64, device=self.world.device)).tolist()
        if failures > 0:
            self.saver.wait()
        return max(1, total), stops > 0, saves > 0  # 1 where all samples are of quarantined shards

    def one_step(self, batches: list[tuple[int, Batch]], num_tokens: int) -> None:
        """Forward and backward of every micro-batch, then one update. Collective."""
        self.student.mode(training=True)
        losses: list[dict[str, Tensor]] = []
        for index, batch in batches:
            inputs, labels = inputs_of(batch, self.world.device)
            with self.teacher.teaching(batch, inputs) if self.teacher else nullcontext() as taught:
                seed_micro_batch(self.config.run.seed, self.step, index)
                loss = self.student(inputs, labels, taught)
            # The engine averages gradients over ranks; the loss is the sum over ranks divided by the global number of target tokens.
            self.student.backward(loss.total * self.world.world_size / num_tokens)
            losses.append({"loss": loss.total.detach(), **loss.parts})
        factor = learning_rate_factor(self.step, self.config.train)
        gradient_norm = self.student.step(factor)
        if self.step == 0:
            check_all_ran(self.student.module)
        if math.isfinite(gradient_norm):
            for name, value in ((name, value) for loss in losses for name, value in loss.items()):
                self.metrics.add(name, value / num_tokens)
            self.metrics.add("gradient_norm", gradient_norm if self.world.rank == 0 else 0.0)
            if self.config.data.quarantine:
                self.metrics.add("left_out_samples", sum(int(batch.left_out.sum()) for _, batch in batches if batch.left_out is not None))
        else:
            self.leave_out(gradient_norm, batches, losses)
        self.step += 1

    def leave_out(self, gradient_norm: float, batches: list[tuple[int, Batch]], losses: list[dict[str, Tensor]]) -> None:
        """Count a step that was not made since its gradient is not finite; over the limit save, keep the batch and raise NumericsError. Collective."""
        what = f"step {self.step + 1}: the gradient norm is {gradient_norm}"
        if self.skipped_steps < self.config.train.max_skipped_steps:
            self.skipped_steps += 1
            self.metrics.leave_out(self.step + 1)
            self.metrics.say(f"{what}; skipped, as {self.skipped_steps} of at most {self.config.train.max_skipped_steps} steps")
            return
        self.save()
        self.saver.wait()
        bad = [pair for pair, loss in zip(batches, losses, strict=True) if not math.isfinite(loss["loss"])]
        found = sum_over_ranks(torch.tensor(len(bad), device=self.world.device)) > 0  # else all losses are sound, and a gradient overflowed
        if bad or not found:
            write_batches(self.run.bad_batches(self.step + 1, self.world.rank), bad or batches)
        raise NumericsError(
            f"{what}, so it was not made; the state before it is saved, the batch is in {self.run.exits}. Raise train.max_skipped_steps to skip it, "
            "or lower train.lr in a new run."
        )

    def validate(self) -> None:
        """Score the validation split, log it, and keep the checkpoint if it is the best so far. Collective."""
        self.student.mode(training=False)
        scores = self.evaluation.validate(self.student.model)
        shown = {name: scores.pop(name) for name in list(scores) if "hidden" in name or "teacher" in name}
        self.metrics.log_scores(self.step, **{f"validation_{name}": value for name, value in scores.items() if name not in ("agreement", "num_tokens")})
        self.metrics.show(self.step, shown)
        if self.best is None or scores["loss"] < self.best["loss"]:
            self.best = {"step": self.step, "loss": scores["loss"]}
            if self.config.export.checkpoint == "best" and not self.due(self.config.checkpoint.every_steps):
                self.save()

    def look_at_weights(self) -> None:
        """Show in TensorBoard what quantization does to each weight, and how alike words are. Collective."""
        self.metrics.show_quantization(self.step, self.student.quantization())
        taught = {f"teacher_{name}": value for name, value in self.teacher.figures().items()} if self.teacher else {}
        self.metrics.show(self.step, self.student.words() | taught)

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless there is one. Collective."""
        if self.saved_step == self.step:
            return
        state = {"step": self.step, "skipped_steps": self.skipped_steps, "best": self.best}
        state |= {"pending_metrics": self.metrics.state(), "config": self.config.model_dump(mode="json")}
        self.saver.save(self.step, self.student, state)
        self.saved_step = self.step

    def resume(self) -> None:
        """Continue from the newest checkpoint that all ranks find sound; from step 0 when there is none. Collective."""
        folder, passed_over = checkpoint.agree_on_newest(self.run.checkpoints, self.student, self.world)
        for message in passed_over:
            self.metrics.say(message)
        pending = self.metrics.state()
        if folder is not None:
            state = checkpoint.read_state(folder)
            checkpoint.require_same_config(folder, state, self.config)
            checkpoint.load(folder, self.student)
            self.step = self.saved_step = state["step"]
            self.skipped_steps, self.best, pending = state["skipped_steps"], state["best"], state["pending_metrics"]
        self.metrics.resume(self.step, pending)
        if self.world.rank == 0:
            self.run.event("start" if folder is None else "resume", step=self.step, ranks=self.world.world_size)

    def test(self) -> tuple[Path, dict[str, Any]]:
        """The chosen checkpoint, its step and its scores on the test split, if there is one. Collective."""
        self.saver.close()
        stop_at_once()  # all is saved
        step = self.best["step"] if self.config.export.checkpoint == "best" and self.best else self.config.train.steps
        folder = on_rank_0(self.world, lambda: checkpoint.at_step(self.run.checkpoints, step))
        if step != self.step:
            checkpoint.load(folder, self.student)
        self.student.mode(training=False)
        return folder, {"step": step, "test": self.evaluation.final(self.student.model, self.run.predictions, self.metrics.phase)}

    def finish(self, folder: Path, tested: dict[str, Any]) -> None:
        """Export, verify, and only then mark the run finished with result.json; what trained is gone then. Collective."""
        self.metrics.say("exporting and verifying")
        self.student.destroy()  # on every rank: what they hold would not fit beside the model that rank 0 exports
        if self.teacher is not None:
            self.teacher.destroy()
        if self.world.rank == 0:
            tested["export"] = export(self.run, folder, held_out=self.evaluation.test or self.evaluation.validation, scores=tested, say=self.metrics.say)
            write_text(self.run.result, json.dumps(tested, indent=1))
        barrier()
