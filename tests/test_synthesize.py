"""The texts of a teacher equal those of a plain loop written here, one document at a time without a cache; and nothing but its number decides a text."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import xxhash
from conftest import flip
from families import FAMILIES, LLAMA
from transformers import AutoModelForCausalLM

from dqtrain.artifact.description import LIST, write_list
from dqtrain.config import Source
from dqtrain.data.corpus import texts_of
from dqtrain.data.prepare import END_OF_TEXT, load_tokenizer, train_tokenizer
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.synthesize import synthesize

VOCAB, END = 280, 0
TEXT = "def area(width, height):\n    return width * height  # the area\n" * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(TEXT)
    train_tokenizer([Source(path=str(folder / "a.txt"))], VOCAB, folder / "bpe")
    return load_tokenizer(folder / "bpe")


@pytest.fixture(scope="module")
def teachers(tokenizer, tmp_path_factory):
    """Directories of small models that write varied texts which end by themselves; their embeddings have 8 rows more than the tokenizer entries."""
    root = tmp_path_factory.mktemp("teachers")
    for family in ("gpt2", "llama", "opt", "bart"):
        model = FAMILIES[family](vocab_size=VOCAB + 8, tie_word_embeddings=False)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            if family != "bart":
                model.get_output_embeddings().weight[VOCAB:] *= 100  # would often be drawn
                model.get_output_embeddings().weight[END] *= 5
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


def lines(path):
    return [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]


@torch.no_grad()
def plain(model, tokenizer, number, tokens, seed):
    """Document `number`, from the description alone."""
    alone = [i for i in range(VOCAB) if i != END and "\ufffd" not in tokenizer.decode([i])]
    start = np.random.default_rng(seed).permutation(alone)[number % len(alone)]
    draw = np.random.default_rng(xxhash.xxh64_intdigest(f"{seed}/{number}".encode()))
    num_greedy, uniform = draw.integers(3, 6), draw.random(tokens)
    written = [int(start)]
    while len(written) < tokens:
        probabilities = model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1, :VOCAB].double().softmax(-1).numpy()
        position = len(written)
        word = int(probabilities.argmax()) if position <= num_greedy else int((probabilities.cumsum() <= uniform[position] * probabilities.sum()).sum())
        if word == END:
            break
        written.append(word)
    return written


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_texts_are_those_of_a_plain_loop(teachers, tokenizer, family, tmp_path, capfd):
    out = tmp_path / "new" / "corpus.jsonl"
    done = []
    synthesize(teachers / family, out, 11, 20, seed=3, batch=4, progress=lambda *numbers: done.append(numbers))
    assert done == [(4, 11), (8, 11), (11, 11)]
    model = AutoModelForCausalLM.from_pretrained(teachers / family)
    expected = [plain(model, tokenizer, i, 20, 3) for i in range(11)]
    assert lines(out) == [tokenizer.decode(ids).rstrip("\ufffd") for ids in expected]
    assert len({len(ids) for ids in expected}) > 2  # they end by themselves
    assert list(texts_of([Source(path=str(out))], "train")) == lines(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["corpus.jsonl", "corpus.jsonl.json"]
    assert capfd.readouterr() == ("", "")


def test_every_word_that_is_text_starts_a_document_in_turn(teachers, tokenizer, tmp_path):
    words = [word for i in range(VOCAB) if i != END and "\ufffd" not in (word := tokenizer.decode([i]))]
    out = tmp_path / "a.jsonl"
    synthesize(teachers / "gpt2", out, len(words), 2, seed=0, batch=64)
    texts = lines(out)
    # A document of 2 tokens: its start, then the likeliest word or nothing.
    left = sorted(words, key=len, reverse=True)
    assert len(texts) == len(words) > 100
    starts = [next(word for word in left if text.startswith(word)) for text in texts]
    assert starts != sorted(starts, key=words.index) and len(set(starts)) > 0.8 * len(words)
    assert not any(END_OF_TEXT in text or text.endswith("\ufffd") for text in texts)


def test_the_seed_and_the_number_decide_a_text_alone(teachers, tmp_path):
    def texts(name, num_documents, tokens, **how):
        synthesize(teachers / "llama", tmp_path / f"{name}.jsonl", num_documents, tokens, **how)
        return lines(tmp_path / f"{name}.jsonl")

    whole = texts("a", 20, 16, seed=1)
    assert texts("b", 20, 16, seed=1, batch=7) == texts("c", 20, 16, seed=1, batch=1) == whole
    assert texts("d", 9, 16, seed=1, batch=5) == whole[:9]
    assert all(long.startswith(short.rstrip("\ufffd")) for long, short in zip(whole, texts("e", 20, 5, seed=1), strict=True))
    other = texts("f", 20, 16, seed=2)
    assert sum(a == b for a, b in zip(whole, other, strict=True)) < 3


class Killed(BaseException):
    pass


def test_killed_anywhere_it_goes_on_and_ends_the_same(teachers, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    synthesize(teachers / "gpt2", whole, 14, 10, seed=5, batch=4)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]

    def kill(done, of):
        if done >= 8:
            raise Killed

    with pytest.raises(Killed):
        synthesize(teachers / "gpt2", out, 14, 10, seed=5, batch=4, progress=kill)
    assert part.read_bytes() == content[: ends[7]] and not out.exists()
    draw = random.Random(0)
    for size in [0, 1, ends[3], ends[3] - 1, ends[8] + 1, len(content), *(draw.randrange(len(content)) for _ in range(6))]:
        for torn in (b"", b"\0" * 100, b'{"text": 3', b"[]\n"):  # what a disk may leave behind the part that was synced
            part.write_bytes(content[:size] + torn)
            out.unlink(missing_ok=True)
            done = []
            synthesize(teachers / "gpt2", out, 14, 10, seed=5, batch=4, progress=lambda now, of, done=done: done.append(now))
            assert out.read_bytes() == content and not part.exists()
            kept = sum(end <= size for end in ends) // 4 * 4
            assert done == [n for n in (4, 8, 12, 14) if n > kept]


def test_a_finished_file_is_left_alone_and_another_ones_settings_refused(teachers, tmp_path):
    out = tmp_path / "out.jsonl"
    synthesize(teachers / "gpt2", out, 3, 6, seed=5)
    before = out.read_bytes(), out.stat().st_mtime_ns
    synthesize(teachers / "gpt2", out, 3, 6, seed=5, batch=2, progress=lambda *_: pytest.fail("nothing is to be done"))
    for changed, key in [((4, 6, 5), "num_documents 3, but this is 4"), ((3, 7, 5), "tokens 6, but this is 7"), ((3, 6, 4), "seed 5, but this is 4")]:
        with pytest.raises(ConfigError, match=rf"out\.jsonl was begun with {key}; remove it with .*out\.jsonl\.json, or give another name"):
            synthesize(teachers / "gpt2", out, changed[0], changed[1], seed=changed[2])
    with pytest.raises(ConfigError, match="was begun with teacher "):
        synthesize(teachers / "llama", out, 3, 6, seed=5)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before

    settings = tmp_path / "out.jsonl.json"
    kept = settings.read_text()
    settings.write_text("{")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.json does not say what .*out\.jsonl was made with"):
        synthesize(teachers / "gpt2", out, 3, 6, seed=5)
    settings.unlink()
    with pytest.raises(ConfigError, match=r"out\.jsonl is there, but .*out\.jsonl\.json, which says what it was made with, is not"):
        synthesize(teachers / "gpt2", out, 3, 6, seed=5)
    out.rename(tmp_path / "out.jsonl.part")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.part is there"):
        synthesize(teachers / "gpt2", out, 3, 6, seed=5)
    settings.write_text(kept)
    synthesize(teachers / "gpt2", out, 3, 6, seed=5)
    assert out.read_bytes() == before[0]


def test_a_teacher_that_is_a_damaged_artifact_is_refused(teachers, tmp_path):
    folder = shutil.copytree(teachers / "gpt2", tmp_path / "teacher")
    write_list(folder / LIST)
    flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not have the hash in files\.json"):
        synthesize(folder, tmp_path / "out.jsonl", 3, 6, seed=5)


def test_what_cannot_be_is_refused_before_anything_is_written(teachers, tmp_path):
    assert LLAMA["max_position_embeddings"] == 64
    for arguments, message in [
        (("bart", "a.jsonl", 3, 6), "bart writes from a source alone, but a causal language model is needed"),
        (("llama", "a.jsonl", 3, 65), "tokens is 65, but .*llama has 64 positions; set it to 64 or less"),
        (("llama", "a.txt", 3, 6), r"a\.txt: a corpus of documents is a \.jsonl file"),
        (("llama", "a.jsonl", 0, 6), "num_documents is 0, but must be 1 or more"),
        (("llama", "a.jsonl", 1, 1), "tokens is 1, but must be 2 or more"),
        (("nothing", "a.jsonl", 3, 6), "nothing: no config.json there"),
    ]:
        teacher, out, *counts = arguments
        with pytest.raises(ConfigError, match=message):
            synthesize(teachers / teacher, tmp_path / out, *counts, seed=0)
    with pytest.raises(ConfigError, match="seed is -1, but must be 0 or more"):
        synthesize(teachers / "llama", tmp_path / "a.jsonl", 3, 6, seed=-1)
    assert not list(tmp_path.iterdir())
    synthesize(teachers / "llama", tmp_path / "a.jsonl", 2, 64, seed=0)
