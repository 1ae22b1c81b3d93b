"""A rank that makes no more progress says where it stands, and ends, so that the run can be started again.

A frozen peer keeps its sockets open: the others wait for it in a collective, and no error ever comes.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dqtrain.errors import Stopped
from dqtrain.files import write_text

TICK_S = 1.0
"""Seconds between two looks, at most."""
LAST_S = 300.0
"""Seconds that a rank which hangs has to say so."""


class Watchdog:
    """Calls `hung`, in a thread of its own, once `limit_s` seconds have passed without a `beat`.

    Before, it writes the stack of every thread of this process to `stacks`, if the disk takes it. It is armed by the second beat, since the
    first forward and backward may wait for compilers. It counts its own ticks, not the clock: a job that is suspended as a whole does not hang.
    """

    def __init__(self, limit_s: float, stacks: Path, hung: Callable[[], object]) -> None:
        self._limit_s, self._stacks, self._hung = limit_s, stacks, hung
        self._beats, self._stopped = 0, threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, *_: Any) -> None:
        """There is progress. Takes whatever a hook of a module is called with; costs nothing."""
        self._beats += 1

    def stop(self) -> None:
        """No progress is expected from here on."""
        self._stopped.set()

    def _watch(self) -> None:
        tick_s = min(TICK_S, self._limit_s / 10)
        seen, idle_s = 0, 0.0
        while not self._stopped.wait(tick_s):
            idle_s = 0.0 if self._beats != seen or seen < 2 else idle_s + tick_s
            seen = self._beats
            if idle_s >= self._limit_s:
                # Should it be the disk that hangs, what follows hangs too.
                last = threading.Timer(LAST_S, os._exit, (Stopped.exit_code,))
                last.daemon, last.name = True, "watchdog"
                last.start()
                try:
                    self._stacks.parent.mkdir(exist_ok=True)
                    write_text(self._stacks, _all_stacks())
                finally:
                    self._hung()
                return


def _all_stacks() -> str:
    """Where every thread of this process is, the newest call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in sys._current_frames().items()]
    return "\n".join(stacks)
