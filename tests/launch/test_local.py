"""Real processes: exit codes, causes, signals, and that nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir
from launch.local import run_ranks

LAUNCHER = """
import sys
from pathlib import Path
import launch.local
from dqtrain.rundir import RunDir
launch.local.GRACE_S = 0.5
sys.exit(launch.local.run_ranks([sys.executable, "-c", sys.argv[2]], int(sys.argv[3]), RunDir(Path(sys.argv[1]))))
"""

RANK = """
import os, signal, sys, time
from pathlib import Path
from dqtrain.rundir import RunDir
rank, run = int(os.environ["RANK"]), RunDir(Path.cwd())
def ready():
    Path(f"ready-{rank}").write_text(str(os.getpid()))
def stop_on(*signums, code=75):
    def note(signum, frame):
        with open(f"signals-{rank}", "a") as file:
            file.write(f"{signum}\\n")
        stopping.append(signum)
    stopping = []
    for signum in signums:
        signal.signal(signum, note)
    ready()
    while not stopping:
        time.sleep(0.02)
    time.sleep(0.3)  # time for a second copy of the signal to arrive
    sys.exit(code)
"""


def _launch(path: Path, body: str, ranks: int = 2) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(path), RANK + body, str(ranks)], cwd=path, stderr=subprocess.PIPE, text=True)


def _finish(launcher: subprocess.Popen) -> tuple[int, str]:
    error = launcher.communicate(timeout=15)[1]
    return launcher.returncode, error


def _until(condition) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _pids(path: Path, ranks: int = 2) -> list[int]:
    files = [path / f"ready-{rank}" for rank in range(ranks)]
    _until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for file in tmp_path.glob("ready-*"):
        assert _is_gone(int(file.read_text())), "a rank was left behind"


def test_environment_of_each_rank(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.split('_')[0] in ('RANK', 'LOCAL', 'WORLD', 'MASTER', 'OMP')}))"
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    assert run_ranks([sys.executable, "-c", body], 3, RunDir(path), env) == 0
    ranks = [json.loads(capfd.readouterr().out)] + [json.loads(RunDir(path).rank_log(rank).read_text()) for rank in (1, 2)]
    port = ranks[0]["MASTER_PORT"]
    assert 1024 <= int(port) < 65536
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    assert ranks == [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)]
    assert not RunDir(path).exits.exists()


def test_threads_that_are_set_stay(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert run_ranks([sys.executable, "-c", body], 2, RunDir(path), {**os.environ, "OMP_NUM_THREADS": "7"}) == 0
    assert capfd.readouterr().out == RunDir(path).rank_log(1).read_text() == "7\n"


def test_cause_of_the_first_rank_decides(path: Path) -> None:
    body = """
if rank == 1:
    run.record_exit(1, 2, "seed is x, but must be y.", 3)
    sys.exit(2)
ready(); time.sleep(60)
"""
    code, error = _finish(_launch(path, body))
    assert (code, error) == (2, "rank 1: seed is x, but must be y.\n")
    assert not RunDir(path).rank_exit(0).exists()  # ended by the launcher: no cause


def test_causes_of_an_earlier_start_are_forgotten(path: Path) -> None:
    RunDir(path).record_exit(5, 2, "old", 1)
    assert _finish(_launch(path, "sys.exit(0)")) == (0, "")
    assert _finish(_launch(path, "sys.exit(9)"))[0] == 9


def test_a_kill_explains_the_crash_of_its_peer(path: Path) -> None:
    body = """
