"""N ranks on this machine: the same command N times, one environment per rank, one exit code for all.

Rank 0 has the terminal, the others write `rank-0001.log`, ... in the run directory. Each rank is a session of its own, so that Ctrl-C
reaches the launcher alone, which passes it on once: the ranks save and exit 75. Needs Linux (prctl); must be called on the main thread,
which the signal handlers and PR_SET_PDEATHSIG belong to, and before the process has other threads.
"""

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from types import FrameType
from typing import IO, Any

from dqtrain.errors import FINAL_CODES, ConfigError, Stopped
from dqtrain.rundir import RunDir

GRACE_S = 10.0
"""Seconds that the other ranks have to end by themselves after one has failed, and again after SIGTERM."""

_POLL_S = 0.05
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None, use_errno=True)


def run_ranks(command: Sequence[str], ranks: int, run: RunDir, env: Mapping[str, str] | None = None) -> int:
    """Run a command as that many ranks and wait for all; `env` replaces this process's environment. Returns the exit code of the run.

    SIGINT, SIGTERM and SIGUSR1 are passed on to every rank, each once; a second SIGINT kills. When a rank has ended, the
    others have GRACE_S to end, are then sent SIGTERM and, after GRACE_S more, SIGKILL. Should the launcher die, the ranks get SIGTERM.

    The code is 0 if every rank ended with 0, else that of the first cause in `exits/` since this start (`RunDir.first_exit`); a rank that
    crashed without one gets one here, with 128 + n for signal n. A failure that rank 0 cannot have printed is printed, once. Raises
    ConfigError when the command cannot be started.
    """
    if ranks < 1:
        raise ConfigError(f"the number of ranks is {ranks}, but must be at least 1. Set --ranks to the number of GPUs, or leave it out.")
    started_ns = time.time_ns()
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    with ExitStack() as stack:
        for signum in _FORWARDED:
            stack.callback(signal.signal, signum, signal.signal(signum, note))
        processes: list[subprocess.Popen] = []
        stack.callback(_kill, processes)
        base = dict(os.environ if env is None else env)
        if ranks > 1:
            base.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
        base |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks):
            output = stack.enter_context(run.rank_log(rank).open("ab")) if rank > 0 else None
            processes.append(start(command, {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output))
        codes = _wait(processes, received, run, started_ns)
    cause = run.first_exit(started_ns) if any(codes) else None
    if cause is None:
        return next((code for code in codes if code), 0)
    said = _cause(0, run, started_ns)  # rank 0 has printed it, unless it was killed
    if cause["code"] > 128 or said is None or said["message"] != cause["message"]:
        print(f"rank {cause['rank']}: {cause['message']}", file=sys.stderr, flush=True)
    return cause["code"]


def _wait(processes: Sequence[subprocess.Popen], received: Sequence[int], run: RunDir, started_ns: int) -> list[int]:
    """Wait for all, pass signals on and end the peers of a failed rank. Returns the exit codes in the order in which the ranks ended."""
    codes: dict[int, int] = {}
    forwarded: set[int] = set()
    ended_at, terminated = float("inf"), False
    while True:
        for rank, process in enumerate(processes):
            if rank not in codes and process.poll() is not None:
                codes[rank] = _exit_code(process.returncode)
                if not terminated:
                    _explain(rank, process.returncode, run, started_ns)
                ended_at = min(ended_at, time.monotonic())
        if len(codes) == len(processes):
            return list(codes.values())
        for signum in set(received) - forwarded:
            forwarded.add(signum)
            _send(processes, signum)
        # Ranks end together, behind a barrier: one that ended long before the others failed, or stopped alone.
        since_first = time.monotonic() - ended_at
        if since_first > GRACE_S and not terminated:
            terminated = True
            _send(processes, signal.SIGTERM)
        if since_first > 2 * GRACE_S or received.count(signal.SIGINT) > 1:
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_S)


def start(command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None) -> subprocess.Popen:
    """A process in a session of its own that gets SIGTERM when this one dies. It prints to `output`, None: as this one. Raises ConfigError when it cannot be started."""
    launcher = os.getpid()

    def follow_launcher() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(128 + signal.SIGTERM)

    try:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=follow_launcher)
    except OSError as error:
        raise ConfigError(f"`{command[0]}` cannot be started ({error}). Give a program that is installed and executable.") from None


def _send(processes: Sequence[subprocess.Popen], signum: int) -> None:
    for process in processes:
        process.send_signal(signum)  # does nothing once the process has been waited for


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    """Leave no rank behind, whatever went wrong in the launcher."""
    _send(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _cause(rank: int, run: RunDir, started_ns: int) -> dict[str, Any] | None:
    """What a rank left behind since this start; an earlier start's may still be there."""
    if not run.rank_exit(rank).exists():
        return None
    left = json.loads(run.rank_exit(rank).read_text())
    return left if left["time_ns"] >= started_ns else None


def _explain(rank: int, returncode: int, run: RunDir, started_ns: int) -> None:
    """Record the cause of a rank that crashed and could not do so itself."""
    if returncode in (0, Stopped.exit_code, *FINAL_CODES) or (returncode > 0 and _cause(rank, run, started_ns)):
        return
    how = f"was ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with exit code {returncode}"
    where = f"; its output is in {run.rank_log(rank)}" if rank > 0 else ""
    with suppress(OSError):  # a full disk must not hide the exit code
        run.record_exit(rank, _exit_code(returncode), f"{how} and left no cause{where}.", None)


def _exit_code(returncode: int) -> int:
    """As a shell reports it: 128 + n for signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def free_port() -> int:
    """A port of this machine that nobody listens on now.

    Below those that the system gives to outgoing connections (ip_local_port_range begins at 32768), such as gloo's own: one of these may be
    taken by any process before rank 0 listens on it.
    """
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
