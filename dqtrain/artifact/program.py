"""Which program runs an artifact, by the files that lie in its folder."""

from pathlib import Path
from typing import Literal

Program = Literal["llama.cpp", "ONNX Runtime", "OpenVINO", "transformers"]


def program_of(path: Path) -> tuple[Program, Path]:
    """The program, and what it loads: a GGUF file, or the folder. What no other program is for is for transformers, there or not."""
    file = path if path.suffix == ".gguf" else path / "model.gguf"
    if file.is_file():
        return "llama.cpp", file
    if (path / "onnx.json").is_file():
        return "ONNX Runtime", path
    if (path / "openvino.json").is_file():
        return "OpenVINO", path
    return "transformers", path
