"""One file of token ids: a header, the document ends, the tokens, which of them are predicted, and a checksum for every MiB of all that.

Layout, little-endian: magic (8 bytes), length of the header (uint64), header (JSON, padded with spaces), xxh3_64 of all before (uint64);
payload: document ends (uint64), tokens (uint16 or uint32), and with `has_predicted` a bit for each token, the lowest bit of a byte first;
xxh3_64 of every `block_bytes` of the payload (uint64 each).
A file is complete or absent, is read through a memory map, and no token is handed out before its block was checked. Needs numpy and xxhash.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dqtrain.errors import DataError
from dqtrain.files import write_whole

VERSION = 2
MAGIC = b"DQSHARD\n"
BLOCK_BYTES = 2**20
_ALIGNMENT = 64
_REMEDY = "delete it and run dqtrain prepare again"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and turn a disk that refuses into a DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); free space or choose another folder, then start again.") from None


def write_shard(
    path: Path,
    tokens: np.ndarray,
    document_ends: np.ndarray,
    *,
    vocab_size: int,
    tokenizer_hash: str,
    source: str,
    split: str,
    num_bytes: int,
    pieces_end: int,
    predicted: np.ndarray | None = None,
) -> None:
    """Write token ids [num_tokens] and, ascending, the offset behind the last token of each document that ends here [num_documents].

    `num_bytes`: UTF-8 bytes of the text; `pieces_end`: corpus pieces that this shard and those before it hold; `predicted`: bool [num_tokens], the tokens that a
    model should say, None for all of them, such as those of an assistant in a chat.
    Raises DataError for an id that is negative or not below `vocab_size`, and when the disk refuses.
    """
    if len(tokens) and not 0 <= (worst := int(tokens.min() if tokens.min() < 0 else tokens.max())) < vocab_size:
        raise DataError(f"{path}: token id {worst} is not in [0, {vocab_size}), the vocabulary; use the tokenizer that made the ids.")
    assert len(document_ends) == 0 or (document_ends[0] > 0 and document_ends[-1] <= len(tokens) and (np.diff(document_ends) > 0).all())
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    assert predicted is None or predicted.dtype == bool and len(predicted) == len(tokens)
    bits = np.packbits(np.zeros(0, bool) if predicted is None else predicted, bitorder="little")
    parts = [np.ascontiguousarray(document_ends, "<u8"), np.ascontiguousarray(tokens, np.dtype(dtype).newbyteorder("<")), bits]
    payload = memoryview(b"".join([part.data for part in parts]))
    blocks = [payload[start : start + BLOCK_BYTES] for start in range(0, len(payload), BLOCK_BYTES)]
    header = {
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer_hash": tokenizer_hash,
        "source": source,
        "split": split,
        "num_tokens": len(tokens),
        "num_documents": len(document_ends),
        "has_predicted": predicted is not None,
        "num_bytes": num_bytes,
        "pieces_end": pieces_end,
        "block_bytes": BLOCK_BYTES,
    }
    text = json.dumps(header).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text) + 8) % _ALIGNMENT)
    head = MAGIC + len(text).to_bytes(8, "little") + text
    checksums = np.array([xxhash.xxh3_64_intdigest(block) for block in blocks], "<u8")
    with writing(path):
        write_whole(path, [head, xxhash.xxh3_64_intdigest(head).to_bytes(8, "little"), payload, checksums.tobytes()])


class Shard:
    """A shard file, open for reading. Raises DataError for one that is missing, of another version, cut short, or changed.

    `header` holds the fields as written, `checksum` is that of the header (hexadecimal).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r").data
        except FileNotFoundError:
            raise DataError(f"token shard {path} is missing; run dqtrain prepare again.") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DataError(f"token shard {path} cannot be read ({error}); {_REMEDY}.") from None
        self.header, payload_start = self._read_header()
        self.checksum = f"{xxhash.xxh3_64_intdigest(self._bytes[: payload_start - 8]):016x}"
        self.num_tokens: int = self.header["num_tokens"]
        self._dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        self._tokens_start = 8 * self.header["num_documents"]
        self._predicted_start = self._tokens_start + self.num_tokens * self._dtype.itemsize
        payload_bytes = self._predicted_start + (-(-self.num_tokens // 8) if self.header["has_predicted"] else 0)
        num_blocks = -(-payload_bytes // self.header["block_bytes"])
        expected = payload_start + payload_bytes + 8 * num_blocks
        if len(self._bytes) != expected:
            raise DataError(f"token shard {path} has {len(self._bytes)} bytes, but its header says {expected}; {_REMEDY}.")
        self._payload = self._bytes[payload_start : payload_start + payload_bytes]
        self._checksums = np.frombuffer(self._bytes[payload_start + payload_bytes :], "<u8")
        self.bytes = self._payload[self._tokens_start : self._predicted_start]
        """The tokens as they are stored, not checked."""
        self._checked = np.zeros(num_blocks, bool)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Return the header and the offset of the payload."""
        start = len(MAGIC) + 8
        if self._bytes[: len(MAGIC)] != MAGIC:
            raise DataError(f"{self.path} is not a token shard: it does not begin with {MAGIC!r}; {_REMEDY}.")
        end = start + int.from_bytes(self._bytes[len(MAGIC) : start], "little")
        if end + 8 > len(self._bytes):
            raise DataError(f"token shard {self.path} has {len(self._bytes)} bytes, but its header alone should end at {end + 8}; {_REMEDY}.")
        if xxhash.xxh3_64_intdigest(self._bytes[:end]) != int.from_bytes(self._bytes[end : end + 8], "little"):
            raise DataError(f"token shard {self.path}: the header does not match its checksum; {_REMEDY}.")
        header = json.loads(bytes(self._bytes[start:end]))
        if header["version"] != VERSION:
            raise DataError(f"token shard {self.path} has format version {header['version']}, but this dqtrain reads {VERSION}; {_REMEDY}.")
        return header, end + 8

    @property
    def has_predicted(self) -> bool:
        """Whether there are tokens that a model should not say."""
        return self.header["has_predicted"]

    @functools.cached_property
    def document_ends(self) -> np.ndarray:
        """Offset behind the last token (the end of text) of each document that ends in this shard: int64 [num_documents]. Raises DataError as `read` does."""
        return self.read_document_ends(0, self.header["num_documents"])

    def read_document_ends(self, start: int, stop: int) -> np.ndarray:
        """Return the ends of documents [start, stop) among those that end in this shard: int64. Raises DataError as `read` does."""
        assert 0 <= start <= stop <= self.header["num_documents"]
        return self._read(8 * start, 8 * stop, np.dtype("<u8")).astype(np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop): int64. Raises DataError when a block they lie in is not what was written."""
        assert 0 <= start <= stop <= self.num_tokens
        size = self._dtype.itemsize
        return self._read(self._tokens_start + start * size, self._tokens_start + stop * size, self._dtype).astype(np.int64)

    def check(self, start: int, stop: int) -> None:
        """Check the blocks that hold the tokens [start, stop), and which of them are predicted, if they were not. Raises DataError as `read` does."""
        size = self._dtype.itemsize
        self._check_between(self._tokens_start + start * size, self._tokens_start + stop * size)
        if self.has_predicted:
            self._check_between(self._predicted_start + start // 8, self._predicted_start + -(-stop // 8))

    def read_predicted(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens [start, stop) a model should say: bool, all True in a shard without `has_predicted`. Raises DataError as `read` does."""
        assert 0 <= start <= stop <= self.num_tokens
        if not self.has_predicted:
            return np.ones(stop - start, bool)
        packed = self._read(self._predicted_start + start // 8, self._predicted_start + -(-stop // 8), np.dtype(np.uint8))
        return np.unpackbits(packed, count=stop - start // 8 * 8, bitorder="little")[start % 8 :].astype(bool)

    def verify(self) -> None:
        """Check every block, whether or not it was checked before. Raises DataError at the first that is not what was written."""
        for block in range(len(self._checked)):
            self._check(block)

    def _read(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        self._check_between(start, stop)
        return np.frombuffer(self._payload[start:stop], dtype)

    def _check_between(self, start: int, stop: int) -> None:
        """Check the blocks that hold the bytes [start, stop) of the payload, if they were not."""
        block_bytes = self.header["block_bytes"]
        for block in range(start // block_bytes, -(-stop // block_bytes)):
            if not self._checked[block]:
                self._check(block)

    def _check(self, block: int) -> None:
        block_bytes = self.header["block_bytes"]
        if xxhash.xxh3_64_intdigest(self._payload[block * block_bytes : (block + 1) * block_bytes]) != self._checksums[block]:
            raise DataError(f"token shard {self.path}: block {block} of {len(self._checked)} does not match its checksum; {_REMEDY}.")
        self._checked[block] = True
