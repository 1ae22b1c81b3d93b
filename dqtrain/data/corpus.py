"""Corpora, read as a stream: text from text files, JSON lines or the Python standard library that is on every machine; pairs of a source and a target
from JSON lines, csv or the docstrings of installed packages.

Needs nothing but the file (or what is installed); no network, no torch.
"""

import csv
import functools
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from dqtrain.config import Pairs
from dqtrain.data.docstrings import DOCSTRINGS, docstring_pairs
from dqtrain.errors import DataError

STDLIB = "builtin:python-stdlib"
SPLITS = ("train", "validation", "test")

PIECE_CHARS = 2**20
LEAK_BYTES = 200
"""No text of this many bytes (so none of this many characters) is in two splits of the standard library."""


def documents(source: str, split: str, text_field: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, ends_document) pieces of one source, in order; no piece is empty.

    `builtin:python-stdlib`: one document per file of `split`. A `.jsonl` file: one document per line, its field `text_field`; any other
    file is one document of plain UTF-8 text, in pieces of about 1 MiB that end with a line. Of a file, `split` says nothing.
    Raises DataError for a source that is missing, not UTF-8, or has a line without the text.
    """
    if source == STDLIB:
        return ((text, True) for _, text in _stdlib()[split])
    if source == DOCSTRINGS:
        raise DataError(f"corpus {DOCSTRINGS} is pairs of a source and a target; set data.pairs, or name {STDLIB}.")
    path = _readable(source, f"a .txt or .jsonl file, or {STDLIB}")
    return _json_texts(path, text_field) if path.suffix == ".jsonl" else _plain_text(path)


def pairs(source: str, split: str, settings: Pairs) -> Iterator[tuple[str, str]]:
    """Yield (source, target) of one corpus, in order and as they are there: the template of `settings` is not applied.

    A `.jsonl` file: one pair per line, in the fields that `settings` names; a `.csv` file: one per row, in the columns so named (RFC 4180: a header,
    quotes where a text has commas or lines). `builtin:python-docstrings`: functions and the first lines of their docstrings, those of `split`.
    Raises DataError for a corpus that is missing or holds no pairs, and, with its line, for a pair without a source or without a target.
    """
    if source == DOCSTRINGS:
        return iter(docstring_pairs()[split])
    if source == STDLIB:
        raise DataError(f"corpus {STDLIB} is text without targets; remove data.pairs, or name {DOCSTRINGS}.")
    expected = f"a .jsonl or .csv file of pairs, or {DOCSTRINGS}"
    path = _readable(source, expected)
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"corpus {path} is no file of pairs that can be read; give {expected}.")
    return _checked_pairs(path, settings)


def references(sources: str | Sequence[str], split: str, settings: Pairs) -> list[tuple[str, list[str]]]:
    """Return every source once, in the order of the corpus, with all targets that it has there."""
    targets: dict[str, list[str]] = {}
    for name in [sources] if isinstance(sources, str) else sources:
        for source, target in pairs(name, split, settings):
            targets.setdefault(source, []).append(target)
    return list(targets.items())


def _readable(source: str, expected: str) -> Path:
    if source.startswith("builtin:"):
        raise DataError(f"corpus `{source}` is not built in; give {expected}.")
    path = Path(source)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise DataError(f"corpus {path} is not a file that can be read; give the path of {expected}.")
    return path


def _json_texts(path: Path, text_field: str) -> Iterator[tuple[str, bool]]:
    for number, record in _json_lines(path):
        if text := _text(path, number, record, text_field, "data.text_field"):
            yield text, True


def _checked_pairs(path: Path, settings: Pairs) -> Iterator[tuple[str, str]]:
    for number, record in _json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path, settings):
        texts = []
        for key, field in (("source", settings.source), ("target", settings.target)):
            text = _text(path, number, record, field, f"data.pairs.{key}")
            if not text.strip():
                raise DataError(f"{path}:{number}: the {key}, `{field}`, is empty, but a pair must have both. Mend or remove the line.")
            texts.append(text)
        yield texts[0], texts[1]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not a line of JSON in UTF-8 ({error}). Mend or remove the line.") from None


def _text(path: Path, number: int, record: Any, field: str, setting: str) -> str:
    """The text in a field of the record at a line; `setting` is the knob that names the field."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {', '.join(record) or '(none)'}" if isinstance(record, dict) else type(record).__name__
        found = f"{field} = {json.dumps(record[field])[:40]}" if isinstance(record, dict) and field in record else found
        raise DataError(f"{path}:{number}: has {found}, but must have the text in `{field}`. Set {setting}, or mend the line.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{path}:{number}: `{field}` is not Unicode text ({error}). Mend or remove the line.") from None
    return text


