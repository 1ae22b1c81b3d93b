"""The tables of docs/artifacts.md are what running every family, target and grid gives. With WRITE_TABLES=1 in the environment they are written anew."""

import functools
import itertools
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import test_gguf
import torch
from families import FAMILIES
from test_compressed import A8, LEARNED, made, quant
from test_ggml_blocks import by_package, drawn
from test_gguf import GATED, AutoModel
from test_onnx import Cases
from test_packed import about, settings
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, T5Config

from dqtrain.artifact import format, hf, parity
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.export import RUNTIMES
from dqtrain.artifact.gguf.blocks import as_tensor, fit, pack, rows_of
from dqtrain.artifact.load import load_artifact
from dqtrain.config import BITS_OF_GRID, Export
from dqtrain.errors import ConfigError
from dqtrain.models.making import load_model
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import quantize_model, served_parameters

DOC = Path(__file__).parents[2] / "docs/artifacts.md"
GRIDS = [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths]
WIDE = {**test_gguf.WIDE, "num_hidden_layers": 1, "intermediate_size": 256}
CONFIGS = [
    GPT2Config(n_embd=256, n_inner=256, n_layer=1, n_head=4, n_positions=16, vocab_size=300),
    LlamaConfig(**WIDE, vocab_size=300),
    MistralConfig(**WIDE, sliding_window=None, vocab_size=300),
    Qwen2Config(**WIDE, vocab_size=300, tie_word_embeddings=True),
    Qwen3Config(**WIDE, head_dim=64, vocab_size=300),
    T5Config(**GATED, d_model=256, num_layers=1, num_decoder_layers=1, vocab_size=300, decoder_start_token_id=0),
]
SHAPES = {config.model_type: functools.partial(AutoModel, config) for config in CONFIGS}  # with rows of 256, which all blocks divide
SHAPES |= {name: make for name, make in FAMILIES.items() if name not in SHAPES}


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def table(columns):
    """Lines of a table of what each column, (title, part), says of each (grid, bits): a row for a grid, one column for parts of a title that say the same, and
    below it those that are refused throughout."""
    alike = {}
    for (title, part), said in columns.items():
        alike.setdefault((title, tuple(said.items())), []).append(part)
    num_parts = Counter(title for title, _ in columns)
    titles = {key: key[0] + ("all" if len(parts) == num_parts[key[0]] else ", ".join(parts)) for key, parts in alike.items()}
    refused = [key for key in alike if set(dict(key[1]).values()) == {"refused"}]
    shown = [key for key in alike if key not in refused]
    lines = [row("grid", *(titles[key] for key in shown)), row(*["---"] * (1 + len(shown)))]
    for grid, widths in BITS_OF_GRID.items():
        cells = []
        for _, said in shown:
            of_type = {}
            for bits in widths:
                of_type.setdefault(dict(said)[grid, bits], []).append(str(bits))
            cells.append("; ".join(type if len(of_type) == 1 else f"{', '.join(bits)}: {type}" for type, bits in of_type.items()))
        lines.append(row(grid, *cells))
    return [*lines, "", f"Refused on every grid: {'; '.join(titles[key] for key in refused) or 'none'}."]


def blocks_table():
    """What ggml has for a grid, each cell packed and read back by ggml's dequantizer."""
    cases = {
        "rows of 256 k": ("per_row", None, 512, True),
        "rows of 32 k": ("per_row", None, 96, True),
        "groups of 128": ("per_group", 128, 512, True),
        "groups of 64": ("per_group", 64, 512, True),
        "groups of 16": ("per_group", 16, 512, True),
        "fp32 scales": ("per_row", None, 512, False),
    }
    found = {("", name): {} for name in cases}
    for (grid, bits), (name, (granularity, group_size, columns, portable)) in itertools.product(GRIDS, cases.items()):
        quantizer = WeightQuantizer(grid, bits, granularity, group_size, 0, portable)
        fits = fit(quantizer, columns)
        if fits.is_refused:
            found["", name][grid, bits] = "refused"
            continue
        codes, scale, zero_point = drawn(quantizer, (5, columns))
        read = as_tensor(by_package(pack(rows_of(codes, scale, zero_point, quantizer), fits.type), fits.type), quantizer)
        is_exact = torch.equal(read, quantizer.dequantize(codes, scale, zero_point))
        assert is_exact != fits.rounds_scales
        found["", name][grid, bits] = fits.type if is_exact else f"inexact {fits.type}"
    return table(found)


def digits_table():
    """What ONNX Runtime has for a grid, each cell packed and multiplied and looked up by it."""
    shapes = {
        "rows": ("per_row", None, 256, True),
        "groups of 128": ("per_group", 128, 256, True),
        "groups of 16": ("per_group", 16, 48, True),
        "groups of 24": ("per_group", 24, 48, True),
        "fp32 scales": ("per_row", None, 40, False),
    }
    found = {("", name): {} for name in shapes}
    for grid, bits in GRIDS:
        cases, values = Cases(), {}
        for name, (granularity, group_size, columns, portable) in shapes.items():
            value, fits = cases.add(name, WeightQuantizer(grid, bits, granularity, group_size, 0, portable), columns, is_table=True)
            found["", name][grid, bits] = "refused" if fits.is_float else fits.type
            if value is not None:
                values[name] = value.numpy()
        with tempfile.TemporaryDirectory() as folder:
            read = cases.run(Path(folder))
        assert all((rows == values[name]).all() for name in values for rows in read[name])
    return table(found)


