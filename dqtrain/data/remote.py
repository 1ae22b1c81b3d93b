"""Shards at an address (s3://, gs://, https://, memory://, ... of fsspec), read through copies on a disk of the node that its ranks share.

A copy is complete and sound or absent: it is fetched under another name, compared with the index and its own checksums, and renamed. There are no locks: of ranks that want
the same shard one fetches it, as long as its unfinished file grows, and the others look for the copy. What was used least recently makes room, and whoever has it mapped
keeps it. Used is opened: a copy that is mapped for long counts as used when it was mapped. An unfinished file's name begins with the time, and its size is all that it will
take, or 0 while it waits for room: so all ranks see the same queue, and copies and what is being fetched are within the bound together. Needs fsspec, and its package for the protocol.
"""

import contextlib
import functools
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

T = TypeVar("T")

ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
"""Before the second attempt; each pause is twice the one before."""
_BLOCK_BYTES = 2**22
_STALLED_S = 10.0
"""After so long without growth an unfinished file counts as left behind."""
_POLL_S = 0.05


def is_address(path: Path | str) -> bool:
    """Whether something has to be fetched, and is not on a disk of this machine."""
    return "://" in str(path)


def read_address(address: str) -> bytes:
    """Return what is at an address; tries again where that fails. Raises DataError."""
    return _again(address, lambda: b"".join(_blocks(address)))


class Copies:
    """The copies of the shards of one folder at an address."""

    def __init__(self, address: str, root: Path | None, max_bytes: int) -> None:
        """`root`: where the copies of all addresses are; None: a folder for temporary files. `max_bytes` is for all of them together."""
        self.address = address.rstrip("/")
        self.root = root or Path(tempfile.gettempdir()) / "dqtrain-shards"
        self.max_bytes = max_bytes
        self.fetched_bytes = 0
        self._counting = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._folder = self.root / hashlib.sha256(self.address.encode()).hexdigest()[:16]

    def open(self, file: str, num_bytes: int, checksum: str) -> Shard:
        """Map a shard, fetched before if there is no sound copy. Raises DataError when it stays missing or damaged, or when the copy cannot be written."""
        with self._opening.setdefault(file, threading.Lock()):  # threads of a process may ask in the same microsecond
            return self._open(self._folder / file, num_bytes, checksum)

    def _open(self, path: Path, num_bytes: int, checksum: str) -> Shard:
        file = path.name
        while (shard := _copy(path, num_bytes, checksum)) is None:
            mine = path.with_name(f".{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.{file}")
            with _writing(mine):
                mine.parent.mkdir(parents=True, exist_ok=True)
                mine.touch()
            try:
                first = min([mine, *_alive(path)], key=lambda other: other.name)
                if first != mine:
                    mine.unlink()
                    while _is_alive(first):
                        time.sleep(_POLL_S)
                elif _copy(path, num_bytes, checksum) is None:  # nobody was just done with it
                    _again(f"{self.address}/{file}", functools.partial(self._fetch, file, mine, num_bytes, checksum))
            finally:
                mine.unlink(missing_ok=True)
        return shard

    def _fetch(self, file: str, unfinished: Path, num_bytes: int, checksum: str) -> None:
        with _writing(unfinished):
            out = unfinished.open("wb")
        with out:
            with _writing(unfinished):
                self._claim(out, num_bytes, unfinished)
            self._make_room(num_bytes, unfinished)
            for block in _blocks(f"{self.address}/{file}"):
                with _writing(unfinished):
                    out.write(block)
                    out.flush()  # so that others see it grow
                with self._counting:
                    self.fetched_bytes += len(block)
            found = out.tell()
            with _writing(unfinished):
                os.fsync(out.fileno())
        if found != num_bytes:
            raise DataError(f"it has {found} bytes, but the index says {num_bytes}")
        shard = Shard(unfinished)
        if shard.checksum != checksum:
            raise DataError("it is not the one that the index names")
        shard.verify()
        os.replace(unfinished, self._folder / file)

    def _claim(self, out: BinaryIO, num_bytes: int, unfinished: Path) -> None:
        """Wait until what others fetch leaves room for `num_bytes`, here as `unfinished`, which is open as `out`."""
        if num_bytes > self.max_bytes:
            raise _Unwritable(f"a shard of {self.address} has {num_bytes / 2**30:.2f} GiB, but data.cache.gib is {self.max_bytes / 2**30:.2f}. Raise it.")
        # Looked at once more behind the claim: of two that claim at once, one sees the other.
        while not (self._is_turn(num_bytes, unfinished) and out.truncate(num_bytes) and self._is_turn(num_bytes, unfinished)):
            out.truncate(0)  # marks the file as changed too: who waits is not gone
            time.sleep(_POLL_S)

    def _is_turn(self, num_bytes: int, unfinished: Path) -> bool:
        """Whether nobody who came before waits, and all that is claimed leaves room for `num_bytes`."""
        others = [(path.name, size) for path, _, size in self._files("*/.*", unfinished)]
        return all(size or name > unfinished.name for name, size in others) and sum(size for _, size in others) + num_bytes <= self.max_bytes

    def _make_room(self, num_bytes: int, unfinished: Path) -> None:
        """Remove copies, those first that were used least recently, until they fit with what is being fetched, here `num_bytes` as `unfinished`."""
        found = self._files("*/*", unfinished)
        excess = sum(size for _, _, size in found) + num_bytes - self.max_bytes
        for path, _, size in sorted(found, key=lambda file: file[1]):
            if excess > 0 and not path.name.startswith("."):
                path.unlink(missing_ok=True)
                excess -= size

    def _files(self, pattern: str, unfinished: Path) -> list[tuple[Path, int, int]]:
        """Copies and what others fetch, of all addresses, with the time of their last use and their bytes."""
        found = []
        for path in self.root.glob(pattern):
            if path == unfinished or path.name.startswith(".") and not _is_alive(path):
                continue
            with contextlib.suppress(FileNotFoundError):  # another rank makes room too, or is done
                status = path.stat()
                found.append((path, status.st_mtime_ns, status.st_size))
        return found


