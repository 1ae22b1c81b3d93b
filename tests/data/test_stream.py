import json

import numpy as np
import pytest
from conftest import prepare_one
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import Pairs, Source
from dqtrain.data.prepare import train_tokenizer
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import AnyStream, PairStream, Stream, permute
from dqtrain.errors import DataError

seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of distinct lengths."""
    root = tmp_path_factory.mktemp("stream")
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "some words, and more words: " * (1 + i % 5)}) + "\n" for i in range(23)))
    train_tokenizer([Source(path=str(corpus))], 260, root / "bpe")
    return prepare_one(str(corpus), "train", root / "bpe", root, tokens_per_shard=600)


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
    beyond, last = (stream.micro_batch(0, j, global_batch, micro_batch) for j in (world_size * accumulation + 1, world_size * accumulation - 1))
    assert (beyond.labels == -100).all() and (beyond.input_ids == last.input_ids).all() and (last.labels != -100).any()
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
    assert batch.samples.tolist() == [n - 2, n - 1, 0, 1]
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.samples)} == {np.dtype(np.int64)}
    assert batch.source_ids is None and batch.source_is_real is None
    assert stream.mean_tokens == 16


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
    refused(copy, "has format version 0, but this dqtrain reads 2; delete")


def test_a_removed_shard_is_named(copy):
    (copy / "shard-00000-00001.bin").unlink()
    refused(copy, r"shard-00000-00001\.bin is missing; run dqtrain prepare again")


def test_a_swapped_shard_is_named(copy):
    (copy / "shard-00000-00001.bin").write_bytes((copy / "shard-00000-00000.bin").read_bytes())
    refused(copy, r"shard-00000-00001\.bin is not the one that the index names")


def test_one_token_is_nothing_to_predict(copy):
    shard = copy / "shard-00000-00000.bin"
    index = json.loads((copy / "index.json").read_text())
    write_shard(shard, np.array([5]), np.array([1]), vocab_size=260, tokenizer_hash="", source="", split="", num_bytes=0, pieces_end=1)
    entry = {"file": shard.name, "num_tokens": 1, "num_documents": 1, "checksum": Shard(shard).checksum}
    (copy / "index.json").write_text(json.dumps(index | {"num_tokens": 1, "shards": [entry]}))
    refused(copy, "hold 1 token, but a sample needs 2")


# --- Pairs ---

PAD, START = 99, 98
SOURCE_TOKENS, TARGET_TOKENS = 21, 13


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    """Ids of sources and targets, without special tokens, as the tokenizer of conftest.py gives them to words."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, (SOURCE_TOKENS - 2, TARGET_TOKENS - 2), (41, 2), endpoint=True)
    return [tuple(draw.integers(4, 12, n).tolist() for n in row) for row in lengths]  # type: ignore[misc]


@pytest.fixture(scope="module")
def pair_folders(pairs, tokenizers, tmp_path_factory):
    """encoder_decoder -> folder of several shards, made with the tokenizer that gives <s> (0) and </s> (2)."""
    root = tmp_path_factory.mktemp("pairs")
    words = dict(enumerate("a b c d e f g h".split(), 4))
    rows = [{name: " ".join(words[id] for id in ids) for name, ids in zip(("source", "target"), pair, strict=True)} for pair in pairs]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Pairs(source_tokens=SOURCE_TOKENS, target_tokens=TARGET_TOKENS)
    return {
        kind: prepare_one(str(root / "a.jsonl"), "train", tokenizers["bart"], root, tokens_per_shard=300, pairs=settings, encoder_decoder=kind)
        for kind in (True, False)
    }


def pair_stream(pair_folders, encoder_decoder: bool, seed: int = 0, shuffle: bool = True) -> PairStream:
    return PairStream(pair_folders[encoder_decoder], seed, shuffle, pad_token_id=PAD, decoder_start_token_id=START if encoder_decoder else None)


def width_of(longest: int, most: int) -> int:
    return next(width for width in [*range(8, most, 8), most] if width >= longest)


positions = st.lists(st.integers(0, 10**6), min_size=1, max_size=9).map(np.array)


