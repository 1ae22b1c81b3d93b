"""What is read of a source is the same however it is cut, stored or addressed; what is damaged is named."""

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqtrain.config import Pairs, Source
from dqtrain.data import sources
from dqtrain.data.corpus import chats, documents, find_corpus, pairs, texts_of
from dqtrain.data.sources import LeftOut
from dqtrain.errors import DataError

RECORDS = [{"title": f"title {i}", "body": f"body {i}\nof é {'x' * (i % 7)}"} for i in range(200)]
TEXTS = [f"{record['title']}: {record['body']}" for record in RECORDS]
TEMPLATE = "{title}: {body}"
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path, read_for="train", left_out=None, **how) -> list[str]:
    corpus = find_corpus(Source(path=str(path), **how), read_for)
    pieces = [piece for unit in corpus.units for piece in documents(corpus, unit, left_out or LeftOut(0))]
    assert all(ends for _, ends in pieces)
    return [text for text, _ in pieces]


def write(folder: Path, kind: str) -> str:
    """RECORDS in a format; what names them."""
    if kind in ("jsonl", "jsonl.gz", "jsonl.zst"):
        path = folder / f"a.{kind}"
        if kind.endswith("zst"):
            with pyarrow.CompressedOutputStream(str(path), "zstd") as first:
                first.write(LINES[:1000])
            with path.open("ab") as file:  # several frames in one file, as pzstd makes
                file.write(pyarrow.compress(LINES[1000:], "zstd", asbytes=True))
        else:
            path.write_bytes(gzip.compress(LINES) if kind.endswith("gz") else LINES)
        return str(path)
    table = pyarrow.Table.from_pylist(RECORDS)
    if kind == "csv":
        datasets.Dataset(table).to_csv(folder / "a.csv", index=False)
        return str(folder / "a.csv")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)
        return str(folder / "a.parquet")
    if kind == "arrow file":
        with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as file:
            file.write_table(table, 70)
        return str(folder / "a.arrow")
    data = datasets.Dataset.from_list(RECORDS)
    if kind == "saved":
        data.save_to_disk(str(folder / "saved"), num_shards=3)
        return str(folder / "saved")
    if kind == "saved splits":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    assert kind == "hub"
    (folder / "hub").mkdir()
    for number in range(2):
        data.shard(2, number, contiguous=True).to_parquet(str(folder / f"hub/train-{number:05d}-of-00002.parquet"))
    return f"hf:{folder}/hub"


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow file", "saved", "saved splits", "hub"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_texts(tmp_path, kind):
    assert read(write(tmp_path, kind), text=TEMPLATE) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow file"])
def test_an_address_gives_what_a_path_does(tmp_path, kind):
    path = write(tmp_path, kind)
    assert read(f"file://{path}", text=TEMPLATE) == TEXTS
    assert find_corpus(Source(path=f"file://{path}", text=TEMPLATE), "train").about == find_corpus(Source(path=path, text=TEMPLATE), "train").about
    memory = fsspec.filesystem("memory")
    name = path.rpartition("/")[2]
    memory.pipe(f"/somewhere/{name}", Path(path).read_bytes())
    assert read(f"memory://somewhere/{name}", text=TEMPLATE) == TEXTS
    assert read("memory://somewhere/*", text=TEMPLATE) == TEXTS
    before = find_corpus(Source(path=f"memory://somewhere/{name}", text=TEMPLATE), "train").about
    memory.pipe(f"/somewhere/{name}", Path(path).read_bytes())
    assert find_corpus(Source(path=f"memory://somewhere/{name}", text=TEMPLATE), "train").about != before  # it was written anew
    memory.rm("/somewhere", recursive=True)
    with pytest.raises(DataError, match="memory://somewhere/"):
        read(f"memory://somewhere/{name}")


