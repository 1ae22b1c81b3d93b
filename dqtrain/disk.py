"""Vectors whose memory is a file on a local disk: what is too much for host memory (`zero.nvme`).

A mapped file without a name. Whoever computes with it needs no code of its own: the kernel reads pages when they are touched, keeps them while there is
memory to spare, and writes them out when not. Space is taken when the vector is made, so that a full disk is a message then and no crash later. The
file is gone with its process, however that ends.
"""

import ctypes
import mmap
import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dqtrain.errors import ConfigError
from dqtrain.world import World, first_problem

_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """Makes vectors in a folder, and holds them until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Tensor] = []

    def zeros(self, numel: int) -> Tensor:
        """An fp32 vector of zeros, which takes space but no memory yet. Raises ConfigError where the disk does not give it."""
        num_bytes = 4 * max(numel, 1)
        try:
            with _file(self.folder, num_bytes) as file:
                made = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=max(numel, 1))[:numel]
        except OSError as error:
            raise ConfigError(_refusal(self.folder, num_bytes, error)) from None
        self._made.append(made)
        return made

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is one of these files."""
        return any(made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for made in self._made)

    def release(self) -> None:
        """Take the pages out of this process's memory; what was written stays, and is there when it is next touched."""
        for made in self._made:
            if _advise(made, mmap.MADV_DONTNEED) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.folder))

    def close(self) -> None:
        """Give the space back, though somebody may still hold the vectors: they are zeros then."""
        for made in self._made:
            _advise(made, mmap.MADV_REMOVE)  # a filesystem that cannot do so gives it back at the end of the process
        self._made.clear()


def require_room(folder: Path, num_bytes: int, world: World) -> None:
    """Raise ConfigError, the same on every rank, unless all of them can have so many bytes in their node's folder at once. Collective."""
    problem = None
    with ExitStack() as held:
        try:
            held.enter_context(_file(folder, num_bytes))
        except OSError as error:
            problem = f"{_refusal(folder, num_bytes, error)} (rank {world.rank} on {os.uname().nodename})"
        problem = first_problem(problem)
    if problem is not None:
        raise ConfigError(problem)


def _file(folder: Path, num_bytes: int) -> IO[Any]:
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller closes it
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError:
        file.close()
        raise
    return file


def _advise(vector: Tensor, advice: int) -> int:
    storage = vector.untyped_storage()
    return _libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), ctypes.c_int(advice))


def _refusal(folder: Path, num_bytes: int, error: OSError) -> str:
    free = "no folder"
    with suppress(OSError):
        free = f"{shutil.disk_usage(folder).free:,} bytes free"
    return (
        f"zero.nvme: {folder} does not take {num_bytes:,} bytes ({error.strerror}; {free}). "
        "Set it to a folder on a local disk that every node has, with 12 bytes of space for each parameter over the ranks, or set the offload to cpu"
    )
