import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.order import BLOCK, SHUFFLED_SHARDS, Mixture, Order, counts_of, permute, unpermute
from dqtrain.errors import ConfigError

seeds = st.integers(0, 2**31 - 1)
shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
weights = st.floats(0.01, 1)


@given(st.integers(1, 3000), st.tuples(seeds, seeds))
def test_permute_is_a_bijection(length, key):
    places = permute(np.arange(length), length, key)
    assert (np.sort(places) == np.arange(length)).all()
    assert (unpermute(places, length, key) == np.arange(length)).all()


@given(st.integers(2**20, 2**40), st.tuples(seeds, seeds), st.data())
def test_permute_is_one_to_one_and_elementwise_on_long_ranges(length, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True)))
    places = permute(index, length, key)
    assert len(np.unique(places)) == len(index)
    assert places.min() >= 0 and places.max() < length
    assert (permute(index[::-1], length, key) == places[::-1]).all()
    assert (unpermute(places, length, key) == index).all()


@given(st.integers(50, 3000), seeds, st.integers(0, 1000))
def test_permute_differs_between_epochs_and_seeds(length, seed, epoch):
    order = permute(np.arange(length), length, (seed, epoch))
    assert (order != np.arange(length)).any()
    assert (order != permute(np.arange(length), length, (seed, epoch + 1))).any()
    assert (order != permute(np.arange(length), length, (seed + 1, epoch))).any()


@given(st.integers(1, 3000), st.tuples(seeds, seeds), st.data())
def test_what_is_looked_up_is_what_is_computed(length, key, data):
    few = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3)))  # too few for tables
    assert (permute(few, length, key) == permute(np.arange(length), length, key)[few]).all()
    assert (unpermute(few, length, key) == unpermute(np.arange(length), length, key)[few]).all()


def test_permute_mixes_well():
    places = permute(np.arange(10_000), 10_000, (0, 0))
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05
    orders = {tuple(permute(np.arange(4), 4, (0, epoch))) for epoch in range(500)}
    assert len(orders) == 24


def test_permute_is_the_same_everywhere():
    assert permute(np.arange(10), 10, (1, 0)).tolist() == [6, 9, 1, 8, 2, 3, 7, 0, 4, 5]


# --- mixtures


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_a_block_has_each_source_to_the_nearest_sample(given_weights):
    counts = counts_of(given_weights)
    assert counts.sum() == BLOCK
    assert (np.abs(counts - np.array(given_weights) / sum(given_weights) * BLOCK) < 1).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "the weights of the sources are , but"),
        ([0.0, 0.0], "0.0, 0.0, but must be 0 or more, and not all 0"),
        ([1.0, -1.0], "1.0, -1.0, but must be"),
        ([1.0, float("nan")], "nan"),
        ([1.0, 1e-6], "the weight 1e-06 of 1, but a mixture cannot have less than 1 of 16384 samples"),
    ],
)
def test_weights_that_are_none_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        counts_of(bad)


@given(st.lists(st.lists(weights, min_size=3, max_size=3), min_size=1, max_size=4), st.data(), seeds)
@settings(max_examples=25, deadline=None)
def test_a_mixture_is_exact_per_block_and_repeats_and_skips_nothing_across_stages(stage_weights, data, seed):
    stage_weights[0][1] = 0.0  # a source that is added by a later stage, if there is one
    lengths = [data.draw(st.integers(1, 3 * BLOCK)) for _ in stage_weights]
    starts = np.cumsum([0, *lengths[:-1]])
    mixture = Mixture(list(zip(starts.tolist(), stage_weights, strict=True)), (seed, 0))
    sources, indices = mixture.at(np.arange(sum(lengths)))
    for source in range(3):  # sample 0, 1, 2, ... of every source, once each, whatever the stages
        assert (np.sort(indices[sources == source]) == np.arange((sources == source).sum())).all()
    for start, length, shares in zip(starts, lengths, stage_weights, strict=True):
        for block in range(start, start + length - BLOCK + 1, BLOCK):
            assert (np.bincount(sources[block : block + BLOCK], minlength=3) == counts_of(shares)).all()
    for position in data.draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=5)):
        source, index = int(sources[position]), int(indices[position])
        assert mixture.position(source, index) == position
        taken = np.bincount(sources[:position], minlength=3)
        assert mixture.reached(position) == [(s, taken[s]) for s in range(3) if stage_weights[np.searchsorted(starts, position, side="right") - 1][s]]


@given(seeds, st.integers(0, 10**13))
@settings(max_examples=20, deadline=None)
def test_a_mixture_is_a_function_of_the_position_anywhere(seed, position):
    mixture = Mixture([(0, [3, 1, 0]), (10**12, [1, 1, 1])], (seed, 7))
    sources, indices = mixture.at(np.array([position, 5, position + 1]))
    assert mixture.position(int(sources[0]), int(indices[0])) == position
    again = mixture.at(np.array([position]))
    assert (again[0][0], again[1][0]) == (sources[0], indices[0])


def test_a_source_without_weight_never_comes():
    mixture = Mixture([(0, [1.0, 1.0]), (100, [1.0, 0.0])], (0,))
    with pytest.raises(ValueError, match="sample 1000 of source 1 never comes"):
        mixture.position(1, 1000)


# --- the whole order