def test_plain_text_at_an_address(tmp_path):
    text = "line é\n" * 500_000
    fsspec.filesystem("memory").pipe("/a.txt", text.encode())
    corpus = find_corpus(Source(path="memory://a.txt"), "train")
    pieces = [piece for unit in corpus.units for piece in documents(corpus, unit, LeftOut(0))]
    assert "".join(piece for piece, _ in pieces) == text and [ends for _, ends in pieces].index(True) == len(pieces) - 1


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_protocol_that_needs_another_package_says_so(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(DataError, match=rf"{protocol}://bucket/a\.jsonl cannot be read: .*{package}"):
        read(f"{protocol}://bucket/a.jsonl")


def test_a_web_server_is_an_address_whose_files_may_change(tmp_path, web):
    path = Path(write(tmp_path, "jsonl.gz"))
    address = f"{web(tmp_path)}/{path.name}"
    assert read(address, text=TEMPLATE) == read(address.replace("a.", "*."), text=TEMPLATE) == TEXTS
    before = find_corpus(Source(path=address), "train").about
    assert find_corpus(Source(path=address), "train").about == before
    os.utime(path, (1, 1))  # as long as before, and other
    assert find_corpus(Source(path=address), "train").about != before
    with pytest.raises(DataError, match=r"corpus http://.*/b\.jsonl is no file; check the address"):
        read(address.replace("a.jsonl.gz", "b.jsonl"))


def test_globs_are_sorted_and_have_one_format(tmp_path):
    for number in (2, 10, 1):
        (tmp_path / f"{number:02d}.jsonl").write_text(json.dumps({"text": str(number)}))
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/a.jsonl").write_text('{"text": "deep"}')
    assert read(tmp_path / "*.jsonl") == ["1", "2", "10"]
    assert read(tmp_path / "**/*.jsonl") == ["1", "2", "10", "deep"]
    assert read(f"file://{tmp_path}/0?.jsonl") == ["1", "2"]
    (tmp_path / "03.csv").write_text("text\nc\n")
    with pytest.raises(DataError, match=r"names files of the formats csv, jsonl; set `format`"):
        read(tmp_path / "0*")
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.parquet")
    with pytest.raises(DataError, match=r"is a folder, and none of datasets\.save_to_disk; name its files, such as .*/\*\.jsonl"):
        read(tmp_path)
    (tmp_path / "what[1].dat").write_text('{"text": "it is what it is"}')
    assert read(tmp_path / "what[1].dat", format="jsonl") == ["it is what it is"]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"\.json may be one value or one per line"):
        read(tmp_path / "a.json")


def test_a_folder_of_splits_gives_the_one_that_is_asked_for(tmp_path):
    path = write(tmp_path, "saved splits")
    assert read(path, "test", text=TEMPLATE) == TEXTS[:1] == read(path, "validation", text=TEMPLATE, split="test")
    with pytest.raises(DataError, match="has the splits train, test, but is read for validation; set `split`"):
        read(path, "validation", text=TEMPLATE)
    with pytest.raises(DataError, match="split nonsense cannot be opened"):
        read(write(tmp_path, "hub"), split="nonsense")


def test_a_hub_that_cannot_be_asked_is_named(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:some/data@main: the Hugging Face hub does not say which commit that is \(OfflineMode.*give a folder, or the 40"):
        read("hf:some/data@main")


# --- Units ---

lines = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=40)


@given(lines, st.integers(1, 400))
def test_lines_are_read_once_however_the_file_is_cut(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" * (1 + len(text) % 2) for text in texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", size)
        left_out = LeftOut(0)
        corpus = find_corpus(Source(path=str(path)), "train")
        assert len(corpus.units) > 1 or path.stat().st_size < 1.6 * size
        assert [text for unit in corpus.units for text, _ in documents(corpus, unit, left_out)] == [text for text in texts if text]
        assert left_out.num_empty == texts.count("")
        path.write_text(path.read_text() + "{bad")
        with pytest.raises(DataError, match=rf"a\.jsonl:{path.read_text().count(chr(10)) + 1}: not a line of JSON"):
            read(path)


@given(st.text(st.sampled_from("ab\né"), max_size=300), st.integers(1, 100), st.integers(1, 40))
def test_plain_text_is_whole_however_it_is_cut(tmp_path_factory, text, size, piece):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", size)
        patch.setattr(sources, "PIECE_BYTES", piece)
        corpus = find_corpus(Source(path=str(path)), "train")
        pieces = [piece for unit in corpus.units for piece in documents(corpus, unit, LeftOut(0))]
        assert "".join(text for text, _ in pieces) == text and all(text for text, _ in pieces)
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)
        assert len(find_corpus(Source(path=str(path)), "train", whole_texts=True).units) == 1


