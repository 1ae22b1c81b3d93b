"""The shards of one source: what its index says of them, each opened when it is first read."""

import hashlib
import os
from pathlib import Path

import numpy as np

from dqtrain.config import Cache
from dqtrain.data.foreign import ForeignFile
from dqtrain.data.prepare import INDEX, parse_index, read_index
from dqtrain.data.remote import Copies, is_address, read_address
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

Tokens = Shard | ForeignFile
"""What a stream reads."""


class Folder:
    """A folder that `prepare` made, here or at an address. Raises DataError for an index that is missing, damaged or of another version."""

    def __init__(self, name: Path | str, cache: Cache) -> None:
        self.name = str(name)
        """Where it is, for messages."""
        self.copies = Copies(self.name, cache.folder, int(cache.gib * 2**30)) if is_address(name) else None
        """Where it is read from, if it is not on this node."""
        index = parse_index(f"{name}/{INDEX}", read_address(f"{name}/{INDEX}")) if self.copies else read_index(Path(name))
        shards = index.pop("shards")
        self.facts = index
        """The index, but for the shards."""
        self.num_tokens, self.num_documents = (np.array([shard[key] for shard in shards], np.int64) for key in ("num_tokens", "num_documents"))
        self._files, self._checksums = ([shard[key] for shard in shards] for key in ("file", "checksum"))
        self._bytes = [shard["bytes"] for shard in shards] if self.copies else []

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.facts["vocab_size"]

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored as."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def fingerprint(self) -> str:
        """Changes when a shard, or what its header says, is another: sha256, hexadecimal."""
        return hashlib.sha256("".join(self._checksums).encode()).hexdigest()

    def check(self) -> None:
        """Raise DataError when a shard is not there; one listing of the folder, whatever the number of shards. What is at an address shows when it is read."""
        there = set() if self.copies else set(os.listdir(self.name))
        for file in [] if self.copies else self._files:
            if file not in there:
                raise DataError(f"token shard {self.name}/{file} is missing; run dqtrain prepare again.")

    def open(self, number: int) -> Tokens:
        """Map a shard. Raises DataError when it is not the one that the index names."""
        if self.copies is not None:
            return self.copies.open(self._files[number], self._bytes[number], self._checksums[number])
        shard = Shard(Path(self.name) / self._files[number])
        if shard.checksum != self._checksums[number]:
            raise DataError(f"token shard {shard.path} is not the one that the index names; delete {self.name} and run dqtrain prepare again.")
        return shard


class ForeignFolder(Folder):
    """A token file of another program, as the only shard of a folder."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.name, self.copies = str(path), None
        self._file = ForeignFile(path, vocab_size)
        self.facts = {"tokenizer_hash": None, "vocab_size": vocab_size}
        self.num_tokens, self.num_documents = np.array([self._file.num_tokens]), np.array([len(self._file.document_ends)])

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored as."""
        return self._file.dtype

    def fingerprint(self) -> str:
        """Changes when there are more or fewer tokens, or documents end elsewhere: sha256, hexadecimal."""
        return hashlib.sha256(f"{self._file.num_tokens} {self._file.dtype}".encode() + self._file.document_ends.tobytes()).hexdigest()

    def check(self) -> None:
        """It is there, since it is open."""

    def open(self, number: int) -> Tokens:
        """The file."""
        return self._file


def open_folder(path: Path | str, cache: Cache | None = None, vocab_size: int = 2**32) -> Folder:
    """The shards at a path or an address; `vocab_size` is that of the tokenizer, which files of other programs do not say."""
    if isinstance(path, Path) and path.suffix in (".bin", ".ds"):
        return ForeignFolder(path, vocab_size)
    return Folder(path, cache or Cache())
