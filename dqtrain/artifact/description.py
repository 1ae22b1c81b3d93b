"""What lists the files of a folder, with a hash of itself in the last line: artifact.json, and the shorter lists of other programs' folders.

{
"format": 4,
"weights": {FILE: {"bytes": ..., "xxh3_128": ...}, ...},
"sizes": {"packed_bytes": of these files, "fp32_bytes": of the float model},
...
"settings": what weights have in common: kind, quantizer, input_quantizer, or reason why they are float; what is null is left out
"coverage": [name, shape, place in the settings] of each parameter of two dimensions or more
"parity": figures of the proof, each as wide as any, so that they change no size; null before there is one
"xxh3_128": "..."
}

A list of another program's folder has "format" and "files", as "weights" are here.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from dqtrain.errors import CheckpointError
from dqtrain.files import digest, write_text

FORMAT = 4
LIST_FORMAT = 2
LIST = "files.json"
"""The list in a folder of floats or of GGUF files, whose own formats have no place for one."""

PARITY = ("tensors_bit_identical", "relative_logit_difference", "relative_l2_to_trained", "top1_agreement", "kl_nats", "perplexity", "perplexity_trained")
"""Figures of the proof that artifact.json has."""

_SEAL = '"xxh3_128": "'
_ROW = {"kind": None, "quantizer": None, "input_quantizer": None, "reason": None}


def describe(files: Mapping[str, tuple[int, str]], fp32_bytes: int, about: Mapping[str, Any]) -> str:
    """artifact.json of these files (bytes and hash by name); `about` holds the rows of `Coverage.to_json` under `coverage`. Its length needs no weights."""
    weights = {name: _entry(*file) for name, file in files.items()}
    sizes = {"packed_bytes": sum(size for size, _ in files.values()), "fp32_bytes": fp32_bytes}
    settings: list[dict[str, Any]] = []
    coverage = []
    for row in about["coverage"]:
        setting = {key: row[key] for key in _ROW if row[key] is not None}
        if setting not in settings:
            settings.append(setting)
        coverage.append([row["name"], row["shape"], settings.index(setting)])
    rest = {key: value for key, value in about.items() if key != "coverage"}
    content = {"format": FORMAT, "weights": weights, "sizes": sizes, **rest, "settings": settings, "coverage": coverage}
    lines: dict[str, Callable[[Any], str]] = {"settings": _a_line_each, "coverage": _a_line_each, "parity": _in_equal_width}
    return sealed([f'"{key}": {lines.get(key, json.dumps)(value)}' for key, value in content.items()])


def with_parity(text: str, figures: Mapping[str, float]) -> str:
    """An artifact.json with these figures of PARITY, in place of what stood there; as long as it was."""
    lines = text.rpartition(_SEAL)[0].removeprefix("{\n").removesuffix(",\n").split(",\n")
    return sealed([f'"parity": {_in_equal_width(figures)}' if line.startswith('"parity": ') else line for line in lines])


def _in_equal_width(figures: Mapping[str, float | None]) -> str:
    """Numbers of four digits, at least 0."""
    return "{" + ", ".join(f'"{name}": {"null" if value is None else f"{value:.3e}":>10}' for name, value in figures.items()) + "}"


def _entry(size: int, hash: str) -> dict[str, Any]:
    return {"bytes": size, "xxh3_128": hash}


def _a_line_each(entries: list[Any]) -> str:
    return "[\n " + ",\n ".join(json.dumps(entry) for entry in entries) + "\n]"


def sealed(lines: list[str]) -> str:
    """The keys and values of a JSON object, and behind them their hash."""
    text = "{\n" + ",\n".join(lines) + ",\n"
    return f'{text}{_SEAL}{xxhash.xxh3_128_hexdigest(text.encode())}"\n}}\n'


def is_sound(text: str) -> bool:
    """Whether a text has the hash in its last line."""
    before, seal, after = text.rpartition(_SEAL)
    return bool(seal) and after == f'{xxhash.xxh3_128_hexdigest(before.encode())}"\n}}\n'


def read(text: str) -> dict[str, Any]:
    """What was described, with the rows of `Coverage.to_json` under `coverage` again."""
    content = json.loads(text)
    settings = content.pop("settings")
    content["coverage"] = [{"name": name, "shape": shape, **_ROW, **settings[place]} for name, shape, place in content["coverage"]]
    return content


def write_list(path: Path) -> None:
    """Write what lists all other files of its folder as they are now. Raises OSError."""
    files = {file.name: _entry(file.stat().st_size, digest(file)) for file in sorted(path.parent.iterdir()) if file.is_file() and file != path}
    write_text(path, sealed([f'"format": {LIST_FORMAT}', f'"files": {json.dumps(files)}']))


def check_list(path: Path) -> list[str]:
    """Names of the files that `write_list` listed, each looked at whole. Raises CheckpointError for no list, one of another format, and damage."""
    files = _listed(path)
    check_files(path, files)
    return list(files)


def check_if_listed(path: Path) -> None:
    """`check_list` of a folder's LIST, or of no more than one file of the folder; where there is no list, or it does not name the file, they come from elsewhere.

    Raises CheckpointError.
    """
    listing = (path if path.is_dir() else path.parent) / LIST
    if listing.is_file():
        check_files(listing, {name: expected for name, expected in _listed(listing).items() if path.is_dir() or name == path.name})


def _listed(path: Path) -> dict[str, Any]:
    """Sizes and hashes by name."""
    return json.loads(read_sealed(path, LIST_FORMAT))["files"]


def read_sealed(path: Path, version: int) -> str:
    """The text of a list of this format that has the hash in its last line. Raises CheckpointError for another one."""
    again = "Export the run again with `dqtrain export RUN`."
    try:
        text = path.read_text()
        found = json.loads(text)["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}). {again}") from None
    if found != version:
        raise CheckpointError(f"{path}: has format {found}, this dqtrain reads {version}. {again}")
    if not is_sound(text):
        raise CheckpointError(f"{path}: does not have the hash in its last line; it was edited or damaged. Copy or export it again with `dqtrain export RUN`.")
    return text


def check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold files against sizes and hashes that the list at `path`, beside them, says. Raises CheckpointError for the first that differs."""
    for name, expected in files.items():
        file = path.with_name(name)
        found = file.stat().st_size if file.is_file() else 0
        if found != expected["bytes"]:
            raise CheckpointError(f"{file}: has {found} bytes, {path.name} says {expected['bytes']}; it is truncated or missing. Copy or export it again.")
        if digest(file) != expected["xxh3_128"]:
            raise CheckpointError(f"{file}: does not have the hash in {path.name}; a byte was changed. Copy or export it again.")
