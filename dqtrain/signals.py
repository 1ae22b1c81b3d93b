"""What asks a run to stop or to save: Ctrl-C here, SIGTERM and SIGUSR1 from a scheduler, files in the run directory from anyone who may write there."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dqtrain.errors import ConfigError, Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOOK_S = 1.0
"""Seconds between two looks for the files: a shared disk may take long to answer."""


def stop_at_once() -> None:
    """From here on such a signal raises Stopped: for phases in which nothing is unsaved."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped outside of training, where nothing is lost; start it again to continue.")

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def withdraw(file: Path) -> None:
    """Remove a stop or save file, if it is there. Raises ConfigError for a directory."""
    try:
        file.unlink(missing_ok=True)
    except IsADirectoryError:
        raise ConfigError(
            f"{file} is a directory, but an empty file of that name asks a run to {file.name}. Remove it, then `dqtrain resume {file.parent}`."
        ) from None


class Requests:
    """From here on a signal only sets a flag, for all ranks to agree on at a step boundary: a handler may not save. The files are looked for on rank 0."""

    def __init__(self, *files: Path) -> None:
        """`files` are the stop file and the save file on rank 0, and none on the others."""
        self._files, self._found, self._look_at = files, [False, False], 0.0
        self._received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def pending(self) -> tuple[bool, bool]:
        """Whether this rank was asked to stop, and to save."""
        if self._files and time.monotonic() >= self._look_at:
            self._found = [file.exists() for file in self._files]
            self._look_at = time.monotonic() + LOOK_S
        stop, save = self._found
        return stop or self._received, save

    def done(self, record: Callable[[str], None]) -> None:
        """What the files asked for is done: each is recorded as stop_requested or save_requested, then removed. Raises ConfigError, OSError."""
        for file, found in zip(self._files, self._found, strict=False):
            if found:
                record(f"{file.name}_requested")
                withdraw(file)
        self._found = [False, False]