def _csv_rows(path: Path, settings: Pairs) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line where the row begins, column -> text); rows without anything are no rows."""
    with path.open("rb") as file:
        rows = csv.reader(_lines(path, file), strict=True)
        number = 1
        try:
            columns = next(rows, [])
            for key, name in (("source", settings.source), ("target", settings.target)):
                if columns.count(name) != 1:
                    found = ", ".join(columns) or "(none)"
                    raise DataError(f"{path}:1: has the columns {found}, but must have one `{name}`. Set data.pairs.{key}, or mend the header.")
            number = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(columns):
                    remedy = "Put texts with commas or line ends in quotes, or remove the row."
                    raise DataError(f"{path}:{number}: the number of columns is {len(row)}, but {len(columns)} in the header. {remedy}")
                if row:
                    yield number, dict(zip(columns, row, strict=True))
                number = rows.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{number}: not a row of csv ({error}). Mend or remove it, or give the pairs as .jsonl.") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")  # Excel begins a file with a byte order mark
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error}). Convert the file, for example with iconv -t utf-8.") from None


def _plain_text(path: Path) -> Iterator[tuple[str, bool]]:
    # newline="" keeps "\r\n" as it is; the bound on readline keeps a file without line ends from being read whole.
    with path.open(encoding="utf-8", newline="") as file:
        try:
            piece = file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)
            while piece:
                following = file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)
                yield piece, not following
                piece = following
        except UnicodeDecodeError as error:
            raise DataError(f"corpus {path} is not UTF-8 text ({error}); convert it, for example with iconv -t utf-8.") from None


def stdlib_summary() -> dict[str, dict[str, int | str]]:
    """Return per split of the standard library corpus: `files`, `bytes` and the `sha256` of names and text. It differs between Python versions."""
    summary: dict[str, dict[str, int | str]] = {}
    for split, files in _stdlib().items():
        digest = hashlib.sha256()
        for name, text in files:
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        summary[split] = {"files": len(files), "bytes": sum(len(text.encode()) for _, text in files), "sha256": digest.hexdigest()}
    return summary


# --- The standard library ---

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "html/entities.py"})
"""What is not the library, or is tests, demonstrations, bundles and tables."""
_GENERATED_FILE = re.compile(r"auto(matically )?-?generated|file is generated|generated (from '|and used)", re.IGNORECASE)
"""What generated files say of themselves in their first lines (`token.py`, `stringprep.py`, `_sysconfigdata*`, codecs)."""
_CODEC_TABLE = re.compile(r"^decoding_(table|map) =", re.MULTILINE)
_SPLIT_SEED = 164
"""Gives validation and test, at Python 3.11, 4 and 5 percent of the text and ten modules or more each; most seeds give one large package instead."""


@functools.cache
def _stdlib() -> dict[str, list[tuple[str, str]]]:
    """Split -> [(relative path, text)], sorted; every file of a top-level module in one split, and no long text in two."""
    root = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for name in sorted(_python_files(root)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few old files are Latin-1, as their own first line says
        if not text or _GENERATED_FILE.search(text[:400]) or _CODEC_TABLE.search(text):
            continue
        module = name.parts[0].removesuffix(".py")
        twentieth = xxhash.xxh64_intdigest(module.encode(), seed=_SPLIT_SEED) % 20
        splits[{0: "test", 1: "validation"}.get(twentieth, "train")].append((name.as_posix(), text))
    if not all(splits.values()):
        raise DataError(f"{root} holds no Python source to make the corpus {STDLIB} of; install Python with its .py files, or name a file.")
    splits["validation"] = _without_leaks(splits["validation"], splits["test"])
    splits["train"] = _without_leaks(splits["train"], splits["validation"] + splits["test"])
    return splits


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]  # site-packages may be huge: never entered
        names = (Path(folder, file).relative_to(root) for file in files if file.endswith(".py"))
        yield from (name for name in names if name.as_posix() not in _LEFT_OUT)


def _without_leaks(files: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove from `files` the lines that touch a text of LEAK_BYTES which `held_out` has too; a file without lines goes."""
    known = np.unique(np.concatenate([_window_hashes(text.encode()) for _, text in held_out]))
    kept = []
    for name, text in files:
        # Lines that were apart may make a new leak once they meet, so a changed file is looked at again.
        while (shorter := _without_windows(text, known)) != text:
            text = shorter
        if text.strip():
            kept.append((name, text))
    return kept


def _without_windows(text: str, known: np.ndarray) -> str:
    data = text.encode()
    hashes = _window_hashes(data)
    nearest = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)]
    starts = np.flatnonzero(nearest == hashes)
    if not len(starts):
        return text
    lines = data.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    edges = np.zeros(len(lines) + 1, np.int64)  # +1 at the first line of a window, -1 behind its last
    np.add.at(edges, np.searchsorted(ends, starts, side="right"), 1)
    np.add.at(edges, np.searchsorted(ends, starts + LEAK_BYTES - 1, side="right") + 1, -1)
    leaks = np.cumsum(edges)[:-1] > 0
    return b"".join(line for line, leak in zip(lines, leaks, strict=True) if not leak).decode()


_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_BYTE_CODES = np.random.default_rng(0).integers(0, 2**64, 256, dtype=np.uint64)


def _window_hashes(data: bytes) -> np.ndarray:
    """Rolling polynomial hash (Karp and Rabin 1987) modulo 2**64 of every window of LEAK_BYTES: uint64 [max(0, bytes - LEAK_BYTES + 1)]."""
    if len(data) < LEAK_BYTES:
        return np.empty(0, np.uint64)
    powers, inverses = (np.full(len(data), base, np.uint64) for base in (_BASE, pow(_BASE, -1, 2**64)))
    powers[0] = inverses[0] = 1
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_BYTE_CODES[np.frombuffer(data, np.uint8)] * np.cumprod(powers), out=prefix[1:])
    return (prefix[LEAK_BYTES:] - prefix[:-LEAK_BYTES]) * np.cumprod(inverses)[: len(data) - LEAK_BYTES + 1]
