"""What a source is: files at any address, cut into units that are read apart from each other, and the records in them.

Units are fixed by the source alone, so that whoever reads them, and how many do, changes nothing. A source is read as a stream, never whole.
fsspec, pyarrow and datasets are imported where an address or a format asks for them; no torch.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dqtrain import hub
from dqtrain.config import Source
from dqtrain.errors import DataError

UNIT_BYTES = 2**26
"""Size of a unit, about: what is larger and can be cut is cut."""
PIECE_BYTES = 2**20
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst")
_ROWS = 64
"""Rows that are decoded at once."""
_BUFFER_BYTES = 2**20
_FIELD_BYTES = 2**28
"""Longest field of a csv file; Python's own limit is 128 KiB, and without one a quote that is not closed would take a whole file into memory."""


@dataclass(frozen=True)
class Unit:
    """What is read in one go: lines that begin at bytes [start, stop) of a file, its row groups [start, stop), shards of a data set, or (stop None) a whole file."""

    address: str
    start: int
    stop: int | None
    num_bytes: int
    """Of the file as it is stored; about, where it is a share of it."""


class Place(NamedTuple):
    """Where a record is: its number in its unit, from 1, and what lies before the unit."""

    unit: Unit
    number: int
    rows_before: int | None = None  # None: lines, which are counted when somebody asks

    def __str__(self) -> str:
        if self.rows_before is not None:
            return f"{self.unit.address}: row {self.rows_before + self.number}"
        return f"{self.unit.address}:{_count_lines(self.unit) + self.number}"


