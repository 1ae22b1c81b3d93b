import os
import resource

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.shard import BLOCK_BYTES, Shard, write_shard
from dqtrain.errors import DataError


def write(path, tokens, ends=(), vocab_size=2**17, predicted=None):
    facts = {"tokenizer_hash": "h", "source": "s.txt", "split": "train", "num_bytes": 7, "pieces_end": 3}
    write_shard(path, np.asarray(tokens), np.asarray(ends, np.int64), vocab_size=vocab_size, predicted=predicted, **facts)
    return path


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([1, 300, 2**16, 2**16 + 1, 2**32]))
    tokens = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=50))
    ends = sorted(data.draw(st.sets(st.integers(1, len(tokens))))) if tokens else []
    predicted = data.draw(st.none() | st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    said = None if predicted is None else np.array(predicted, bool)
    path = write(tmp_path_factory.mktemp("shard") / "a.bin", np.array(tokens, np.int64), ends, vocab_size, said)
    shard = Shard(path)
    assert shard.num_tokens == len(tokens)
    assert shard.document_ends.tolist() == ends
    first, last = sorted(data.draw(st.tuples(st.integers(0, len(ends)), st.integers(0, len(ends)))))
    assert shard.read_document_ends(first, last).tolist() == ends[first:last]
    assert shard.header["dtype"] == ("uint16" if vocab_size <= 2**16 else "uint32")
    assert shard.header["pieces_end"] == 3
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens)))))
    assert shard.read(start, stop).dtype == np.int64
    assert shard.read(start, stop).tolist() == tokens[start:stop]
    assert shard.read_predicted(start, stop).dtype == bool
    assert shard.read_predicted(start, stop).tolist() == (predicted or [True] * len(tokens))[start:stop]
    shard.verify()


def test_reads_across_blocks(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**17, BLOCK_BYTES)  # 4 MiB, and the one document end shifts the blocks
    shard = Shard(write(tmp_path / "a.bin", tokens, [len(tokens)]))
    for start in (0, BLOCK_BYTES // 4 - 5, len(tokens) - 9):
        assert (shard.read(start, start + 9) == tokens[start : start + 9]).all()
    assert (shard.read(0, len(tokens)) == tokens).all()


@pytest.mark.parametrize("bad", [[0, 300], [-1, 2]])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, bad):
    with pytest.raises(DataError, match=rf"token id {300 if 300 in bad else -1} is not in \[0, 300\)"):
        write(tmp_path / "a.bin", bad, vocab_size=300)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**30))
def test_any_flipped_bit_is_found(tmp_path_factory, where):
    path = write(tmp_path_factory.mktemp("shard") / "a.bin", np.arange(100), [40, 100], vocab_size=300, predicted=np.arange(100) > 50)
    flip(path, where % path.stat().st_size)
    with pytest.raises(DataError, match=str(path)):
        Shard(path).verify()


def test_a_flipped_bit_is_found_when_its_block_is_read_and_not_before(tmp_path):
    path = write(tmp_path / "a.bin", np.zeros(BLOCK_BYTES, np.int64))
    flip(path, BLOCK_BYTES + 5000)
    shard = Shard(path)
    assert not shard.read(0, 1000).any()
    with pytest.raises(DataError, match=r"a\.bin: block 1 of 4 does not match its checksum; delete it and run dqtrain prepare again"):
        shard.read(0, BLOCK_BYTES)
    flip(path, 5000)
    with pytest.raises(DataError, match="block 0 of 4"):
        Shard(path).read(1000, 1001)


@pytest.mark.parametrize("num_bytes", [0, 5, 12, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, num_bytes):
    path = write(tmp_path / "a.bin", np.arange(1000))
    os.truncate(path, num_bytes % path.stat().st_size)
    with pytest.raises(DataError, match=rf"{path}.*delete it and run dqtrain prepare again"):
        Shard(path)


def test_a_truncated_file_says_how_long_it_is_and_should_be(tmp_path):
    path = write(tmp_path / "a.bin", np.arange(1000))
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(DataError, match=f"has {size - 10} bytes, but its header says {size}"):
        Shard(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.bin is missing"):
        Shard(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"PK" * 100)
    with pytest.raises(DataError, match="is not a token shard"):
        Shard(tmp_path / "a.bin")


def test_another_version_is_refused(tmp_path):
    path = write(tmp_path / "a.bin", [1, 2])
    data = path.read_bytes().replace(b'"version": 2', b'"version": 1')
    end = 16 + int.from_bytes(data[8:16], "little")
    path.write_bytes(data[:end] + xxhash.xxh3_64_intdigest(data[:end]).to_bytes(8, "little") + data[end + 8 :])
    with pytest.raises(DataError, match="has format version 1, but this dqtrain reads 2"):
        Shard(path)


def test_a_disk_that_refuses_leaves_nothing_new_behind(tmp_path):
    path = write(tmp_path / "a.bin", [1, 2, 3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"a\.bin cannot be written \(File too large\); free space"):
            write(path, np.zeros(10**6, np.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert Shard(path).read(0, 3).tolist() == [1, 2, 3]
