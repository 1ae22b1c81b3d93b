"""A finished run's checkpoint -> verified artifacts: packed codes of a quantized student and what is made of them, a Hugging Face directory of a float one."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dqtrain.artifact import format, hf, kernels, parity
from dqtrain.artifact.card import size_of, write_card
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.description import LIST, PARITY, write_list
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.load import trained_in_files
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.artifact.openvino.target import OpenVinoTarget
from dqtrain.artifact.pretrained import name_in_config
from dqtrain.artifact.size import export_about, float_part
from dqtrain.artifact.target import RuntimeTarget
from dqtrain.config import Export, Quant, RunConfig, Target
from dqtrain.data.stream import AnyStream
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import sync_path, write_text
from dqtrain.models.making import meta_model
from dqtrain.quant.modules import Coverage, float_bytes
from dqtrain.rundir import RunDir

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
    artifact, which is written first unless it is there, and no weight but the one at work is in memory. A quantized student's artifacts are compared on `held_out` text. `scores`
    are for the model cards: step and test (default: those of result.json). `say` is given a line for each artifact that is there. Raises ConfigError for what a target cannot hold, CheckpointError when one
    cannot be written or does not compute what was trained; an older artifact then stays.
    """
    config = run.load_config()
    asked = asked or config.export
    targets = targets_of(config, asked)
    model = trained_in_files(run, folder)
    about = check_targets(config, asked, model, _coverage(run) if config.quant else None, run.student)
    scores = scores or run.load_result()
    first: Target = "hf" if config.quant is None else "packed"
    results: dict[Target, dict[str, Any]] = {}
    with _alone(run.path):
        if first in targets or not _is_packed(run, folder):
            results[first] = (
                _hf(run, model, asked, scores, about["hf"]) if config.quant is None else _packed(run, model, folder, config.quant, held_out, scores)
            )
        for target in targets:
            if target in RUNTIMES:
                results[target] = _for_runtime(target, run, model, asked, held_out, scores, about[target])
            elif target not in results:
                results[target] = _hf(run, model, asked, scores, about[target])
    for target, figures in results.items():
        say(f"{figures['path']}: {size_of(figures)}")
        for line in figures["notes"]:
            if line not in about[target]:  # which is known before there are weights, and in the figures
                say(line)
    last = targets[0] if first not in results else first
    return results.pop(last) | ({"others": results} if results else {})


def targets_of(config: RunConfig, asked: Export) -> tuple[Target, ...]:
    """The targets asked for: packed, or hf for a float student, where none is named. Raises ConfigError for what a float student has not."""
    if config.quant is None:
        other = next((target for target in asked.targets or () if target != "hf"), None)
        if other is not None:
            raise ConfigError(f"the target {other} holds codes, but quant is null, so the student has none. Use the target hf.")
    return asked.targets or ("hf" if config.quant is None else "packed",)


def check_targets(config: RunConfig, asked: Export, model: PreTrainedModel, coverage: Coverage | None, tokenizer: Path) -> dict[Target, list[str]]:
    """What a person should know about targets before a student, whose modules are quantized, is trained: lines by target. Raises ConfigError for one that cannot hold the student as it is trained."""
    found = {}
    for target in targets_of(config, asked):
        if target in RUNTIMES:
            assert coverage is not None and config.quant is not None, "a float student has no such target"
            found[target] = RUNTIMES[target].check(config.quant, model.config, coverage, tokenizer, asked)
        elif target == "hf":
            found[target] = hf.check(coverage, float_part(model), asked)
    return found


def _coverage(run: RunDir) -> Coverage:
    try:
        return Coverage.from_json(run.coverage.read_text())
    except OSError as error:
        raise CheckpointError(f"{run.coverage}: cannot be read ({error.strerror}); it says how each weight was quantized. Restore that file.") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The only export of a run's folder at a time. Raises CheckpointError where there is another one, and for a folder that takes no file."""
    try:
        file = (folder / ".export").open("w")
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error.strerror}). Mend that, then export the run again.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another export of this run is at work. Wait for its end, then export again.") from None
        except OSError:
            pass  # a file system without locks
        yield


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
            f"{final}: could not be written ({error}). Mend that, or free space there, then `dqtrain export {run.path} --to {target}` or `dqtrain resume {run.path}`."
        ) from None


def _figures(
    run: RunDir, target: Target, model: PreTrainedModel, folder: Path, size: int, found: dict[str, Any], scores: Mapping[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What is known of a target, which is left in its folder too: parity.json, and README.md for people."""
    sizes = {"bytes": size, "fp32_bytes": float_bytes(model), "ratio": float_bytes(model) / size}
    figures = {"path": str(run.artifact(target)), **sizes, "parity": found, "notes": list(notes)}
    write_text(folder / "parity.json", json.dumps(found, indent=1))
    write_card(run, target, folder, figures, scores, model.config.is_encoder_decoder)
    return figures


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors*"))


def _packed(run: RunDir, model: PreTrainedModel, folder: Path, quant: Quant, held_out: AnyStream | None, scores: Mapping[str, Any]) -> dict[str, Any]:
    with _published(run, "packed") as partial:
        _copy_student(run, partial)
        name_in_config(partial, type(meta_model(run.student)).__name__)
        write_list(partial / LIST)  # config and tokenizer: artifact.json has the weights
        format.write(model, partial, export_about(_coverage(run), quant, folder.name))
        found = parity.verify_packed(model, partial, held_out)
        format.add_parity(partial, {name: (found | found["as_shipped"])[name] for name in PARITY})
        return _figures(run, "packed", model, partial, _weights_bytes(partial), found, scores)


def _hf(run: RunDir, model: PreTrainedModel, asked: Export, scores: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    config = run.load_config()
    packed = run.artifact("packed") if config.quant is not None else None
    rounded = hf.rounded(_coverage(run) if config.quant else None, float_part(model), asked)
    with _published(run, "hf") as partial:
        _copy_student(run, partial)
        hf.write(model, partial, asked)
        found = parity.verify(model, partial, packed, rounded)
        return _figures(run, "hf", model, partial, _weights_bytes(partial), found, scores, notes)


def _for_runtime(
    name: Target, run: RunDir, model: PreTrainedModel, asked: Export, held_out: AnyStream | None, scores: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    packed = run.artifact("packed")
    with _published(run, name) as partial, format.PackedTensors(packed, format.read_description(packed)) as tensors:
        target = RUNTIMES[name](tensors, model.config, asked)
        target.write(partial)
        found = parity.verify_target(model, packed, partial, target, held_out, asked.allow_inexact)
        if target.has_kernels and float_bytes(model) <= parity.WHOLE_BYTES:
            sibling = RUNTIMES[name](kernels.Widened(tensors), model.config, asked)
            found["kernels"] = kernels.measure(target, partial, sibling, model.config)
            notes = [*notes, *kernels.slower(target.program, found["kernels"])]
        elif target.has_kernels:
            found["kernels"] = {"not_measured": f"the student takes more than {parity.WHOLE_BYTES:,} bytes as floats"}
        return _figures(run, name, model, partial, found["bytes"]["file"], found, scores, notes)


def _copy_student(run: RunDir, folder: Path) -> None:
    for file in run.student.iterdir():  # config, generation config, tokenizer
        shutil.copy(file, folder)