@given(st.lists(shard_sizes, min_size=1, max_size=3), seeds, st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_every_sample_comes_once_per_epoch(sources, seed, shuffle, data):
    order = Order(sources, seed, shuffle)
    n = sum(map(sum, sources))
    assert order.num_samples == n
    epoch = data.draw(st.integers(0, 5))
    samples = order.at(range(epoch * n, (epoch + 1) * n))
    assert sorted(samples.tolist()) == list(range(n))
    if not shuffle:
        assert samples.tolist() == list(range(n))


@given(st.lists(shard_sizes, min_size=2, max_size=4), st.data(), seeds)
@settings(max_examples=40, deadline=None)
def test_each_source_of_a_mixture_goes_through_its_own_epochs(sources, data, seed):
    shares = [data.draw(weights) for _ in sources]
    later = [data.draw(weights) for _ in sources]
    order = Order(sources, seed, True, [(0, shares), (data.draw(st.integers(1, 500)), later)])
    samples = order.at(range(2000))
    ends = np.cumsum([sum(sizes) for sizes in sources])
    of = np.searchsorted(ends, samples, side="right")
    reference, indices = Mixture([(0, shares), (int(order._mixtures[0].starts[1]), later)], order._mixtures[0].key).at(np.arange(2000))
    assert (of == reference).all()
    for source, sizes in enumerate(sources):
        n = sum(sizes)
        seen = np.full(2000, -1)
        seen[indices[of == source]] = samples[of == source] - (ends[source] - n)
        seen = seen[: (of == source).sum()]
        for epoch in range(len(seen) // n):
            assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
        rest = seen[len(seen) // n * n :]
        assert len(set(rest.tolist())) == len(rest)


def positions_of(world_size, num_steps, batches_per_step, micro_batch):
    """Which positions each rank asks for, in its own order."""
    for rank in range(world_size):
        for step in range(num_steps):
            for j in range(rank, batches_per_step, world_size):
                start = (step * batches_per_step + j) * micro_batch
                yield range(start, start + micro_batch)


part_shards = st.sampled_from([12, 24]).flatmap(lambda count: st.lists(st.integers(8, 9), min_size=count, max_size=count))


@given(st.integers(1, 5), st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), seeds, st.lists(part_shards, min_size=1, max_size=2), st.data())
@settings(max_examples=30, deadline=None)
def test_each_part_reads_its_own_shards_once_per_epoch_a_few_at_a_time(world_size, parts, turns, micro_batch, seed, sources, data):
    stages = [(0, [data.draw(weights) for _ in sources])] if data.draw(st.booleans()) else ()
    order = Order(sources, seed, True, stages, parts, micro_batch)
    sizes = np.concatenate(sources)
    num_steps = 3 * sizes.sum() // (parts * turns * micro_batch)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    said: dict[int, int] = {}
    for positions in positions_of(world_size, num_steps, parts * turns, micro_batch):  # whoever asks, and in whatever pieces
        said |= dict(zip(positions, order.at(positions).tolist(), strict=True))
    run = np.array([said[position] for position in range(num_steps * parts * turns * micro_batch)])
    assert (order.at(range(len(run))) == run).all()
    owners: dict[int, int] = {}
    part_of = np.arange(len(run)) // micro_batch % parts
    for part in range(parts):
        samples = run[part_of == part]
        for shard in np.unique(shard_of[samples]):
            assert owners.setdefault(int(shard), part) == part
        if not stages:
            mine = int(sizes[[shard for shard, owner in owners.items() if owner == part]].sum())
            for epoch in range(len(samples) // mine):
                seen = samples[epoch * mine : (epoch + 1) * mine]
                assert len(np.unique(seen)) == mine
                uses = [np.flatnonzero(shard_of[seen] == shard) for shard in np.unique(shard_of[seen])]
                in_use = [sum(use[0] <= moment <= use[-1] for use in uses) for moment in range(mine)]
                assert max(in_use) <= SHUFFLED_SHARDS
        where = int(np.flatnonzero(part_of == part)[data.draw(st.integers(0, len(samples) - 1))])
        assert shard_of[run[where]] in order.ahead(part, where - where % (parts * micro_batch))


def test_the_shards_ahead_are_those_that_come():
    order = Order([[5] * 40], 3, True, (), parts=2, micro_batch=5)
    coming = [int(shard) for shard in order.at(range(1000)) // 5]
    for position in range(0, 400, 10):
        for part in (0, 1):
            ahead = order.ahead(part, position)
            mine = [shard for number, shard in enumerate(coming) if number // 5 % 2 == part and number >= position]
            assert set(mine[:20]) <= set(ahead)  # this group's, and the next one's
            assert SHUFFLED_SHARDS <= len(ahead) <= 2 * SHUFFLED_SHARDS


def test_parts_of_unlike_size_are_refused():
    with pytest.raises(ConfigError, match=r"data.parts is 4, but the 6 shards of a source would give parts of 10 to 20 samples.*Set data.parts to 3"):
        Order([[10] * 6], 0, True, (), parts=4)
    with pytest.raises(ConfigError, match=r"parts of 0 to 10 samples"):
        Order([[10] * 2], 0, True, (), parts=4)


def test_an_order_is_the_same_everywhere():
    assert Order([[3, 4]], 1, True).at(range(9)).tolist() == [0, 6, 4, 5, 2, 1, 3, 1, 4]
    assert Order([[3], [4]], 1, True, [(0, [1, 2])]).at(range(9)).tolist() == [3, 6, 1, 0, 4, 5, 4, 5, 3]
    assert Order([[1] * 8], 1, True, (), 2, 2).at(range(9)).tolist() == [0, 4, 1, 5, 6, 2, 3, 7, 2]
