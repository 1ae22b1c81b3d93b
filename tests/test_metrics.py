"""The log is the mean over steps of the sum over ranks, and an interruption does not show in it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dqtrain.errors import ConfigError
from dqtrain.metrics import TIMING, Metrics, Progress
from dqtrain.rundir import RunDir
from dqtrain.world import World, barrier, broadcast_object, gather_objects, gather_tensors, init_world, sum_over_ranks

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))

TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from dqtrain.metrics import Metrics
from dqtrain.rundir import RunDir
from dqtrain.world import barrier, broadcast_object, gather_objects, gather_tensors, init_world, sum_over_ranks
try:
    barrier()
    sys.exit("a local answer before the group was joined")
except ValueError:
    pass
world = init_world()
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=world.rank, world_size=2)
rank = world.rank
barrier()
assert [part.tolist() for part in gather_tensors(torch.full((1 + rank, 2), float(rank)))] == [[[0.0, 0.0]], [[1.0, 1.0]] * 2]
assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
assert broadcast_object(f"from {rank}") == "from 0"
assert sum_over_ranks(torch.tensor([1.0 + rank])).item() == 3.0
metrics = Metrics(RunDir(Path(sys.argv[1])), world, 4)
for step in (1, 2):
    for value in ((step, 10.0 * step) if rank == 0 else (100.0 * step, 0.0)):
        metrics.add("loss", torch.tensor(float(value), requires_grad=True))
    metrics.add("a", 1.0)
state = metrics.state()
assert state == {"logged_step": 0, "left_out": 0, "sums": {"a": 4.0, "loss": 333.0}}, state
line = metrics.log(2, 64, lr=0.5)
metrics.resume(2, state)
assert metrics.log(3, 96)["loss"] == 111.0
metrics.close()
assert {key: line[key] for key in ("step", "tokens", "a", "loss", "lr")} == {"step": 2, "tokens": 64, "a": 2.0, "loss": 166.5, "lr": 0.5}
distributed.destroy_process_group()
"""


def _lines(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in run.log.read_text().splitlines()]


def _without_timing(run: RunDir) -> list[str]:
    return [json.dumps({key: value for key, value in line.items() if key not in TIMING}) for line in _lines(run)]


def _train(metrics: Metrics, first_step: int, last_step: int, every_steps: int = 4) -> None:
    for step in range(first_step, last_step + 1):
        for j in range(3):
            metrics.add("loss", torch.sin(torch.tensor(3.0 * step + j)) / 3)
        if step % every_steps == 0:
            metrics.log(step, 32 * step, lr=1 / step)


def test_line_is_the_mean_over_steps_and_ends_with_timing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    metrics = Metrics(run, ALONE, 8)
    for step in range(1, 5):
        metrics.add("loss", torch.tensor(float(step)))
        metrics.add("loss", 1.0)
        metrics.add("accuracy", torch.tensor(0.25, dtype=torch.bfloat16))
    line = metrics.log(4, 128, lr=0.1)
    metrics.close()
    assert _lines(run) == [line]
    assert list(line) == ["step", "tokens", "accuracy", "loss", "lr", *TIMING]
    assert [line[key] for key in ("step", "tokens", "accuracy", "loss", "lr")] == [4, 128, 0.25, 3.5, 0.1]
    assert line["tokens_per_s"] > 0 and line["eta_s"] > 0


def test_add_does_not_keep_the_graph_nor_alias(tmp_path: Path) -> None:
    metrics = Metrics(RunDir(tmp_path), ALONE, 1)
    value = torch.tensor(1.0, dtype=torch.float64)
    metrics.add("x", value)
    value += 5
    weight = torch.tensor(1.0, requires_grad=True)
    metrics.add("x", weight * 2)
    assert metrics.log(1, 1)["x"] == 3.0


@pytest.mark.parametrize(("saved", "died"), [(0, 3), (2, 3), (3, 9), (4, 4), (6, 11), (8, 10)])
def test_interrupted_log_equals_uninterrupted(tmp_path: Path, saved: int, died: int) -> None:
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    for run in (whole, broken):
        run.path.mkdir()
    metrics = Metrics(whole, ALONE, 12)
    _train(metrics, 1, 12)
    metrics.close()

    metrics = Metrics(broken, ALONE, 12)
    _train(metrics, 1, saved)
    state = json.loads(json.dumps(metrics.state()))
    _train(metrics, saved + 1, died)
    metrics.close()
    with broken.log.open("a") as file:
        file.write('{"step": 1')  # a crash tears the last line
    metrics = Metrics(broken, ALONE, 12)
    metrics.resume(saved, state)
    _train(metrics, saved + 1, 12)
    metrics.close()
    assert _without_timing(broken) == _without_timing(whole)

    for run in (whole, broken):
        board = EventAccumulator(str(run.tensorboard)).Reload()
        assert [(event.step, event.value) for event in board.Scalars("loss")] == [(line["step"], pytest.approx(line["loss"])) for line in _lines(whole)]


