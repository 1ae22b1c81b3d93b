"""A run directory: claims, one live owner, events, causes, and files that are whole or absent."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dqtrain.config import RunConfig, validate
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import write_text
from dqtrain.rundir import ENDED_JOB, OWNER_DEAD_S, RunDir, append_line, model_directory

RACER = """
import sys, time
from pathlib import Path
from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir
print("ready", flush=True)
for line in sys.stdin:
    path, start = line.split()
    while time.time() < float(start):
        pass
    try:
        RunDir(Path(path)).acquire()
        print("won", flush=True)
    except ConfigError as error:
        print("lost" if "is being run by process" in str(error) else error, flush=True)
"""


def _config(path: Path, seed: int = 1, every_steps: int = 10, steps: int = 4) -> RunConfig:
    tree = {
        "run": {"dir": str(path), "seed": seed},
        "teacher": {"path": "t"},
        "data": {"train": "c.jsonl", "tokens_per_sample": 8},
        "train": {"steps": steps, "global_batch": 2, "micro_batch": 1, "lr": 1e-3},
        "quant": None,
        "distill": {"logits": {"weight": 1.0}},
        "checkpoint": {"every_steps": every_steps},
    }
    return validate(tree, "test")


@contextmanager
def _full_disk(room_bytes: int) -> Iterator[None]:
    """No file may grow beyond that size: a write stops half-way and then fails, as on a full disk (and without root)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _edit_owner(run: RunDir, **changes: object) -> None:
    run.owner.write_text(json.dumps({**json.loads(run.owner.read_text()), **changes}))


def _age(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def racers() -> Iterator[Callable[[Path], list[str]]]:
    processes = [subprocess.Popen([sys.executable, "-c", RACER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]

    def race(path: Path) -> list[str]:
        for process in processes:
            process.stdin.write(f"{path} {time.time() + 0.003}\n")
            process.stdin.flush()
        return sorted(process.stdout.readline().strip() for process in processes)

    assert all(process.stdout.readline() == "ready\n" for process in processes)
    yield race
    for process in processes:
        process.communicate()


def test_write_text_replaces(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "x", text)
        assert (tmp_path / "x").read_text() == text
    assert os.listdir(tmp_path) == ["x"]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    with _full_disk(1000), pytest.raises(OSError):
        write_text(tmp_path / "x", "new" * 1000)
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("room_bytes", [10, 14, 19])
def test_full_disk_leaves_no_torn_line(tmp_path: Path, room_bytes: int) -> None:
    append_line(tmp_path / "x", "123456789")
    with _full_disk(room_bytes), pytest.raises(OSError):
        append_line(tmp_path / "x", "123456789")
    append_line(tmp_path / "x", "end")
    assert (tmp_path / "x").read_text() == "123456789\nend\n"


def test_claim_starts_and_continues(run: RunDir) -> None:
    config = _config(run.path)
    assert run.claim(config) == "start"
    assert run.load_config() == config
    assert run.claim(config) == "continue"
    assert not run.events.exists()


def test_claim_takes_what_precedes_the_config(run: RunDir) -> None:
    run.acquire()
    run.event("x")
    run.rank_log(1).touch()
    run.record_exit(0, 75, "", None)
    (run.path / "shards").mkdir()
    assert run.claim(_config(run.path)) == "start"


def test_claim_takes_and_records_passive_changes(run: RunDir) -> None:
    run.claim(_config(run.path))
    changed = _config(run.path, every_steps=5)
    assert run.claim(changed) == "continue"
    assert run.load_config() == changed
    (event,) = run.read_events()
    assert event["event"] == "config"
    assert event["changes"] == {"checkpoint.every_steps": [10, 5]}


def test_claim_refuses_another_config(run: RunDir) -> None:
    config = _config(run.path, steps=3)
    run.claim(config)
    assert run.claim(_config(run.path)) == "continue"  # nothing was trained yet
    config = _config(run.path)
    (run.checkpoints / "step-000000001").mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        run.claim(_config(run.path, seed=7, every_steps=5, steps=9))
    for line in ("run.seed: 1 -> 7", "train.steps: 4 -> 9", "checkpoint.every_steps: 10 -> 5", "run.dir", "dqtrain resume"):
        assert line in str(error.value)
    assert run.load_config() == config


def test_claim_refuses_a_finished_run(run: RunDir) -> None:
    run.claim(_config(run.path))
    run.artifact("packed").mkdir(parents=True)
    write_text(run.result, "{}")
    with pytest.raises(ConfigError, match=f"finished.*{run.artifact('packed')}"):
        run.claim(_config(run.path))


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints", "log.jsonl"])
def test_claim_refuses_what_is_no_run(run: RunDir, name: str) -> None:
    run.path.mkdir()
    (run.path / name).touch()
    with pytest.raises(ConfigError, match=f"not a run directory.*{name}"):
        run.claim(_config(run.path))
    assert os.listdir(run.path) == [name]


def test_a_place_that_cannot_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ConfigError, match="cannot be made"):
            RunDir(path).claim(_config(path))


def test_claim_needs_write_permission(run: RunDir) -> None:
    run.path.mkdir(mode=0o500)
    is_mounted = os.geteuid() == 0  # root may write everywhere, but for a file system that is read-only
    if is_mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run.path)], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        pytest.skip("this root may not mount a tmpfs")
    try:
        with pytest.raises(ConfigError, match="not writable"):
            run.claim(_config(run.path))
    finally:
        if is_mounted:
            subprocess.run(["umount", str(run.path)], check=True)


