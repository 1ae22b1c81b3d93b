"""What a choice of quantization does to a model, before any training: coverage, bytes, error of every weight, and whether words become alike.

The figures are made by `artifact.size` and `quant.diagnose`; here models are opened, weights are read one at a time, and the figures
are drawn for a terminal or printed as JSON. Learned scales stand where training would start them: at the least squared error.
"""

import contextlib
import copy
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from dqtrain.artifact import hf
from dqtrain.artifact.export import RUNTIMES
from dqtrain.artifact.size import MIB, FloatPart, artifact_bytes, export_about, float_part, num_elements, paper_bytes
from dqtrain.config import ActivationQuant, Bits, Export, Quant, WeightQuant, load_config
from dqtrain.data.prepare import tokenizer_files
from dqtrain.errors import ConfigError, DataError
from dqtrain.models.making import empty_model, read_model_config
from dqtrain.models.weights import stored_tensors
from dqtrain.quant.diagnose import SHADES, Homogeneity, relative, similarity_picture, weight_statistics
from dqtrain.quant.grid import compute
from dqtrain.quant.modules import Coverage, CoverageRow, quantize_model
from dqtrain.quant.scale import initial_learned
from dqtrain.rundir import RunDir
from dqtrain.tensor_file import MappedFiles

NUM_WORDS = 48
"""Words in the picture of their similarities."""

GAP = 2
"""Columns between two pictures."""


def shorthand(text: str, grid: str = "dynamic", group_size: int | None = None) -> Quant:
    """`W-E-A`, the bits of linears, word embeddings and activations, as settings.

    Linears per tensor, or per group of `group_size` inputs; embeddings per row; both on `grid`. Positions 8 bit per row on the dynamic
    grid, norms and biases bf16, activations per token. 32 leaves linears or embeddings float, 32 or 16 activations.
    Raises ConfigError for anything else, with config.py's own message for a grid that does not exist at a width.
    """
    form = "give W-E-A, the bits of linears, embeddings and activations, such as 2-2-8 or ternary-ternary-8"
    words = text.split("-")
    widths = [*map(str, get_args(Bits)), "32"]
    if len(words) != 3:
        raise ConfigError(f"--quant {text}: has {len(words)} part{'s' * (len(words) != 1)}, but must have 3; {form}.")
    for word, name in zip(words[:2], ("linears", "embeddings"), strict=True):
        if word not in widths:
            raise ConfigError(f"--quant {text}: {name} have `{word}` bits, but must have one of {', '.join(widths)} (float); {form}.")
    if words[2] not in ("4", "8", "16", "32"):
        raise ConfigError(f"--quant {text}: activations have `{words[2]}` bits, but must have one of 4, 8, 16 (float), 32 (float); {form}.")
    if words[0] == words[1] == "32":
        raise ConfigError(f"--quant {text}: leaves linears and embeddings float, so that there is nothing to look at; {form}.")
    if group_size is not None and words[0] == "32":
        raise ConfigError(f"--group-size {group_size}: is for linears, which --quant {text} leaves float; remove it.")

    def weights(kind: str, word: str, granularity: str, group_size: int | None = None) -> WeightQuant | None:
        if word == "32":
            return None
        bits = word if word == "ternary" else int(word)
        try:
            return WeightQuant.model_validate({"grid": grid, "bits": bits, "granularity": granularity, "group_size": group_size})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            cause, where = problem.get("ctx", {}).get("error"), ".".join(map(str, problem["loc"]))
            message = cause or f"{where} is {problem['input']!r}, but {problem['msg'][0].lower()}{problem['msg'][1:]}"
            raise ConfigError(f"--quant {text}: {kind}: {message}.") from None

    return Quant(
        linears=weights("linears", words[0], "per_group" if group_size is not None else "per_tensor", group_size),
        embeddings=weights("embeddings", words[1], "per_row"),
        positions=WeightQuant(grid="dynamic", bits=8, granularity="per_row"),
        vectors="bf16",
        activations=ActivationQuant(bits=4 if words[2] == "4" else 8) if words[2] in ("4", "8") else None,
    )


