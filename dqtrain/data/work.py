"""Numbered pieces of work in several processes, which tell how far they are; whoever is free takes the next one.

The processes are forks of a clean one (Python's forkserver), since the caller may hold threads and a GPU. They end with the caller, however it ends.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from dqtrain.errors import DataError, UserError

Report = Callable[[str, float | None], None]
"""Called with a message, and the share of the work that is done where the next message is to take its place."""
Work = Callable[[int, Callable[[int, int, int], None]], None]
"""Does piece n, and calls what it is given with more (documents, tokens, bytes)."""
_PLAIN_S = 10
"""Seconds between messages where they follow one another, as in a file."""


class _Tally:
    """Tells `report` about once a second on a terminal, else every ten seconds, how far the work is."""

    def __init__(self, what: str, num_bytes: int, report: Report | None) -> None:
        self.what, self.num_bytes, self.report = what, num_bytes, report
        self.documents = self.tokens = self.bytes = 0
        self.started = self.told = time.monotonic()
        self.interval_s = 1 if sys.stdout.isatty() else _PLAIN_S

    def add(self, documents: int, tokens: int, num_bytes: int) -> None:
        """More that is done."""
        self.documents, self.tokens, self.bytes = self.documents + documents, self.tokens + tokens, self.bytes + num_bytes
        self.tell(self.interval_s)

    def tell(self, interval_s: float) -> None:
        """Say it, unless it was said within the interval."""
        now = time.monotonic()
        if self.report is None or now - self.told < interval_s:
            return
        self.told, passed = now, now - self.started
        share = min(1.0, self.bytes / self.num_bytes) if self.num_bytes else 1.0
        left = f", {_clock(passed / share * (1 - share))} left" if 0 < share < 1 else ""
        rates = f"{self.documents / passed:,.0f} documents/s, {self.tokens / passed:,.0f} tokens/s"
        self.report(f"{self.what}: {self.documents:,} documents, {self.tokens:,} tokens, {rates}{left}", share)


def share_out(work: Work, numbers: Sequence[int], workers: int | None, what: str, num_bytes: int, report: Report | None) -> None:
    """Do all `numbers`, in this process or, if there are several, in up to `workers` (default: as many as processors). Work goes to others by pickle.

    `num_bytes` is that of all of it, for the progress. Raises what the work raises, and DataError when a process is killed; then the others are stopped.
    """
    tally = _Tally(what, num_bytes, report)
    count = min(len(numbers), len(os.sched_getaffinity(0)) if workers is None else workers)
    if count <= 1:
        for number in numbers:
            work(number, tally.add)
    else:
        _in_processes(work, numbers, count, tally)
    if tally.told > tally.started:  # it took long enough to be told of
        tally.tell(0)


def _in_processes(work: Work, numbers: Sequence[int], count: int, tally: _Tally) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dqtrain.data.prepare", "transformers.models.auto.tokenization_auto"])
    taken: Any = context.Value("q", 0)
    done: Any = context.Array("q", 3)
    processes, pipes = [], []
    try:
        for _ in range(count):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work_off, args=(work, list(numbers), taken, done, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        open_pipes = dict(zip(pipes, processes, strict=True))
        while open_pipes:
            for pipe in wait(list(open_pipes), timeout=tally.interval_s):
                _hear(pipe, open_pipes.pop(pipe))  # type: ignore[arg-type, call-overload]
            with done:
                seen = list(done)
            tally.add(*(now - before for now, before in zip(seen, (tally.documents, tally.tokens, tally.bytes), strict=True)))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _hear(pipe: Connection, process: Any) -> None:
    """What a process says when it ends: nothing when all is done."""
    try:
        error = pipe.recv()
    except EOFError:
        process.join()
        if process.exitcode == 0:
            return
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise DataError(
                f"a process that prepares data was ended by {name}, as happens where memory runs out. What is complete is kept: start again, with fewer --workers."
            ) from None
        raise RuntimeError(f"a process that prepares data ended with code {process.exitcode}; what it said is above") from None
    raise error


def _work_off(work: Work, numbers: Sequence[int], taken: Any, done: Any, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the processors already
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()

    def add(*more: int) -> None:
        with done:
            for i, value in enumerate(more):
                done[i] += value

    try:
        while True:
            with taken:
                turn = taken.value
                taken.value += 1
            if turn >= len(numbers):
                return
            work(numbers[turn], add)
    except UserError as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(error)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
