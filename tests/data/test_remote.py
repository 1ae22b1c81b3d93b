"""Prepared folders at an address, read through copies on this node."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import Cache
from dqtrain.data import remote
from dqtrain.data import stream as stream_module
from dqtrain.data.folder import open_folder
from dqtrain.data.prepare import VERSION
from dqtrain.data.reader import own_micro_batches
from dqtrain.data.remote import Copies
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import Interleaving, Stream
from dqtrain.errors import DataError

TOKENS = 8


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    yield
    fsspec.filesystem("memory").store.clear()


def made(root, samples_per_shard, address):
    """A prepared folder, copied to an address; the bytes of each shard."""
    root.mkdir()
    shards = []
    for number, count in enumerate(samples_per_shard):
        path, tokens = root / f"shard-{number:05d}.bin", np.full(count * TOKENS + 1, number)
        facts = {"tokenizer_hash": "h", "source": str(number), "split": "train", "num_bytes": 0, "pieces_end": 1}
        write_shard(path, tokens, np.array([len(tokens)]), vocab_size=1000, **facts)
        shards.append({"file": path.name, "num_tokens": len(tokens), "num_documents": 1, "bytes": path.stat().st_size, "checksum": Shard(path).checksum})
    (root / "index.json").write_text(json.dumps({"version": VERSION, "tokenizer_hash": "h", "vocab_size": 1000, "shards": shards}))
    files = fsspec.core.url_to_fs(address)[0]
    files.makedirs(address, exist_ok=True)
    for path in root.iterdir():
        files.pipe_file(f"{address}/{path.name}", path.read_bytes())
    return [shard["bytes"] for shard in shards]


@pytest.mark.parametrize("protocol", ["memory", "file", "http"])
def test_an_address_gives_what_the_folder_gives(tmp_path, protocol, web):
    address = "memory://store" if protocol == "memory" else f"file://{tmp_path}/store"
    made(tmp_path / "here", [5, 3, 9], address)
    if protocol == "http":
        address = web(tmp_path / "store")
    far = Stream([open_folder(address, Cache(folder=tmp_path / "copies", gib=1))], TOKENS, 3, True)
    near = Stream(tmp_path / "here", TOKENS, 3, True)
    for _ in range(2):
        for name, array in near.batch(range(40))._asdict().items():
            assert np.array_equal(getattr(far.batch(range(40)), name), array)
    assert far.folders[0].copies.fetched_bytes == sum(path.stat().st_size for path in (tmp_path / "here").glob("*.bin"))


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([12, 16, 24]), st.integers(0, 2**31 - 1))
@settings(max_examples=6, deadline=None)
def test_with_parts_each_shard_comes_to_one_node_once_per_epoch(tmp_path_factory, num_nodes, ranks_per_node, num_shards, seed):
    root = tmp_path_factory.mktemp("parts")
    parts, turns, micro_batch = 4 if num_nodes != 3 else 3, 2 * ranks_per_node, 2
    sizes = made(root / "here", [12] * num_shards, "memory://parts")
    nodes = [rank // ranks_per_node for rank in range(num_nodes * ranks_per_node)]
    count = parts * turns
    steps_per_epoch = num_shards * 12 // (count * micro_batch)
    samples, fetched = [], []
    for node in range(num_nodes):
        copies = root / f"node-{node}"
        folder = open_folder("memory://parts", Cache(folder=copies, gib=1))
        for rank in [rank for rank, where in enumerate(nodes) if where == node]:  # they share the copies
            stream = Stream([folder], TOKENS, seed, True, Interleaving((), parts, micro_batch))
            steps = stream.steps(0, own_micro_batches(rank, nodes, count, parts), count * micro_batch, micro_batch)
            for _ in range(steps_per_epoch):
                samples += [batch.samples for j, batch in next(steps) if j < count]
            stream._fetchers.shutdown()
        fetched.append(folder.copies.fetched_bytes)
    seen = np.sort(np.concatenate(samples))
    if num_shards % parts == 0 and steps_per_epoch * count * micro_batch == num_shards * 12:  # parts of equal size, whose epochs end together
        assert (seen == np.arange(num_shards * 12)).all()
        if parts % num_nodes == 0:
            assert sum(fetched) == sum(sizes)


def test_what_was_used_least_recently_makes_room_and_stays_readable_where_it_is_open(tmp_path):
    sizes = made(tmp_path / "here", [40] * 4, "memory://store")
    folder = open_folder("memory://store", Cache(folder=tmp_path / "copies", gib=3.5 * sizes[0] / 2**30))
    opened = []
    for number in (0, 1, 2):
        opened.append(folder.open(number))
        os.utime(opened[-1].path, ns=(number * 10**9, number * 10**9))
    folder.open(0)  # now shard 1 is the one that was used least recently
    folder.open(3)
    assert sorted(path.name for path in opened[0].path.parent.iterdir()) == ["shard-00000.bin", "shard-00002.bin", "shard-00003.bin"]
    assert opened[1].read(0, 5).tolist() == [1] * 5
    small = open_folder("memory://store", Cache(folder=tmp_path / "small", gib=sizes[0] / 2 / 2**30))
    with pytest.raises(DataError, match=r"a shard of memory://store has .* GiB, but data.cache.gib is .*Raise it"):
        small.open(0)


@pytest.mark.parametrize("within", [False, True])
def test_a_cache_smaller_than_what_is_read_together_loses_nothing(tmp_path, within):
    sizes = made(tmp_path / "here", [7] * 24, "memory://store")
    cache = Cache(folder=tmp_path / "copies", gib=8.5 * sizes[0] / 2**30)
    how = (3, True, Interleaving((), 2, 2))
    far, near = Stream([open_folder("memory://store", cache)], TOKENS, *how, within=within), Stream(tmp_path / "here", TOKENS, *how, within=within)
    for start in (0, 100, 200):
        for batch, expected in zip(
            far._batches(far.order.at(range(start, start + 100)), 4), near._batches(near.order.at(range(start, start + 100)), 4), strict=True
        ):
            assert batch.left_out is None and (batch.labels == expected.labels).all() and (batch.input_ids == expected.input_ids).all()
    first, known = far._first_group, far._known
    assert {number for number in range(24) if known[first[number] : first[number + 1]].any()} == set(far._shards) and len(far._shards) < 24


def test_shards_that_are_behind_are_let_go(tmp_path, monkeypatch):
    """What was fetched ahead is mapped, and takes its space for as long as it is, though its copy made room for another."""
    monkeypatch.setattr(stream_module, "_ORDERED", 2)  # to look ahead at every step
    sizes = made(tmp_path / "here", [4] * 80, "memory://store")
    cache = Cache(folder=tmp_path / "copies", gib=12.5 * sizes[0] / 2**30)
    stream = Stream([open_folder("memory://store", cache)], TOKENS, 3, True, Interleaving((), 2, 2))
    steps = stream.steps(0, [0], 4, 2)  # of one part, which has 40 shards
    for _ in range(80):
        next(steps)
    stream._fetchers.shutdown()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "copies") in line]
    assert 0 < len(mapped) <= 30  # 12 that the cache holds, 8 ahead, and a few that are going


def test_what_is_being_fetched_counts_and_what_is_left_behind_goes(tmp_path):
    sizes = made(tmp_path / "here", [40] * 4, "memory://store")
    folder = open_folder("memory://store", Cache(folder=tmp_path / "copies", gib=3.5 * sizes[0] / 2**30))
    copies = [folder.open(number).path for number in (0, 1)]
    os.utime(copies[0], ns=(0, 0))
    other, left = tmp_path / "copies/another/.1.host.1.1.a", tmp_path / "copies/another/.1.host.1.1.b"
    other.parent.mkdir()
    for path in (other, left):
        path.write_bytes(bytes(sizes[0]))
    os.utime(left, ns=(0, 0))
    folder.open(2)
    assert [path.exists() for path in (*copies, other, left)] == [False, True, True, False]
    seen = []
    real = remote._blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            remote, "_blocks", lambda address: seen.extend(p.stat().st_size for p in (tmp_path / "copies").glob("*/.*shard-00003.bin")) or real(address)
        )
        folder.open(3)
    assert seen == sizes[:1]  # the whole size, before the first byte


def test_ranks_that_want_other_shards_at_once_wait_until_there_is_room(tmp_path, monkeypatch):
    sizes = made(tmp_path / "here", [4000] * 8, "memory://store")
    assert len(set(sizes)) == 1
    claimed = []
    slow = remote._blocks

    def blocks(address):
        for block in slow(address):
            for _ in range(3):
                time.sleep(0.02)
                files = {}
                for path in (tmp_path / "copies").glob("*/*"):
                    with contextlib.suppress(FileNotFoundError):
                        files[path.name] = path.stat().st_size
                claimed.append(sum(size for name, size in files.items() if name.startswith(".")))
            yield block

    monkeypatch.setattr(remote, "_blocks", blocks)
    cache = Cache(folder=tmp_path / "copies", gib=2.5 * sizes[0] / 2**30)
    folders = [open_folder("memory://store", cache) for _ in range(8)]
    found: dict[int, list[int]] = {}

    def fetch(number):
        found[number] = folders[number].open(number).read(0, 2).tolist()

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [number] * 2 for number in range(8)}
    assert max(claimed) <= 2.5 * sizes[0]  # whatever is fetched at once; copies are removed a moment later
    assert sum(path.stat().st_size for path in (tmp_path / "copies").glob("*/*")) <= 2.5 * sizes[0]
    assert sum(folder.copies.fetched_bytes for folder in folders) == sum(sizes)


def test_a_rank_that_waits_for_room_is_not_taken_for_gone(tmp_path):
    (size,) = made(tmp_path / "here", [40], "memory://store")
    other = tmp_path / "copies/another/.1.host.1.1.a"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(size))
    os.utime(other, (time.time() + 3600,) * 2)  # of a rank that goes on for long
    folder = open_folder("memory://store", Cache(folder=tmp_path / "copies", gib=1.5 * size / 2**30))
    thread = threading.Thread(target=folder.open, args=(0,), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not (waiting := list((tmp_path / "copies").glob("*/.*shard-00000.bin"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        os.utime(waiting[0], (0, 0))  # as it looks when nothing was done for long
        while waiting[0].stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waiting[0].stat().st_mtime > 0 and waiting[0].stat().st_size == 0 and folder.copies.fetched_bytes == 0
    other.unlink()
    thread.join()
    assert folder.copies.fetched_bytes == size and not waiting[0].exists()


def test_a_rank_so_slow_that_its_own_file_counts_as_left_behind_fetches(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_STALLED_S", -1.0)
    made(tmp_path / "here", [5], "memory://store")
    assert open_folder("memory://store", Cache(folder=tmp_path / "copies")).open(0).read(0, 3).tolist() == [0] * 3


def test_ranks_that_want_the_same_shard_fetch_it_once(tmp_path, monkeypatch):
    (size,) = made(tmp_path / "here", [4000], "memory://store")
    slow = remote._blocks

    def blocks(address):
        for block in slow(address):
            time.sleep(0.3)
            yield block

    monkeypatch.setattr(remote, "_blocks", blocks)
    folders = [open_folder("memory://store", Cache(folder=tmp_path / "copies")) for _ in range(4)]
    found = []
    threads = [threading.Thread(target=lambda folder=folder: found.append(folder.open(0).read(0, 3).tolist())) for folder in folders]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert found == [[0] * 3] * 4
    assert sum(folder.copies.fetched_bytes for folder in folders) == size
    assert [path.name for path in (tmp_path / "copies").glob("*/*")] == ["shard-00000.bin"]


def test_an_unfinished_file_of_a_rank_that_is_gone_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_STALLED_S", 0.5)
    made(tmp_path / "here", [5], "memory://store")
    folder = open_folder("memory://store", Cache(folder=tmp_path / "copies"))
    left = folder.copies._folder / ".00000000000000000001.host.1.1.shard-00000.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"DQ")
    assert folder.open(0).read(0, 3).tolist() == [0] * 3
    assert not left.exists()


def test_a_process_killed_while_it_fetches_leaves_no_copy(tmp_path):
    made(tmp_path / "here", [5], f"file://{tmp_path}/store")
    code = f"""
