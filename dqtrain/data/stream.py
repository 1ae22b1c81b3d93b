"""Position in the data -> batch: a pure function, the same on any number of ranks, so that resuming needs one integer.

Text: sample i of a shard has the inputs [i*T, i*T + T) and, as labels, the tokens one further on: documents are packed, samples overlap by one token,
and every token but the first of a shard is predicted exactly once. Pairs: sample i is pair i of the corpus; every token of its target is predicted once,
and a batch is as wide as its longest sample asks. The order of an epoch is a keyed permutation, computed and not stored.
Nothing here knows the rank. Needs numpy; the trainer makes tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dqtrain.data.prepare import read_index
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError
from dqtrain.files import write_whole

IGNORED = -100
"""Label where there is nothing to predict."""
_ROUNDS = 8
_WIDTH = 8
"""Widths of batches of pairs are multiples of this, which matrix units like; few widths also mean few kernels."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right."""

    input_ids: np.ndarray
    """What the decoder, or the causal model, reads: int64 [samples, tokens]."""
    labels: np.ndarray
    """What it should say, already shifted: the token behind input t, or -100 where there is nothing to predict. int64 [samples, tokens]."""
    samples: np.ndarray
    """Number of each sample in the order of the corpus: int64 [samples]."""
    source_ids: np.ndarray | None = None
    """What the encoder reads: int64 [samples, source tokens]; None for a causal model."""
    source_is_real: np.ndarray | None = None
    """Where `source_ids` is no padding: bool [samples, source tokens]."""


def write_batches(path: Path, batches: Sequence[tuple[int, Batch]]) -> None:
    """Keep micro-batches, with their numbers in the step, as safetensors NUMBER.FIELD. Raises OSError."""
    arrays = {f"{number}.{name}": array for number, batch in batches for name, array in vars(batch).items() if array is not None}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, [save(arrays)])


def permute(index: np.ndarray, length: int, key: tuple[int, int]) -> np.ndarray:
    """Map each index in [0, length) to its place in a pseudo-random permutation of [0, length): int64, shaped as `index`.

    `key` is (seed, epoch). A Feistel network over the next power of four; what falls outside is sent through again until it
    falls inside (cycle walking: Black and Rogaway 2002, section 4), about four times at most on average.
    """
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    result = np.array(index, np.uint64).reshape(-1)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = left << half | right
        outside = outside[result[outside] >= length]
    return result.astype(np.int64).reshape(np.shape(index))


def _mix(value: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finalizer of SplitMix64: Steele, Lea and Flood 2014)."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


class AnyStream(ABC):
    """The samples of folders that `prepare` made of sources of one kind, in an order that depends on `seed` and the epoch alone.

    Raises DataError when the index or a shard is missing, damaged or of another version, or when there is nothing to predict.
    """

    def __init__(self, folders: Path | Sequence[Path], seed: int, shuffle: bool) -> None:
        folders = [folders] if isinstance(folders, Path) else list(folders)
        indices = [read_index(folder) for folder in folders]
        self._index: dict[str, Any] = {**indices[0], "num_tokens": sum(index["num_tokens"] for index in indices)}
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size: int = self._index["vocab_size"]
        self._shards = []
        for folder, index in zip(folders, indices, strict=True):
            for entry in index["shards"]:
                shard = Shard(folder / entry["file"])
                if shard.checksum != entry["checksum"]:
                    raise DataError(f"token shard {shard.path} is not the one that the index names; delete {folder} and run dqtrain prepare again.")
                self._shards.append(shard)
        self._sample_ends = np.cumsum([self._num_samples(shard) for shard in self._shards])
        self.num_samples = int(self._sample_ends[-1])
        if not self.num_samples:
            raise DataError(f"the shards in {folders[0]} hold {self._index['num_tokens']} token, but a sample needs 2; give a longer corpus.")

    @property
    @abstractmethod
    def mean_tokens(self) -> float:
        """Tokens that a model reads per sample, on average and without padding."""

    @abstractmethod
    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what is read and what is predicted of sample i in corpus order: int64 [tokens] each."""

    @abstractmethod
    def _num_samples(self, shard: Shard) -> int: ...

    @abstractmethod
    def _batch(self, samples: np.ndarray) -> Batch: ...

    def batch(self, positions: np.ndarray | range) -> Batch:
        """Return the samples at positions counted from the start of the run: position p is in epoch p // num_samples."""
        epochs, samples = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if self.shuffle:
            for epoch in np.unique(epochs):
                samples[epochs == epoch] = permute(samples[epochs == epoch], self.num_samples, (self.seed, int(epoch)))
        return self._batch(samples)

    def micro_batch(self, step: int, j: int, global_batch: int, micro_batch: int) -> Batch:
        """Return micro-batch j of a step, the same whichever rank asks; steps count from 0, sizes are in samples.

        Beyond the step's last one it is that one without target tokens, for a rank that has no work left but takes part in the collectives.
        """
        count = global_batch // micro_batch
        start = step * global_batch + min(j, count - 1) * micro_batch
        batch = self.batch(range(start, start + micro_batch))
        if j >= count:
            batch.labels.fill(IGNORED)
        return batch

    def _find(self, i: int) -> tuple[Shard, int]:
        """The shard that holds sample i, and its number there."""
        number = int(np.searchsorted(self._sample_ends, i, side="right"))
        return self._shards[number], i - int(self._sample_ends[number - 1] if number else 0)