def test_row_groups_are_cut(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    monkeypatch.setattr(sources, "UNIT_BYTES", 600)
    assert len(find_corpus(Source(path=path, text=TEMPLATE), "train").units) > 3
    assert read(path, text=TEMPLATE) == TEXTS


MEMORY = """
import re, sys
from pathlib import Path
from dqtrain.config import Source
from dqtrain.data.corpus import texts_of
list(texts_of([Source(path=sys.argv[2])], "train"))  # a small one, so that all is imported
resident = lambda name: int(re.search(rf"^{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1000
Path("/proc/self/clear_refs").write_text("5")  # the mark is what is resident now; getrusage's begins with what the parent held
before = resident("VmRSS")
count = sum(len(text) for text in texts_of([Source(path=sys.argv[1])], "train"))
print(count, resident("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["jsonl", "txt", "jsonl.zst", "parquet", pytest.param("hub", marks=pytest.mark.slow)])
def test_a_source_is_never_read_whole(tmp_path, kind):
    """200 MB of text, one row group of it in parquet; what the reader needs is a tenth of that at most, and what `datasets` does less than half."""
    words = random.Random(1).choices([f"word{i}" for i in range(5000)], k=20_000)
    lines = [json.dumps({"text": " ".join(words[i : i + 150])}) + "\n" for i in range(19_000)]
    text = "".join(lines).encode()  # about 20 MB
    for name, times in (("small", 0), ("large", 10)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "hub":
            (tmp_path / name).mkdir()
            path = tmp_path / name / "train-00000-of-00001.parquet"
        if kind in ("parquet", "hub"):
            schema = pyarrow.schema({"text": pyarrow.string()})
            rows = pyarrow.table({"text": [json.loads(line)["text"] for line in lines[: 19_000 if times else 1]]})
            with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
                writer.write_table(pyarrow.concat_tables([rows] * max(times, 1)), row_group_size=10**9 if kind == "parquet" else 5000)
        else:
            with pyarrow.CompressedOutputStream(str(path), "zstd") if kind.endswith("zst") else path.open("wb") as file:
                for _ in range(times):
                    file.write(text)
                if not times:
                    file.write(lines[0].encode())
    names = [f"hf:{tmp_path}/{name}" if kind == "hub" else str(tmp_path / f"{name}.{kind}") for name in ("large", "small")]
    command = [sys.executable, "-c", MEMORY, *names]
    pool = {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # pyarrow's own keeps some 40 MB, of a file of any size
    count, grown_mb = map(float, subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | pool).stdout.split())
    assert count > 190e6
    assert grown_mb < (100 if kind == "hub" else 20)


# --- What is damaged ---


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jsonl.gz", "cannot be read .*damaged"),
        ("jsonl.zst", "cannot be read .*Truncated compressed stream.*damaged"),
        ("parquet", "cannot be read .*damaged"),
        ("arrow file", "cannot be read .*damaged"),
    ],
)
def test_a_file_that_is_cut_short_is_named(tmp_path, kind, message):
    path = Path(write(tmp_path, kind))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{path.name} {message}"):
        read(path, text=TEMPLATE)


def test_a_gz_with_damaged_content_is_named(tmp_path):
    path = Path(write(tmp_path, "jsonl.gz"))
    content = bytearray(path.read_bytes())
    content[10] |= 6  # a kind of block that there is not, which zlib says in its own way
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read .*invalid block type.*damaged"):
        read(path, text=TEMPLATE)


def test_a_long_field_of_csv_is_read(tmp_path):
    text = "ab " * 100_000
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    assert read(tmp_path / "a.csv") == [text]


def test_a_file_of_another_format_is_named(tmp_path):
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.arrow"):
        (tmp_path / name).write_bytes(bz2.compress(LINES))
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read(tmp_path / name, text=TEMPLATE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_is_named_with_its_file(tmp_path, kind):
    path = write(tmp_path, kind)
    named = path.removeprefix("hf:").rpartition("/")[2]
    with pytest.raises(DataError, match=rf"{named}.* has the (fields|columns) title, body.* `subject`.*`text` of the source"):
        read(path, text="{subject}: {body}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "hub"])
def test_a_row_without_text_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RECORDS", [*RECORDS[:150], {"title": None, "body": "b"}, *RECORDS[150:]])
    monkeypatch.setattr(sys.modules[__name__], "LINES", "".join(json.dumps(record) + "\n" for record in RECORDS).encode())
    place = {"jsonl": "a.jsonl:151", "parquet": "a.parquet: row 151", "saved": "row 17", "hub": "shard 1 of 2: row 50"}[kind]
    path = write(tmp_path, kind)
    with pytest.raises(DataError, match=rf"{place}: has title = null, but must have the text in `title`"):
        read(path, text=TEMPLATE)
    left_out = LeftOut(1)
    assert read(path, text=TEMPLATE, left_out=left_out) == TEXTS
    assert left_out.num_bad == 1 and place in left_out.first_bad


def test_bad_lines_are_left_out_when_they_are_allowed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"\n{"txt": "c"}\n{"text": "\xff"}\n{"text": ""}\n{"text": "d"}\n')
    left_out = LeftOut(3)
    assert read(path, left_out=left_out) == ["a", "d"]
    assert (left_out.num_bad, left_out.num_empty) == (3, 1) and f"{path}:2: not a line of JSON" in left_out.first_bad
    with pytest.raises(DataError, match=r"a\.jsonl:4: not a line of JSON in UTF-8 .*That makes 3 bad lines, but max_bad_lines of the source allows 2"):
        read(path, left_out=LeftOut(2))
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a line of JSON .*Mend or remove the line\.$"):
        read(path)
    (tmp_path / "a.csv").write_text("text,n\na,1\nb\nc,3\n")
    assert read(tmp_path / "a.csv", left_out=LeftOut(1)) == ["a", "c"]


def test_fields_that_are_all_empty_make_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"title": t, "body": b}) + "\n" for t, b in [("", ""), ("a", ""), ("", "b"), ("{x}", "}")]))
    left_out = LeftOut(0)
    assert read(tmp_path / "a.jsonl", text="{{{title}}}\n\n{body}", left_out=left_out) == ["{a}\n\n", "{}\n\nb", "{{x}}\n\n}"]
    assert left_out.num_empty == 1


def test_text_and_built_in_corpora_have_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path / "a.txt", "builtin:python-stdlib"):
        for how in ({"text": "{title}"}, {"messages": "messages"}):
            with pytest.raises(DataError, match="fields; leave out text and messages"):
                read(path, **how)


def test_pairs_are_read_from_tables(tmp_path):
    settings = Pairs(source="title", target="body", template="say {source}", source_tokens=8, target_tokens=8)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        source = Source(path=write(tmp_path / kind, kind))
        corpus = find_corpus(source, "train", settings)
        found = [pair for unit in corpus.units for pair in pairs(corpus, unit, LeftOut(0))]
        assert found == [(record["title"], record["body"]) for record in RECORDS]
        assert list(texts_of([source], "train", settings))[:2] == ["say title 0", RECORDS[0]["body"]]


def test_what_is_no_chat_is_named(tmp_path):
    good = {"messages": [{"role": "user", "content": "hi"}]}
    path = tmp_path / "a.jsonl"
    for number, bad in enumerate([{"messages": "hi"}, {"messages": [{"content": "hi"}]}, {"messages": ["hi"]}, {"chat": []}]):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        corpus = find_corpus(Source(path=str(path), messages="messages"), "train")
        with pytest.raises(DataError, match=r"a\.jsonl:2: has .*, but must have a list of messages, each with `role` and `content`, in `messages`"):
            list(chats(corpus, corpus.units[0], LeftOut(0)))
        assert len(list(chats(corpus, corpus.units[0], LeftOut(1)))) == 1, number
    path.write_text(json.dumps({"messages": []}) + "\n" + json.dumps(good))
    left_out = LeftOut(0)
    corpus = find_corpus(Source(path=str(path), messages="messages"), "train")
    assert [messages for _, messages in chats(corpus, corpus.units[0], left_out)] == [good["messages"]] and left_out.num_empty == 1
    assert list(texts_of([corpus.source], "train")) == ["hi"]