def _copy(path: Path, num_bytes: int, checksum: str) -> Shard | None:
    """A sound copy, used now; None where there is none, or that of an earlier index."""
    try:
        shard = Shard(path)
        if shard.checksum == checksum and path.stat().st_size == num_bytes:
            with contextlib.suppress(OSError):  # a copy that somebody else keeps there, or that was just removed, is as sound
                os.utime(path)
            return shard
    except (DataError, FileNotFoundError):  # it may be removed at any moment, to make room
        pass
    return None


class _Unwritable(DataError):
    """What another attempt would not mend."""


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the copy {path} cannot be written ({error.strerror or error})"
        raise _Unwritable(f"{what}. Set data.cache.folder to a folder on a disk of the node that has room, or lower data.cache.gib.") from None


def _alive(path: Path) -> list[Path]:
    """Unfinished files of a copy that grow."""
    return [other for other in path.parent.glob(f".*.{path.name}") if _is_alive(other)]


def _is_alive(unfinished: Path) -> bool:
    """Whether an unfinished file is there and grows; one that does not is removed, since its rank is gone or stuck."""
    try:
        age_s = time.time() - unfinished.stat().st_mtime
    except FileNotFoundError:
        return False
    if age_s >= _STALLED_S:
        unfinished.unlink(missing_ok=True)
    return age_s < _STALLED_S


def _blocks(address: str) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(address, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _again(address: str, act: Callable[[], T]) -> T:
    """Do something at an address, up to ATTEMPTS times; a store, or what lies between, fails now and then."""
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except _Unwritable:
            raise
        except ImportError as error:  # fsspec names the package of the protocol
            raise DataError(f"{address} cannot be read: {error}.") from None
        except Exception as error:  # stores raise whatever they like
            if attempt + 1 == ATTEMPTS:
                raise DataError(
                    f"{address} cannot be read, tried {ATTEMPTS} times: {error or type(error).__name__}. Put a sound copy there, from the folder that dqtrain prepare "
                    "made, or set data.quarantine to true, which leaves its samples out."
                ) from None
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")
