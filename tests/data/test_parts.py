"""Parts of a source: the same files whoever makes them, however many at once and however often they are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from conftest import prepare_one, write_corpus

from dqtrain.config import Data, Pairs, Source
from dqtrain.data import sources, work
from dqtrain.data.prepare import folders_of, load_tokenizer, prepare, read_index, train_tokenizer
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

UNIT = 4000
PREPARE = f"""
import sys
from pathlib import Path
from dqtrain.config import Data
from dqtrain.data import sources
from dqtrain.data.prepare import prepare
sources.UNIT_BYTES = {UNIT}
if __name__ == "__main__":
    corpus, tokenizer, root, workers = sys.argv[1:]
    print(*prepare(Data(train=corpus, tokens_per_sample=16), "train", Path(tokenizer), Path(root), workers=int(workers)))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_corpus(folder / "a.jsonl", 400, 1)
    train_tokenizer([Source(path=str(folder / "a.jsonl"))], 290, folder / "bpe")
    return folder / "bpe"


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", UNIT)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def texts(folder: Path, tokenizer: Path) -> list[str]:
    """What all shards say, as text, document by document; documents may go on in the next shard."""
    ids, ends = [], []
    for entry in read_index(folder)["shards"]:
        shard = Shard(folder / entry["file"])
        assert (shard.num_tokens, shard.header["num_documents"], shard.path.stat().st_size) == (entry["num_tokens"], entry["num_documents"], entry["bytes"])
        ends += (shard.document_ends + sum(map(len, ids))).tolist()
        ids.append(shard.read(0, shard.num_tokens))
    return [load_tokenizer(tokenizer).decode(document, skip_special_tokens=True) for document in np.split(np.concatenate(ids), ends)[:-1]]


def lengths(values) -> list[int]:
    counts = [0] * (max(values).bit_length())
    for value in values:
        counts[value.bit_length() - 1] += 1
    return counts


@pytest.mark.usefixtures("small_units")
def test_the_files_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path):
    """One source of everything: many small files, one that is cut, and a compressed one."""
    (tmp_path / "in").mkdir()
    for number, size in enumerate([3, 2, 200, 4, 1]):
        write_corpus(tmp_path / f"in/{number}.jsonl", size, number)
    expected = [json.loads(line)["text"] for number in range(5) for line in (tmp_path / f"in/{number}.jsonl").read_text().splitlines()]
    folders = [
        prepare_one(f"{tmp_path}/in/*.jsonl", "train", tokenizer, tmp_path / str(workers), workers=workers, tokens_per_shard=1500) for workers in (1, 2, 3)
    ]
    assert len({folder.name for folder in folders}) == 1
    one, *others = map(content, folders)
    assert others == [one] * 2 and len(one) > 6
    index = read_index(folders[0])
    assert texts(folders[0], tokenizer) == expected
    assert {"shard-00000-00000.bin", "shard-00001-00000.bin", "shard-00001-00001.bin", "index.json"} <= one.keys()
    fast = load_tokenizer(tokenizer)
    assert index["lengths"] == {"documents": lengths([len(fast(text)["input_ids"]) + 1 for text in expected])}


@pytest.mark.usefixtures("small_units")
def test_a_long_text_is_one_document_over_many_parts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    text = "the cat sees a small dog\n" * 2000
    (tmp_path / "b.txt").write_text(text)
    (tmp_path / "a.txt").write_text("the cat")
    folder = prepare_one(f"{tmp_path}/*.txt", "train", tokenizer, tmp_path, workers=2, tokens_per_shard=900)
    index = read_index(folder)
    assert texts(folder, tokenizer) == ["the cat", text] and len(index["shards"]) > 10
    fast = load_tokenizer(tokenizer)
    assert index["lengths"] == {"documents": lengths([len(fast("the cat")["input_ids"]) + 1, index["num_tokens"] - len(fast("the cat")["input_ids"]) - 1])}
    whole = prepare_one(f"{tmp_path}/*.txt", "train", tokenizer, tmp_path, samples="documents", tokens_per_shard=900, workers=1)
    assert whole != folder and texts(whole, tokenizer) == ["the cat", text]
    for entry in read_index(whole)["shards"]:  # no document is in two shards
        assert Shard(whole / entry["file"]).document_ends[-1] == entry["num_tokens"]


