"""Where a run's time went, against sums made by hand; what is shown of a run, from its files alone; following a log; asking a run to stop."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqtrain.cli import main
from dqtrain.rundir import RunDir
from launch.status import TimeSpent, clock, data_waited, steps_repeated, time_spent, validation_s
from launch.submit import ROOT, Launch, load_launch, save_launch

BEGIN = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def events(*lines: tuple[Any, ...]) -> list[dict[str, Any]]:
    """(second, kind, fields) -> events."""
    return [{"time": (BEGIN + timedelta(seconds=at)).isoformat(timespec="milliseconds"), "event": kind, **dict(*more)} for at, kind, *more in lines]


def spent(now: float, what: str, *lines: tuple[Any, ...]) -> TimeSpent:
    return time_spent(events(*lines), BEGIN + timedelta(seconds=now), what)  # type: ignore[arg-type]


def save(step: int, stall_s: float = 1.0, write_s: float = 5.0) -> dict[str, Any]:
    return {"step": step, "stall_s": stall_s, "write_s": write_s, "bytes": 1}


QUEUED = (0, "submit", {"job": "1", "nodes": 2})
STARTED = (10, "job_start", {"job": "1", "restart": 0, "nodes": ["a", "b"], "ranks": 2})
TRAINS = (30, "start", {"step": 0, "ranks": 2})


@pytest.mark.parametrize(
    "now, what, lines, expected",
    [
        (7, "waits", [QUEUED], TimeSpent(queue=7)),
        (25, "runs", [QUEUED, STARTED], TimeSpent(queue=10, start=15)),
        # Trains, with one checkpoint complete at 60; nothing is lost as far as one knows.
        (90, "runs", [QUEUED, STARTED, TRAINS, (60, "checkpoint", save(5))], TimeSpent(queue=10, start=20, save=1, steps=59)),
        # Killed at 90: the steps after those of the checkpoint, which were made by 55, are lost. 20 s in the queue, then 10 s of start.
        (
            150, "runs",
            [QUEUED, STARTED, TRAINS, (60, "checkpoint", save(5)), (90, "srun_end", {"step": 8}), (91, "requeue", {"why": "w"}), (110, "job_start", {"restart": 1}),
             (120, "resume", {"step": 5})],
            TimeSpent(queue=30, start=30, save=1, rework=35, steps=24 + 30),
        ),
        # Asked to stop: the last save, of the last step, is waited for.
        (
            80, "waits",
            [QUEUED, STARTED, TRAINS, (70, "checkpoint", save(9)), (70, "stopped", {"step": 9, "code": 75}), (72, "srun_end", {"step": 9}), (73, "requeue", {"why": "w"})],
            TimeSpent(queue=20, start=20, save=6, rework=0, steps=34),
        ),
        # Nobody saw it end: the batch script's node lost power some time after the checkpoint of 60.
        (
            200, "runs",
            [QUEUED, STARTED, TRAINS, (60, "checkpoint", save(5)), (150, "job_start", {"restart": 1}), (160, "resume", {"step": 5})],
            TimeSpent(queue=100, start=30, save=1, rework=5, steps=24 + 40),
        ),
        # The next owner found how long the last one had lived: until 100.
        (
            200, "runs",
            [QUEUED, STARTED, TRAINS, (60, "checkpoint", save(5)), (150, "job_start", {"restart": 1}), (155, "takeover", {"dead": {"heartbeat": (BEGIN + timedelta(seconds=100)).isoformat()}}),
             (160, "resume", {"step": 5})],
            TimeSpent(queue=60, start=30, save=1, rework=45, steps=24 + 40),
        ),
        # It has just ended so, and waits in the queue.
        (100, "waits", [QUEUED, STARTED, TRAINS, (60, "checkpoint", save(5))], TimeSpent(queue=50, start=20, save=1, rework=5, steps=24)),
        # Without any checkpoint all of it is lost.
        (100, "rests", [QUEUED, STARTED, TRAINS, (90, "srun_end", {"step": 8}), (92, "job_end", {"code": 1})], TimeSpent(queue=12, start=20, rework=60)),
        # A night between stop and resume is nobody's loss.
        (
            1000, "waits",
            [QUEUED, STARTED, TRAINS, (70, "checkpoint", save(9)), (70, "stopped", {"step": 9}), (72, "job_end", {"code": 75}), (900, "submit", {"job": "2"})],
            TimeSpent(queue=12 + 100, start=20, save=6, steps=34),
        ),
        # Finished; what follows does not count.
        (
            500, "rests",
            [QUEUED, STARTED, TRAINS, (90, "checkpoint", save(10)), (100, "finished", {"code": 0}), (101, "srun_end", {"step": None}), (102, "job_end", {"code": 0})],
            TimeSpent(queue=10, start=20, save=1, steps=69),
        ),
        # Slurm has queued it again by itself after a job_end.
        (60, "runs", [QUEUED, STARTED, (20, "job_end", {"code": 1}), (50, "job_start", {"restart": 1})], TimeSpent(queue=40, start=20)),
        # On one machine there is no queue.
        (
            300, "runs",
            [(0, "launch", {"ranks": 2}), (10, "start", {"step": 0}), (40, "checkpoint", save(5)), (40, "stopped", {"step": 5}), (200, "launch", {"ranks": 2}), (205, "resume", {"step": 5})],
            TimeSpent(start=15, save=6, steps=24 + 95),
        ),
        (300, "rests", [], TimeSpent()),
    ],
)  # fmt: skip
def test_where_the_time_went(now: float, what: str, lines: list[tuple[Any, ...]], expected: TimeSpent) -> None:
    found = spent(now, what, *lines)
    assert vars(found) == pytest.approx(vars(expected))
    assert found.goodput == pytest.approx(expected.steps / expected.wall if expected.wall else 0)


def test_seconds_that_steps_waited_for_data() -> None:
    def line(step: int, steps_per_s: float, wait: float) -> dict[str, float]:
        return {"step": step, "tokens": step * 100, "tokens_per_s": steps_per_s * 100, "data_wait": wait}

    # 10 steps in 5 s, a tenth of it waiting; 10 in 20 s, half of it; a validation's line; the start resumed at 25, so that 5 steps took 1 s.
    log = [line(10, 2.0, 0.1), line(20, 0.5, 0.5), {"step": 20, "validation_loss": 3.0}, line(30, 5.0, 0.2), {"step": 40, "tokens": 4000, "tokens_per_s": 1.0}]
    assert data_waited(log, {25}) == pytest.approx(0.5 + 10 + 0.2)
    assert data_waited(log[:1], {0, 10}) == pytest.approx(0.5) and data_waited([], {5}) == 0


def test_how_long_a_validation_takes() -> None:
    def line(step: int, seconds: float, steps: int = 10) -> dict[str, float]:
        return {"step": step, "tokens": step * 100, "tokens_per_s": steps * 100 / seconds}

    def validated(step: int) -> dict[str, float]:
        return {"step": step, "validation_loss": 3.0}

    # 10 steps take 5 s; a validation between two lines and one behind a line 300 s and 40 s more; the last is not known yet.
    log = [line(10, 5.0), validated(15), line(20, 305.0), line(30, 5.0), validated(30), line(40, 45.0), line(50, 6.0), validated(50)]
    assert validation_s(log[:3], set()) == pytest.approx(300) and validation_s(log, set()) == pytest.approx(40)
    assert validation_s(log[1:3], set()) is None and validation_s(log[:1], set()) is None
    for resumed in (20, 25):  # in the start before
        assert validation_s([line(10, 5.0), validated(20), line(30, 22.5, steps=30 - resumed)], {resumed}) is None


@pytest.mark.parametrize(
    "lines, again",
    [
        ([TRAINS, (60, "checkpoint", save(5)), (70, "stopped", {"step": 5})], 0),
        # Stopped by a power cut at step 8 or 9: the log had 8. The second time the rank said that it had finished 12.
        ([TRAINS, (60, "checkpoint", save(5)), (90, "job_start", {"logged": 8}), (99, "resume", {"step": 5})], 3),
        (
            [TRAINS, (60, "checkpoint", save(5)), (90, "job_start", {"logged": 8}), (99, "resume", {"step": 5}), (120, "srun_end", {"step": 12}),
             (121, "job_start", {"logged": 11}), (130, "resume", {"step": 10}), (140, "srun_end", {"step": None}), (150, "job_start", {"logged": 9}), (160, "resume", {"step": 10})],
            3 + 2,
        ),
        ([TRAINS, (50, "srun_end", {"step": 4}), (60, "job_start", {}), (70, "start", {"step": 0})], 4),
    ],
)  # fmt: skip
def test_steps_made_again(lines: list[tuple[Any, ...]], again: int) -> None:
    assert steps_repeated(events(*lines)) == again


KINDS = ["submit", "job_start", "launch", "start", "resume", "checkpoint", "stopped", "finished", "srun_end", "requeue", "successor", "job_end", "exclude"]


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50)), max_size=30), st.sampled_from(["runs", "waits", "rests"]))
def test_no_second_is_counted_twice(kinds: list[tuple[str, int]], what: str) -> None:
    lines, at = [], 0
    for kind, gap in kinds:
        at += gap
        lines.append((at, kind, {"step": at, "stall_s": 0.0, "write_s": 3.0, "why": ""}))
    found = spent(at + 20, what, *lines)
    assert 0 <= found.wall <= at + 20
    assert all(value >= 0 for value in vars(found).values())


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (11229, "3:07:09"), (86399, "23:59:59"), (86400, "1-00:00:00"), (-3, "0:00:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 20 steps that trained here to step 10, was stopped, and rests."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(
        f"run: {{dir: {run.path}}}\nteacher: null\nstudent: {{architecture: {{model_type: gpt2}}}}\n"
        "data: {train: a.jsonl, tokens_per_sample: 16, train_tokenizer: {vocab_size: 300}}\ntrain: {steps: 20, global_batch: 8, micro_batch: 1, lr: 3e-5}\n"
        "quant: null\ndistill: {task: 1.0}\ncheckpoint: {every_steps: 5}\n"
    )
    lines = [(0, "launch", {"ranks": 2}), (10, "start", {"step": 0}), (40, "checkpoint", save(5)), (70, "checkpoint", save(10, 0.5, 2.25))]
    lines += [(70, "stopped", {"step": 10, "code": 75, "message": "stopped after step 10 of 20; saved."})]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events(*lines)))
    log = [{"step": 5, "tokens": 1, "loss": 5.0, "tokens_per_s": 3.0, "eta_s": 90.0, "time": BEGIN.isoformat()}]
    log += [{"step": 5, "validation_loss": 4.25}, {"step": 10, "tokens": 2, "loss": 4.5, "tokens_per_s": 1234.5, "eta_s": 60.0, "time": BEGIN.isoformat()}]
    run.log.write_text("".join(json.dumps(line) + "\n" for line in log))
    return run


def shown(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[str]:
    assert main(["status", *map(str, paths)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_that_rests(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, step, checkpoint, spent, end = shown(capsys, run.path)
    assert first == f"{run.path}: not running; `dqtrain resume {run.path}` goes on"
    assert step == "  step       10 of 20 (50%), loss 4.5, validation loss 4.25, 1,234 tokens/s, 0:01:00 to go"
    assert checkpoint.startswith("  checkpoint step 10, ") and checkpoint.endswith(" ago, took 2.8 s")
    assert spent == "  time       0:01:10, of which 80% goodput, queue 0:00:00 (0%), start 0:00:10 (14%), save 0:00:04 (5%), rework 0:00:00 (0%)"
    assert end == "  last end   stopped after step 10 of 20; saved."


def test_what_the_log_knows_of_data(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    # 5 steps of the 10 in 10 s, of which 0.5 waited; 60 s were spent on steps and saves.
    lines = [
        {"step": 5, "tokens": 500, "tokens_per_s": 50.0, "eta_s": 1, "loss": 5.0},
        {"step": 10, "tokens": 1000, "tokens_per_s": 50.0, "eta_s": 1, "loss": 5.0, "data_wait": 0.7},
    ]
    run.log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with run.events.open("a") as file:
        file.write(
            "".join(
                json.dumps(event) + "\n"
                for event in events((80, "launch", {"logged": 13}), (80, "resume", {"step": 10}), (80, "stopped", {"step": 10, "message": ""}))
            )
        )
    text = "\n".join(shown(capsys, run.path))
    assert (
        "  time       0:01:10, of which 70% goodput, queue 0:00:00 (0%), start 0:00:10 (14%), data 0:00:07 (10%), save 0:00:04 (5%), rework 0:00:00 (0%), 3 steps made again"
        in text
    )


def test_a_torn_line_and_no_line_are_no_reason_to_fail(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with run.log.open("a") as log:
        log.write('{"step": 15, "lo')
    assert any("10 of 20" in line for line in shown(capsys, run.path))
    run.log.unlink()
    run.events.unlink()
    assert shown(capsys, run.path) == [f"{run.path}: not running; `dqtrain resume {run.path}` goes on"]


def test_a_long_log_is_read_from_its_end(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.log.write_text('{"step": 1}\n' * 50000 + run.log.read_text())
    assert any("10 of 20 (50%), loss 4.5, validation loss 4.25" in line for line in shown(capsys, run.path))


def test_a_run_that_runs_here(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.acquire()
    lines = shown(capsys, run.path)
    assert lines[0].startswith(f"{run.path}: running as process {os.getpid()} on ") and not any("last end" in line for line in lines)
    assert main(["stop", str(run.path)]) == 0
    assert f"asked {run.path} to save and end at its next step" in capsys.readouterr().out
    assert run.stop.exists() and run.read_events()[-1]["event"] == "stop_requested"


def test_a_finished_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.result.write_text("{}")
    first, step, *_ = shown(capsys, run.path)
    assert first == f"{run.path}: finished" and "to go" not in step
    assert main(["stop", str(run.path)]) == 2
    assert "There is nothing to stop." in capsys.readouterr().err and not run.stop.exists()


def launched(run: RunDir, job: str, *history: str) -> None:
    from launch.site import Site

    site = Site.model_validate_json('{"gpus_per_node": 0, "grace_s": 2}')
    save_launch(Launch(site=site, nodes=2, min_nodes=2, time="1:00:00", python=Path(sys.executable), folder=run.path, job=job, history=history), run)


def test_restarts_nodes_and_a_slow_save(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(run.path))  # no Slurm
    launched(run, "7", "5")
    start = "job_start"
    lines = [
        (0, "submit", {"job": "5"}),
        (60, start),
        (120, "requeue", {"why": "time limit"}),
        (180, start),
        (240, start),
        (300, "successor", {"why": "lost b"}),
    ]
    lines += [(360, start), (400, "submit", {"job": "7"}), (420, start), (430, "checkpoint", save(10, 0.5, 2.0))]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events(*lines)))
    log = [{"step": step, "tokens": step, "loss": 5.0, "tokens_per_s": 5 / seconds, "eta_s": 1.0} for step, seconds in ((5, 1.0), (10, 8.5))]
    run.log.write_text("".join(json.dumps(line) + "\n" for line in (log[0], {"step": 5, "validation_loss": 4.0}, log[1])))
    run.excluded.write_text(json.dumps({"b": {"until": "2999-01-01T00:00:00+00:00", "why": "rank 3 hung"}}))
    text = "\n".join(shown(capsys, run.path))
    assert (
        "\n  restarts   4: ...; 2026-11-21 12:04 requeued by Slurm, which had lost a node or needed it; 2026-11-21 12:06 lost b; 2026-11-21 12:07 submitted again\n"
    ) in text
    assert "\n  avoids     b until 2999-01-01T00:00:00+00:00: rank 3 hung" in text
    assert "\n             a save takes longer than grace_s, 2 s; raise it in the site file" in text
    assert "\n             a validation takes about 0:00:08, longer than grace_s, 2 s: a time limit that comes in one costs the steps before it" in text


def test_all_runs_of_the_folder(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    assert main(["status"]) == 2
    assert "there are no runs in ./runs. Name run directories." in capsys.readouterr().err
    (run.path / "runs").mkdir()
    for name in "ba":
        (run.path / "runs" / name).symlink_to(run.path)
    assert [line for line in shown(capsys) if not line.startswith(" ")] == [f"runs/{name}: not running; `dqtrain resume runs/{name}` goes on" for name in "ab"]


def test_a_watched_run_is_drawn_anew_until_ctrl_c(run: RunDir) -> None:
    screen, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "150", "LINES": "30"}
    command = [sys.executable, "-m", "dqtrain", "status", "--watch", str(run.path)]
    seen = ""

    def until_seen(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([screen], [], [], 0.2)[0]:
                seen += os.read(screen, 1 << 16).decode()

    def hear_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in the background has them ignore it

    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment, preexec_fn=hear_ctrl_c) as process:
        try:
            until_seen("10 of 20 (50%)")
            with run.log.open("a") as log:
                log.write(json.dumps({"step": 15, "tokens": 3, "loss": 4.0, "tokens_per_s": 10.0, "eta_s": 5.0, "time": BEGIN.isoformat()}) + "\n")
            until_seen("15 of 20 (75%)")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    os.close(terminal)
    os.close(screen)
    assert "Traceback" not in seen and "\x1b[1A" in seen  # over the earlier view


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run directory: it has no run.yaml." in capsys.readouterr().err


def test_logs(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(run.path)]) == 2
    assert "no output of rank 0 there. Rank 0 of a run that was not submitted prints to its terminal" in capsys.readouterr().err
    launched(run, "9", "7", "8")
    for job in "79":
        run.job_log(job).write_text(f"job {job}\n")
    run.rank_log(3).write_text("rank 3\n")
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "job 7\njob 9\n"
    assert main(["logs", str(run.path), "--rank", "3"]) == 0
    assert capsys.readouterr().out == "rank 3\n"


def test_a_log_is_followed_into_the_successor_until_the_run_is_finished(run: RunDir) -> None:
    launched(run, "7")
    run.job_log("7").write_text("x" * 10000 + "\nfirst\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dqtrain", "logs", "-f", str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        killer = threading.Timer(60, process.kill)
        killer.start()
        assert len(process.stdout.readline()) < 5000 and process.stdout.readline() == "first\n"
        with run.job_log("7").open("a") as log:
            log.write("second\n")
        assert process.stdout.readline() == "second\n"
        launch = load_launch(run)
        assert launch is not None
        save_launch(launch.followed_by("8"), run)
        time.sleep(0.2)
        run.job_log("8").write_text("third\n")
        assert process.stdout.readline() == "third\n"
        with run.job_log("8").open("a") as log:
            log.write("last\n")
        run.result.write_text("{}")
        assert process.stdout.read() == "last\n" and process.wait(timeout=30) == 0
        killer.cancel()
