import json

import numpy as np
import pytest
from conftest import prepare_one
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import Pairs, Source
from dqtrain.data.prepare import VERSION, train_tokenizer
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import AnyStream, DocumentStream, Interleaving, PairStream, Stream
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
    beyond, last = (stream.micro_batch(0, j, global_batch, micro_batch) for j in (2 * world_size * accumulation - 1, world_size * accumulation - 1))
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
    stream = Stream(copy, 16, 0, False)
    with pytest.raises(DataError, match=r"shard-00000-00001\.bin is not the one that the index names"):
        stream.batch(range(stream.num_samples))


def test_one_token_is_nothing_to_predict(copy):
    shard = copy / "shard-00000-00000.bin"
    index = json.loads((copy / "index.json").read_text())
    write_shard(shard, np.array([5]), np.array([1]), vocab_size=260, tokenizer_hash="", source="", split="", num_bytes=0, pieces_end=1)
    entry = {"file": shard.name, "num_tokens": 1, "num_documents": 1, "checksum": Shard(shard).checksum}
    (copy / "index.json").write_text(json.dumps(index | {"num_tokens": 1, "shards": [entry]}))
    refused(copy, "hold 1 token, but a sample needs 2")


def made(root, sizes, documents, vocab_size=1000, predicted=None):
    """A folder of shards of the given token ids; `documents`, the length of each of their documents."""
    root.mkdir()
    shards = []
    for number, (tokens, lengths) in enumerate(zip(sizes, documents, strict=True)):
        path, said = root / f"shard-{number:05d}.bin", None if predicted is None else predicted[number]
        facts = {"tokenizer_hash": "h", "source": "", "split": "train", "num_bytes": 0, "pieces_end": 1}
        write_shard(path, tokens, np.cumsum(lengths), vocab_size=vocab_size, **facts, predicted=said)
        shards.append({"file": path.name, "num_tokens": len(tokens), "num_documents": len(lengths), "checksum": Shard(path).checksum})
    (root / "index.json").write_text(json.dumps({"version": VERSION, "tokenizer_hash": "h", "vocab_size": vocab_size, "num_tokens": 0, "shards": shards}))
    return root


lengths_of = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=3)


def draw_folder(tmp_path_factory, lengths, masked=False):
    draw = np.random.default_rng(sum(map(sum, lengths)))
    tokens = [draw.integers(1, 1000, sum(shard)) for shard in lengths]
    predicted = [draw.random(sum(shard)) < 0.6 for shard in lengths] if masked else None
    return made(tmp_path_factory.mktemp("made") / "f", tokens, lengths, predicted=predicted), tokens, predicted


