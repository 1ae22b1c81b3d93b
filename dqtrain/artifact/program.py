"""Which program runs an artifact, by the files that lie in its folder."""

from pathlib import Path
from typing import Literal

from dqtrain.artifact.gguf.files import files_of

Program = Literal["llama.cpp", "ONNX Runtime", "OpenVINO", "transformers"]


def program_of(path: Path) -> tuple[Program, Path]:
    """The program, and what it loads: a GGUF file, of several parts the first, or the folder. What no other program is for is for transformers, there or not."""
    if files := files_of(path):
        return "llama.cpp", files[0]
    if (path / "onnx.json").is_file():
        return "ONNX Runtime", path
    if (path / "openvino.json").is_file():
        return "OpenVINO", path
    return "transformers", path
