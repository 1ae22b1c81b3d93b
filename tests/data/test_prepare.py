import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.prepare import END_OF_TEXT, _Report, load_tokenizer, prepare, tokenizer_hash, train_tokenizer
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

TEXT = "def area(width, height):\n    return width * height  # the area\n" * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(TEXT)
    train_tokenizer(str(folder / "a.txt"), "text", 280, folder / "bpe")
    return folder / "bpe"


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return load_tokenizer(tokenizer)


@pytest.fixture
def corpus(tmp_path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}\n" + TEXT[: i * 7]}) + "\n" for i in range(40)))
    return str(path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_tokenizer_gives_back_every_text(loaded, text):
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == text
    assert all(id < 280 for id in ids)


def test_the_tokenizer_is_deterministic_and_made_once(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    lines: list[str] = []
    train_tokenizer([str(tmp_path / "a.txt")], "text", 280, tmp_path / "again", progress=lines.append)
    assert lines == [f"training a tokenizer of 280 entries on {tmp_path / 'a.txt'}"]
    assert content(tmp_path / "again") == content(tokenizer)
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(tokenizer)
    train_tokenizer("nowhere.txt", "text", 999, tmp_path / "again")
    assert content(tmp_path / "again") == content(tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "again"]


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match=r"a\.txt gives a tokenizer of 259 entries, but data\.train_tokenizer\.vocab_size is 1000"):
        train_tokenizer(str(tmp_path / "a.txt"), "text", 1000, tmp_path / "bpe")
    assert not (tmp_path / "bpe").exists()


def test_tokenizers_that_cannot_be_used_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere holds no tokenizer"):
        tokenizer_hash(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(tokenizer, broken)
    (broken / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match="broken cannot be loaded"):
        load_tokenizer(broken)
    endless = tmp_path / "endless"
    shutil.copytree(tokenizer, endless)
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="set `eos_token`"):
        load_tokenizer(endless)


def test_documents_become_tokens_with_an_end(corpus, tokenizer, loaded, tmp_path):
    folder = prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    index = json.loads((folder / "index.json").read_text())
    shards = [Shard(folder / entry["file"]) for entry in index["shards"]]
    texts = [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()]
    documents = []
    for shard in shards:
        shard.verify()
        documents += np.split(shard.read(0, shard.num_tokens), shard.document_ends)[:-1]
    assert len(shards) > 2
    assert [loaded.decode(ids) for ids in documents] == [text + END_OF_TEXT for text in texts]
    assert index["num_documents"] == len(texts)
    assert index["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert index["num_tokens"] == sum(len(ids) for ids in documents) == sum(entry["num_tokens"] for entry in index["shards"])
    assert index["vocab_size"] == 280
    assert all(entry["checksum"] == shard.checksum for entry, shard in zip(index["shards"], shards, strict=True))


def test_a_long_text_ends_once_over_several_shards(tokenizer, loaded, tmp_path):
    text = "".join(f"{i}: é\n" for i in range(250_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    folder = prepare(str(tmp_path / "a.txt"), "validation", tokenizer, tmp_path, tokens_per_shard=2**19)
    shards = [Shard(path) for path in sorted(folder.glob("*.bin"))]
    assert len(shards) == 3
    assert [shard.document_ends.tolist() for shard in shards] == [[], [], [shards[-1].num_tokens]]
    assert loaded.decode(np.concatenate([shard.read(0, shard.num_tokens) for shard in shards])) == text + END_OF_TEXT


def test_several_sources_follow_one_another(tokenizer, loaded, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    folder = prepare([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")], "train", tokenizer, tmp_path)
    shard = Shard(folder / "shard-00000.bin")
    assert loaded.decode(shard.read(0, shard.num_tokens)) == f"text b{END_OF_TEXT}text a{END_OF_TEXT}"


@pytest.mark.parametrize("lost", [[], [-1], [1], [0], [-1, -2]])
def test_a_killed_prepare_goes_on_and_ends_the_same(corpus, tokenizer, tmp_path, lost):
    folder = prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    whole = content(folder)
    shards = sorted(folder.glob("*.bin"))
    kept_times = {path: path.stat().st_mtime_ns for path in shards[: min((n % len(shards) for n in lost), default=len(shards))]}
    for number in lost:
        shards[number].unlink()
    (folder / "index.json").unlink()
    assert prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500) == folder
    assert content(folder) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept_times.items())


def test_a_shard_that_went_missing_is_made_again(corpus, tokenizer, tmp_path):
    folder = prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    whole = content(folder)
    (folder / "shard-00001.bin").unlink()
    prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    assert content(folder) == whole


def test_what_is_there_is_returned_and_what_changed_is_not(corpus, tokenizer, tmp_path):
    folder = prepare(corpus, "train", tokenizer, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare([corpus], "train", tokenizer, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert prepare(corpus, "test", tokenizer, tmp_path) != folder
    assert prepare(corpus, "train", tokenizer, tmp_path, tokens_per_shard=99) != folder
    os.utime(corpus, ns=(0, 0))
    assert prepare(corpus, "train", tokenizer, tmp_path) != folder


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_an_empty_corpus_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl has no text for the split test"):
        prepare(str(path), "test", tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_corpus_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt is not a file"):
        prepare(str(tmp_path / "nowhere.txt"), "train", tokenizer, tmp_path)


def test_progress_is_told_once_a_second():
    lines: list[str] = []
    report = _Report("train", lines.append)
    report.count(1000, False)
    assert lines == []
    report.started = report.told = report.told - 2  # as if two seconds had gone by
    report.count(1000, True)
    report.count(1000, True)
    assert len(lines) == 1
    assert re.fullmatch(r"tokenising train: 1 documents, 2,000 tokens, (1,000|9\d\d) tokens/s", lines[0])


def test_the_stdlib_is_a_corpus(tokenizer, tmp_path):
    folder = prepare("builtin:python-stdlib", "validation", tokenizer, tmp_path)
    index = json.loads((folder / "index.json").read_text())
    assert index["num_documents"] > 5
    assert index["num_tokens"] > 100_000