if rank == 0:
    run.record_exit(0, 1, "connection closed by peer", 3)
    sys.exit(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert _finish(_launch(path, body))[0] == 137


def test_a_rank_that_stops_alone_ends_the_others(path: Path) -> None:
    assert _finish(_launch(path, "sys.exit(75) if rank == 1 else time.sleep(60)"))[0] == 75


def test_all_saved(path: Path) -> None:
    assert _finish(_launch(path, "sys.exit(75)")) == (75, "")


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_hang_is_what_the_living_ranks_say_of_it(path: Path, frozen: int) -> None:
    RunDir(path).record_exit(frozen, 75, "an earlier start's", 1)
    body = f"""
if rank == {frozen}:
    ready()
    os.kill(os.getpid(), signal.SIGSTOP)
while not Path("ready-{frozen}").exists():
    time.sleep(0.02)
if rank == 0:
    print("told by rank 0", file=sys.stderr)
run.record_exit(rank, 75, "no progress", 3)
sys.exit(75)
"""
    code, error = _finish(_launch(path, body, ranks=3))
    assert code == 75  # not 137, which is how the frozen one ended
    assert error in {0: ("rank 1: no progress\n", "rank 2: no progress\n"), 1: ("told by rank 0\n",)}[frozen]


@pytest.mark.parametrize("message", ["the same of both", "rank 1's own"])
def test_what_rank_0_has_printed_is_not_printed_again(path: Path, message: str) -> None:
    body = f"""
if rank == 0:
    while not run.rank_exit(1).exists():
        time.sleep(0.02)
run.record_exit(rank, 5, "the same of both" if rank == 0 else {message!r}, 3)
sys.exit(5)
"""
    assert _finish(_launch(path, body)) == (5, "" if message == "the same of both" else f"rank 1: {message}\n")


def test_a_crash_is_explained_although_an_earlier_start_left_a_cause(path: Path) -> None:
    RunDir(path).record_exit(1, 2, "old", 1)
    code, error = _finish(_launch(path, "sys.exit(9 if rank == 1 else 0)"))
    assert code == 9
    assert error == f"rank 1: ended with exit code 9 and left no cause; its output is in {RunDir(path).rank_log(1)}.\n"


def test_rank_0_prints_its_own_error(path: Path) -> None:
    code, error = _finish(_launch(path, "sys.exit('my own words' if rank == 0 else 0)"))
    assert (code, error) == (1, "my own words\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_forwarded_once(path: Path, signum: signal.Signals) -> None:
    launcher = _launch(path, "stop_on(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)")
    _pids(path)
    launcher.send_signal(signum)
    if signum != signal.SIGINT:
        _until(lambda: (path / "signals-1").exists())
        launcher.send_signal(signum)
    assert _finish(launcher) == (75, "")
    assert [(path / f"signals-{rank}").read_text() for rank in (0, 1)] == [f"{signum.value}\n"] * 2


def test_second_interrupt_kills(path: Path) -> None:
    launcher = _launch(path, "signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)")
    _pids(path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    code, error = _finish(launcher)
    assert code == 137
    assert "SIGKILL" in error


def test_killed_rank_ends_the_others(path: Path) -> None:
    launcher = _launch(path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)", ranks=3)
    pids = _pids(path, 3)
    os.kill(pids[1], signal.SIGKILL)
    code, error = _finish(launcher)
    assert code == 137
    assert error == f"rank 1: was ended by SIGKILL and left no cause; its output is in {RunDir(path).rank_log(1)}.\n"


def test_cause_of_a_kill_outlives_peers_that_save(path: Path) -> None:
    body = "ready() if rank == 1 else None\nstop_on(signal.SIGTERM) if rank == 0 else time.sleep(60)"
    launcher = _launch(path, body)
    os.kill(_pids(path)[1], signal.SIGKILL)
    assert _finish(launcher)[0] == 137
    assert json.loads(RunDir(path).rank_exit(1).read_text())["code"] == 137


def test_ranks_do_not_outlive_the_launcher(path: Path) -> None:
    launcher = _launch(path, "stop_on(signal.SIGTERM)")
    pids = _pids(path)
    launcher.kill()
    assert _finish(launcher)[0] == -signal.SIGKILL
    _until(lambda: all(map(_is_gone, pids)))
    assert [(path / f"signals-{rank}").read_text() for rank in (0, 1)] == [f"{signal.SIGTERM.value}\n"] * 2


def test_mistakes_have_messages(path: Path) -> None:
    with pytest.raises(ConfigError, match="`no-such-program` cannot be started"):
        run_ranks(["no-such-program"], 2, RunDir(path))
    with pytest.raises(ConfigError, match="must be at least 1"):
        run_ranks(["true"], 0, RunDir(path))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