import os
from dqtrain.data import remote
real = remote._blocks
def blocks(address):
    for block in real(address):
        yield block[:100]
        os.kill(os.getpid(), 9)
remote._blocks = blocks
remote.Copies("file://{tmp_path}/store", __import__("pathlib").Path("{tmp_path}/copies"), 10**9).open("shard-00000.bin", 1, "x")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = (tmp_path / "copies").glob("*/*")
    assert left.name.startswith(".") and left.name.endswith(".shard-00000.bin")


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "another"])
def test_a_shard_that_stays_missing_or_damaged_is_named_and_tried_again(tmp_path, damage, monkeypatch):
    made(tmp_path / "here", [5, 5], "memory://store")
    files, name = fsspec.filesystem("memory"), "memory://store/shard-00001.bin"
    sound = files.cat_file(name)
    flipped = bytearray(sound)
    flipped[-30] ^= 1
    if damage == "missing":
        files.rm_file(name)
    else:
        files.pipe_file(name, {"flipped": bytes(flipped), "cut": sound[:-10], "another": files.cat_file("memory://store/shard-00000.bin")}[damage])
    folder = open_folder("memory://store", Cache(folder=tmp_path / "copies"))
    message = {"missing": "shard-00001.bin", "flipped": "does not match its checksum", "cut": "but the index says", "another": "not the one that the index"}
    with pytest.raises(DataError, match=rf"^memory://store/shard-00001.bin cannot be read, tried 5 times: .*{message[damage]}.*data.quarantine"):
        folder.open(1)
    assert not list(tmp_path.glob("copies/*/*"))
    told: list[str] = []
    stream = Stream([folder], TOKENS, 0, False, quarantine=told.append)
    batch = stream.batch(range(10))
    assert batch.left_out.tolist() == [False] * 5 + [True] * 5 and len(told) == 1
    # Mended while it is tried again.
    calls = []
    real = remote._blocks
    monkeypatch.setattr(
        remote, "_blocks", lambda address: calls.append(files.pipe_file(name, sound)) or real(address) if len(calls) == 2 else calls.append(0) or real(address)
    )
    assert folder.open(1).read(0, 2).tolist() == [1, 1]
    assert len(calls) == 3


