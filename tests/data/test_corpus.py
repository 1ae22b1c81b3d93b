import json
import sysconfig
from pathlib import Path

import pytest
import xxhash

from dqtrain.data import corpus
from dqtrain.data.corpus import LEAK_BYTES, SPLITS, STDLIB, documents, stdlib_summary
from dqtrain.errors import DataError


def read(path: Path, text_field: str = "text") -> list[tuple[str, bool]]:
    return list(documents(str(path), "train", text_field))


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "één\\n"}\n\n{"question": ""}\n{"question": "two", "answer": 2}', encoding="utf-8")
    assert read(path, "question") == [("één\n", True), ("two", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON in UTF-8"),
        (b'{"title": "a"}', "has the fields title, but must have the text in `text`"),
        (b'{"text": 3}', "has text = 3, but must have the text"),
        (b'["a"]', "has list, but must have the text"),
        (b'{"text": "\\ud800"}', "is not Unicode text"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}:2: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "short", "line\r\n\n" * 300_000, "é" * 2_500_000, "x" * 2**20])
def test_plain_text_is_one_document_in_bounded_pieces(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = read(path)
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == ([False] * len(pieces) + [True])[-len(pieces) :] if pieces else not text
    assert all(0 < len(piece) <= 2 * corpus.PIECE_CHARS for piece, _ in pieces)
    if "\n" in text:
        assert all(piece.endswith("\n") for piece, _ in pieces)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["nowhere.txt", "builtin:c-stdlib"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(DataError, match=source):
        documents(source, "train", "text")


def test_stdlib_splits_are_whole_modules_of_real_files():
    assert {split: len(list(documents(STDLIB, split, "text"))) for split in SPLITS} == {split: stdlib_summary()[split]["files"] for split in SPLITS}
    modules = [{name.split("/")[0].removesuffix(".py") for name, _ in corpus._stdlib()[split]} for split in SPLITS]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    test = corpus._stdlib()["test"]
    assert all((Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8") == text for name, text in test)
    total = sum(int(summary["bytes"]) for summary in stdlib_summary().values())
    assert 5e6 < total < 20e6
    assert all(0.02 < int(stdlib_summary()[split]["bytes"]) / total < 0.1 for split in ("validation", "test"))


def windows(text: str, stride: int) -> set[int]:
    """Hashes of windows of a size that any text of LEAK_BYTES characters holds one of, at a stride."""
    size = LEAK_BYTES // 2
    return {xxhash.xxh3_64_intdigest(text[start : start + size].encode()) for start in range(0, len(text) - size + 1, stride)}


@pytest.mark.parametrize(("split", "held_out"), [("validation", ["test"]), ("train", ["validation", "test"])])
def test_no_long_text_is_in_two_splits_of_the_stdlib(split, held_out):
    # Half-size windows find the candidates; each is then looked for as a whole, with str.find: nothing here shares code with the corpus.
    seen = set().union(*(windows(text, LEAK_BYTES // 2 - 1) for other in held_out for text, _ in documents(STDLIB, other, "text")))
    others = "\0".join(text for other in held_out for text, _ in documents(STDLIB, other, "text"))
    num_candidates = 0
    for text, _ in documents(STDLIB, split, "text"):
        size = LEAK_BYTES // 2
        for start in range(len(text) - size + 1):
            if xxhash.xxh3_64_intdigest(text[start : start + size].encode()) in seen:
                num_candidates += 1
                assert all(text[a : a + LEAK_BYTES] not in others for a in range(max(0, start - size), min(start, len(text) - LEAK_BYTES) + 1))
    assert num_candidates > 0 or split == "validation"  # shared texts below the limit stay, so the search does find things


def test_leaks_go_by_lines_until_none_is_left():
    shared = "".join(f"shared line {i}, which is copied\n" for i in range(12))
    halves = "".join(f"left {i}\n" for i in range(15)), "".join(f"right {i}\n" for i in range(15))
    assert len(halves[0]) < LEAK_BYTES < len(halves[0] + halves[1])
    held_out = [("held_out", f"a = 1; {shared}b = 2\n"), ("seam", halves[0] + halves[1])]
    leaky = f"before = 'é'\n{shared}after = 'é'\n"
    seam = f"top\n{halves[0]}{shared}{halves[1]}bottom\n"
    kept = corpus._without_leaks([("a", leaky), ("b", shared), ("c", "own\n" * 100), ("d", seam)], held_out)
    assert kept == [("a", "before = 'é'\nafter = 'é'\n"), ("c", "own\n" * 100), ("d", "top\nbottom\n")]


def test_stdlib_summary_is_json():
    assert json.loads(json.dumps(stdlib_summary())) == stdlib_summary()
