import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_one
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import Data, Pairs, Source
from dqtrain.data.prepare import END_OF_TEXT, load_tokenizer, prepare, tokenizer_hash, train_tokenizer
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

TEXT = "def area(width, height):\n    return width * height  # the area\n" * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(TEXT)
    train_tokenizer([Source(path=str(folder / "a.txt"))], 280, folder / "bpe")
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
    train_tokenizer([Source(path=str(tmp_path / "a.txt"))], 280, tmp_path / "again", progress=lines.append)
    assert lines == [f"training a tokenizer of 280 entries on {tmp_path / 'a.txt'}"]
    assert content(tmp_path / "again") == content(tokenizer)
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(tokenizer)
    train_tokenizer([Source(path="nowhere.txt")], 999, tmp_path / "again")
    assert content(tmp_path / "again") == content(tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "again"]


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match=r"a\.txt gives a tokenizer of 259 entries, but data\.train_tokenizer\.vocab_size is 1000"):
        train_tokenizer([Source(path=str(tmp_path / "a.txt"))], 1000, tmp_path / "bpe")
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
    folder = prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
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
    folder = prepare_one(str(tmp_path / "a.txt"), "validation", tokenizer, tmp_path, tokens_per_shard=2**19)
    shards = [Shard(path) for path in sorted(folder.glob("*.bin"))]
    assert len(shards) == 3
    assert [shard.document_ends.tolist() for shard in shards] == [[], [], [shards[-1].num_tokens]]
    assert loaded.decode(np.concatenate([shard.read(0, shard.num_tokens) for shard in shards])) == text + END_OF_TEXT


def test_each_source_has_a_folder_of_its_own(tokenizer, loaded, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    data = Data(train=(str(tmp_path / "b.txt"), Source(path=str(tmp_path / "a.txt"))), tokens_per_sample=8)
    folders = prepare(data, "train", tokenizer, tmp_path)
    shards = [Shard(folder / "shard-00000-00000.bin") for folder in folders]
    assert [loaded.decode(shard.read(0, shard.num_tokens)) for shard in shards] == [f"text b{END_OF_TEXT}", f"text a{END_OF_TEXT}"]
    assert prepare(data.model_copy(update={"train": str(tmp_path / "a.txt")}), "train", tokenizer, tmp_path) == folders[1:]


@pytest.mark.parametrize("lost", [[], [-1], [1], [0], [-1, -2]])
def test_a_killed_prepare_goes_on_and_ends_the_same(corpus, tokenizer, tmp_path, lost):
    folder = prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    whole = content(folder)
    shards = sorted(folder.glob("*.bin"))
    kept_times = {path: path.stat().st_mtime_ns for path in shards[: min((n % len(shards) for n in lost), default=len(shards))]}
    for number in lost:
        shards[number].unlink()
    (folder / "index.json").unlink()
    assert prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500) == folder
    assert content(folder) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept_times.items())


def test_a_shard_that_went_missing_is_made_again(corpus, tokenizer, tmp_path):
    folder = prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    whole = content(folder)
    (folder / "shard-00000-00001.bin").unlink()
    prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=500)
    assert content(folder) == whole


