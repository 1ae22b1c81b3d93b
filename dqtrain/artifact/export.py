"""A finished run's checkpoint -> verified artifacts: packed codes of a quantized student and what is made of them, a Hugging Face directory of a float one."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dqtrain.artifact import format, parity
from dqtrain.artifact.card import size_of, write_card
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.description import LIST, write_list
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.load import trained_in_files
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.artifact.openvino.target import OpenVinoTarget
from dqtrain.artifact.pretrained import name_in_config
from dqtrain.artifact.size import export_about
from dqtrain.artifact.target import RuntimeTarget
from dqtrain.config import Export, RunConfig, Target
from dqtrain.data.stream import AnyStream
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import sync_path, write_text
from dqtrain.models.making import meta_model, read_model_config
from dqtrain.quant.modules import Coverage, float_bytes, is_learned_scale, latent_heads, served_parameters
from dqtrain.rundir import RunDir
from dqtrain.tensor_file import write_model_files

RUNTIMES: dict[Target, type[RuntimeTarget]] = {
    "gguf": GgufTarget,
    "onnx": OnnxTarget,
    "openvino": OpenVinoTarget,
    "compressed-tensors": CompressedTarget,
}
"""Targets that a program of its own runs, each proven in it (`parity.verify_target`)."""


def export(
    run: RunDir,
    folder: Path,
    asked: Export | None = None,
    held_out: AnyStream | None = None,
    scores: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write, verify and only then publish the artifacts of a checkpoint folder: of each target path, sizes and parity, the first one's outside `others`.

    `asked`: which targets and how (default: what the run's config says). All of a quantized student are made of the codes of its packed
    artifact, which is written first unless it is there, and no weight but the one at work is in memory. A runtime is compared on `held_out` text. `scores`
    are for the model cards: step and test (default: those of result.json). `say` is given a line for each artifact that is there. Raises ConfigError for what a target cannot hold, CheckpointError when one
    cannot be written or does not compute what was trained; an older artifact then stays.
    """
    config = run.load_config()
    asked = asked or config.export
    targets = targets_of(config, asked)
    about = check_targets(config, asked, read_model_config(run.student), _coverage(run) if config.quant else None, run.student)
    model = trained_in_files(run, folder)
    scores = scores or run.load_result()
    first: Target = "hf" if config.quant is None else "packed"
    results: dict[Target, dict[str, Any]] = {}
    if first in targets or not _is_packed(run, folder):
        results[first] = _hf(run, model, scores) if config.quant is None else _packed(run, model, folder, config, scores)
    for target in targets:
        if target in RUNTIMES:
            results[target] = _for_runtime(target, run, model, asked, held_out, scores) | {"notes": about[target]}
        elif target not in results:
            results[target] = _hf(run, model, scores)
    for figures in results.values():
        say(f"{figures['path']}: {size_of(figures)}")
    last = targets[0] if first not in results else first
    return results.pop(last) | ({"others": results} if results else {})


def targets_of(config: RunConfig, asked: Export) -> tuple[Target, ...]:
    """The targets asked for: packed, or hf for a float student, where none is named. Raises ConfigError for what a float student has not."""
    if config.quant is None:
        other = next((target for target in asked.targets or () if target != "hf"), None)
        if other is not None:
            raise ConfigError(f"the target {other} holds codes, but quant is null, so the student has none. Use the target hf.")
    return asked.targets or ("hf" if config.quant is None else "packed",)


def check_targets(config: RunConfig, asked: Export, model: PretrainedConfig, coverage: Coverage | None, tokenizer: Path) -> dict[Target, list[str]]:
    """What a person should know about targets before training: lines by target. Raises ConfigError for one that cannot hold the student as it is trained."""
    found = {}
    for target in targets_of(config, asked):
        if target in RUNTIMES:
            assert coverage is not None and config.quant is not None, "a float student has no such target"
            found[target] = RUNTIMES[target].check(config.quant, model, coverage, tokenizer, asked)
    return found


