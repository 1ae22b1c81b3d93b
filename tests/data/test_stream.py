import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.prepare import prepare, train_tokenizer
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import Stream, permute
from dqtrain.errors import DataError

seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of distinct lengths."""
    root = tmp_path_factory.mktemp("stream")
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "some words, and more words: " * (1 + i % 5)}) + "\n" for i in range(23)))
    train_tokenizer(str(corpus), "text", 260, root / "bpe")
    return prepare(str(corpus), "train", root / "bpe", root, tokens_per_shard=600)


@given(st.integers(1, 3000), st.tuples(seeds, seeds))
def test_permute_is_a_bijection(length, key):
    assert (np.sort(permute(np.arange(length), length, key)) == np.arange(length)).all()


@given(st.integers(2**20, 2**40), st.tuples(seeds, seeds), st.data())
def test_permute_is_one_to_one_and_elementwise_on_long_ranges(length, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True)))
    places = permute(index, length, key)
    assert len(np.unique(places)) == len(index)
    assert places.min() >= 0 and places.max() < length
    assert (permute(index[::-1], length, key) == places[::-1]).all()


@given(st.integers(50, 3000), seeds, st.integers(0, 1000))
def test_permute_differs_between_epochs_and_seeds(length, seed, epoch):
    order = permute(np.arange(length), length, (seed, epoch))
    assert (order != np.arange(length)).any()
    assert (order != permute(np.arange(length), length, (seed, epoch + 1))).any()
    assert (order != permute(np.arange(length), length, (seed + 1, epoch))).any()


def test_permute_mixes_well():
    places = permute(np.arange(10_000), 10_000, (0, 0))
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05
    orders = {tuple(permute(np.arange(4), 4, (0, epoch))) for epoch in range(500)}
    assert len(orders) == 24


def test_permute_is_the_same_everywhere():
    assert permute(np.arange(10), 10, (1, 0)).tolist() == [6, 9, 1, 8, 2, 3, 7, 0, 4, 5]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 900))
def test_each_token_is_a_label_once_and_padding_is_none(folder, tokens_per_sample):
    stream = Stream(folder, tokens_per_sample, seed=0, shuffle=False)
    rows = [stream.sample(i) for i in range(stream.num_samples)]
    for ids, labels in rows:
        n = int((labels != -100).sum())
        assert n > 0
        assert (ids[1:n] == labels[: n - 1]).all()
        assert (ids[n:] == 0).all() and (labels[n:] == -100).all()
        assert (labels[:n] >= 0).all()
    shards = [Shard(path) for path in sorted(folder.glob("*.bin"))]
    assert len(shards) == 3
    tokens = [shard.read(0, shard.num_tokens) for shard in shards]
    assert np.concatenate([labels[labels != -100] for _, labels in rows]).tolist() == np.concatenate([t[1:] for t in tokens]).tolist()
    assert np.concatenate([ids[labels != -100] for ids, labels in rows]).tolist() == np.concatenate([t[:-1] for t in tokens]).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
def test_every_sample_comes_once_per_epoch_for_any_world(folder, world_size, accumulation, micro_batch, seed):
    stream = Stream(folder, 16, seed, shuffle=True)
    global_batch = world_size * accumulation * micro_batch
    num_steps = -(-2 * stream.num_samples // global_batch)
    rows: dict[int, list[tuple[int, ...]]] = {}
    for rank in range(world_size):
        for step in range(num_steps):
            for j in range(rank * accumulation, (rank + 1) * accumulation):
                batch = stream.micro_batch(step, j, global_batch, micro_batch)
                assert batch.input_ids.shape == batch.labels.shape == (micro_batch, 16)
                for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
                    rows.setdefault(step * global_batch + j * micro_batch + row, []).append((*ids, *labels))
    assert all(len(seen) == 1 for seen in rows.values())
    run = [rows[position][0] for position in range(num_steps * global_batch)]
    every_sample = sorted((*ids, *labels) for ids, labels in map(stream.sample, range(stream.num_samples)))
    n = stream.num_samples
    assert sorted(run[:n]) == sorted(run[n : 2 * n]) == every_sample
    assert run[:n] != run[n : 2 * n]


@given(st.integers(0, 10**9), st.integers(1, 12), seeds)
@settings(max_examples=30, deadline=None)
def test_a_batch_is_a_function_of_its_positions(folder, first, size, seed):
    positions = range(first, first + size)
    whole = Stream(folder, 16, seed, shuffle=True).batch(positions)
    again = Stream(folder, 16, seed, shuffle=True)
    for row, position in reversed(list(enumerate(positions))):
        one = again.batch(np.array([position]))
        assert (one.input_ids[0] == whole.input_ids[row]).all()
        assert (one.labels[0] == whole.labels[row]).all()


def test_without_shuffle_the_order_is_the_corpus(folder):
    stream = Stream(folder, 16, seed=0, shuffle=False)
    n = stream.num_samples
    batch = stream.batch(range(n - 2, n + 2))
    assert [ids.tolist() for ids in batch.input_ids] == [stream.sample(i)[0].tolist() for i in (n - 2, n - 1, 0, 1)]
    assert {array.dtype for array in (batch.input_ids, batch.labels)} == {np.dtype(np.int64)}


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder, message):
    with pytest.raises(DataError, match=message):
        Stream(folder, 16, 0, True)


def test_a_missing_index_is_refused(copy):
    (copy / "index.json").unlink()
    refused(copy, r"index\.json cannot be read .*Run dqtrain prepare again")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index_is_refused(copy, text):
    (copy / "index.json").write_text(text)
    refused(copy, "is not an index of shards")


def test_an_index_of_another_version_is_refused(copy):
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"version": 0}))
    refused(copy, "has format version 0, but this dqtrain reads 1; delete")


def test_a_removed_shard_is_named(copy):
    (copy / "shard-00001.bin").unlink()
    refused(copy, r"shard-00001\.bin is missing; run dqtrain prepare again")


def test_a_swapped_shard_is_named(copy):
    (copy / "shard-00001.bin").write_bytes((copy / "shard-00000.bin").read_bytes())
    refused(copy, r"shard-00001\.bin is not the one that the index names")


def test_one_token_is_nothing_to_predict(copy):
    shard = copy / "shard-00000.bin"
    index = json.loads((copy / "index.json").read_text())
    write_shard(shard, np.array([5]), np.array([1]), vocab_size=260, tokenizer_hash="", source="", split="", num_bytes=0, pieces_end=1)
    entry = {"file": shard.name, "num_tokens": 1, "num_documents": 1, "checksum": Shard(shard).checksum}
    (copy / "index.json").write_text(json.dumps(index | {"num_tokens": 1, "shards": [entry]}))
    refused(copy, "hold 1 token, but a sample needs 2")