def test_what_is_there_is_returned_and_what_changed_is_not(corpus, tokenizer, tmp_path):
    folder = prepare_one(corpus, "train", tokenizer, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_one((corpus,), "train", tokenizer, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert prepare_one(corpus, "test", tokenizer, tmp_path) != folder
    assert prepare_one(corpus, "train", tokenizer, tmp_path, tokens_per_shard=99) != folder
    os.utime(corpus, ns=(0, 0))
    assert prepare_one(corpus, "train", tokenizer, tmp_path) != folder


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_an_empty_corpus_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl has no text for the split test"):
        prepare_one(str(path), "test", tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_corpus_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt is not a file"):
        prepare_one(str(tmp_path / "nowhere.txt"), "train", tokenizer, tmp_path)


def test_the_stdlib_is_a_corpus(tokenizer, tmp_path):
    folder = prepare_one("builtin:python-stdlib", "validation", tokenizer, tmp_path)
    index = json.loads((folder / "index.json").read_text())
    assert index["num_documents"] > 5
    assert index["num_tokens"] > 100_000


# --- Pairs; the ids of the tokenizers are in conftest.py ---

GPT2 = {word: number for number, word in enumerate("<eos> a b c d e f g h say :".split())}
BART = {word: number for number, word in enumerate("<s> <pad> </s> <unk> a b c d e f g h say :".split())}
T5 = {word: number for number, word in enumerate("<pad> </s> <unk> a b c d e f g h say :".split())}


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs))
    return str(path)


def tokens_of(folder: Path) -> list[list[list[int]]]:
    """Shard -> its documents."""
    shards = [Shard(path) for path in sorted(folder.glob("*.bin"))]
    return [[ids.tolist() for ids in np.split(shard.read(0, shard.num_tokens), shard.document_ends)[:-1]] for shard in shards]


@pytest.mark.parametrize(
    ("family", "encoder_decoder", "words", "expected"),
    [
        ("bart", True, BART, ["<s> say : a b </s>", "<s> c </s>", "<s> say : a b </s>", "<s> d e </s>"]),
        ("t5", True, T5, ["say : a b </s>", "c </s>", "say : a b c </s>", "d e f </s>"]),
        ("gpt2", True, GPT2, ["say : a b <eos>", "c <eos>", "say : a b c <eos>", "d e f <eos>"]),
        ("gpt2", False, GPT2, ["say : a b", "c <eos>", "b c d e f g", "d e f <eos>"]),
        ("bart", False, BART, ["say : a b", "c </s>", "b c d e f g", "d e f </s>"]),
    ],
)
def test_pairs_become_sources_and_targets_with_their_special_tokens(tokenizers, tmp_path, family, encoder_decoder, words, expected):
    corpus = write_pairs(tmp_path / "a.jsonl", [("a b", "c"), ("a b c d e f g", "d e f g")])
    settings = Pairs(template="say : {source}", source_tokens=6, target_tokens=4)
    folder = prepare_one(corpus, "train", tokenizers[family], tmp_path, pairs=settings, encoder_decoder=encoder_decoder)
    assert tokens_of(folder) == [[[words[word] for word in text.split()] for text in expected]]
    index = json.loads((folder / "index.json").read_text())
    assert index["pairs"] == settings.model_dump() and index["encoder_decoder"] == encoder_decoder
    assert index["num_documents"] == 4
    assert index["num_bytes"] == len("say : a b" + "c" + "say : a b c d e f g" + "d e f g")
    assert index["num_tokens"] == sum(len(text.split()) for text in expected)


lengths = st.integers(1, 12)


@settings(max_examples=25)
@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=30), st.integers(1, 40), st.booleans(), st.data())
def test_a_pair_is_in_one_shard_whatever_was_killed(tokenizers, tmp_path_factory, lengths, tokens_per_shard, encoder_decoder, data):
    root = tmp_path_factory.mktemp("pairs")
    pairs = [(" ".join("abcdefgh"[i % 8] for i in range(n)), " ".join("hgfedcba"[i % 8] for i in range(m))) for n, m in lengths]
    corpus = write_pairs(root / "a.jsonl", pairs)

    def make() -> Path:
        return prepare_one(
            corpus,
            "train",
            tokenizers["gpt2"],
            root,
            tokens_per_shard=tokens_per_shard,
            pairs=Pairs(source_tokens=20, target_tokens=20),
            encoder_decoder=encoder_decoder,
        )

    folder = make()
    end = [GPT2["<eos>"]]
    expected = []
    for source, target in pairs:
        expected += [[GPT2[word] for word in source.split()] + end * encoder_decoder, [GPT2[word] for word in target.split()] + end]
    shards = tokens_of(folder)
    assert all(len(documents) % 2 == 0 for documents in shards)
    assert sum(shards, []) == expected
    for documents in shards[:-1]:  # full with the last pair, and not before
        assert sum(map(len, documents)) >= tokens_per_shard > sum(map(len, documents[:-2]))
    whole = content(folder)
    (folder / "index.json").unlink()
    (folder / f"shard-00000-{data.draw(st.integers(0, len(shards) - 1)):05d}.bin").unlink()
    assert make() == folder
    assert content(folder) == whole


