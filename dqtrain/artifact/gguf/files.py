"""The files of a GGUF model: model.gguf, or parts that are named as llama.cpp wants them, which is given the first and finds the others."""

import re
from pathlib import Path

FILE = "model.gguf"

_PART = re.compile(r"(.+)-\d{5}-of-(?!0{5})(\d{5})\.gguf")


def files_of(path: Path) -> list[Path]:
    """All files of the model in a folder, or of the one that a .gguf file is, or is a part of: those that llama.cpp needs, the first first, also where some are missing.

    None for a folder that has no such file.
    """
    if path.suffix != ".gguf":
        found = sorted(file for file in path.glob("model*.gguf") if file.name == FILE or _PART.fullmatch(file.name))
        return files_of(found[-1]) if found else []  # model.gguf, if there, is the last
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    stem, count = part.groups()
    return [path.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
