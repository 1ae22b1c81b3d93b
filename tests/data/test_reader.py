import json
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.order import Order
from dqtrain.data.prepare import VERSION
from dqtrain.data.reader import Reader, own_micro_batches
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import Interleaving, Stream
from dqtrain.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def text_folders(tmp_path_factory):
    """Two folders, whose shards hold 37, 20 and 11 samples of 8 tokens."""
    folders = []
    for sizes in ((37, 20), (11,)):
        folder, shards = tmp_path_factory.mktemp("text"), []
        for number, size in enumerate(sizes):
            path = folder / f"{number}.bin"
            facts = {"tokenizer_hash": "h", "source": "", "split": "train", "num_bytes": 0, "pieces_end": 1}
            write_shard(path, np.arange(8 * size + 1), np.array([8 * size + 1]), vocab_size=1000, **facts)
            shards.append({"file": path.name, "num_tokens": 8 * size + 1, "num_documents": 1, "checksum": Shard(path).checksum})
        (folder / "index.json").write_text(json.dumps({"version": VERSION, "tokenizer_hash": "h", "vocab_size": 1000, "shards": shards}))
        folders.append(folder)
    return folders


def test_items_come_in_order_and_only_so_many_are_read_ahead():
    made: list[int] = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    with closing(Reader(items(), ahead=3)) as reader:
        time.sleep(0.2)
        assert made == [0, 1, 2, 3]  # three wait, and the thread holds one
        assert [next(reader) for _ in range(100)] == list(range(100))
        with pytest.raises(StopIteration):
            next(reader)


def test_what_goes_wrong_comes_out_where_the_item_would_have_come():
    def items():
        yield from (1, 2)
        raise DataError("shard x is gone")

    with closing(Reader(items())) as reader:
        assert (next(reader), next(reader)) == (1, 2)
        for _ in range(2):
            with pytest.raises(DataError, match="shard x is gone"):
                next(reader)


def test_it_says_how_long_was_waited_for_it():
    def items():
        while True:
            time.sleep(0.2)
            yield 0

    with closing(Reader(items())) as reader:
        next(reader)
        assert 0.1 < reader.waited_s() < 2
        time.sleep(0.6)
        next(reader)
        assert reader.waited_s() < 0.1
        assert reader.waited_s() == 0


def test_closing_ends_the_thread():
    before = threading.active_count()
    reader = Reader(iter(lambda: 0, 1))
    next(reader)
    reader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise RuntimeError"])
def test_the_end_of_the_interpreter_ends_it(end):
    code = f"""
import numpy as np
from dqtrain.data.order import Order
from dqtrain.data.prepare import VERSION
from dqtrain.data.reader import Reader
def items():
    try:
        while True:
            yield np.random.default_rng(0).integers(0, 9, 10**6)
    finally:
        print("ended", flush=True)
reader = Reader(items())
next(reader)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"pass": 0, "raise SystemExit(3)": 3, "raise RuntimeError": 1}[end]
    assert "Fatal" not in done.stderr and ("Traceback" in done.stderr) == (end == "raise RuntimeError")


# --- who reads what

nodes = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # ranks of each node


@given(nodes, st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=100)
def test_every_micro_batch_is_computed_once_and_each_part_on_one_node(sizes, turns, parts):
    of_rank = [node for node, size in enumerate(sizes) for _ in range(size)]
    count = turns * parts
    if 1 < parts < len(sizes):
        with pytest.raises(ConfigError, match=rf"data.parts is {parts}, but the run has {len(sizes)} nodes.*Set it to {len(sizes)} or more"):
            own_micro_batches(0, of_rank, count, parts)
        return
    if parts == 1 and count < len(of_rank):
        return  # refused elsewhere
    numbers = [own_micro_batches(rank, of_rank, count, parts) for rank in range(len(of_rank))]
    assert len({len(mine) for mine in numbers}) == 1
    assert sorted(j for mine in numbers for j in mine if j < count) == list(range(count))
    home: dict[int, int] = {}
    for node, mine in zip(of_rank, numbers, strict=True):
        for j in mine:
            assert parts == 1 or home.setdefault(j % count % parts, node) == node
    if parts > 1:
        shares = [list(home.values()).count(node) for node in range(len(sizes))]
        assert max(shares) - min(shares) <= 1


def test_without_parts_ranks_take_turns():
    assert [own_micro_batches(rank, [0, 0, 0], 7) for rank in range(3)] == [[0, 3, 6], [1, 4, 11], [2, 5, 12]]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 4), st.booleans(), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_every_step_has_the_same_samples_whatever_ranks_go_on_with_it(text_folders, starts, micro_batch, mixed, seed):
    """`starts`: (ranks, steps) of one start behind the other, each from the one integer that the last one left."""
    stages = ((0, (0.7, 0.3)), (40, (0.1, 0.9))) if mixed else ()
    count = 6
    global_batch = count * micro_batch
    order = Order([[37, 20], [11]], seed, True, stages)
    step = 0
    for ranks, num_steps in starts:
        found: list[list[tuple[int, list[int]]]] = [[] for _ in range(num_steps)]
        for rank in range(ranks):
            stream = Stream(text_folders, 8, seed, True, Interleaving(stages))
            with closing(Reader(stream.steps(step, own_micro_batches(rank, [0] * ranks, count), global_batch, micro_batch))) as reader:
                for among in found:
                    among += [(j, batch.samples.tolist()) for j, batch in next(reader) if (batch.labels != -100).any()]
        for number, among in enumerate(found, step):
            samples = [sample for _, part in sorted(among) for sample in part]
            assert samples == order.at(range(number * global_batch, (number + 1) * global_batch)).tolist()
        step += num_steps