def test_scores_are_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    metrics = Metrics(run, ALONE, 4)
    for step in range(1, 5):
        metrics.add("loss", float(step))
        if step == 2:
            metrics.log_scores(2, validation_loss=1.23456)
    metrics.log(4, 128)
    metrics.close()
    scores, line = _lines(run)
    assert scores == {"step": 2, "validation_loss": 1.23456}
    assert line["loss"] == 2.5, "scores do not end a window"
    assert capsys.readouterr().out.startswith("step 2: validation_loss 1.2346\n")
    resumed = Metrics(run, ALONE, 4)
    resumed.resume(2, {"logged_step": 0, "left_out": 0, "sums": {"loss": 3.0}})
    assert _lines(run) == [scores]


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    metrics = Metrics(run, ALONE, 1)
    metrics.add("loss", torch.tensor(float("inf")))
    metrics.log(1, 1)
    metrics.close()
    assert _lines(run)[0]["loss"] == float("inf")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(RunDir(tmp_path), World(rank=1, world_size=1, local_rank=0, device=torch.device("cpu")), 1)
    metrics.show_quantization(1, {"weight": {"scale": torch.ones(3)}})
    metrics.show(1, {"word_rank": 2.0})
    metrics.log(1, 1)
    metrics.close()
    assert os.listdir(tmp_path) == []


def test_quantization_is_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    metrics = Metrics(run, ALONE, 1)
    many = {"scale": torch.tensor([1.0, 2.0, 6.0]), "clip_fraction": 0.25, "codes_changed": None, "codes": (-1, torch.tensor([5, 0, 7]))}
    metrics.show_quantization(1, {"a.weight": many, "b.weight": {"scale": torch.ones(1)}})
    metrics.show(1, {"word_rank": 12.5})
    metrics.close()
    shown = EventAccumulator(str(run.tensorboard)).Reload()
    assert shown.Histograms("scale/a.weight")[0].histogram_value.num == 3
    assert shown.Scalars("scale/a.weight")[0].value == 3.0 and shown.Scalars("scale/b.weight")[0].value == 1.0
    assert shown.Scalars("clip_fraction/a.weight")[0].value == 0.25 and "codes_changed/a.weight" not in shown.Tags()["scalars"]
    codes = shown.Histograms("codes/a.weight")[0].histogram_value
    assert (codes.min, codes.max, codes.num, codes.sum, codes.sum_squares) == (-1, 1, 12, 2, 12)
    assert list(zip(codes.bucket_limit, codes.bucket, strict=True))[-3:] == [(-0.5, 5), (0.5, 0), (1.5, 7)]
    assert shown.Scalars("word_rank")[0].value == 12.5


LINE = {"step": 5, "tokens": 320, "loss": 2.34567, "lr": 1e-4, "tokens_per_s": 12345.6, "eta_s": 3725.0, "time": "2026-01-01T00:00:00+00:00"}


def test_progress_on_a_file_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(200, stream)
    progress.show(LINE)
    progress.close()
    assert stream.getvalue() == "  2%   5/200  loss 2.346      lr 0.0001     12,346 tokens/s  1:02:05 left\n"


def test_progress_on_a_terminal_is_rewritten_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    progress = Progress(10, stream)
    progress.show(LINE)
    progress.show({**LINE, "step": 10})
    progress.close()
    progress.close()
    first, last = stream.getvalue().split("\r")[1:]
    assert first.startswith("[==========          ]  50%  5/10  loss 2.346 ")
    assert last.startswith("[====================] 100% 10/10  loss 2.346 ")
    assert last.endswith("\x1b[K\n")
    assert all(len(text.split("\x1b")[0]) == 59 for text in (first, last))


def test_two_ranks(tmp_path: Path) -> None:
    env = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path)], env={**env, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert [line["step"] for line in _lines(RunDir(tmp_path))] == [2, 3]


def test_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    world = init_world()
    assert (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
    assert init_world() == world
    assert "RANK" not in os.environ  # a later `dqtrain train` in this process must not take itself for a rank
    barrier()
    assert [part.tolist() for part in gather_tensors(torch.ones(2))] == [[1.0, 1.0]]
    assert gather_objects("x") == ["x"]
    assert broadcast_object("x") == "x"
    assert sum_over_ranks(torch.tensor([2.0])).tolist() == [2.0]


@pytest.mark.parametrize(("rank", "world_size", "problem"), [("0", "", "WORLD_SIZE is ``"), ("x", "2", "RANK is `x`"), ("2", "2", "RANK is 2")])
def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str, problem: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=problem):
        init_world()
