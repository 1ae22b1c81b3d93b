"""The Python standard library as a corpus: on every machine, without a download, in three splits that share no long text."""

import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from dqtrain.config import SPLITS
from dqtrain.errors import DataError

STDLIB = "builtin:python-stdlib"
LEAK_BYTES = 200
"""No text of this many bytes (so none of this many characters) is in two splits of the standard library."""


def stdlib_summary() -> dict[str, dict[str, int | str]]:
    """Return per split of the standard library corpus: `files`, `bytes` and the `sha256` of names and text. It differs between Python versions."""
    summary: dict[str, dict[str, int | str]] = {}
    for split, files in stdlib_texts().items():
        digest = hashlib.sha256()
        for name, text in files:
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        summary[split] = {"files": len(files), "bytes": sum(len(text.encode()) for _, text in files), "sha256": digest.hexdigest()}
    return summary


_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "html/entities.py"})
"""What is not the library, or is tests, demonstrations, bundles and tables."""
_GENERATED_FILE = re.compile(r"auto(matically )?-?generated|file is generated|generated (from '|and used)", re.IGNORECASE)
"""What generated files say of themselves in their first lines (`token.py`, `stringprep.py`, `_sysconfigdata*`, codecs)."""
_CODEC_TABLE = re.compile(r"^decoding_(table|map) =", re.MULTILINE)
_SPLIT_SEED = 164
"""Gives validation and test, at Python 3.11, 4 and 5 percent of the text and ten modules or more each; most seeds give one large package instead."""


@functools.cache
def stdlib_texts() -> dict[str, list[tuple[str, str]]]:
    """Split -> [(relative path, text)], sorted; every file of a top-level module in one split, and no long text in two.

    Raises DataError where Python has no source files.
    """
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