@given(lengths_of, st.integers(1, 40), st.booleans(), seeds)
@settings(max_examples=40, deadline=None)
def test_documents_are_samples_of_their_own(tmp_path_factory, lengths, tokens_per_sample, masked, seed):
    folder, tokens, predicted = draw_folder(tmp_path_factory, lengths, masked)
    stream = DocumentStream(folder, tokens_per_sample, seed, shuffle=True)
    expected = []
    for number, shard in enumerate(lengths):
        for end, length in zip(np.cumsum(shard), shard, strict=True):
            text = tokens[number][end - length : end].tolist()
            said = predicted[number][end - length : end].tolist() if predicted else [True] * length
            labels = [token if is_said else -100 for token, is_said in zip(text, said, strict=True)][1:]
            expected.append((text[:-1][:tokens_per_sample], labels[:tokens_per_sample]) if length > 1 else (text, [-100]))
    assert stream.num_samples == len(expected)
    assert [tuple(part.tolist() for part in stream.sample(i)) for i in range(len(expected))] == expected
    batch = stream.batch(range(len(expected)))
    assert sorted(batch.samples.tolist()) == list(range(len(expected)))
    width = min(tokens_per_sample, -(-max(len(ids) for ids, _ in expected) // 8) * 8)
    for sample, ids, labels in zip(batch.samples, batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        pad = width - len(expected[sample][0])
        assert ids == expected[sample][0] + [0] * pad
        assert labels == expected[sample][1] + [-100] * pad


@given(lengths_of, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_tokens_that_are_not_predicted_are_read_and_no_labels(tmp_path_factory, lengths, tokens_per_sample):
    folder, tokens, predicted = draw_folder(tmp_path_factory, lengths, masked=True)
    if max(map(len, tokens)) < 2:
        return
    assert predicted is not None
    stream = Stream(folder, tokens_per_sample, 0, shuffle=False)
    batch = stream.batch(range(stream.num_samples))
    labels = np.concatenate([part[1:] for part in tokens])
    expected = labels[np.concatenate([part[1:] for part in predicted])]
    assert batch.labels[batch.labels != -100].tolist() == expected.tolist()
    full = np.concatenate([batch.input_ids[batch.samples == i][0] for i in range(stream.num_samples)])
    assert [token for token in full.tolist() if token] == [token for part in tokens for token in part[:-1].tolist()]


@given(lengths_of, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_within_documents_positions_start_again_and_no_document_says_the_next(tmp_path_factory, lengths, tokens_per_sample):
    folder, tokens, _ = draw_folder(tmp_path_factory, lengths)
    if max(map(len, tokens)) < 2:
        return
    across, within = (Stream(folder, tokens_per_sample, 0, False, within=how) for how in (False, True))
    everything = range(across.num_samples)
    before, after = across.batch(everything), within.batch(everything)
    assert before.positions is None and after.positions is not None
    assert (before.input_ids == after.input_ids).all()
    row = 0
    for number, shard in enumerate(lengths):
        begins = np.repeat(np.cumsum(shard) - shard, shard)  # of the document that each token is in
        for start in range(0, sum(shard) - 1, tokens_per_sample):
            real = min(tokens_per_sample, sum(shard) - 1 - start)
            places = np.arange(start, start + real)
            assert after.positions[row, :real].tolist() == (places - np.maximum(begins[places], start)).tolist()
            said = np.where(begins[places + 1] == begins[places], tokens[number][places + 1], -100)
            assert after.labels[row].tolist() == said.tolist() + [-100] * (tokens_per_sample - real)
            row += 1


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), seeds, st.booleans())
@settings(max_examples=25, deadline=None)
def test_steps_are_the_micro_batches_one_behind_the_other(folder, first, micro_batch, count, ranks, seed, within):
    stream = Stream(folder, 16, seed, True, within=within)
    numbers = range(0, -(-count // ranks) * ranks, ranks)  # those of rank 0, some beyond the last
    steps = stream.steps(first, numbers, count * micro_batch, micro_batch)
    for step in range(first, first + 30):
        batches = next(steps)
        assert [j for j, _ in batches] == list(numbers)
        for j, batch in batches:
            one = stream.micro_batch(step, j, count * micro_batch, micro_batch)
            for name, array in one._asdict().items():
                assert np.array_equal(getattr(batch, name), array), name
            assert (batch.labels != -100).any() == (j < count)


def test_several_folders_take_turns_as_their_weights_say(tmp_path):
    folders = [made(tmp_path / name, [np.full(n * 8 + 1, fill)], [[n * 8 + 1]]) for name, n, fill in (("a", 50, 1), ("b", 7, 2))]
    plain = Stream(folders, 8, 3, True).batch(range(57))
    assert (plain.labels[:, 0] == 1).sum() == 50 and sorted(plain.samples.tolist()) == list(range(57))
    mixed = Stream(folders, 8, 3, True, Interleaving(((0, (1.0, 1.0)), (16384, (0.0, 1.0))))).batch(range(2**14 + 9))
    assert (mixed.labels[: 2**14, 0] == 1).sum() == 2**13
    assert (mixed.labels[2**14 :, 0] == 2).all() and (mixed.samples[2**14 :] >= 50).all()
    of_b = mixed.samples[mixed.samples >= 50]
    for epoch in range(len(of_b) // 7):
        assert sorted(of_b[7 * epoch : 7 * epoch + 7].tolist()) == list(range(50, 57))


def test_folders_of_different_tokenizers_are_refused(tmp_path):
    folders = [made(tmp_path / name, [np.arange(9)], [[9]]) for name in "ab"]
    index = json.loads((folders[1] / "index.json").read_text())
    (folders[1] / "index.json").write_text(json.dumps(index | {"tokenizer_hash": "other"}))
    with pytest.raises(DataError, match="/b and .*/a were made with different tokenizers. Prepare both with the same one"):
        Stream(folders, 4, 0, True)


@pytest.mark.parametrize("kind", [Stream, DocumentStream])
def test_a_quarantined_shard_has_no_targets_and_moves_nothing(tmp_path, kind):
    folder = made(tmp_path / "a", [np.arange(1, 34), np.arange(101, 134), np.arange(201, 234)], [[11] * 3] * 3)
    sound = kind(folder, 8, 3, True).batch(range(20))
    data = bytearray((folder / "shard-00001.bin").read_bytes())
    data[-60] ^= 1  # among the tokens
    (folder / "shard-00001.bin").write_bytes(data)
    (folder / "shard-00002.bin").unlink()
    with pytest.raises(DataError, match="shard-00002.bin is missing"):
        kind(folder, 8, 3, True)
    told: list[str] = []
    stream = kind(folder, 8, 3, True, quarantine=told.append)
    batch = stream.batch(range(20))
    first = (sound.input_ids < 100).any(1)
    assert batch.left_out.tolist() == (~first).tolist() and 0 < first.sum() < 20
    assert (batch.samples == sound.samples).all()
    assert (batch.labels[first] == sound.labels[first]).all() and (batch.input_ids[first] == sound.input_ids[first]).all()
    assert (batch.labels[~first] == -100).all() and (batch.input_ids[~first] == 0).all()
    assert sorted(stream.quarantined) == [1, 2]
    assert len(told) == 2 and any("does not match its checksum" in why for why in told) and any("shard-00002.bin is missing" in why for why in told)
    (folder / "shard-00000.bin").unlink()  # it is open, and stays so
    assert (stream.batch(range(20)).labels == batch.labels).all()


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_samples_near_damage_are_refused_each_time_and_no_others(tmp_path_factory, where, tokens_per_sample, together):
    tokens = np.random.default_rng(where).integers(0, 1000, 401)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqtrain.data.shard.BLOCK_BYTES", 64)
        patch.setattr("dqtrain.data.stream._CHECKED", together)
        folder = made(tmp_path_factory.mktemp("damaged") / "f", [tokens], [[401]])
        path = folder / "shard-00000.bin"
        content, opened = bytearray(path.read_bytes()), Shard(path)
        byte = where % (2 * len(tokens)) + 8  # of the payload, behind the end of the one document
        content[len(content) - 8 * len(opened._checksums) - len(opened._payload) + byte] ^= 1
        path.write_bytes(content)
        stream = Stream(folder, tokens_per_sample, 0, False)
        group = max(1, together // tokens_per_sample)
        for _ in range(2):
            for i in range(stream.num_samples):
                first, end = (i // group * group * tokens_per_sample, min((i // group + 1) * group * tokens_per_sample + 1, 401))
                blocks = range((8 + 2 * first) // 64, (8 + 2 * end - 1) // 64 + 1)
                if byte // 64 in blocks:
                    with pytest.raises(DataError, match=f"block {byte // 64} of"):
                        stream.batch(range(i, i + 1))
                else:
                    expected = tokens[i * tokens_per_sample : (i + 1) * tokens_per_sample + 1]
                    assert stream.sample(i)[0][: len(expected) - 1].tolist() == expected[:-1].tolist()


@pytest.mark.parametrize("where", ["document ends", "loss bits"])
def test_damage_beside_the_tokens_is_quarantined_too(tmp_path, where, monkeypatch):
    monkeypatch.setattr("dqtrain.data.shard.BLOCK_BYTES", 16)  # tokens, and what is beside them, in blocks of their own
    folder = made(tmp_path / "a", [np.arange(1, 37)] * 2, [[11] * 3] * 2, predicted=[np.arange(36) % 2 == 0] * 2)
    path = folder / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    opened = Shard(path)
    start = len(content) - 8 * len(opened._checksums) - len(opened._payload)
    content[start if where == "document ends" else start + opened._predicted_start] ^= 1
    path.write_bytes(content)
    told: list[str] = []
    batch = Stream(folder, 8, 0, False, quarantine=told.append, within=where == "document ends").batch(range(10))
    assert len(told) == 1 and "does not match its checksum" in told[0]
    assert batch.left_out.tolist() == [False] * 5 + [True] * 5 and (batch.labels[5:] == -100).all() and (batch.labels[:5] != -100).any()
    assert batch.without_targets().left_out is None


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
    return PairStream(pair_folders[encoder_decoder], PAD, START if encoder_decoder else None, seed, shuffle)


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


@pytest.mark.parametrize("kind", [Stream, DocumentStream])
def test_no_more_shards_are_open_than_are_allowed(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("dqtrain.data.stream._OPEN_SHARDS", 2)
    stream = kind(made(tmp_path / "a", [np.arange(10 * i, 10 * i + 9) for i in range(5)], [[9]] * 5), 8, 0, False)
    for position in (0, 1, 2, 3, 4, 0, 4, 1, 1):
        assert stream.batch(range(position, position + 1)).input_ids[0].tolist() == list(range(10 * position, 10 * position + 8))
        assert len(stream._shards) <= 2
    assert stream.batch(range(5)).input_ids[:, 0].tolist() == [0, 10, 20, 30, 40]  # more than that at once
