"""Signals that ask a run to stop: Ctrl-C here, SIGTERM and SIGUSR1 from a scheduler."""

import signal
from types import FrameType

from dqtrain.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop_at_once() -> None:
    """From here on such a signal raises Stopped: for phases in which nothing is unsaved."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped outside of training, where nothing is lost; start it again to continue.")

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


class StopRequest:
    """From here on such a signal only sets a flag, for all ranks to agree on at a step boundary: a handler may not save."""

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
