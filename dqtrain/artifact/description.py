"""The text of artifact.json: what is in the other files, by line, and in the last line a hash of the lines before it.

{
"format": 4,
"weights": {FILE: {"bytes": ..., "xxh3_128": ...}, ...},
"sizes": {"packed_bytes": of these files, "fp32_bytes": of the float model},
...
"settings": what weights have in common: kind, quantizer, input_quantizer, or reason why they are float; what is null is left out
"coverage": [name, shape, place in the settings] of each parameter of two dimensions or more
"xxh3_128": "..."
}
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

FORMAT = 4
_SEAL = '"xxh3_128": "'
_ROW = {"kind": None, "quantizer": None, "input_quantizer": None, "reason": None}


def describe(files: Mapping[str, tuple[int, str]], fp32_bytes: int, about: Mapping[str, Any]) -> str:
    """artifact.json of these files (bytes and hash by name); `about` holds the rows of `Coverage.to_json` under `coverage`. Its length needs no weights."""
    weights = {name: {"bytes": size, "xxh3_128": hash} for name, (size, hash) in files.items()}
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
    return sealed([f'"{key}": {_a_line_each(value) if key in ("settings", "coverage") else json.dumps(value)}' for key, value in content.items()])


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