def test_load_config_needs_a_run(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        run.load_config()


def test_result_of_an_unfinished_run(run: RunDir) -> None:
    run.claim(_config(run.path))
    with pytest.raises(CheckpointError, match="unfinished.*dqtrain resume"):
        run.load_result()
    write_text(run.result, '{"step": 4}')
    assert run.load_result() == {"step": 4}


def test_model_directory(run: RunDir, tmp_path: Path) -> None:
    assert model_directory(tmp_path) == tmp_path
    run.claim(_config(run.path))
    with pytest.raises(CheckpointError, match="unfinished"):
        model_directory(run.path)
    write_text(run.result, "{}")
    with pytest.raises(ConfigError, match=r"artifact/hf is not there, which the run exported .* Make it again with `dqtrain export"):
        model_directory(run.path)
    run.artifact("hf").mkdir(parents=True)
    assert model_directory(run.path) == run.artifact("hf")


def test_a_quantized_run_is_no_model_directory_whatever_it_exported(run: RunDir) -> None:
    quant = {"linears": {"bits": 2, "granularity": "per_row"}, "embeddings": None, "positions": None, "activations": None}
    run.claim(validate(_config(run.path).model_dump(mode="json") | {"quant": quant}, "test"))
    write_text(run.result, "{}")
    run.artifact("hf").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is a quantized run, which is no float model.*artifact/hf, by `dqtrain export .* --to hf`, holds"):
        model_directory(run.path)
    assert model_directory(run.artifact("hf")) == run.artifact("hf")  # named itself, it is what it is


def test_events_in_order(run: RunDir) -> None:
    assert run.read_events() == []
    run.path.mkdir()
    run.event("start", step=0)
    run.event("stopped", message="a\nb")
    events = run.read_events()
    assert [(event["event"], event.get("step"), event.get("message")) for event in events] == [("start", 0, None), ("stopped", None, "a\nb")]
    assert events[0]["time"] <= events[1]["time"]


def test_owner_comes_and_goes(run: RunDir) -> None:
    assert run.live_owner() is None
    run.acquire()
    run.acquire()
    owner = run.live_owner()
    assert owner is not None
    assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert os.listdir(run.path) == ["owner.json"]
    run.release()
    assert os.listdir(run.path) == []


def test_live_owner_is_refused(run: RunDir) -> None:
    run.path.mkdir()
    racer = subprocess.Popen([sys.executable, "-c", RACER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    racer.stdin.write(f"{run.path} 0\n")
    racer.stdin.flush()
    assert [racer.stdout.readline() for _ in range(2)] == ["ready\n", "won\n"]
    with pytest.raises(ConfigError, match=f"process {racer.pid} on {socket.gethostname()}, since 20"):
        run.acquire()
    with pytest.raises(ConfigError, match=f"process {racer.pid} on"):
        run.refuse_if_owned()
    run.release()
    assert run.live_owner()["pid"] == racer.pid, "only the owner releases"
    racer.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, racer.pid, os.WEXITED | os.WNOWAIT)
    assert run.live_owner() is None, "a zombie is dead"
    run.refuse_if_owned()
    racer.communicate()
    run.acquire()
    assert run.live_owner()["pid"] == os.getpid()
    (event,) = run.read_events()
    assert (event["event"], event["dead"]["pid"]) == ("takeover", racer.pid)
    assert sorted(os.listdir(run.path)) == ["events.jsonl", "owner.json"]


def test_pid_that_was_given_to_another_process_is_dead(run: RunDir) -> None:
    run.acquire()
    _edit_owner(run, process_start=1)
    assert run.live_owner() is None
    run.acquire()
    assert run.live_owner() is not None


@pytest.mark.parametrize(("age_s", "is_live"), [(0, True), (OWNER_DEAD_S - 10, True), (OWNER_DEAD_S + 10, False)])
def test_owner_on_another_host_dies_of_age(run: RunDir, age_s: int, is_live: bool) -> None:
    run.acquire()
    _edit_owner(run, host="elsewhere", heartbeat=_age(age_s))
    assert (run.live_owner() is not None) == is_live
    if is_live:
        with pytest.raises(ConfigError, match="on elsewhere"):
            run.acquire()
    else:
        run.acquire()
        assert run.live_owner()["host"] == socket.gethostname()


def test_requeued_job_takes_over_from_its_earlier_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run.acquire()
    _edit_owner(run, host="elsewhere")
    with pytest.raises(ConfigError, match="Slurm job 12"):
        run.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.acquire()
    assert run.live_owner()["restart"] == "1"


def test_heartbeat(run: RunDir) -> None:
    run.acquire()
    _edit_owner(run, heartbeat=_age(50))
    first = json.loads(run.owner.read_text())
    run.heartbeat()
    assert json.loads(run.owner.read_text()) == first, "too early"
    run._last_beat -= 11
    run.heartbeat()
    second = json.loads(run.owner.read_text())
    assert datetime.fromisoformat(second["heartbeat"]) - datetime.fromisoformat(first["heartbeat"]) > timedelta(seconds=45)
    assert {**second, "heartbeat": first["heartbeat"]} == first
    _edit_owner(run, host="elsewhere")
    run._last_beat -= 11
    with pytest.raises(ConfigError, match="on elsewhere"):
        run.heartbeat()


def test_a_late_heartbeat_does_not_bring_back_a_run_that_is_given_up(run: RunDir) -> None:
    for _ in range(50):
        run.acquire()
        run._last_beat -= 11
        beat = threading.Thread(target=run.heartbeat)
        beat.start()
        run.release()
        beat.join()
        assert not run.owner.exists()


def test_an_owner_in_a_job_that_has_ended_is_dead(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.acquire()
    _edit_owner(run, host="elsewhere", job="12", heartbeat=_age(1))
    monkeypatch.setenv(ENDED_JOB, "13")
    with pytest.raises(ConfigError, match="Slurm job 12"):
        run.refuse_if_owned()
    monkeypatch.setenv(ENDED_JOB, "12")
    run.acquire()
    assert run.live_owner()["host"] == socket.gethostname()


def test_owner_that_is_not_json(run: RunDir) -> None:
    run.path.mkdir()
    run.owner.write_text("{")
    with pytest.raises(ConfigError, match=str(run.owner)):
        run.acquire()


@pytest.mark.parametrize("dead_heir", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_one_of_racing_processes_wins(tmp_path: Path, racers: Callable[[Path], list[str]], stale: bool, dead_heir: bool) -> None:
    for round_ in range(20):
        run = RunDir(tmp_path / str(round_))
        run.path.mkdir()
        dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "process_start": 1, "job": None, "restart": "0", "time": _age(9), "heartbeat": _age(9)}
        if stale:
            run.owner.write_text(json.dumps(dead))
        if dead_heir:
            heir = run.path / ".heir-of-{host}-{pid}-{process_start}-{time}".format(**dead)
            heir.write_text(json.dumps({**dead, "process_start": 2}))
        assert racers(run.path) == ["lost", "lost", "won"]
        leftovers = {entry for entry in os.listdir(run.path) if stale or not entry.startswith(".heir")}
        assert leftovers == ({"owner.json", "events.jsonl"} if stale else {"owner.json"})


def test_first_exit_is_what_the_others_followed_from(run: RunDir) -> None:
    run.path.mkdir()
    assert run.first_exit(0) is None
    for rank, code, message in ((0, 75, "stopped"), (1, 1, "peer gone"), (2, 137, "killed"), (3, 5, "loss is nan"), (4, 2, "later")):
        run.record_exit(rank, code, message, rank + 4)
        first = run.first_exit(0)
        assert first is not None and first["rank"] == {1: 0, 4: 3}.get(rank, rank)
    assert (first["code"], first["message"], first["step"]) == (5, "loss is nan", 7)
    assert run.rank_exit(3).name == "rank-0003.json"
    assert run.first_exit(time.time_ns()) is None


def test_a_mangled_event_costs_no_other(tmp_path):
    run = RunDir(tmp_path)
    run.event("submit", job="1")
    with run.events.open("a") as events:
        events.write('{"time": "2026-01-01T00:00:00+00:00", "event{"time": 3}\n17\n')  # two nodes at once
    run.event("job_start", job="1")
    assert [event["event"] for event in run.read_events()] == ["submit", "job_start"]
