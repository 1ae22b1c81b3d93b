import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.reader import Reader, own_micro_batches
from dqtrain.errors import ConfigError, DataError


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