def _coverage(run: RunDir) -> Coverage:
    return Coverage.from_json(run.coverage.read_text())


def _is_packed(run: RunDir, folder: Path) -> bool:
    """Whether the codes of this checkpoint are there and sound."""
    try:
        return format.read_description(run.artifact("packed"))["checkpoint"] == folder.name
    except CheckpointError:
        return False


@contextmanager
def _published(run: RunDir, target: Target) -> Iterator[Path]:
    """A folder to write into, which replaces the artifact when all went well. Raises CheckpointError for a disk that takes no more."""
    final = run.artifact(target)
    partial, old = final.with_name(f".tmp-{target}"), final.with_name(f".old-{target}")
    if old.exists() and not final.exists():
        old.rename(final)  # an earlier export was killed between its last two renames
    try:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            sync_path(file)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        sync_path(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{final}: could not be written ({error}). Free space there, then `dqtrain export {run.path}` or `dqtrain resume {run.path}`."
        ) from None


def _figures(run: RunDir, target: Target, model: PreTrainedModel, folder: Path, size: int, found: dict[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a target, which is left in its folder too: parity.json, and README.md for people."""
    figures = {"path": str(run.artifact(target)), "bytes": size, "fp32_bytes": float_bytes(model), "ratio": float_bytes(model) / size, "parity": found}
    write_text(folder / "parity.json", json.dumps(found, indent=1))
    write_card(run, target, folder, figures, scores, model.config.is_encoder_decoder)
    return figures


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors*"))


def _packed(run: RunDir, model: PreTrainedModel, folder: Path, config: RunConfig, scores: Mapping[str, Any]) -> dict[str, Any]:
    assert config.quant is not None
    with _published(run, "packed") as partial:
        _copy_student(run, partial)
        format.write(model, partial, export_about(_coverage(run), config.quant, folder.name))
        name_in_config(partial, type(meta_model(run.student)).__name__)
        return _figures(run, "packed", model, partial, _weights_bytes(partial), parity.verify(model, partial), scores)


def _hf(run: RunDir, model: PreTrainedModel, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Floats that transformers loads without dqtrain: what forward computed with. Quantized activations become floats."""
    packed = run.artifact("packed") if run.load_config().quant is not None else None
    plain = meta_model(run.student)
    buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not isinstance(tensor, nn.Parameter)}

    def original(name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One of our model's tensors as its family's files have it: experts one by one."""
        return revert_weight_conversion(plain, {name: tensor})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, value in itertools.chain(served_parameters(model), buffers.items()):
            if not is_learned_scale(name):
                yield from original(name, value).items()

    shapes = [*model.named_parameters(), *latent_heads(model), *buffers.items()]
    stored = [pair for name, tensor in shapes if not is_learned_scale(name) for pair in original(name, torch.empty_like(tensor, device="meta")).items()]
    with _published(run, "hf") as partial:
        _copy_student(run, partial)
        config = json.loads((partial / "config.json").read_text()) | {"architectures": [type(plain).__name__], "dtype": "float32"}
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        write_model_files(partial, {name: (tensor.dtype, tensor.shape) for name, tensor in stored}, tensors())
        write_list(partial / LIST)
        return _figures(run, "hf", model, partial, _weights_bytes(partial), parity.verify(model, partial, packed), scores)


def _for_runtime(name: Target, run: RunDir, model: PreTrainedModel, asked: Export, held_out: AnyStream | None, scores: Mapping[str, Any]) -> dict[str, Any]:
    packed = run.artifact("packed")
    with _published(run, name) as partial, format.PackedTensors(packed, format.read_description(packed)) as tensors:
        target = RUNTIMES[name](tensors, model.config, asked)
        target.write(partial)
        found = parity.verify_target(model, packed, partial, target, held_out, asked.allow_inexact)
        return _figures(run, name, model, partial, found["bytes"]["file"], found, scores)


def _copy_student(run: RunDir, folder: Path) -> None:
    for file in run.student.iterdir():  # config, generation config, tokenizer
        shutil.copy(file, folder)
