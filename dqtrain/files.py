"""Files that are complete or absent: written aside, synced, renamed."""

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import xxhash

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
"""What a disk says that takes no more."""


def sync_path(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power failure. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that no other process uses, on any machine that shares the disk."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def write_aside(path: Path, parts: Iterable[bytes | memoryview]) -> Path:
    """A complete, synced file under a temporary name beside `path`. Raises OSError, such as on a full disk, and then leaves none."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace a file by a complete, synced one. Raises OSError, such as on a full disk, and then leaves the old file as it was."""
    temporary = write_aside(path, parts)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, [text.encode()])


def digest(path: Path) -> str:
    """xxh3_128 of a file, as hex: against damage, not against malice."""
    result = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()