class Stream(AnyStream):
    """Text: every sample has `tokens_per_sample` tokens."""

    def __init__(self, folder: Path | Sequence[Path], tokens_per_sample: int, seed: int, shuffle: bool) -> None:
        self.tokens_per_sample = tokens_per_sample
        super().__init__(folder, seed, shuffle)
        assert "pairs" not in self._index, f"{folder} holds pairs"

    @property
    def mean_tokens(self) -> float:
        """`tokens_per_sample`."""
        return float(self.tokens_per_sample)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of sample i in corpus order, each int64 [tokens_per_sample], padded with 0 and -100."""
        shard, number = self._find(i)
        start = number * self.tokens_per_sample
        window = shard.read(start, min(start + self.tokens_per_sample + 1, shard.num_tokens))
        num_tokens = len(window) - 1
        ids, labels = (np.full(self.tokens_per_sample, fill, np.int64) for fill in (0, IGNORED))
        ids[:num_tokens], labels[:num_tokens] = window[:-1], window[1:]
        return ids, labels

    def _num_samples(self, shard: Shard) -> int:
        return -(-(shard.num_tokens - 1) // self.tokens_per_sample)

    def _batch(self, samples: np.ndarray) -> Batch:
        ids, labels = zip(*(self.sample(int(i)) for i in samples), strict=True)
        return Batch(np.stack(ids), np.stack(labels), samples)


class PairStream(AnyStream):
    """Pairs of a source and a target, for an encoder-decoder model, or for a causal one where `decoder_start_token_id` is None.

    `pad_token_id` pads what is read. Widths are a multiple of 8, or the longest that `prepare` cut to, whichever is less.
    """

    def __init__(self, folder: Path | Sequence[Path], seed: int, shuffle: bool, pad_token_id: int, decoder_start_token_id: int | None) -> None:
        super().__init__(folder, seed, shuffle)
        assert self._index.get("encoder_decoder") == (decoder_start_token_id is not None), f"{folder} was not prepared for this model"
        self.pad_token_id = pad_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self._source_tokens: int = self._index["pairs"]["source_tokens"]
        self._target_tokens: int = self._index["pairs"]["target_tokens"]

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of source and target together."""
        return self._index["num_tokens"] / self.num_samples

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, target) of pair i in corpus order, with their special tokens: int64 [source tokens] and [target tokens]."""
        shard, number = self._find(i)
        ends = shard.read_document_ends(max(0, 2 * number - 1), 2 * number + 2)
        start, middle, end = ends if number else (0, *ends)
        tokens = shard.read(int(start), int(end))
        return tokens[: middle - start], tokens[middle - start :]

    def _num_samples(self, shard: Shard) -> int:
        return shard.header["num_documents"] // 2

    def _batch(self, samples: np.ndarray) -> Batch:
        sources, targets = zip(*(self.sample(int(i)) for i in samples), strict=True)
        if self.decoder_start_token_id is None:
            width = _width([len(source) + len(target) - 1 for source, target in zip(sources, targets, strict=True)], self._source_tokens + self._target_tokens)
            inputs = [np.append(source, target[:-1]) for source, target in zip(sources, targets, strict=True)]
            # The last token of the source says the first one of the target.
            labels = [np.append(np.full(len(source) - 1, IGNORED), target) for source, target in zip(sources, targets, strict=True)]
            return Batch(_padded(inputs, width, self.pad_token_id), _padded(labels, width, IGNORED), samples)
        width = _width([len(target) for target in targets], self._target_tokens)
        source_width = _width([len(source) for source in sources], self._source_tokens)
        return Batch(
            _padded([np.append(self.decoder_start_token_id, target[:-1]) for target in targets], width, self.pad_token_id),
            _padded(targets, width, IGNORED),
            samples,
            _padded(sources, source_width, self.pad_token_id),
            np.arange(source_width) < np.array([[len(source)] for source in sources]),
        )


def _width(lengths: Sequence[int], longest: int) -> int:
    return min(-(-max(lengths) // _WIDTH) * _WIDTH, longest)


def _padded(rows: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    result = np.full((len(rows), width), fill, np.int64)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result