@pytest.mark.usefixtures("small_units")
def test_lengths_of_pairs_are_counted_apart(tokenizers, tmp_path):
    pairs = [("a " * (1 + i % 9), "b " * (1 + i % 4)) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs))
    settings = Pairs(source_tokens=20, target_tokens=20)
    folder = prepare_one(str(tmp_path / "a.jsonl"), "train", tokenizers["gpt2"], tmp_path, pairs=settings, tokens_per_shard=50, workers=2)
    assert read_index(folder)["lengths"] == {
        "sources": lengths([len(source) // 2 for source, _ in pairs]),
        "targets": lengths([len(target) // 2 + 1 for _, target in pairs]),
    }


def wait_for(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("small_units")
def test_a_kill_loses_no_part_that_was_done_and_leaves_nobody_behind(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", 6000, 1)
    command = [sys.executable, "-c", PREPARE, str(corpus), str(tokenizer), str(tmp_path / "killed"), "2"]
    process = subprocess.Popen(command)
    wait_for(lambda: len(list((tmp_path / "killed").glob("*/part-*.json"))) > 5 or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) >= 3 and not alive  # two workers, and the clean process that they are forks of
    [folder] = (tmp_path / "killed").iterdir()
    done = {path.name[5:10] for path in folder.glob("part-*.json")}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*") if path.name[6:11] in done}
    assert not (folder / "index.json").exists() and len(times) > 5
    for left in folder.glob(".*"):
        os.utime(left, (0, 0))  # as if it had been a while ago
    assert prepare_one(str(corpus), "train", tokenizer, tmp_path / "killed", workers=1) == folder
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = prepare_one(str(corpus), "train", tokenizer, tmp_path / "whole", workers=2)
    assert content(folder) == content(whole)
    (folder / "shard-00003-00000.bin").unlink()
    assert content(prepare_one(str(corpus), "train", tokenizer, tmp_path / "killed")) == content(whole)


@pytest.mark.usefixtures("small_units")
def test_a_process_that_is_killed_is_told_of(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", 6000, 1)
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(corpus), str(tokenizer), str(tmp_path / "out"), "2"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((tmp_path / "out").glob("*/part-*.json"))) > 3 or process.poll() is not None)
    server = next(child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline()))
    os.kill(server.children()[0].pid, signal.SIGKILL)
    message = process.communicate(timeout=60)[1]
    assert "a process that prepares data was ended by SIGKILL, as happens where memory runs out. What is complete is kept: start again" in message


@pytest.mark.usefixtures("small_units")
def test_tasks_share_the_work_and_the_last_one_writes_the_index(tokenizer, tmp_path):
    data = Data(train=(str(write_corpus(tmp_path / "a.jsonl", 300, 1)), str(write_corpus(tmp_path / "b.jsonl", 5, 2))), tokens_per_sample=16)
    whole = prepare(data, "train", tokenizer, tmp_path / "whole", workers=1)
    said: list[str] = []
    for task in (2, 0, 1):
        folders = prepare(data, "train", tokenizer, tmp_path / "shared", workers=1, share=(task, 3), progress=lambda message, share: said.append(message))
        assert (folders[0] / "index.json").exists() == (task == 1)
        assert (folders[1] / "index.json").exists() == (task != 2)
    assert [content(folder) for folder in folders] == [content(folder) for folder in whole]
    assert said[0] == f"6 of 8 parts of {tmp_path}/a.jsonl are left to other tasks"
    before = content(folders[0])
    assert prepare(data, "train", tokenizer, tmp_path / "shared", share=(0, 3)) == folders
    assert content(folders[0]) == before
    for part in (3, 4):  # lost later: each task makes its own again
        (folders[0] / f"shard-{part:05d}-00000.bin").unlink()
    prepare(data, "train", tokenizer, tmp_path / "shared", workers=1, share=(0, 3))
    assert (folders[0] / "shard-00003-00000.bin").exists() and not (folders[0] / "shard-00004-00000.bin").exists()
    prepare(data, "train", tokenizer, tmp_path / "shared", workers=1, share=(1, 3))
    assert content(folders[0]) == before


@pytest.mark.usefixtures("small_units")
def test_a_bad_line_is_named_from_any_process_and_counted_over_all(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", 300, 1)
    lines = corpus.read_text().splitlines()
    for number in (120, 250):
        lines[number] = lines[number][:-5]
    lines[30] = '{"text": ""}'
    corpus.write_text("\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:(121|251): not a line of JSON"):
            prepare_one(str(corpus), "train", tokenizer, tmp_path / "out", workers=workers)
        with pytest.raises(DataError, match=r"a\.jsonl:121: not a line .*That makes 2 bad lines, but max_bad_lines of the source allows 1"):
            prepare_one(Source(path=str(corpus), max_bad_lines=1), "train", tokenizer, tmp_path / "out", workers=workers)
    said: list[str] = []
    allowed = Source(path=str(corpus), max_bad_lines=2)
    how = {"workers": 2, "progress": lambda message, share: said.append(message)}
    folder = prepare_one(allowed, "train", tokenizer, tmp_path / "out", **how)
    index = read_index(folder)
    assert (index["num_documents"], index["num_bad_lines"], index["num_empty"]) == (297, 2, 1)
    with pytest.raises(DataError, match="That makes 2 bad lines"):  # what is complete is not taken either when less is allowed
        prepare_one(allowed.model_copy(update={"max_bad_lines": 1}), "train", tokenizer, tmp_path / "out")
    for path in folder.iterdir():
        path.unlink()
    prepare_one(allowed, "train", tokenizer, tmp_path / "out", **how)
    assert said[-1].startswith(f"{corpus}: left out 2 bad lines, such as {corpus}:121: not a line of JSON") and said[-1].endswith(
        "and 1 documents without text"
    )


def test_shards_that_come_out_otherwise_are_refused(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", 30, 1)
    folder = prepare_one(str(corpus), "train", tokenizer, tmp_path)
    index = read_index(folder)
    index["shards"][0]["checksum"] = "0" * 16
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard-00000-00000.bin").unlink()
    with pytest.raises(DataError, match="the shards of part 0 in .* came out otherwise than the index says; delete .* and run dqtrain prepare again"):
        prepare_one(str(corpus), "train", tokenizer, tmp_path)


def test_progress_is_told_from_time_to_time():
    said: list[tuple[str, float | None]] = []
    tally = work._Tally("tokenising x", 4000, lambda message, share: said.append((message, share)))
    tally.add(1, 500, 1000)
    assert said == []
    tally.told = tally.started = tally.started - 20  # as if time had gone by
    tally.add(1, 1500, 0)
    tally.add(1, 1000, 2000)
    [(message, share)] = said
    assert re.fullmatch(r"tokenising x: 2 documents, 2,000 tokens, 0 documents/s, (100|99) tokens/s, 0:01:00 left", message) and share == 0.25


def test_tokens_stay_where_they_are_if_they_are_those_that_are_asked_for(tokenizer, tokenizers, tmp_path):
    folder = prepare_one(str(write_corpus(tmp_path / "a.jsonl", 30, 1)), "train", tokenizer, tmp_path / "made")
    (tmp_path / "b.bin").touch()
    fsspec.filesystem("memory").put(str(folder), "/made", recursive=True)
    sources_of = (str(folder), f"{folder}/index.json", Source(path=str(folder), format="shards"), "memory://made/index.json", str(tmp_path / "b.bin"))
    data = Data(train=sources_of, tokens_per_sample=16)
    expected = [folder, folder, folder, "memory://made", tmp_path / "b.bin"]
    assert prepare(data, "train", tokenizer, tmp_path / "out") == expected == folders_of(data, "train", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for path in (str(folder), "memory://made/index.json"):
        with pytest.raises(DataError, match="were made by a tokenizer with the hash .*: the model would read other words. Prepare them with"):
            prepare_one(path, "train", tokenizers["gpt2"], tmp_path)
        with pytest.raises(DataError, match="samples: packed, but this run asks for documents"):
            prepare_one(path, "train", tokenizer, tmp_path, samples="documents")
        with pytest.raises(DataError, match="were made with {}, but this run asks for {.*source_tokens"):
            prepare_one(path, "train", tokenizer, tmp_path, pairs=Pairs(source_tokens=8, target_tokens=8))
    with pytest.raises(DataError, match="is tokens already, so that there is no text to read"):
        train_tokenizer([Source(path=str(folder))], 300, tmp_path / "bpe")
    with pytest.raises(DataError, match=r"memory://nowhere cannot be read"):
        prepare_one(Source(path="memory://nowhere", format="shards"), "train", tokenizer, tmp_path)
