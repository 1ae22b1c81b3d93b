import csv
import io
import json
import sysconfig
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dqtrain.config import SPLITS, Pairs, Source
from dqtrain.data import sources, stdlib
from dqtrain.data.corpus import documents, find_corpus, pairs, references
from dqtrain.data.docstrings import DOCSTRINGS, docstring_pairs
from dqtrain.data.sources import LeftOut
from dqtrain.data.stdlib import LEAK_BYTES, STDLIB, stdlib_summary, stdlib_texts
from dqtrain.errors import DataError

PAIRS = Pairs(source="mr", target="ref", template="say: {source}", source_tokens=8, target_tokens=8)


def read(path: Path | str, split: str = "train", left_out: LeftOut | None = None, **how) -> list[tuple[str, bool]]:
    """All pieces of a source, unit by unit."""
    corpus = find_corpus(Source(path=str(path), **how), split)
    return [piece for unit in corpus.units for piece in documents(corpus, unit, left_out or LeftOut(0))]


def read_as_pairs(path: Path | str, split: str = "train") -> list[tuple[str, str]]:
    corpus = find_corpus(Source(path=str(path)), split, PAIRS)
    return [pair for unit in corpus.units for pair in pairs(corpus, unit, LeftOut(0))]


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "één\\n"}\n\n{"question": ""}\n{"question": "two", "answer": 2}', encoding="utf-8")
    assert read(path, text="{question}") == [("één\n", True), ("two", True)]


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
    assert all(0 < len(piece) <= 2 * sources.PIECE_BYTES for piece, _ in pieces)
    if "\n" in text:
        assert all(piece.endswith("\n") for piece, _ in pieces)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["nowhere.txt", "builtin:c-stdlib"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(DataError, match=source):
        find_corpus(Source(path=source), "train")


def test_stdlib_splits_are_whole_modules_of_real_files():
    assert {split: len(read(STDLIB, split)) for split in SPLITS} == {split: stdlib_summary()[split]["files"] for split in SPLITS}
    modules = [{name.split("/")[0].removesuffix(".py") for name, _ in stdlib_texts()[split]} for split in SPLITS]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    test = stdlib_texts()["test"]
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
    seen = set().union(*(windows(text, LEAK_BYTES // 2 - 1) for other in held_out for text, _ in read(STDLIB, other)))
    others = "\0".join(text for other in held_out for text, _ in read(STDLIB, other))
    num_candidates = 0
    for text, _ in read(STDLIB, split):
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
    kept = stdlib._without_leaks([("a", leaky), ("b", shared), ("c", "own\n" * 100), ("d", seam)], held_out)
    assert kept == [("a", "before = 'é'\nafter = 'é'\n"), ("c", "own\n" * 100), ("d", "top\nbottom\n")]


def test_stdlib_summary_is_json():
    assert json.loads(json.dumps(stdlib_summary())) == stdlib_summary()


def read_pairs(path: Path, content: str | bytes) -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_as_pairs(path)


def test_json_lines_are_pairs(tmp_path):
    content = '{"mr": " één\\n", "ref": "eins", "id": 1}\n\n{"ref": "zwei", "mr": "two"}'
    assert read_pairs(tmp_path / "a.jsonl", content) == [(" één\n", "eins"), ("two", "zwei")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_rows_are_pairs(tmp_path, newline, mark):
    content = newline.join(["ref,mr,n", '"one, ""1""","a', 'b",1', "", "two,c,", ""])
    assert read_pairs(tmp_path / "a.csv", mark + content.encode()) == [(f"a{newline}b", 'one, "1"'), ("c", "two")]


texts = st.text(st.characters(codec="utf-8"), max_size=8).map(lambda text: f"{text}x")


@given(st.lists(st.tuples(texts, texts), max_size=6))
def test_csv_and_json_give_back_every_text(tmp_path_factory, expected):
    folder = tmp_path_factory.mktemp("pairs")
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("mr", "ref"), *expected])
    assert read_pairs(folder / "a.csv", buffer.getvalue()) == expected
    assert read_pairs(folder / "a.jsonl", "".join(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr, ref in expected)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"mr": "a"', "not a line of JSON"),
        (b'{"mr": "a"}', r"has the fields mr, but must have the text in `ref`. Set data\.pairs\.target, or mend the line"),
        (b'{"meaning": "a", "ref": "b"}', r"has the fields meaning, ref, but must have the text in `mr`. Set data\.pairs\.source"),
        (b'{"mr": "a", "ref": ["b"]}', r'has ref = \["b"\], but must have the text'),
        (b'{"mr": "a", "ref": " "}', "the target, `ref`, is empty, but a pair must have both. Mend or remove the line"),
        (b'{"mr": "", "ref": "b"}', "the source, `mr`, is empty"),
        (b'{"mr": "\\ud800", "ref": "b"}', "`mr` is not Unicode text"),
    ],
)
def test_a_bad_json_pair_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}"):
        read_pairs(tmp_path / "a.jsonl", b'{"mr": "a", "ref": "b"}\n\n' + line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"1: has the columns \(none\), but must have one `mr`. Set data\.pairs\.source, or mend the header"),
        (b"mr,text\na,b\n", "1: has the columns mr, text, but must have one `ref`"),
        (b"mr,mr,ref\na,b,c\n", "1: has the columns mr, mr, ref, but must have one `mr`"),
        (b'mr,ref\n"a\n1",b\nc\n', "4: the number of columns is 1, but 2 in the header. Put texts with commas"),
        (b"mr,ref\na,b\nc,d,e\n", "3: the number of columns is 3, but 2 in the header"),
        (b'mr,ref\na,b\n\n"c\n",\n', "4: the target, `ref`, is empty"),
        (b'mr,ref\n"a" b,c\n', "2: not a row of csv .*Mend or remove it, or give the corpus as .jsonl"),
        (b'mr,ref\na,b\nc,"d\ne,f\n', "3: not a row of csv"),
        (b"mr,ref\na,b\nc,\xe9\n", "3: not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"a\.csv:{message}"):
        read_pairs(tmp_path / "a.csv", content)


def test_sources_of_the_other_kind_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name, message in {
        str(tmp_path / "a.txt"): r"a\.txt is no file of pairs that can be read; give \.jsonl, \.csv or \.parquet files of pairs, or builtin:python-docstrings",
        str(tmp_path / "b.csv"): r"b\.csv is not a file that can be read; give a file \(\.txt, \.jsonl",
        STDLIB: f"{STDLIB} is text without targets; remove data.pairs, or name {DOCSTRINGS}",
        "builtin:c-docstrings": "`builtin:c-docstrings` is not built in",
    }.items():
        with pytest.raises(DataError, match=message):
            find_corpus(Source(path=name), "train", PAIRS)
    with pytest.raises(DataError, match=f"{DOCSTRINGS} is pairs of a source and a target; set data.pairs, or name {STDLIB}"):
        find_corpus(Source(path=DOCSTRINGS), "train")


def test_docstrings_are_pairs():
    assert all(read_as_pairs(DOCSTRINGS, split) == docstring_pairs()[split] for split in SPLITS)


def test_references_are_all_targets_of_a_source(tmp_path):
    (tmp_path / "a.csv").write_text("mr,ref\nb,1\na,2\nb,3\nb,1\n")
    (tmp_path / "b.jsonl").write_text('{"mr": "c", "ref": "4"}\n{"mr": "a", "ref": "5"}\n')
    files = [Source(path=str(tmp_path / "a.csv")), Source(path=str(tmp_path / "b.jsonl"))]
    assert references(files, "test", PAIRS) == [("b", ["1", "3", "1"]), ("a", ["2", "5"]), ("c", ["4"])]
    assert references(files[:1], "test", PAIRS) == [("b", ["1", "3", "1"]), ("a", ["2"])]
