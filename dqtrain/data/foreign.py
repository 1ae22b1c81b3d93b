"""Token files of other programs, read in place: Megatron-LM's PREFIX.bin with PREFIX.idx, and datatrove's NAME.ds with NAME.ds.index.

They hold no checksums and do not say which tokenizer made them: sizes and ids are checked, but damage that leaves an id an id does not show.
Layouts: Megatron-LM, megatron/core/datasets/indexed_dataset.py (_IndexWriter); datatrove, pipeline/tokens/tokenizer.py (TokenizedFile).
"""

from pathlib import Path

import numpy as np

from dqtrain.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK = 2**19
"""Tokens whose ids are looked at together, when the first of them is read."""


class ForeignFile:
    """A token file of Megatron-LM (.bin) or datatrove (.ds), with the face of a `Shard`. Raises DataError for one that is missing, or does not fit its index."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """`vocab_size`: one more than the largest id of the tokenizer, as far as is known; other ids are refused when they are read."""
        self.path, self.vocab_size = path, vocab_size
        try:
            self.dtype, self.document_ends = _megatron_index(path) if path.suffix == ".bin" else _datatrove_index(path)
            tokens = np.memmap(path, self.dtype, "r")
            said = path.with_name(path.name + ".loss") if path.suffix == ".ds" else None
            self._predicted = np.memmap(said, bool, "r") if said is not None and said.is_file() else None
        except OSError as error:
            raise DataError(f"{error.filename or path} cannot be read ({error.strerror or error}); {path} needs it beside it.") from None
        except ValueError as error:  # an empty file, and one whose size is no multiple of an id's
            raise DataError(f"{path} cannot be read ({error}); copy it again.") from None
        self.num_tokens = len(tokens)
        self.bytes = tokens.view(np.uint8).data
        self._tokens = np.frombuffer(self.bytes, self.dtype)
        expected = int(self.document_ends[-1]) if len(self.document_ends) else 0
        if self.num_tokens != expected or self._predicted is not None and len(self._predicted) != expected:
            raise DataError(f"{path} holds {self.num_tokens} tokens, but its index says {expected}; copy both again.")
        self._checked = np.zeros(-(-self.num_tokens // _BLOCK), bool)

    @property
    def has_predicted(self) -> bool:
        """Whether there are tokens that a model should not say: datatrove's .loss file."""
        return self._predicted is not None

    def read_document_ends(self, start: int, stop: int) -> np.ndarray:
        """As of a Shard."""
        return self.document_ends[start:stop]

    def read(self, start: int, stop: int) -> np.ndarray:
        """As of a Shard; raises DataError for an id beyond the vocabulary."""
        self.check(start, stop)
        return self._tokens[start:stop].astype(np.int64)

    def read_predicted(self, start: int, stop: int) -> np.ndarray:
        """As of a Shard."""
        return np.ones(stop - start, bool) if self._predicted is None else np.array(self._predicted[start:stop])

    def check(self, start: int, stop: int) -> None:
        """As of a Shard: look at the ids of the blocks."""
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            if not self._checked[block]:
                ids = self._tokens[block * _BLOCK : (block + 1) * _BLOCK]
                worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
                if not 0 <= worst < self.vocab_size:
                    raise DataError(
                        f"{self.path}: token id {worst} is not in [0, {self.vocab_size}), the vocabulary; set data.tokenizer to the one that made it."
                    )
                self._checked[block] = True


def _megatron_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """(dtype of the tokens, where documents end) of PREFIX.bin. Raises OSError, DataError."""
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    version, code = (int.from_bytes(content[9:17], "little"), content[17]) if len(content) >= 34 else (0, 0)
    if content[:9] != _MAGIC or version != 1 or code not in _DTYPES:
        raise DataError(f"{index} is not an index of Megatron-LM's version 1 with integers; it must be the one that was written with {path.name}.")
    num_sequences, num_documents = np.frombuffer(content, "<u8", 2, 18).tolist()
    expected = 34 + 12 * num_sequences + 8 * num_documents
    if len(content) < expected:
        raise DataError(f"{index} has {len(content)} bytes, but {expected} or more by what it begins with; copy it again.")
    lengths = np.frombuffer(content, "<i4", num_sequences, 34).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", num_sequences, 34 + 4 * num_sequences)
    firsts = np.frombuffer(content, "<i8", num_documents, 34 + 12 * num_sequences)  # of the sequences of each document, and behind the last
    dtype, ends = np.dtype(_DTYPES[code]).newbyteorder("<"), np.cumsum(lengths)
    if (pointers != (ends - lengths) * dtype.itemsize).any() or (np.diff(firsts) < 0).any() or num_documents == 0 or firsts[-1] != num_sequences:
        raise DataError(f"{index}: its sequences do not follow each other in {path.name}, or its documents not in them; write both again.")
    return dtype, np.unique(ends[firsts[1:] - 1])  # a document without sequences has no tokens


def _datatrove_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """(dtype of the tokens, where documents end) of NAME.ds. Raises OSError, DataError."""
    index = path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8").astype(np.int64)
    num_bytes = path.stat().st_size
    sizes = [size for size in (2, 4) if len(ends) and ends[-1] * size == num_bytes]
    if not sizes or (np.diff(ends) < 0).any():
        raise DataError(
            f"{index} says {int(ends[-1]) if len(ends) else 0} tokens, but {path.name} has {num_bytes} bytes, neither 2 nor 4 for each; copy both again."
        )
    return np.dtype(f"<u{sizes[0]}"), np.unique(ends[ends > 0])