@given(positions, seeds, st.booleans())
@settings(max_examples=60)
def test_a_batch_for_an_encoder_decoder_is_what_its_pairs_say(pair_folders, pairs, positions, seed, shuffle):
    batch = pair_stream(pair_folders, True, seed, shuffle).batch(positions)
    assert shuffle or batch.samples.tolist() == (positions % len(pairs)).tolist()
    chosen = [([0, *pairs[i][0], 2], [0, *pairs[i][1], 2]) for i in batch.samples]
    width = width_of(max(len(target) for _, target in chosen), TARGET_TOKENS)
    source_width = width_of(max(len(source) for source, _ in chosen), SOURCE_TOKENS)
    assert batch.labels.tolist() == [target + [-100] * (width - len(target)) for _, target in chosen]
    assert batch.input_ids.tolist() == [[START, *target[:-1]] + [PAD] * (width - len(target)) for _, target in chosen]
    assert batch.source_ids is not None and batch.source_is_real is not None
    assert batch.source_ids.tolist() == [source + [PAD] * (source_width - len(source)) for source, _ in chosen]
    assert batch.source_is_real.tolist() == [[True] * len(source) + [False] * (source_width - len(source)) for source, _ in chosen]
    assert batch.source_is_real.dtype == bool
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.samples, batch.source_ids)} == {np.dtype(np.int64)}


@given(positions, seeds, st.booleans())
@settings(max_examples=60)
def test_a_batch_for_a_causal_model_predicts_targets_alone(pair_folders, pairs, positions, seed, shuffle):
    batch = pair_stream(pair_folders, False, seed, shuffle).batch(positions)
    assert batch.source_ids is None and batch.source_is_real is None
    width = width_of(max(len(pairs[i][0]) + len(pairs[i][1]) for i in batch.samples), SOURCE_TOKENS + TARGET_TOKENS)
    for i, ids, labels in zip(batch.samples, batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        source, target = pairs[i][0], [*pairs[i][1], 2]
        assert len(ids) == len(labels) == width
        real = len(source) + len(target) - 1
        assert ids == [*source, *target[:-1]] + [PAD] * (width - real)
        for place, label in enumerate(labels):  # what is predicted at a place is the token behind it
            behind = (source + target)[place + 1] if place < real else None
            assert label == (behind if place + 1 >= len(source) and place < real else -100)


def test_the_decoder_reads_what_transformers_would_give_it(pair_folders):
    import torch
    from transformers.models.bart.modeling_bart import shift_tokens_right

    batch = pair_stream(pair_folders, True).batch(range(41))
    expected = shift_tokens_right(torch.from_numpy(batch.labels), PAD, START).numpy()
    assert (batch.input_ids == expected)[batch.labels != -100].all()


@pytest.mark.parametrize("encoder_decoder", [True, False])
@given(world_size=st.integers(1, 4), accumulation=st.integers(1, 3), size=st.integers(1, 4), seed=seeds)
@settings(max_examples=15)
def test_every_target_token_comes_once_per_epoch_in_any_micro_batches(pair_folders, pairs, encoder_decoder, world_size, accumulation, size, seed):
    stream = pair_stream(pair_folders, encoder_decoder, seed)
    assert stream.num_samples == len(pairs) and stream.vocab_size == 14
    global_batch = world_size * accumulation * size
    num_steps = -(-2 * len(pairs) // global_batch)
    batches = [stream.micro_batch(step, j, global_batch, size) for step in range(num_steps) for j in range(world_size * accumulation)]
    samples = np.concatenate([batch.samples for batch in batches])
    epochs = samples[: len(pairs)].tolist(), samples[len(pairs) : 2 * len(pairs)].tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(pairs)))
    assert epochs[0] != epochs[1]
    rows = [row for batch in batches for row in batch.labels]
    expected = [[0] * encoder_decoder + pairs[i][1] + [2] for i in samples]
    assert [row[row != -100].tolist() for row in rows] == expected

    whole = stream.batch(range(len(samples)))  # one batch of all is the same but for its padding
    assert whole.samples.tolist() == samples.tolist()
    for name, fill in (("input_ids", PAD), ("labels", -100)) + ((("source_ids", PAD), ("source_is_real", False)) if encoder_decoder else ()):
        for row, wide in zip([row for batch in batches for row in getattr(batch, name)], getattr(whole, name), strict=True):
            assert (wide[: len(row)] == row).all()
            assert (wide[len(row) :] == fill).all()


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_samples_of_pairs_are_in_the_order_of_the_corpus(pair_folders, pairs, encoder_decoder):
    stream: AnyStream = pair_stream(pair_folders, encoder_decoder)
    assert len(list(pair_folders[encoder_decoder].glob("*.bin"))) > 2
    start = [0] * encoder_decoder
    expected = [(start + source + [2] * encoder_decoder, start + target + [2]) for source, target in pairs]
    assert [tuple(ids.tolist() for ids in stream.sample(i)) for i in range(len(pairs))] == expected
    assert stream.mean_tokens == sum(len(source) + len(target) for source, target in expected) / len(pairs)
