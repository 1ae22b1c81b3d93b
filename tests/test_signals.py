"""Files that ask a run to stop or to save."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dqtrain.errors import ConfigError
from dqtrain.signals import STOP_SIGNALS, Requests


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    before = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    yield tmp_path / "stop", tmp_path / "save"
    for number, handler in before:
        signal.signal(number, handler)


def test_a_file_is_seen_recorded_and_removed(files: tuple[Path, Path]) -> None:
    recorded: list[str] = []
    files[1].touch()
    requests = Requests(*files)
    assert requests.pending() == (False, True)
    requests.done(recorded.append)
    assert recorded == ["save_requested"] and not files[1].exists() and requests.pending() == (False, False)
    assert Requests().pending() == (False, False)


@pytest.mark.parametrize("number, verb", [(0, "stop"), (1, "save")])
def test_a_directory_is_said_to_be_one(files: tuple[Path, Path], number: int, verb: str) -> None:
    files[number].mkdir()
    requests = Requests(*files)
    assert requests.pending() == (number == 0, number == 1)
    with pytest.raises(ConfigError, match=f"^{files[number]} is a directory, but an empty file of that name asks a run to {verb}. Remove it, then "):
        requests.done(lambda kind: None)
