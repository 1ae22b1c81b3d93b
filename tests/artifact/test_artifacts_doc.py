"""The tables of docs/artifacts.md are what running every family, target and grid gives. With WRITE_TABLES=1 in the environment they are written anew."""

import copy
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from test_compressed import A8, LEARNED, made, quant
from test_ggml_blocks import by_package, drawn
from test_gguf import GATED, OTHERS, WIDE, AutoModel
from test_onnx import Cases
from test_packed import about, settings
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, T5Config

from dqtrain.artifact import format, parity
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.gguf.blocks import as_tensor, fit, pack, rows_of
from dqtrain.artifact.gguf.family import family
from dqtrain.artifact.gguf.target import GgufTarget, refusal
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.config import BITS_OF_GRID, Export
from dqtrain.data.prepare import load_tokenizer
from dqtrain.errors import ConfigError
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.modules import quantize_model

DOC = Path(__file__).parents[2] / "docs/artifacts.md"
GRIDS = [(grid, bits) for grid, widths in BITS_OF_GRID.items() for bits in widths]
RUN_BY_LLAMA_CPP = {
    "gpt2": GPT2Config(n_embd=256, n_layer=1, n_head=4, n_positions=16, vocab_size=300),
    "llama": LlamaConfig(**WIDE | {"num_hidden_layers": 1}, vocab_size=300),
    "mistral": MistralConfig(**WIDE | {"num_hidden_layers": 1, "sliding_window": None}, vocab_size=300),
    "qwen2": Qwen2Config(**WIDE | {"num_hidden_layers": 1}, vocab_size=300, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**WIDE | {"num_hidden_layers": 1, "head_dim": 64}, vocab_size=300),
    "t5": T5Config(**GATED, d_model=256, num_layers=1, num_decoder_layers=1, vocab_size=300, decoder_start_token_id=0),
}


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


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
    lines = [row("grid", "bits", *cases), row(*["---"] * (2 + len(cases)))]
    for grid, bits in GRIDS:
        cells = []
        for granularity, group_size, columns, portable in cases.values():
            quantizer = WeightQuantizer(grid, bits, granularity, group_size, 0, portable)
            found = fit(quantizer, columns)
            if found.is_refused:
                cells.append("refused")
                continue
            codes, scale, zero_point = drawn(quantizer, (5, columns))
            read = as_tensor(by_package(pack(rows_of(codes, scale, zero_point, quantizer), found.type), found.type), quantizer)
            is_exact = torch.equal(read, quantizer.dequantize(codes, scale, zero_point))
            assert is_exact != found.rounds_scales
            cells.append(found.type if is_exact else f"inexact {found.type}")
        lines.append(row(grid, bits, *cells))
    return lines


def digits_table():
    """What ONNX Runtime has for a grid, each cell packed and multiplied and looked up by it."""
    shapes = {
        "rows": ("per_row", None, 256, True),
        "groups of 128": ("per_group", 128, 256, True),
        "groups of 16": ("per_group", 16, 48, True),
        "groups of 24": ("per_group", 24, 48, True),
        "fp32 scales": ("per_row", None, 40, False),
    }
    lines = [row("grid", "bits", *shapes), row(*["---"] * (2 + len(shapes)))]
    for grid, bits in GRIDS:
        cases, cells, values = Cases(), [], {}
        for name, (granularity, group_size, columns, portable) in shapes.items():
            value, found = cases.add(name, WeightQuantizer(grid, bits, granularity, group_size, 0, portable), columns, is_table=True)
            cells.append("refused" if found.is_float else found.type)
            if value is not None:
                values[name] = value.numpy()
        with tempfile.TemporaryDirectory() as folder:
            read = cases.run(Path(folder))
        assert all((found == values[name]).all() for name in values for found in read[name])
        lines.append(row(grid, bits, *cells))
    return lines


def llama_cpp_runs(model, folder):
    return f"as {family(model.config).arch}"


def graphs_hold(model, folder):
    """What the graphs of a packed artifact say of its weights, each read by ONNX Runtime."""
    with format.PackedTensors(folder, format.read_description(folder)) as tensors:
        target = OnnxTarget(tensors, model.config, Export())
        (folder / "onnx").mkdir()
        target.write(folder / "onnx")
        found = parity.verify_weights(model, folder / "onnx", target)
    assert found["bit_identical"] == found["tensors"]
    return ", ".join(found["types"])


def families_table(tokenizer):
    """Every family on every grid: the targets packed, gguf and onnx are written, loaded and compared, weight by weight."""
    lines = [row("grid", "bits", "packed", *(f"gguf: {name}" for name in RUN_BY_LLAMA_CPP), "onnx: these, bart"), row(*["---"] * (4 + len(RUN_BY_LLAMA_CPP)))]
    torch.manual_seed(0)
    _, bart, shape = OTHERS["bart"]
    configs = RUN_BY_LLAMA_CPP | {"bart": bart(**shape | {"decoder_layers": 1}, vocab_size=300)}
    students = {name: AutoModel(config).eval() for name, config in configs.items()}
    for grid, bits in GRIDS:
        quant = settings(bits, bits, None, None, grid, "per_row")
        cells, digits = [], set()
        for name, student in students.items():
            model = copy.deepcopy(student)
            coverage = quantize_model(model, quant)
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                model.config.save_pretrained(folder)
                load_tokenizer(tokenizer).save_pretrained(folder)
                format.write(model, folder, about(quant, coverage))
                parity.verify(model, folder)
                digits.add(graphs_hold(model, folder))
                if name not in RUN_BY_LLAMA_CPP:
                    continue
                with format.PackedTensors(folder, format.read_description(folder)) as tensors:
                    target = GgufTarget(tensors, model.config, Export())
                    if refusal(list(target.placed.values())):
                        cells.append("refused")
                        continue
                    target.write(folder)
                    found = parity.verify_weights(model, folder, target)
                    cells.append(", ".join(found["types"]))
        lines.append(row(grid, bits, "exact", *cells, ", ".join(sorted(digits))))
    return lines


def others_table(tokenizer):
    """Every family that dqtrain quantizes: packed artifact and graphs are written, loaded and compared; whether llama.cpp runs it as transformers does."""
    lines = [row("family", "packed", "gguf", "onnx"), row("---", "---", "---", "---")]
    quant = settings(2, 2, 8)
    for name, make in FAMILIES.items():
        model = make()
        coverage = quantize_model(model, quant)
        with tempfile.TemporaryDirectory() as place:
            folder, said = Path(place), []
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            model.config.save_pretrained(folder)
            format.write(model, folder, about(quant, coverage))
            parity.verify(model, folder)
            for run in (llama_cpp_runs, graphs_hold):
                try:
                    said.append(run(model, folder))
                except ConfigError as error:
                    said.append(f"refused: {str(error).split('. Use')[0]}")
        lines.append(row(name, "exact", *said))
    return lines


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


def test_families_that_other_programs_run(world):
    compare("others", others_table(world / "tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "vllm"])
def test_what_compressed_tensors_holds(layout):
    compare(f"compressed-tensors for {layout}", compressed_table(layout))


@pytest.mark.slow
def test_families_on_every_grid(world):
    compare("families", families_table(world / "tokenizer"))
