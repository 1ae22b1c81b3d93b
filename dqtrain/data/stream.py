"""Position in the data -> batch: a pure function, the same on any number of ranks, so that resuming needs one integer.

Sample i of a shard has the inputs [i*T, i*T + T) and, as labels, the tokens one further on: documents are packed, samples overlap by one token,
and every token but the first of a shard is predicted exactly once. The order of an epoch is a keyed permutation, computed and not stored.
Nothing here knows the rank. Needs numpy; the trainer makes tensors.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dqtrain.data.prepare import read_index
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

IGNORED = -100
"""Label where there is nothing to predict."""
_ROUNDS = 8


@dataclass(frozen=True)
class Batch:
    """Samples of equal length, int64 [samples, tokens]. The label at t is the token behind input t (already shifted), or -100 in the padding."""

    input_ids: np.ndarray
    labels: np.ndarray


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


class Stream:
    """The samples of a folder that `prepare` made, in an order that depends on `seed` and the epoch alone.

    Raises DataError when the index or a shard is missing, damaged or of another version, or when there is nothing to predict.
    """

    def __init__(self, folder: Path, tokens_per_sample: int, seed: int, shuffle: bool) -> None:
        index = read_index(folder)
        self.tokens_per_sample = tokens_per_sample
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size: int = index["vocab_size"]
        self._shards = [Shard(folder / entry["file"]) for entry in index["shards"]]
        for shard, entry in zip(self._shards, index["shards"], strict=True):
            if shard.checksum != entry["checksum"]:
                raise DataError(f"token shard {shard.path} is not the one that the index names; delete {folder} and run dqtrain prepare again.")
        num_samples = [-(-(shard.num_tokens - 1) // tokens_per_sample) for shard in self._shards]
        self._sample_ends = np.cumsum(num_samples)
        self.num_samples = int(self._sample_ends[-1])
        if not self.num_samples:
            raise DataError(f"the shards in {folder} hold {index['num_tokens']} token, but a sample needs 2; give a longer corpus.")

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of sample i in corpus order, each int64 [tokens_per_sample], padded with 0 and -100."""
        number = int(np.searchsorted(self._sample_ends, i, side="right"))
        shard = self._shards[number]
        start = (i - int(self._sample_ends[number - 1] if number else 0)) * self.tokens_per_sample
        window = shard.read(start, min(start + self.tokens_per_sample + 1, shard.num_tokens))
        num_tokens = len(window) - 1
        ids, labels = (np.full(self.tokens_per_sample, fill, np.int64) for fill in (0, IGNORED))
        ids[:num_tokens], labels[:num_tokens] = window[:-1], window[1:]
        return ids, labels

    def batch(self, positions: np.ndarray | range) -> Batch:
        """Return the samples at positions counted from the start of the run: position p is in epoch p // num_samples."""
        epochs, samples = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if self.shuffle:
            for epoch in np.unique(epochs):
                samples[epochs == epoch] = permute(samples[epochs == epoch], self.num_samples, (self.seed, int(epoch)))
        return Batch(*(np.stack(rows) for rows in zip(*(self.sample(int(i)) for i in samples), strict=True)))

    def micro_batch(self, step: int, j: int, global_batch: int, micro_batch: int) -> Batch:
        """Return micro-batch j of a step, the same whichever rank asks; steps count from 0, sizes are in samples."""
        start = step * global_batch + j * micro_batch
        return self.batch(range(start, start + micro_batch))
