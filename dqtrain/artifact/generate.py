"""What an artifact or model writes for a prompt, in the program that runs it, and two such texts side by side."""

import itertools
import textwrap
from pathlib import Path

import torch

from dqtrain.artifact.gguf.llama_cpp import LlamaCpp
from dqtrain.artifact.load import complete, load_artifact, load_spread
from dqtrain.artifact.onnx.runtime import OnnxRunner
from dqtrain.artifact.openvino.runtime import OpenVinoRunner
from dqtrain.artifact.program import program_of
from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir

NARROWEST = 30
"""Characters that a column has at least."""


def generate(path: Path, prompt: str, tokens: int, mode: str | None = None, stream: bool = False, alone: bool = False) -> str:
    """The prompt and its greedy continuation of up to `tokens` tokens; the answer alone of an encoder-decoder, and where there is a chat template.

    `mode`: how a packed artifact is loaded. `stream`: also print it, as it is written. `alone`: without the prompt. Raises ConfigError for a mode of what another program runs and for
    too many tokens, and what loading raises.
    """
    program, model = program_of(path)
    if mode and path.exists() and not (path / "artifact.json").is_file():
        raise ConfigError(f"--mode is for packed artifacts, but {program} runs {path}. Leave it out.")
    if program == "transformers":
        run = RunDir(path)
        loaded = load_artifact(path, mode, "cuda" if torch.cuda.is_available() else "cpu") if mode else load_spread(path)
        return complete(loaded, run.student if run.config.is_file() else path, prompt, tokens, stream, alone)
    if program == "llama.cpp":
        with LlamaCpp(model) as runtime:
            return runtime.generate(prompt, tokens, stream, alone)
    return (OnnxRunner if program == "ONNX Runtime" else OpenVinoRunner)(model).generate(prompt, tokens, stream, alone)


def side_by_side(headings: tuple[str, str], texts: tuple[str, str], width: int) -> str:
    """Two texts in columns under their headings, together as wide as `width` or twice `NARROWEST`. Their lines stay lines, and are wrapped."""
    column = max(NARROWEST, (width - 3) // 2)

    def rows(cells: tuple[str, str]) -> list[str]:
        wrapped = [[part for line in cell.splitlines() for part in textwrap.wrap(line, column) or [""]] for cell in cells]
        return [f"{left:<{column}} | {right}".rstrip() for left, right in itertools.zip_longest(*wrapped, fillvalue="")]

    return "\n".join([*rows(headings), f"{'-' * column}-+-{'-' * column}", *rows(texts)])