@dataclass(frozen=True)
class Source:
    """A float model: its modules without values, and its weights one at a time."""

    name: str
    model: PreTrainedModel  # on the meta device, unquantized
    read: Callable[[str], Tensor] | None  # a parameter by its first name, in any float dtype; None where there are no weights
    nonzero_buffers: Collection[str] = ()
    tokenizer: Path = Path()
    quant: Quant | None = None  # how a finished run was quantized
    rounded: bool = False  # whether it rounded its matrices to bf16 first
    learned: dict[str, Tensor] = field(default_factory=dict)  # what its quantizers have learned, by name


def open_model(path: Path) -> Source:
    """A Hugging Face directory of a causal or encoder-decoder model, with or without weights, or the chosen checkpoint of a finished run.

    Weights stay in their safetensors files where these name them as the model does, or else the model is loaded once, in fp32.
    Raises ConfigError, or CheckpointError for an unfinished or damaged run.
    """
    run = RunDir(path)
    if run.config.is_file():
        from dqtrain import checkpoint  # which imports deepspeed: seconds
        from dqtrain.artifact.load import chosen_checkpoint

        folder = chosen_checkpoint(run)
        model = empty_model(run.student)
        learned = checkpoint.fill(model, folder)
        trained = run.load_config()
        return replace(_loaded(str(path), model, run.student), quant=trained.quant, rounded=trained.train.rounds_matrices, learned=learned)
    if (path / "artifact.json").is_file():
        raise ConfigError(f"{path}: is a packed artifact, whose weights are codes already. Name the run that it came from, or a float model.")
    config = _read_config(path)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            empty = auto.from_config(config, dtype=torch.float32)
        if not _has_weights(path):
            return Source(str(path), empty, None, tokenizer=path)
        streamed = _stream(path, empty)
        if streamed is not None:
            return Source(str(path), empty, *streamed, tokenizer=path)
        model, report = auto.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{path}: transformers cannot load it ({error}). Save the model again with save_pretrained.") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"{path}: its files lack {len(missing)} tensors, such as {missing[0]}, which would be random. Save the model again whole.")
    return _loaded(str(path), model, path)


def _read_config(folder: Path) -> PretrainedConfig:
    """The config of a causal or encoder-decoder language model. Raises ConfigError."""
    try:
        written = json.loads((folder / "config.json").read_text())
        encodes = bool(written.get("is_encoder_decoder")) or written.get("model_type") in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        config = AutoConfig.from_pretrained(folder, local_files_only=True) if encodes else None
    except (OSError, ValueError, KeyError, AttributeError):
        config = None  # which the next line tells
    if config is None or not config.is_encoder_decoder:
        config = read_model_config(folder)
    elif config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{folder}: holds a {config.model_type}, but a causal or encoder-decoder language model is needed. Give another directory.")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        raise ConfigError(f"{folder}: is quantized already (quantization_config: {method}), but a float model is needed. Give the model that it was made from.")
    return config


