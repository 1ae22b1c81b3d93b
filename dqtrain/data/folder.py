"""The shards of one source: what its index says of them, each opened when it is first read."""

import os
from pathlib import Path

import numpy as np

from dqtrain.data.prepare import read_index
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError


class Folder:
    """A folder that `prepare` made. Raises DataError for an index that is missing, damaged or of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_index(path)
        shards = index.pop("shards")
        self.facts = index
        """The index, but for the shards."""
        self.num_tokens, self.num_documents = (np.array([shard[key] for shard in shards], np.int64) for key in ("num_tokens", "num_documents"))
        self._files, self._checksums = ([shard[key] for shard in shards] for key in ("file", "checksum"))

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return str(self.path)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.facts["vocab_size"]

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored as."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def check(self) -> None:
        """Raise DataError when a shard is not there; one listing of the folder, whatever the number of shards."""
        there = set(os.listdir(self.path))
        for file in self._files:
            if file not in there:
                raise DataError(f"token shard {self.path / file} is missing; run dqtrain prepare again.")

    def open(self, number: int) -> Shard:
        """Map a shard. Raises DataError when it is not the one that the index names."""
        return self._checked(Shard(self.path / self._files[number]), number)

    def _checked(self, shard: Shard, number: int) -> Shard:
        if shard.checksum != self._checksums[number]:
            raise DataError(f"token shard {shard.path} is not the one that the index names; delete {self.path} and run dqtrain prepare again.")
        return shard


def open_folder(path: Path) -> Folder:
    """The shards at a path."""
    return Folder(path)
