"""The model card: README.md of an exported folder, with the front matter that the Hub reads. Of one checkpoint it is the same text each time, but for times of kernels."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dqtrain.artifact.gguf.files import files_of
from dqtrain.config import RunConfig, Target
from dqtrain.errors import UserError
from dqtrain.files import write_text
from dqtrain.quant.modules import Coverage
from dqtrain.rundir import RunDir, model_directory

_RECIPE = {"student", "train", "quant", "distill"}
"""Blocks of the config that say how a student was made, without a path to anything of ours."""

_LOAD: dict[str, str] = {
    "packed": '```python\nimport dqtrain\nfrom transformers import {auto}, AutoTokenizer\nmodel, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n```\n',
    "hf": '```python\nfrom transformers import {auto}, AutoTokenizer\nmodel, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n```\n',
    "compressed-tensors": "With `pip install compressed-tensors`:\n\n"
    '```python\nfrom transformers import {auto}, AutoTokenizer\nmodel, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n```\n',
    "vllm": "```\nvllm serve .\n```\n\nor `dqtrain serve .`, which looks for the same program.\n",
    "openvino": "With `pip install openvino`; every graph of the folder reads `model.bin`:\n\n"
    '```python\nimport openvino\nmodel = openvino.compile_model(openvino.Core().read_model("{graph}", "model.bin"), "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n```\n\n'
    'or `dqtrain generate . "Once upon a time"`.\n',
    "gguf": '```\nllama-cli -m {gguf} -p "Once upon a time"\n```\n',
}


def write_card(run: RunDir, target: Target, folder: Path, figures: Mapping[str, Any], scores: Mapping[str, Any], is_encoder_decoder: bool) -> None:
    """README.md of a target: recipe, sizes and proof (`export.export`'s `figures`), scores of the checkpoint (as in result.json), licence, and how to load it.

    A LICENSE that lies beside the teacher is copied. Raises OSError.
    """
    config = run.load_config()
    coverage = Coverage.from_json(run.coverage.read_text()) if config.quant is not None else None
    teacher, licence, text = _teacher(config)
    if text is not None:
        shutil.copy(text, folder / "LICENSE")
    reader = "vllm" if target == "compressed-tensors" and _layout(folder) == "vllm" else target
    auto = "AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM"
    recipe = config.model_dump(mode="json", include=_RECIPE, exclude={"student": {"init_from"}}, exclude_defaults=True)
    parts = [
        _front_matter(config, target, reader, licence or ("other" if text else None), is_encoder_decoder),
        f"# {run.path.name}, {target}",
        f"Trained by dqtrain for {scores['step']:,} steps{f', taught by {teacher}' if teacher else ''}.",
        "## Use",
        _LOAD.get(reader, '```\ndqtrain generate . "Once upon a time"\n```\n')
        .format(auto=auto, graph="decoder.xml" if is_encoder_decoder else "model.xml", gguf=next((file.name for file in files_of(folder)), None))
        .rstrip(),
        *(["Activations are float here, and were quantized in training."] if target == "hf" and config.quant and config.quant.activations else []),
        "## Size",
        f"{size_of(figures)}.",
        "## Scores",
        _table("score", scores.get("test") or {}) or "Not measured: the run has no test split.",
        "## Proof",
        "This folder against the student as it was trained, measured when it was exported.",
        _table("figure", figures["parity"]),
        *(["\n".join(f"- {note}" for note in figures["notes"])] if figures["notes"] else []),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).rstrip()}\n```",
        *([] if coverage is None else [f"```\n{coverage.table()}\n```"]),
        "## Licence",
        f"{licence}, as the teacher's card states."
        if licence
        else "The teacher's: LICENSE."
        if text
        else "No licence could be read beside the teacher."
        if teacher
        else "Not stated.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def size_of(figures: Mapping[str, Any]) -> str:
    """What a person is told of an artifact's size (`export.export`'s `figures`)."""
    return f"{figures['bytes']:,} bytes, {figures['ratio']:.2f} times smaller than the {figures['fp32_bytes']:,} bytes of the model in fp32"


def _layout(folder: Path) -> str:
    """Whom a directory of compressed-tensors is for."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layout"]


def _front_matter(config: RunConfig, target: Target, reader: str, licence: str | None, is_encoder_decoder: bool) -> str:
    quant = config.quant
    content: dict[str, Any] = {
        "library_name": {"packed": "dqtrain", "gguf": "llama.cpp", "onnx": "onnxruntime", "openvino": "openvino", "vllm": "vllm"}.get(reader, "transformers")
    }
    if licence:
        content["license"] = licence
    name = _hub_name(config.teacher.path) if config.teacher else None
    if name:
        content |= {"base_model": name, "base_model_relation": "finetune" if quant is None else "quantized"}
    content["pipeline_tag"] = "text2text-generation" if is_encoder_decoder else "text-generation"
    content["tags"] = ["dqtrain", *(["distillation"] if config.teacher else []), *(["quantized"] if quant else []), target]
    if quant is not None:
        bits = dict.fromkeys(block.bits for block in (quant.linears, quant.embeddings) if block is not None)
        content["tags"] += [f"{width}-bit" if isinstance(width, int) else width for width in bits]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _teacher(config: RunConfig) -> tuple[str | None, str | None, Path | None]:
    """What a stranger may know the teacher by, the licence that its card names, and the file of its text; None where there is none."""
    if config.teacher is None:
        return None, None, None
    path, stated, text = config.teacher.path, None, None
    try:
        folder = model_directory(path)
        text = next((folder / name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (folder / name).is_file()), None)
        card = (folder / "README.md").read_text()
        stated = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
    except (UserError, OSError, ValueError, yaml.YAMLError):  # it may be gone by now, or be no card of the Hub
        pass
    licence = stated.get("license") if isinstance(stated, dict) else None
    return _hub_name(path) or path.name, licence if isinstance(licence, str) else None, text


def _hub_name(path: Path) -> str | None:
    """NAME of hf:NAME@COMMIT."""
    text = str(path)
    return text.removeprefix("hf:").partition("@")[0] if text.startswith("hf:") else None


def _table(head: str, figures: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in _flat(figures)]
    return "\n".join([f"| {head} | |", "| --- | --- |", *rows]) if rows else ""


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