def is_trained(model, loaded):
    found = dict(loaded.named_parameters())
    return all(torch.equal(found[name], tensor) for name, tensor in served_parameters(model))


def in_packed(model, packed, quant):
    assert is_trained(model, load_artifact(packed, "dense"))
    return "exact"


def in_hf(model, packed, quant):
    """As transformers reads what is written of the student."""
    folder = packed / "hf"
    folder.mkdir()
    model.config.save_pretrained(folder)
    hf.write(model, folder, Export())
    assert is_trained(model, load_model(folder))
    return "exact"


def in_runtime(name, **asked):
    """What a target of another program has codes in, each weight written and read back by that program; or that it is refused before training."""

    def held(model, packed, quant):
        folder = packed / "-".join([name, *asked.values()])
        folder.mkdir()
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            try:
                RUNTIMES[name].check(quant, model.config, tensors.coverage, packed, Export(**asked))
            except ConfigError:
                return "refused"
            target = RUNTIMES[name](tensors, model.config, Export(**asked))
            target.write(folder)
            found = parity.verify_weights(model, folder, target)
        assert found["bit_identical"] == found["tensors"]
        return ", ".join(type for type in found["types"] if type not in ("F32", "BF16"))

    return held


TARGETS = {
    "packed: ": in_packed,
    "hf: ": in_hf,
    "gguf: ": in_runtime("gguf"),
    "onnx: ": in_runtime("onnx"),
    "compressed-tensors for transformers: ": in_runtime("compressed-tensors", compressed_tensors="transformers"),
    "compressed-tensors for vLLM: ": in_runtime("compressed-tensors", compressed_tensors="vllm"),
}


def families_table(tokenizer, targets):
    """Every family on every grid: what each target holds of it."""
    torch.manual_seed(0)
    found = {(target, family): {} for target in targets for family in SHAPES}
    for (grid, bits), (family, make) in itertools.product(GRIDS, SHAPES.items()):
        model, quant = make(), settings(bits, bits, None, None, grid, "per_row")
        coverage = quantize_model(model, quant)
        with tempfile.TemporaryDirectory() as place:
            packed = Path(place) / "packed"
            shutil.copytree(tokenizer, packed)
            model.config.save_pretrained(packed)
            format.write(model, packed, about(quant, coverage))
            for target, held in targets.items():
                found[target, family][grid, bits] = held(model, packed, quant)
    return table(found)


def compressed_table(layout):
    """Ways to quantize every family, in one layout of compressed-tensors: written and read back, weight by weight."""
    symmetric = {"bits": 8, "asymmetric": "nowhere"}
    ways = {
        "2-2-16": quant(2, 2),
        "4-4-16, groups": quant(4, 4, granularity="per_group", group_size=16),
        "4-4-16, affine rows": quant(4, 4, grid="affine", granularity="per_row"),
        "8-8-8": quant(8, 8, 8, A8),
        "8-8-8, learned": quant(8, 8, 8, LEARNED),
        "8-8-8, one scale for a tensor": quant(8, 8, 8, {"bits": 8, "scale": "per_tensor"}),
        "2-2-8": quant(2, 2, 8, A8),
        "2-2-8, no zero points": quant(2, 2, 8, symmetric),
        "2-2-8, learned": quant(2, 2, 8, LEARNED),
    }
    lines = [row("way", *FAMILIES), row(*["---"] * (1 + len(FAMILIES)))]
    with tempfile.TemporaryDirectory() as place:
        for number, (way, settings) in enumerate(ways.items()):
            cells = []
            for family in FAMILIES:
                model, packed, _ = made(family, settings, Path(place) / f"{family}-{number}")
                with format.PackedTensors(packed, format.read_description(packed)) as tensors:
                    try:
                        target = CompressedTarget(tensors, model.config, Export(compressed_tensors=layout))
                    except ConfigError:
                        cells.append("refused")
                        continue
                    if target.plan.refused:
                        cells.append("refused")
                        continue
                    folder = Path(place) / f"{family}-{number}-out"
                    folder.mkdir()
                    target.write(folder)
                    found = parity.verify_weights(model, folder, target)
                    assert found["bit_identical"] == found["tensors"]
                    cells.append("dense" if target.plan.dequantize else "exact")
            lines.append(row(way, *cells))
    return lines


def compare(name, lines):
    before, mark, rest = DOC.read_text().partition(f"<!-- {name} -->\n")
    table, end, after = rest.partition(f"<!-- end of {name} -->")
    if os.environ.get("WRITE_TABLES"):
        DOC.write_text(before + mark + "\n".join(lines) + "\n" + end + after)
    else:
        assert table.splitlines() == lines


def test_blocks_that_hold_a_grid():
    compare("blocks", blocks_table())


def test_digits_that_hold_a_grid():
    compare("digits", digits_table())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "vllm"])
def test_what_compressed_tensors_holds(layout):
    compare(f"compressed-tensors for {layout}", compressed_table(layout))


@pytest.mark.slow
def test_families_on_every_grid(world):
    compare("families", families_table(world / "tokenizer", TARGETS))