def test_an_index_that_is_not_there_and_a_disk_that_refuses_are_named(tmp_path):
    with pytest.raises(DataError, match=r"memory://nothing/index.json cannot be read, tried 5 times"):
        open_folder("memory://nothing", Cache())
    with pytest.raises(DataError, match=r"nosuch://a/index.json cannot be read.*nosuch"):
        open_folder("nosuch://a", Cache())
    made(tmp_path / "here", [5], "memory://store")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the copy .*cannot be written \(Not a directory\). Set data.cache.folder"):
        open_folder("memory://store", Cache(folder=tmp_path / "file")).open(0)


def test_a_cache_that_may_not_be_written_gives_the_copies_it_has_and_is_named_for_others(tmp_path):
    made(tmp_path / "here", [5, 3], "memory://store")
    cache = Cache(folder=tmp_path / "copies")
    cache.folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(cache.folder)], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        pytest.skip("mounting a tmpfs needs root")
    try:
        open_folder("memory://store", cache).open(0)
        subprocess.run(["mount", "-o", "remount,ro", str(cache.folder)], check=True)
        folder = open_folder("memory://store", cache)
        assert folder.open(0).read(0, 2).tolist() == [0, 0] and folder.copies.fetched_bytes == 0
        with pytest.raises(DataError, match=rf"the copy {cache.folder}/.*shard-00001.bin cannot be written \(Read-only file system\)\. Set data.cache.folder"):
            folder.open(1)
    finally:
        subprocess.run(["umount", "-l", str(cache.folder)], check=True)


def test_a_copy_of_an_earlier_index_is_fetched_anew(tmp_path):
    made(tmp_path / "old", [5], "memory://store")
    cache = Cache(folder=tmp_path / "copies")
    open_folder("memory://store", cache).open(0)
    made(tmp_path / "new", [7], "memory://store")
    assert open_folder("memory://store", cache).open(0).num_tokens == 7 * TOKENS + 1
    assert isinstance(Copies("memory://a/", None, 1).address, str)