def test_settings_of_pairs_decide_the_folder(tokenizers, tmp_path):
    corpus = write_pairs(tmp_path / "a.jsonl", [("a", "b")])
    settings = Pairs(source_tokens=8, target_tokens=8)
    changes = [{}, {"source_tokens": 9}, {"target_tokens": 9}, {"template": "say {source}"}, {"source": "target", "target": "source"}]
    folders = {prepare_one(corpus, "train", tokenizers["t5"], tmp_path, pairs=settings.model_copy(update=change)) for change in changes}
    folders.add(prepare_one(corpus, "train", tokenizers["t5"], tmp_path, pairs=settings, encoder_decoder=True))
    folders.add(prepare_one(Source(path=corpus, text="{source}"), "train", tokenizers["t5"], tmp_path))
    folders.add(prepare_one(Source(path=corpus, text="{target}"), "train", tokenizers["t5"], tmp_path))
    assert len(folders) == len(changes) + 3
    assert prepare_one(corpus, "train", tokenizers["t5"], tmp_path, pairs=settings) in folders


@pytest.mark.parametrize(
    ("family", "encoder_decoder", "lengths", "message"),
    [
        ("bart", True, (2, 8), r"data\.pairs\.source_tokens is 2, but 2 of a source are special tokens; set it to 3 or more"),
        ("t5", True, (8, 1), r"data\.pairs\.target_tokens is 1, but 1 of a target are special tokens; set it to 2 or more"),
        ("gpt2", True, (1, 8), r"data\.pairs\.source_tokens is 1, but 1 of a source"),
        ("gpt2", False, (1, 1), r"data\.pairs\.target_tokens is 1, but 1 of a target"),
    ],
)
def test_a_cut_that_leaves_no_text_is_refused(tokenizers, tmp_path, family, encoder_decoder, lengths, message):
    corpus = write_pairs(tmp_path / "a.jsonl", [("a", "b")])
    with pytest.raises(DataError, match=message):
        prepare_one(
            corpus,
            "train",
            tokenizers[family],
            tmp_path,
            pairs=Pairs(source_tokens=lengths[0], target_tokens=lengths[1]),
            encoder_decoder=encoder_decoder,
        )


def test_pairs_that_cannot_be_used_are_named(tokenizers, tokenizer, tmp_path):
    settings = Pairs(source_tokens=8, target_tokens=8)
    with pytest.raises(DataError, match=r"empty\.csv has no pairs for the split test"):
        (tmp_path / "empty.csv").write_text("source,target\n")
        prepare_one(str(tmp_path / "empty.csv"), "test", tokenizers["t5"], tmp_path, pairs=settings)
    with pytest.raises(DataError, match=r"a\.txt is no file of pairs"):
        (tmp_path / "a.txt").write_text("text")
        prepare_one(str(tmp_path / "a.txt"), "test", tokenizers["t5"], tmp_path, pairs=settings)
    nothing = tmp_path / "nothing"
    shutil.copytree(tokenizer, nothing)
    description = json.loads((nothing / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (nothing / "tokenizer.json").write_text(json.dumps(description))
    corpus = write_pairs(tmp_path / "a.jsonl", [("a", "b"), ("~~", "b")])
    with pytest.raises(DataError, match="the tokenizer makes no token of the source `~~`, but a target must follow one; mend or remove the pair"):
        prepare_one(corpus, "test", nothing, tmp_path, pairs=settings)


def test_a_tokenizer_learns_from_both_sides_of_pairs(tmp_path):
    corpus = write_pairs(tmp_path / "a.jsonl", [("area area", "width width")] * 9)
    settings = Pairs(template="explain: {source}", source_tokens=8, target_tokens=8)
    train_tokenizer([Source(path=corpus)], 270, tmp_path / "bpe", pairs=settings)
    assert all(len(load_tokenizer(tmp_path / "bpe")(word)["input_ids"]) < len(word) for word in (" area", " width", "explain"))
    with pytest.raises(DataError, match="must have the text in `text`"):
        train_tokenizer([Source(path=corpus)], 270, tmp_path / "other")


def test_docstrings_are_a_corpus(tokenizer, tmp_path):
    folder = prepare_one("builtin:python-docstrings", "validation", tokenizer, tmp_path, pairs=Pairs(source_tokens=256, target_tokens=64))
    documents = tokens_of(folder)[0]
    assert len(documents) > 1500
    assert max(map(len, documents[::2])) == 256
    assert max(map(len, documents[1::2])) <= 64 and all(ids[-1] == 0 for ids in documents[1::2])