def _has_weights(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any((folder / name).exists() for name in names) or any(folder.glob("model-*.safetensors"))


def _stream(folder: Path, model: PreTrainedModel) -> tuple[Callable[[str], Tensor], list[str]] | None:
    """(reader of one parameter, buffers that are not 0) over safetensors files; None where only transformers knows what the files mean.

    That is so where it would rename, split or fuse tensors, and where a tied weight lies in the files more than once: it then looks
    whether the copies are equal.
    """
    stored, files = stored_tensors(folder), MappedFiles()
    prefix = f"{model.base_model_prefix}."

    def keys_of(name: str) -> set[str]:
        return {name, name.removeprefix(prefix), prefix + name} & stored.keys()  # a base model's files lack the prefix, or the other way round

    keys: dict[str, str] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, aliases in names.items():
        found = set().union(*map(keys_of, aliases))
        if len(found) != 1:
            return None
        keys[aliases[0]] = key = found.pop()
        if files.shape(stored[key], key) != tuple(parameter.shape):
            return None
    nonzero = [name for name, _ in model.named_buffers() for key in keys_of(name) if files.read(stored[key], key).any()]
    return lambda name: files.read(stored[keys[name]], keys[name]), nonzero


def _loaded(name: str, model: PreTrainedModel, tokenizer: Path) -> Source:
    state = model.state_dict()
    nonzero = [name for name, buffer in model.named_buffers() if name in state and buffer.any()]
    return Source(name, _on_meta(model), dict(model.named_parameters()).__getitem__, nonzero, tokenizer)


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without values, in which the same weights are tied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Column:
    """One way to quantize the model, a column of the tables."""

    label: str
    quant: Quant
    coverage: Coverage
    floats: FloatPart


def columns_of(source: Source, quants: dict[str, Quant], rounded: bool = False) -> list[Column]:
    """Quantize the model's modules, without values, in each way, their matrices `rounded` to bf16 first or not. Raises ConfigError."""
    columns = []
    for label, quant in quants.items():
        model = _on_meta(source.model)
        coverage = quantize_model(model, quant, initialise=False, rounded=rounded)
        columns.append(Column(label, quant, coverage, float_part(model, source.nonzero_buffers)))
    return columns


def sizes(source: Source, columns: list[Column]) -> dict[str, Any]:
    """Bytes, ratios to fp32 and bits per parameter."""
    first = columns[0]
    elements = num_elements(first.coverage, first.floats.other_elements)
    fp32 = 4 * elements

    def figures(num_bytes: int) -> dict[str, Any]:
        return {"bytes": num_bytes, "ratio": fp32 / num_bytes, "bits_per_parameter": 8 * num_bytes / elements}

    result: dict[str, Any] = {"parameters": elements, "fp32": figures(fp32), "as_the_papers_count": {}, "artifact": {}, "tokenizer_bytes": None}
    for column in columns:
        paper = paper_bytes(column.coverage, column.floats.other_elements)
        result["as_the_papers_count"][column.label] = {
            "linears_bytes": paper.linears,
            "embeddings_bytes": paper.embeddings,
            "floats_bytes": paper.floats,
            "total": figures(paper.total),
            "with_row_scales": figures(paper.total_with_row_scales),
        }
        ours = artifact_bytes(column.coverage, column.floats, export_about(column.coverage, column.quant))
        result["artifact"][column.label] = {"model.safetensors": figures(ours.weights), "artifact.json": ours.description, "total": figures(ours.total)}
    with contextlib.suppress(DataError):  # there is none
        result["tokenizer_bytes"] = sum(file.stat().st_size for file in tokenizer_files(source.tokenizer))
    return result


def measure(source: Source, columns: list[Column], progress: Callable[[str], None] = lambda message: None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(errors, homogeneity of each table of words), every weight read once.

    Errors: relative squared error of each weight by column, from the worst, and in total, weighted by elements. Homogeneity: mean cosine,
    effective rank and picture rows, float and by column. Raises ConfigError for weights that are not finite.
    """
    assert source.read is not None
    modules: dict[str, dict[str, float]] = {}
    sums = {column.label: [0.0, 0.0] for column in columns}
    tables = []
    looked_at = [row for row in columns[0].coverage.rows if row.quantizer or row.kind == "embeddings"]
    for i, first in enumerate(looked_at):
        progress(f"{i + 1}/{len(looked_at)} {first.name}")
        weight = source.read(first.name)
        words = _Words(first, weight) if first.kind == "embeddings" else None
        for column in columns:
            row = next(row for row in column.coverage.rows if row.name == first.name)
            if row.quantizer is None:
                continue
            learned = [source.learned[name] for name in row.learned_names if name in source.learned and column.quant is source.quant]
            if len(learned) < len(row.learned_names):
                learned = list(initial_learned(weight, row.quantizer, row.name))
            elif not weight.isfinite().all():
                raise ConfigError(f"{row.name} holds NaN or infinite values. Use a run whose weights are finite.")
            scales = row.quantizer.scales(weight, *learned)
            found = weight_statistics(weight, row.quantizer, scales)
            modules.setdefault(row.name, {})[column.label] = found.relative_error
            sums[column.label][0] += float(found.squared_error)
            sums[column.label][1] += float(found.squared_norm)
            if words is not None:
                words.add(column.label, row.quantizer.value(weight, scales))
        if words is not None:
            tables.append(words.figures())
    progress("")
    worst_first = sorted(modules.items(), key=lambda item: max(item[1].values()), reverse=True)
    return {"modules": dict(worst_first), "total": {label: relative(*pair) for label, pair in sums.items()}}, tables


class _Words:
    """Homogeneity of one table of words, float and quantized."""

    def __init__(self, row: CoverageRow, weight: Tensor) -> None:
        count = min(NUM_WORDS, row.shape[0])
        self.name, self.shape = row.name, row.shape
        self.rows = [i * row.shape[0] // count for i in range(count)]
        self.by_label: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, Tensor] = {}
        self.add("float", weight)

    def add(self, label: str, table: Tensor) -> None:
        found = Homogeneity(table.shape[1], table.device)
        found.add(table)
        self.by_label[label] = {"mean_cosine": found.mean_cosine, "effective_rank": found.effective_rank}
        self.samples[label] = compute(table[self.rows]).clone()

    def figures(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape, "rows": self.rows, "tables": self.by_label, "samples": self.samples}


def draw_coverage(coverage: Coverage, width: int) -> str:
    """Coverage's own table; where a line is too long, the reason goes below it."""
    head, *lines = coverage.table().split("\n")
    cut = head.index("why float")
    result = [f"  {head if len(head) + 2 <= width else head[:cut].rstrip()}"]
    for line in lines:
        reason = line[cut:] if line[cut - 2 : cut] == "  " else ""
        if reason and len(line) + 2 > width:
            result += [f"  {line[:cut].rstrip()}", *textwrap.wrap(reason, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        else:
            result.append(f"  {line}")
    return "\n".join(result)


def draw_sizes(found: dict[str, Any], width: int) -> str:
    """The sizes as a table."""
    lines = [("", "bytes", "MiB", "smaller", "bits per parameter")]

    def line(label: str, figures: dict[str, Any]) -> None:
        num_bytes = figures["bytes"]
        lines.append((label, f"{num_bytes:,}", f"{num_bytes / MIB:.2f}", f"{figures['ratio']:.2f}x", f"{figures['bits_per_parameter']:.3f}"))

    line("float, fp32", found["fp32"])
    paper = list(found["as_the_papers_count"].values())
    assert all(p == paper[0] for p in paper), "the papers' count knows bits alone"
    line("as the papers count", paper[0]["total"])
    line("  and an fp32 scale per word", paper[0]["with_row_scales"])
    for label, figures in found["artifact"].items():
        line(f"our model.safetensors, {label}", figures["model.safetensors"])
        line("  and artifact.json", figures["total"])
    if found["tokenizer_bytes"] is not None:
        lines.append(("the tokenizer beside it", f"{found['tokenizer_bytes']:,}", f"{found['tokenizer_bytes'] / MIB:.2f}", "", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"  {line[0].ljust(widths[0])}" + "".join(f"  {cell.rjust(width)}" for cell, width in zip(line[1:], widths[1:], strict=True)) for line in lines]
    note = "The papers count linear weights and word embeddings at their bits and all else, positions included, at 32; the tied head once."
    return "\n".join([*map(str.rstrip, text), *_notes(note, width)])


def draw_errors(found: dict[str, Any], width: int) -> str:
    """The errors as a table, and a bar each where `width` has room for three columns of it; without room even for names, these lose their beginning."""
    labels = list(found["total"])
    number = max(9, *map(len, labels))
    longest = max(map(len, found["modules"]), default=5)
    bar = min(24, (width - 2 - longest) // len(labels) - number - 3)
    bar = bar if bar >= 3 else 0
    name_width = max(16, min(longest, width - 2 - len(labels) * (number + 3 + bar)))
    top = max((e for errors in found["modules"].values() for e in errors.values() if math.isfinite(e)), default=0.0) or 1.0
    lines = [f"  {'':{name_width}}" + "".join(f"  {label:>{number}} {'':{bar}}" for label in labels)]

    def line(name: str, errors: dict[str, float]) -> None:
        short = name if len(name) <= name_width else "…" + name[len(name) - name_width + 1 :]
        cells = [f"  {_number(errors[label]):>{number}} {_bar(errors[label] / top, bar):{bar}}" for label in labels]
        lines.append(f"  {short:{name_width}}" + "".join(cells))

    for name, errors in found["modules"].items():
        line(name, errors)
    line("total", found["total"])
    return "\n".join(map(str.rstrip, lines))


def draw_words(found: dict[str, Any], width: int) -> str:
    """Homogeneity of one table of words: the figures, and pictures side by side, as many as fit into `width` columns."""
    size = f"{found['shape'][0]} x {found['shape'][1]}"
    name_width = max(map(len, found["tables"]))
    lines = [f"  {found['name']}, {size}", f"  {'':{name_width}}  mean cosine  effective rank"]
    for label, figures in found["tables"].items():
        lines.append(f"  {label:{name_width}}  {_or_dash(figures['mean_cosine'], '.4f'):>11s}  {_or_dash(figures['effective_rank'], '.1f'):>14s}")
    columns = min(len(found["rows"]), max(24, (width - 2 - GAP * (len(found["tables"]) - 1)) // len(found["tables"]) // 2 * 2))
    words = [i * len(found["rows"]) // columns for i in range(columns)]
    per_band = max(1, (width - 2 + GAP) // (columns + GAP))
    shades = ", ".join(f"{shade} above {i / len(SHADES):.1f}" for i, shade in enumerate(SHADES) if i)
    lines += ["", *_notes(f"Cosines of {columns} words, evenly spaced rows of the table, each with each ({shades}):", width)]
    pictures = {label: similarity_picture(sample, words, columns).split("\n") for label, sample in found["samples"].items()}
    labels = list(pictures)
    for start in range(0, len(labels), per_band):
        band = labels[start : start + per_band]
        lines += ["", "  " + (" " * GAP).join(f"{label[:columns]:{columns}}" for label in band)]
        lines += ["  " + (" " * GAP).join(parts) for parts in zip(*(pictures[label] for label in band), strict=True)]
    return "\n".join(map(str.rstrip, lines))


def _notes(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, min(width, 100), initial_indent="  ", subsequent_indent="  ")


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.2e}"


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _bar(share: float, width: int) -> str:
    """A bar of up to `width` columns, in eighths of one."""
    eighths = round(8 * width * min(1.0, share))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _finite(value: Any) -> Any:
    """Plain JSON: NaN and infinity, which it does not have, become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items() if key != "samples"}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose(text: str | None, config: Path | None, grids: Sequence[str], group_size: int | None) -> dict[str, Quant]:
    """What the command line asks for, by the label of its column; nothing when it asks for none. Raises ConfigError."""
    if text is None and (grids or group_size is not None):
        raise ConfigError("--grid and --group-size go with --quant W-E-A, which is not given; add it, such as --quant 2-2-8.")
    if text is not None:
        return {grid: shorthand(text, grid, group_size) for grid in grids or ["dynamic"]}
    if config is None:
        return {}
    quant = load_config(config).quant
    if quant is None:
        raise ConfigError(f"{config}: quant is null, so there is nothing to look at; give a config that quantizes, or --quant 2-2-8.")
    return {config.stem: quant}


def inspect(
    path: Path, text: str | None = None, config: Path | None = None, grids: Sequence[str] = (), group_size: int | None = None, as_json: bool = False
) -> int:
    """Print what the quantization of `--quant`, `--config`, or of the run itself does to a model; the exit code. Raises ConfigError."""
    quants = choose(text, config, grids, group_size)
    source = open_model(path)
    rounded = config is not None and text is None and load_config(config).train.rounds_matrices
    if not quants:
        if source.quant is None:
            raise ConfigError(f"{path} is a float model, and nothing says how to quantize it; give --quant, such as --quant 2-2-8, or --config FILE.yaml.")
        quants, rounded = {"trained": source.quant}, source.rounded
    columns = columns_of(source, quants, rounded)
    asked = load_config(config).export if config is not None else RunDir(path).load_config().export if RunDir(path).config.is_file() else Export()
    if as_json:
        print(json.dumps(_finite(dict(_figures(source, columns, asked)))))
        return 0
    try:
        "█▏…".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # of a pipe under an old locale
    width = max(48, shutil.get_terminal_size((120, 24)).columns)
    what = f"{text} on {', '.join(quants)}" if text else f"the quant block of {config}" if config else "as it was trained"
    print(f"{source.name}: {type(source.model).__name__}, {what}")
    for section in _sections(source, columns, width, asked):
        print(section, flush=True)
    return 0


def targets(source: Source, columns: list[Column], asked: Export) -> dict[str, list[str]]:
    """What the other targets of a config hold of each way: by its label, one line for each thing to know. Raises ConfigError for a model that one does not run."""
    found: dict[str, list[str]] = {column.label: [] for column in columns}
    for target in asked.targets or ():
        for column in columns:
            if target == "hf":
                found[column.label] += hf.describe(column.coverage, column.floats, asked)
            elif target in RUNTIMES:
                found[column.label] += RUNTIMES[target].describe(column.quant, source.model.config, column.coverage, column.floats.shapes, asked)
    return {label: lines for label, lines in found.items() if lines}


def _figures(source: Source, columns: list[Column], asked: Export) -> Iterator[tuple[str, Any]]:
    """The parts of the JSON object."""
    yield "model", source.name
    yield "class", type(source.model).__name__
    yield "quant", {column.label: column.quant.model_dump(mode="json") for column in columns}
    yield "coverage", {column.label: json.loads(column.coverage.to_json()) for column in columns}
    yield "sizes", sizes(source, columns)
    yield "targets", targets(source, columns, asked)
    errors, words = measure(source, columns, _progress) if source.read else (None, None)
    yield "errors", errors
    yield "homogeneity", words


def _sections(source: Source, columns: list[Column], width: int, asked: Export) -> Iterator[str]:
    """The parts of the text, as soon as each is known."""
    found = sizes(source, columns)
    yield f"\nCOVERAGE\n{draw_coverage(columns[0].coverage, width)}"
    if len(columns) > 1:
        yield "\n".join(_notes(f"The same parameters on {', '.join(column.label for column in columns[1:])}.", width))
    yield f"\nSIZES, {found['parameters']:,} parameters\n{draw_sizes(found, width)}"
    for label, said in targets(source, columns, asked).items():
        yield "\n".join([f"\nTARGETS of {label}", *(line for text in said for line in _notes(text, width))])
    if source.read is None:
        yield f"\nErrors and homogeneity need weights, and {source.name} holds a config.json alone."
        return
    errors, words = measure(source, columns, _progress)
    yield f"\nRELATIVE SQUARED ERROR of quantized weights, worst first\n{draw_errors(errors, width)}"
    for table in words:
        yield f"\nHOMOGENEITY of word embeddings (a mean cosine of 1: all words are alike)\n{draw_words(table, width)}"


def _progress(message: str) -> None:
    """Show where a long measurement is, to a person alone."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message[:70]}", end="", file=sys.stderr, flush=True)
