"""Which sample stands at which position of a run: arithmetic alone, so that nothing of the corpus's size is stored and any position is as near as the first.

A position counts the samples of the run. Micro-batch g of the run (its positions are g * micro_batch and on) belongs to part g mod parts, and each part goes through its
own shards, so that whoever reads the micro-batches of one part reads those shards alone. Within a part a mixture says from which source a sample comes, and
the source's samples follow each other in epochs, each a keyed permutation. With one part a source is permuted as a whole; with several its shards
are, and then the samples of SHUFFLED_SHARDS shards at a time. Needs numpy.
"""

import functools
import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dqtrain.errors import ConfigError

BLOCK = 2**14
"""Samples in which a mixture has exactly its shares; the least share is one of them."""
SHUFFLED_SHARDS = 4
"""Shards of a part whose samples are shuffled together: so many of each source are read at a time."""
_UNEVEN = 1.25
"""How many times as large as the smallest the largest part may be: its samples come so many times less often."""
_ROUNDS = 8
_MIXTURE, _SHARDS, _SAMPLES = 2**40, 2**40 + 1, 2**40 + 2
"""Keep the keys of what is permuted apart; no epoch is as large."""


def permute(index: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """Map each index in [0, length) to its place in a pseudo-random permutation of [0, length): int64, shaped as `index`.

    `key` is any few integers from 0, such as (seed, epoch). A Feistel network over the next power of two, whose halves differ by a bit at most; what falls outside is
    sent through again until it falls inside (cycle walking: Black and Rogaway 2002, section 4), twice at most on average.
    """
    return _walk(index, length, key, inverse=False)


def unpermute(place: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """The index that `permute` maps to each place: int64, shaped as `place`."""
    return _walk(place, length, key, inverse=True)


def _walk(index: np.ndarray, length: int, key: tuple[int, ...], inverse: bool) -> np.ndarray:
    bits = max(2, (length - 1).bit_length())
    high, low = bits // 2, bits - bits // 2
    result = np.array(index, np.int64).reshape(-1)
    # To look up takes as much as to compute all that there may be to find, which later calls find too.
    rounds = list(enumerate((_looked_up if len(result) >= 1 << low else _computed)(key, high, low)))
    if inverse:
        rounds.reverse()
    mask_right = (1 << low) - 1
    walking = result
    outside: np.ndarray | None = None  # where in the result those that walk are; None: all of them
    while len(walking):
        left, right = walking >> low, walking & mask_right
        for number, mixed in rounds:
            if number % 2 == 0:
                left ^= mixed(right)
            else:
                right ^= mixed(left)
        walking = left << low | right
        if outside is None:
            result = walking
            outside = np.flatnonzero(walking >= length)
        else:
            result[outside] = walking
            outside = outside[walking >= length]
        walking = result[outside]
    return result.reshape(np.shape(index))


_Round = Callable[[np.ndarray], np.ndarray]
"""What changes one half, made of the other."""


def _computed(key: tuple[int, ...], high: int, low: int) -> list[_Round]:
    salts = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    return [functools.partial(_mixed, salt, np.uint64((1 << (high if number % 2 == 0 else low)) - 1)) for number, salt in enumerate(salts)]


@functools.lru_cache(maxsize=32)
def _looked_up(key: tuple[int, ...], high: int, low: int) -> list[_Round]:
    return [mixed(np.arange(1 << (low if number % 2 == 0 else high))).take for number, mixed in enumerate(_computed(key, high, low))]


def _mixed(salt: np.uint64, mask: np.uint64, half: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finalizer of SplitMix64: Steele, Lea and Flood 2014), and take as many of them as a half has: int64."""
    value = half.view(np.uint64) ^ salt
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    value &= mask
    return value.view(np.int64)


def counts_of(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in a BLOCK: int64 [sources], in proportion to the weights by largest remainders.

    Raises ConfigError for weights that are none, and for one so small that a block would have no sample of its source.
    """
    shares = np.array(weights, np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum() > 0:
        raise ConfigError(
            f"the weights of the sources are {', '.join(map(str, weights))}, but must be 0 or more, and not all 0. Mend data.train or data.mixture."
        )
    ideal = shares / shares.sum() * BLOCK
    counts = np.floor(ideal).astype(np.int64)
    counts[np.argsort(counts - ideal, kind="stable")[: BLOCK - counts.sum()]] += 1
    if ((shares > 0) & (counts == 0)).any():
        least = min(weight for weight in weights if weight > 0)
        raise ConfigError(
            f"a source has the weight {least:g} of {shares.sum():g}, but a mixture cannot have less than 1 of {BLOCK} samples. Raise it, or set it to 0."
        )
    return counts


class Mixture:
    """Position -> source and index in that source, both counted from the start of the run.

    `stages` are (first position, weights [sources]), the first one from 0. Each block of BLOCK positions since the start of its stage has exactly `counts_of` the weights
    of each source, in an order of its own. A source goes on at a new stage where it was: nothing is replayed and nothing repeated.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], key: tuple[int, ...]) -> None:
        assert stages[0][0] == 0 and all(a[0] < b[0] for a, b in zip(stages, stages[1:], strict=False))
        self.key = key
        self.starts = np.array([start for start, _ in stages], np.int64)
        self.counts = np.stack([counts_of(weights) for _, weights in stages])
        self._ends = np.cumsum(self.counts, axis=1)
        self._before = np.zeros_like(self.counts)
        self._block = functools.lru_cache(maxsize=2)(self._drawn)
        for stage in range(1, len(stages)):
            self._before[stage] = self._taken(stage - 1, int(self.starts[stage]))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n] -> source and index in the source: int64 [n] each."""
        stages = np.searchsorted(self.starts, positions, side="right") - 1
        blocks, places = np.divmod(positions - self.starts[stages], BLOCK)
        sources, indices = np.empty((2, len(positions)), np.int64)
        for (stage, block), chosen in grouped(stages, blocks):
            drawn, ranks, _ = self._block(stage, block)
            source = drawn[places[chosen]]
            sources[chosen] = source
            indices[chosen] = (self._before[stage] + block * self.counts[stage])[source] + ranks[places[chosen]]
        return sources, indices

    def position(self, source: int, index: int) -> int:
        """The position at which a source's sample number `index` of the run comes. Raises ValueError for one that never comes, since its weight is 0 by then."""
        for stage in range(len(self.starts)):
            count = int(self.counts[stage, source])
            if stage + 1 < len(self.starts) and index >= self._before[stage + 1, source] or not count:
                continue
            block, rank = divmod(index - int(self._before[stage, source]), count)
            places = self._block(stage, block)[2]
            return int(self.starts[stage]) + block * BLOCK + int(places[self._ends[stage, source] - count + rank])
        raise ValueError(f"sample {index} of source {source} never comes")

    def reached(self, position: int) -> list[tuple[int, int]]:
        """(source, number of its samples before a position) of the sources that have a weight there."""
        stage = int(np.searchsorted(self.starts, position, side="right")) - 1
        taken = self._taken(stage, position)
        return [(int(source), int(taken[source])) for source in np.flatnonzero(self.counts[stage])]

    def _taken(self, stage: int, position: int) -> np.ndarray:
        """Samples of each source before a position of a stage, or before its end: int64 [sources]."""
        blocks, rest = divmod(position - int(self.starts[stage]), BLOCK)
        drawn = self._block(stage, blocks)[0][:rest]
        return self._before[stage] + blocks * self.counts[stage] + np.bincount(drawn, minlength=self.counts.shape[1])

    def _drawn(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The source at each place of a block, how many of that source came before it in the block, and the places by source: int32 [BLOCK] each.

        The samples of a source come in their own order, so that a stage may end within a block, and an epoch too, with nothing repeated or left out.
        """
        slots = permute(np.arange(BLOCK), BLOCK, (*self.key, stage, block))
        sources = np.searchsorted(self._ends[stage], slots, side="right").astype(np.int32)
        places = np.argsort(sources, kind="stable").astype(np.int32)
        ranks = np.empty(BLOCK, np.int32)
        ranks[places] = np.arange(BLOCK) - (self._ends[stage] - self.counts[stage])[sources[places]]
        return sources, ranks, places


class Order:
    """Position of a run -> sample, numbered in the order of the corpus: shard behind shard, source behind source."""

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        seed: int,
        shuffle: bool,
        stages: Sequence[tuple[int, Sequence[float]]] = (),
        parts: int = 1,
        micro_batch: int = 1,
    ) -> None:
        """`sources`: samples of each shard of each source, in the order of the corpus; `stages`: (first position, weights of the sources), none: one source after the other.

        With parts, `micro_batch` is in samples, and stages begin where as many micro-batches of each part are over.
        Raises ConfigError for weights that are none, and for shards that give no parts of like size.
        """
        assert parts == 1 or shuffle, "the parts of a split are shuffled"
        self.seed, self.shuffle, self.parts, self.micro_batch = seed, shuffle, parts, micro_batch
        groups = [np.asarray(sizes, np.int64) for sizes in sources] if stages else [np.concatenate([np.asarray(sizes, np.int64) for sizes in sources])]
        self._sizes = np.concatenate(groups)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        firsts = np.cumsum([0] + [len(group) for group in groups])
        # [source][part] -> numbers of its shards, counted over all sources
        self._shards = [[part + first for part in _share_out(sizes, parts)] for sizes, first in zip(groups, firsts, strict=False)]
        at = [(start // parts, weights) for start, weights in stages]
        self._mixtures = [Mixture(at, (seed, _MIXTURE, part)) if stages else None for part in range(parts)]
        self._num = [[int(self._sizes[shards].sum()) for shards in source] for source in self._shards]
        self._epoch = functools.lru_cache(maxsize=8 * len(groups) * parts)(self._shards_of_epoch)

    def at(self, positions: np.ndarray | range) -> np.ndarray:
        """Positions [n] -> samples: int64 [n]."""
        positions = np.asarray(positions, np.int64)
        if self.parts == 1:
            return self._in_part(0, positions)
        batches, rows = np.divmod(positions, self.micro_batch)
        turns, parts = np.divmod(batches, self.parts)
        samples = np.empty(len(positions), np.int64)
        for (part,), chosen in grouped(parts):
            samples[chosen] = self._in_part(part, turns[chosen] * self.micro_batch + rows[chosen])
        return samples

    def ahead(self, part: int, position: int) -> list[int]:
        """Shards, counted over all sources, that a part reads at a position of the run and soon after it, the nearest ones first."""
        found: list[int] = []
        for further in range(2):
            for source, index in self._reached(part, position // self.parts):
                epoch, rest = divmod(index, self._num[source][part])
                shards, _, ends = self._epoch(source, part, epoch)
                group = int(np.searchsorted(ends[SHUFFLED_SHARDS - 1 :: SHUFFLED_SHARDS], rest, side="right")) + further
                if group * SHUFFLED_SHARDS >= len(shards):
                    shards, group = self._epoch(source, part, epoch + 1)[0], 0
                found += [int(number) for number in shards[group * SHUFFLED_SHARDS : (group + 1) * SHUFFLED_SHARDS] if number not in found]
        return found

    def _reached(self, part: int, position: int) -> list[tuple[int, int]]:
        """(source, how many of its samples a part has had before a position of its own) of the sources that it reads there."""
        mixture = self._mixtures[part]
        return [(0, position)] if mixture is None else mixture.reached(position)

    def _in_part(self, part: int, positions: np.ndarray) -> np.ndarray:
        mixture = self._mixtures[part]
        if mixture is None:
            return self._in_source(0, part, positions)
        sources, indices = mixture.at(positions)
        samples = np.empty(len(positions), np.int64)
        for (source,), chosen in grouped(sources):
            samples[chosen] = self._in_source(source, part, indices[chosen])
        return samples

    def _in_source(self, source: int, part: int, indices: np.ndarray) -> np.ndarray:
        """Samples of a source that a part reads: its indices count on from epoch to epoch."""
        epochs, rests = np.divmod(indices, self._num[source][part])
        if self.parts == 1:
            if self.shuffle:
                for (epoch,), chosen in grouped(epochs):
                    rests[chosen] = permute(rests[chosen], self._num[source][0], (self.seed, epoch, source))
            return rests + self._starts[self._shards[source][0][0]]
        samples = np.empty(len(indices), np.int64)
        for (epoch,), chosen in grouped(epochs):
            shards, starts, ends = self._epoch(source, part, epoch)
            groups = np.searchsorted(ends[SHUFFLED_SHARDS - 1 :: SHUFFLED_SHARDS], rests[chosen], side="right")
            for (group,), among in grouped(groups):
                first, last = group * SHUFFLED_SHARDS, min((group + 1) * SHUFFLED_SHARDS, len(shards))
                start, stop = int(starts[first]), int(ends[last - 1])
                places = start + permute(rests[chosen][among] - start, stop - start, (self.seed, _SAMPLES, source, part, epoch, group))
                which = np.searchsorted(ends, places, side="right")
                samples[chosen[among]] = self._starts[shards[which]] + places - starts[which]
        return samples

    def _shards_of_epoch(self, source: int, part: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A part's shards of a source as they follow each other in an epoch, and where the samples of each start and end in it."""
        mine = self._shards[source][part]
        shards = mine[permute(np.arange(len(mine)), len(mine), (self.seed, _SHARDS, source, part, epoch))]
        ends = np.cumsum(self._sizes[shards])
        return shards, ends - self._sizes[shards], ends


def _share_out(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Numbers of the shards of each part, ascending: the largest shard first, each to the part that has the fewest samples by then."""
    if parts == 1:
        return [np.arange(len(sizes))]
    shares = _dealt(sizes, parts)
    totals = _totals(sizes, shares)
    if max(totals) <= _UNEVEN * min(totals):
        return shares
    fewer = next(number for number in range(parts - 1, 0, -1) if max(found := _totals(sizes, _dealt(sizes, number))) <= _UNEVEN * min(found))
    raise ConfigError(
        f"data.parts is {parts}, but the {len(sizes)} shards of a source would give parts of {min(totals):,} to {max(totals):,} samples, and the samples of a large part "
        f"come less often. Set data.parts to {fewer}, or prepare more and smaller shards."
    )


def _dealt(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    totals = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for shard in np.argsort(-sizes, kind="stable").tolist():
        total, part = heapq.heappop(totals)
        shares[part].append(shard)
        heapq.heappush(totals, (total + int(sizes[shard]), part))
    return [np.array(sorted(share), np.int64) for share in shares]


def _totals(sizes: np.ndarray, shares: list[np.ndarray]) -> list[int]:
    return [int(sizes[share].sum()) for share in shares]


def grouped(*keys: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Each different tuple of entries of the keys [n], with the indices at which it stands."""
    if not len(keys[0]):
        return
    if all((key == key[0]).all() for key in keys):
        yield tuple(int(key[0]) for key in keys), np.arange(len(keys[0]))
        return
    order = np.lexsort(keys[::-1])
    sorted_keys = np.stack([key[order] for key in keys])
    for chosen in np.split(order, np.flatnonzero((np.diff(sorted_keys) != 0).any(0)) + 1):
        yield tuple(int(key[chosen[0]]) for key in keys), chosen