class LeftOut:
    """Counts what is left out of a source: documents without text, and bad lines, of which more than `allowed` raise DataError."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.num_bad, self.first_bad, self.num_empty = allowed, 0, "", 0

    def bad(self, message: str) -> None:
        """One more, for this reason."""
        self.num_bad += 1
        self.first_bad = self.first_bad or message
        self.check(message)

    def check(self, message: str) -> None:
        """Raise DataError with the reason of one of them when there are too many."""
        if self.num_bad > self.allowed:
            more = f" That makes {self.num_bad} bad lines, but max_bad_lines of the source allows {self.allowed}." if self.allowed else ""
            raise DataError(message + more)


@dataclass(frozen=True)
class Files:
    """The files, or shards, of a source."""

    source: Source
    format: str
    """text, jsonl, csv, parquet, arrow, or hub: a data set by name."""
    units: tuple[Unit, ...]
    about: dict[str, Any]
    """What changes when the content does."""

    def records(self, unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
        """Yield (place, field -> value) of a unit's records, in order; those that have no line or row are no records.

        Of tables only `fields` (name -> the setting that names it) are read. Raises DataError for what cannot be read, and for a table without one of them.
        """
        reader: Callable[[Unit, Mapping[str, str], LeftOut], Iterator[tuple[Place, Any]]]
        reader = {"jsonl": _json_lines, "csv": _csv_rows, "parquet": _parquet_rows, "arrow": _arrow_rows, "hub": self._hub_rows}[self.format]
        with reading(unit.address):
            yield from reader(unit, fields, left_out)

    def text_pieces(self, unit: Unit) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether the file ends with it) of a unit of plain text, in pieces of about 1 MiB that end with a line."""
        with reading(unit.address), open_bytes(unit.address) as file:
            yield from _text_pieces(file, unit)

    def _hub_rows(self, unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
        data = _load_hub(self.source.path, self.about["subset"], self.about["split"], self.about["revision"], json.dumps(self.about))
        assert unit.stop is not None
        number = 0
        for index in range(unit.start, unit.stop):
            shard = Unit(f"{unit.address}, shard {index} of {data.num_shards}", 0, None, 0)
            rows = iter(data.shard(num_shards=data.num_shards, index=index))
            while True:
                try:
                    row = next(rows, None)
                except Exception as error:  # datasets raises whatever its readers and the network do
                    raise DataError(f"{shard.address}: cannot be read behind row {number} ({_first_line(error)}).") from None
                if row is None:
                    break
                number += 1
                yield Place(shard, number, 0), row


def is_tokens(source: Source) -> bool:
    """Whether a source is tokenised already: shards of `dqtrain prepare`, Megatron's or datatrove's."""
    named = source.path.endswith((".bin", ".ds", "/index.json")) or "://" not in source.path and (Path(source.path) / "index.json").is_file()
    return source.format == "shards" or source.format is None and named


def find_files(source: Source, split: str, whole_files: bool = False) -> Files:
    """The units of a source that is read for a split, by address and place in the file; with `whole_files` no text file is cut.

    Raises DataError when there is nothing there, or when nothing says what it is.
    """
    if source.path.startswith("hf:"):
        return _find_hub(source, source.split or split)
    path = source.path.removeprefix("file://") if source.path.startswith("file://") else source.path
    found = _list_arrow_folder(path, source.split or split) or _list_addresses(path)
    formats = {source.format or ("arrow" if os.path.isdir(path) else _format(address)) for address in found}
    if len(formats) > 1:
        raise DataError(f"{source.path} names files of the formats {', '.join(sorted(formats))}; set `format`, or make a source of each.")
    form = formats.pop()
    if form == "text" and (source.text != "{text}" or source.messages is not None):
        raise DataError(f"{source.path} is plain text, which has no fields; leave out text and messages, or set format.")
    with reading(source.path):
        described = [_describe(address) for address in found]
        units = [unit for address, size, _ in described for unit in _cut(address, size, form, whole_files)]
    about = {"source": path if "://" in path else os.path.abspath(path), "format": form, "files": described}
    return Files(source, form, tuple(units), about)


def _list_addresses(path: str) -> list[str]:
    """The files that a path, glob or address names, sorted; local ones as absolute paths. Raises DataError when there is none."""
    if "://" not in path:
        if os.path.isfile(path):
            return [os.path.abspath(path)]
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder, and none of datasets.save_to_disk; name its files, such as {path.rstrip('/')}/*.jsonl.")
        found = sorted(os.path.abspath(name) for name in glob(path, recursive=True) if os.path.isfile(name)) if has_magic(path) else []
        if not found:
            what = "matches no file" if has_magic(path) else "is not a file that can be read"
            raise DataError(f"corpus {path} {what}; give a file (.txt, .jsonl, .csv, .parquet), a glob, an address, hf:NAME or builtin:python-stdlib.")
        return found
    with reading(path):
        fs, stripped = _remote(path)
        names = sorted(str(name) for name in fs.glob(stripped)) if has_magic(stripped) else [stripped]
        found = [fs.unstrip_protocol(name) for name in names if fs.isfile(name)]
    if not found:
        raise DataError(f"corpus {path} {'matches' if has_magic(path) else 'is'} no file; check the address, and what it takes to read it.")
    return found


@contextlib.contextmanager
def open_bytes(address: str) -> Iterator[BinaryIO]:
    """A file at an address, decompressed by its name. Raises what it is read with raises."""
    with contextlib.ExitStack() as stack:
        file: Any
        if "://" in address:
            fs, path = _remote(address)
            file = stack.enter_context(io.BufferedReader(fs.open(path, "rb"), _BUFFER_BYTES))
        else:
            file = stack.enter_context(open(address, "rb"))
        if address.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        if address.endswith(".zst"):
            import pyarrow

            file = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
            file = stack.enter_context(io.BufferedReader(file, _BUFFER_BYTES))
        yield file


@contextlib.contextmanager
def reading(address: str) -> Iterator[None]:
    """Turn what readers say of a file that is not there, damaged or of another format into a DataError."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # fsspec names the package of a protocol
        raise DataError(f"{address} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {address} is not UTF-8 text ({error}); convert it, for example with iconv -t utf-8.") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's ArrowInvalid is a ValueError, the end of a cut .gz an EOFError
        what = getattr(error, "strerror", None) or error
        raise DataError(f"corpus {address} cannot be read ({what}): it is missing, damaged or of another format than its name says.") from None


def _remote(address: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(address)


def _format(address: str) -> str:
    stem, suffix = os.path.splitext(address)
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    if suffix == ".json":
        raise DataError(f"{address}: .json may be one value or one per line; set format: jsonl if each line holds an object, or convert it.")
    return _FORMATS.get(suffix, "text")


def _describe(address: str) -> tuple[str, int, Any]:
    """(address, bytes, what changes with the content)."""
    if "://" in address:
        fs, path = _remote(address)
        found = fs.info(path)
        size = int(found.get("size") or 0)
        if address.startswith(("http://", "https://")):  # fsspec holds that what is there never changes
            return address, size, [found.get(header) for header in ("ETag", "Last-Modified", "Content-MD5")]
        return address, size, fs.ukey(path)
    if not os.access(address, os.R_OK):
        raise DataError(f"corpus {address} is not a file that can be read; change its permissions.")
    status = os.stat(address)
    return address, status.st_size, status.st_mtime_ns


def _cut(address: str, size: int, form: str, whole_files: bool) -> list[Unit]:
    count = max(1, round(size / UNIT_BYTES))
    if count > 1 and not address.endswith(_COMPRESSED):
        if form == "jsonl" or form == "text" and not whole_files:
            step = -(-size // count)
            return [Unit(address, start, min(start + step, size), min(step, size - start)) for start in range(0, size, step)]
        if form == "parquet":
            return _cut_parquet(address)
    return [Unit(address, 0, None, size)]


# --- Text and JSON lines ---


def _text_pieces(file: BinaryIO, unit: Unit) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    pieces = _byte_pieces(file, _to_line(file, unit.start), unit.stop)
    piece = next(pieces, b"")
    while piece:
        following = next(pieces, b"")
        if text := decoder.decode(piece, final=not following):
            yield text, not following and not file.read(1)
        piece = following


def _byte_pieces(file: BinaryIO, position: int, stop: int | None) -> Iterator[bytes]:
    """Pieces of lines that begin before `stop`. The bound on readline keeps a file without line ends from being read whole."""
    in_line = False
    while stop is None or position < stop or in_line:
        piece = file.read(PIECE_BYTES if stop is None else max(0, min(PIECE_BYTES, stop - position)))
        if not piece.endswith(b"\n"):
            piece += file.readline(PIECE_BYTES)
        if not piece:
            return
        position += len(piece)
        in_line = not piece.endswith(b"\n")
        yield piece


def _to_line(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at `start` or later; its position."""
    if start == 0:
        return 0
    position = file.seek(start - 1)
    while line := file.readline(PIECE_BYTES):
        position += len(line)
        if line.endswith(b"\n"):
            break
    return position


def _count_lines(unit: Unit) -> int:
    """Lines before a unit."""
    if unit.start == 0:
        return 0
    with open_bytes(unit.address) as file:
        left, count = _to_line(file, unit.start), 0
        file.seek(0)
        while block := file.read(min(left, _BUFFER_BYTES)):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def _json_lines(unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
    with open_bytes(unit.address) as file:
        position = _to_line(file, unit.start)
        for number, line in enumerate(file, 1):
            if unit.stop is not None and position >= unit.stop:
                return
            position += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                left_out.bad(f"{Place(unit, number)}: not a line of JSON in UTF-8 ({error}). Mend or remove the line.")
                continue
            yield Place(unit, number), record


# --- Tables ---


def _csv_rows(unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
    """A record's place is the line where its row begins."""
    csv.field_size_limit(_FIELD_BYTES)
    with open_bytes(unit.address) as file:
        rows = csv.reader(_decoded_lines(unit, file), strict=True)
        number = 1
        try:
            columns = next(rows, [])
            for name, setting in fields.items():
                if columns.count(name) != 1:
                    found = ", ".join(columns) or "(none)"
                    raise DataError(f"{unit.address}:1: has the columns {found}, but must have one `{name}`. Set {setting}, or mend the header.")
            number = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(columns):
                    remedy = "Put texts with commas or line ends in quotes, or remove the row."
                    left_out.bad(f"{unit.address}:{number}: the number of columns is {len(row)}, but {len(columns)} in the header. {remedy}")
                elif row:
                    yield Place(unit, number), dict(zip(columns, row, strict=True))
                number = rows.line_num + 1
        except csv.Error as error:  # where the next row begins is not known any more
            raise DataError(f"{unit.address}:{number}: not a row of csv ({error}). Mend or remove it, or give the corpus as .jsonl.") from None


def _decoded_lines(unit: Unit, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")  # Excel begins a file with a byte order mark
        except UnicodeDecodeError as error:
            raise DataError(f"{unit.address}:{number}: not UTF-8 ({error}). Convert the file, for example with iconv -t utf-8.") from None


def _cut_parquet(address: str) -> list[Unit]:
    """Row groups side by side, until they have the size of a unit."""
    with _parquet(address) as file:
        sizes = [
            sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in map(file.metadata.row_group, range(file.num_row_groups))
        ]
    units, start, total = [], 0, 0
    for stop, size in enumerate(sizes, 1):
        total += size
        if total >= UNIT_BYTES or stop == len(sizes):
            units.append(Unit(address, start, stop, total))
            start, total = stop, 0
    return units


@contextlib.contextmanager
def _parquet(address: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # Row groups may be large: a buffer and no pre_buffer, so that none is read whole.
    with open_bytes(address) as raw, ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        yield file


def _parquet_rows(unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
    with _parquet(unit.address) as file:
        _check_columns(unit, file.schema_arrow.names, fields)
        groups = range(unit.start, file.num_row_groups if unit.stop is None else unit.stop)
        before = sum(file.metadata.row_group(i).num_rows for i in range(unit.start))
        yield from _rows(unit, file.iter_batches(_ROWS, list(groups), list(fields)), before)


def _arrow_rows(unit: Unit, fields: Mapping[str, str], left_out: LeftOut) -> Iterator[tuple[Place, Any]]:
    import pyarrow

    with open_bytes(unit.address) as raw:
        file = pyarrow.PythonFile(raw, "r") if "://" in unit.address or unit.address.endswith(_COMPRESSED) else pyarrow.memory_map(unit.address)
        try:
            batches: Any = pyarrow.ipc.open_stream(file)  # as datasets writes it
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            _check_columns(unit, reader.schema.names, fields)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            _check_columns(unit, batches.schema.names, fields)
        slices = (batch.select(list(fields)).slice(start, _ROWS) for batch in batches for start in range(0, batch.num_rows, _ROWS))
        yield from _rows(unit, slices, 0)


def _check_columns(unit: Unit, columns: Sequence[str], fields: Mapping[str, str]) -> None:
    for name, setting in fields.items():
        if name not in columns:
            raise DataError(f"{unit.address}: has the columns {', '.join(columns)}, but must have `{name}`. Set {setting}, or mend the file.")


def _rows(unit: Unit, batches: Iterator[Any], before: int) -> Iterator[tuple[Place, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Place(unit, number, before), row


def _list_arrow_folder(path: str, split: str) -> list[str]:
    """The files of a folder that `datasets.save_to_disk` wrote; none when it is none."""
    folder = Path(path)
    if "://" in path or not folder.is_dir():
        return []
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise DataError(f"{folder} has the splits {', '.join(splits)}, but is read for {split}; set `split` to one of them.")
        folder = folder / split
    if not (folder / "state.json").is_file():
        return []
    return [str((folder / entry["filename"]).absolute()) for entry in json.loads((folder / "state.json").read_text())["_data_files"]]


# --- Hugging Face data sets ---


def _hub_name(path: str) -> tuple[str, str | None]:
    name, at, revision = path.removeprefix("hf:").rpartition("@")
    return (name, revision) if at else (revision, None)


def _find_hub(source: Source, split: str) -> Files:
    name, revision = _hub_name(source.path)
    if os.path.isdir(name):
        described: dict[str, Any] = {"files": [_describe(str(path)) for path in sorted(Path(name).absolute().rglob("*")) if path.is_file()]}
        revision = None
    else:
        revision = _commit(source.path, name, revision)
        described = {}
    about = {"source": source.path, "format": "hub", "revision": revision, "subset": source.subset, "split": split, **described}
    data = _load_hub(source.path, source.subset, split, revision, json.dumps(about))
    units = [Unit(source.path, i, i + 1, UNIT_BYTES) for i in range(data.num_shards)]
    return Files(source, "hub", tuple(units), about)


def _commit(path: str, name: str, revision: str | None) -> str:
    """The commit that a revision stands for, which must not change under a corpus."""
    if revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # whatever the network and the hub say
        raise DataError(
            f"{path}: the Hugging Face hub does not say which commit that is ({_first_line(error)}). Check the name and the network, or give a "
            "folder, or the 40 digits of a commit that is in the cache."
        ) from None
    assert commit is not None
    return commit


@functools.lru_cache(2)
def _load_hub(path: str, subset: str | None, split: str, revision: str | None, version: str) -> Any:
    """The data set, opened once by each process; `version` changes with its content."""
    import datasets

    name = _hub_name(path)[0]
    if revision is not None:
        name = str(hub.data_directory(f"hf:{name}@{revision}") or name)  # fetched for a job, which has no network
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=None if os.path.isdir(name) else revision)
        if builder.name == "parquet":  # by itself it reads a file ahead as fast as it can, and into memory as a whole
            from pyarrow.dataset import ParquetFragmentScanOptions

            builder.config.batch_size = _ROWS
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=_BUFFER_BYTES)
        return builder.as_streaming_dataset(split=split)
    except Exception as error:
        raise DataError(f"{path}: split {split} cannot be opened ({_first_line(error)}). Check path, subset and split.") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
