"""Rows of tokens out of many mapped files by one call of numpy, which takes as long whether they lie in one file or in thousands. Needs numpy."""

from types import SimpleNamespace

import numpy as np

_NOWHERE = -(2**62)
"""Where rows of a file begin that is not mapped: an index that numpy refuses."""


class Rows:
    """Rows of `width` tokens, anywhere in the files that are mapped here; what is mapped stays mapped until `unmap`. For one thread at a time.

    All that lies between the lowest and the highest of the files in memory is one array, of which each token begins an entry as long as a row: entries overlap, and
    numpy copies those that it is asked for. Entries between files are never asked for, since a row is found by its file.
    """

    def __init__(self, num_files: int, dtype: np.dtype, width: int) -> None:
        self._dtype, self._row_bytes = dtype, width * dtype.itemsize
        self._firsts = np.full(num_files, _NOWHERE)  # of each file, the entry that its first token begins
        self._held: dict[int, np.ndarray] = {}  # file -> its tokens
        self._start = self._end = 0  # addresses between which the files lie
        self._entries = np.empty(0, f"V{self._row_bytes}")

    def __contains__(self, file: int) -> bool:
        return file in self._held

    def map(self, file: int, tokens: memoryview) -> None:
        """Take a file's tokens, as they are stored, which hold a row at least."""
        held = np.frombuffer(tokens, self._dtype)
        start = held.__array_interface__["data"][0]
        assert start % self._dtype.itemsize == 0 and held.nbytes >= self._row_bytes
        self._held[file] = held
        if len(self._held) == 1:
            self._lay(start, start + held.nbytes)
        elif start < self._start or start + held.nbytes > self._end:
            self._lay(min(start, self._start), max(start + held.nbytes, self._end))
        self._firsts[file] = (start - self._start) // self._dtype.itemsize

    def unmap(self, file: int) -> None:
        """Let go of a file, if it is mapped."""
        self._held.pop(file, None)
        self._firsts[file] = _NOWHERE

    def gather(self, files: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Copy the rows that begin at token `starts` [n] of `files` [n], as they are stored: [n, width]. Raises IndexError for a file that is not mapped."""
        return self._entries[self._firsts[files] + starts].view(self._dtype).reshape(len(starts), -1)

    def _lay(self, start: int, end: int) -> None:
        """Begin entries at all tokens between two addresses that leave room for a row."""
        size = self._dtype.itemsize
        mapped = self._firsts != _NOWHERE
        self._firsts[mapped] += (self._start - start) // size
        self._start, self._end = start, end
        layout = {"version": 3, "typestr": f"|V{self._row_bytes}", "shape": ((end - start - self._row_bytes) // size + 1,), "strides": (size,)}
        self._entries = np.asarray(SimpleNamespace(__array_interface__={**layout, "data": (start, True)}))
