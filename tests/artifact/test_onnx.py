"""Graphs for ONNX Runtime: blocks that it reads back to the bit, and models that it runs as they were trained."""

import contextlib
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import flip, of_format
from families import FAMILIES, LLAMA
from test_ggml_blocks import GRIDS_AND_BITS, drawn, quantizer_of
from test_gguf import QUANT, packed_artifact, student  # noqa: F401 # a fixture
from test_packed import about, settings
from transformers import BartConfig, GPT2Config, LlamaConfig, OPTConfig, PegasusConfig, Qwen3Config, Qwen3ForCausalLM, T5Config

from dqtrain import tensor_file
from dqtrain.artifact import format, parity
from dqtrain.artifact.description import check_list, write_list
from dqtrain.artifact.gguf.blocks import as_tensor, rows_of
from dqtrain.artifact.graphs.family import check_family
from dqtrain.artifact.graphs.graph import WEIGHTS, Graph, Stored, Weight, onnx_package
from dqtrain.artifact.load import complete, load_artifact
from dqtrain.artifact.onnx.blocks import fit, pack, parts
from dqtrain.artifact.onnx.runtime import OnnxRunner, require_runtime
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.config import Export
from dqtrain.data.prepare import load_tokenizer
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.quant.modules import quantize_model

# Blocks

SHAPES = {  # name: granularity, group size, columns
    "a scale for all": ("per_tensor", None, 256),
    "rows of 128 k": ("per_row", None, 256),
    "rows of 32 k": ("per_row", None, 96),
    "rows that blocks do not divide": ("per_row", None, 44),
    "short rows": ("per_tensor", None, 6),
    "groups of 128": ("per_group", 128, 256),
    "groups of 96": ("per_group", 96, 192),
    "groups of 16": ("per_group", 16, 48),
}


class Cases:
    """Weights in one graph: each is multiplied by a unit matrix, and tables are looked up whole."""

    def __init__(self):
        self.stored, self.weights, self.chunks, self.end = {}, {}, [], 0

    def add(self, name, quantizer, columns, is_table, seed=0):
        """Codes of 7 rows at random; what they are, and what holds them."""
        shape, found = (7, columns), fit(quantizer, columns)
        codes, scale, zero_point = drawn(quantizer, shape if quantizer.row_axis == 0 else shape[::-1], seed)
        if found.is_float:
            return None, found
        packed = pack(rows_of(codes, scale, zero_point, quantizer), quantizer, found)
        for part, (dtype, form) in parts(quantizer, found, shape, is_table).items():
            assert packed[part].dtype == dtype and packed[part].size == np.prod(form)
            self.stored[f"{name}{part}"] = Stored(dtype, form, WEIGHTS, self.end, packed[part].nbytes)
            self.chunks.append(packed[part].tobytes())
            self.end += packed[part].nbytes
        self.weights[name] = Weight(shape, found)
        return quantizer.dequantize(codes, scale, zero_point), found

    def run(self, folder):
        """Name -> (what is looked up, what is multiplied), as ONNX Runtime gives them."""
        g = Graph(self.stored, self.weights)
        feeds = {}
        for name, (shape, _) in self.weights.items():
            feeds[f"unit {name}"] = np.eye(shape[1], dtype=np.float32)
            product = g.linear(g.input(f"unit {name}", shape[1:] * 2), "none", name, name=f"product {name}")
            g.output(product, ("rows", "columns"))
            if len(self.stored[name].shape) == 2:
                feeds[f"ids {name}"] = np.arange(shape[0])
                g.op("Identity", g.rows(g.input(f"ids {name}", shape[:1], np.int64), name), name=f"rows {name}")
                g.output(f"rows {name}", ("rows", "columns"))
        model = g.model()
        for node in model.graph.node:
            for attribute in node.attribute:
                attribute.i = 0 if attribute.name == "accuracy_level" else attribute.i
        (folder / WEIGHTS).write_bytes(b"".join(self.chunks))
        onnx.save(model, folder / "cases.onnx")
        session = onnxruntime.InferenceSession(folder / "cases.onnx")
        found = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
        return {name: (found.get(f"rows {name}"), found[f"product {name}"].T) for name in self.weights}


@pytest.mark.parametrize("row_axis", [0, 1])
@pytest.mark.parametrize("grid", sorted({grid for grid, _ in GRIDS_AND_BITS}))
def test_onnx_runtime_reads_back_the_trained_values(grid, row_axis, tmp_path):
    """Difference 0.0 by both operators, on every grid, width and shape; scales of fp32, and those that fp16 holds."""
    cases, expected = Cases(), {}
    for bits in [bits for name, bits in GRIDS_AND_BITS if name == grid]:
        for number, (title, (granularity, group_size, columns)) in enumerate(SHAPES.items()):
            quantizer = quantizer_of(grid, bits, granularity, group_size, row_axis, portable=number % 2 == 0)
            value, _ = cases.add(f"{bits} {title}", quantizer, columns, is_table=number % 3 == 0, seed=number)
            expected[f"{bits} {title}"] = quantizer, value
    read = cases.run(tmp_path)
    assert read.keys() == expected.keys()
    for name, (quantizer, value) in expected.items():
        for found in read[name]:
            assert found is None or torch.equal(as_tensor(np.ascontiguousarray(found), quantizer), value), name


@pytest.mark.parametrize(
    ("grid", "bits", "group_size", "columns", "expected"),
    [
        ("dynamic", "ternary", None, 768, (2, 128, None)),
        ("lsq", 2, None, 896, (2, 128, None)),
        ("lsq", 2, None, 320, (2, 64, None)),
        ("dynamic", 8, None, 12, (8, 32, None)),
        ("dynamic", 3, None, 768, (4, 128, "7 levels take 4 bits each")),
        ("seq", 2, None, 768, (4, 128, "4 levels without one at 0 take 4 bits")),
        ("mean43", 1, None, 768, (2, 128, "2 levels without one at 0 take 2 bits")),
        ("affine", 8, None, 768, (8, 128, None)),
        ("dynamic", 2, 256, 768, (2, 128, None)),
        ("dynamic", 2, 48, 768, (2, 16, "blocks of 16 have no fast kernel")),
        ("dynamic", 4, 24, 768, (32, 0, "groups of 24 are no multiple of 16")),
    ],
)
def test_the_smallest_digits_and_largest_blocks(grid, bits, group_size, columns, expected):
    found = fit(quantizer_of(grid, bits, "per_group" if group_size else "per_row", group_size), columns)
    assert (found.bits, found.block) == expected[:2] and (expected[2] in found.why if expected[2] else found.why is None)


# Models of every family, untrained


def with_tokenizer(world, model, quant, folder):
    """The packed artifact of a model."""
    coverage = quantize_model(model, quant)
    shutil.copytree(world / "tokenizer", folder)
    model.config.save_pretrained(folder)
    format.write(model, folder, about(quant, coverage))
    return model, folder, None


def to_onnx(made, folder, allow_inexact=False, spoil=lambda folder: None):
    """Figures of the files that are made, and spoiled before they are looked at."""
    model, packed, held_out = made
    with opened(made) as target:
        folder.mkdir(exist_ok=True)
        target.write(folder)
        spoil(folder)
        return parity.verify_target(model, packed, folder, target, held_out, allow_inexact)


@contextlib.contextmanager
def opened(made):
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        yield OnnxTarget(tensors, made[0].config, Export())


MODELS = FAMILIES | {"qwen3": lambda **keys: Qwen3ForCausalLM(Qwen3Config(**LLAMA, vocab_size=97, **keys))}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
FLOAT_PARTS = {"positions": None, "overrides": ({"match": "*1.*c_fc.weight", "keep_float": True}, {"match": "*0.attn.c_proj.weight", "keep_float": True})}
CASES = {
    "gpt2": ("gpt2", {}, {}),
    "gpt2, floats among codes": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}, FLOAT_PARTS),
    "gpt2, float words": ("gpt2", {"activation_function": "relu"}, {"embeddings": None}),
    "gpt2, a float head": ("gpt2", {"tie_word_embeddings": True}, {"float_head": True}),
    "opt": ("opt", {}, {}),
    "opt, norms behind": ("opt", {"do_layer_norm_before": False, "activation_function": "gelu", "enable_bias": False}, {}),
    "llama": ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}, {}),
    "llama, float": ("llama", {"rope_parameters": LINEAR, "head_dim": 16}, {"linears": None}),
    "mistral": ("mistral", {"sliding_window": 5}, {"linears": 4, "granularity": "per_group", "group_size": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, {"grid": "affine", "linears": 8}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}, {}),
    "bart": ("bart", {}, {"grid": "minmax_affine"}),
    "bart, float": ("bart", {"activation_function": "relu"}, {"embeddings": None, "positions": None}),
    "mbart": ("mbart", {"scale_embedding": True}, {"grid": "seq"}),
    "t5": ("t5", {"relative_attention_max_distance": 9, "relative_attention_num_buckets": 8}, {}),
    "t5, gated": ("t5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "num_layers": 1, "num_decoder_layers": 3}, {"positions": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_graphs_compute_what_transformers_does(name, world, tmp_path):
    family, config, quant = CASES[name]
    model = MODELS[family](**config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for key, buffer in model.named_buffers() if key == "final_logits_bias")]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))  # norms and biases are of effect
    made = with_tokenizer(world, model, settings(**quant, activations=None), tmp_path / "packed")
    with opened(made) as target:
        (tmp_path / "onnx").mkdir()
        target.write(tmp_path / "onnx")
        weights = parity.verify_weights(model, tmp_path / "onnx", target)
        assert weights["bit_identical"] == weights["tensors"]
        parity._verify_size(tmp_path / "onnx", target, model)
        ids, source = torch.randint(97, (24,), generator=generator), torch.randint(97, (19,), generator=generator)
        read = (source[None], torch.ones(1, 19, dtype=torch.bool)) if model.config.is_encoder_decoder else (None, None)
        with torch.no_grad():
            expected = LanguageModel(load_artifact(tmp_path / "packed")).logits(Inputs(ids[None], torch.ones(1, 24, dtype=torch.bool), *read))
        with target.with_float_activations(tmp_path / "onnx", 24) as runner:
            for one_by_one in (False, True):
                found = runner.logits(ids.tolist(), source.tolist() if model.config.is_encoder_decoder else None, one_by_one)
                assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_texts_of_a_batch_are_padded_as_transformers_pads_them(world, tmp_path):
    """A causal model's on the left, where positions do not count them; an encoder's on the right."""
    for family in ("gpt2", "llama", "bart", "t5"):
        made = with_tokenizer(world, FAMILIES[family](), settings(4, 4, activations=None), tmp_path / family)
        with opened(made) as target:
            folder = tmp_path / f"{family}.onnx"
            folder.mkdir()
            target.write(folder)
        runner = OnnxRunner(folder, accuracy_level=0)
        long, short, target_ids = [5, 6, 7, 8, 9], [11, 12, 13], [3, 4]
        if runner.encoder is None:
            feeds = {"input_ids": np.array([long, [0, 0, *short]]), "attention_mask": np.array([[1] * 5, [0, 0, 1, 1, 1]])}
            found = runner.decoder.array(runner.decoder.run(feeds | runner.start(batch=2)._past)["logits"])
            assert np.abs(found[1, 2:] - runner.logits(short).numpy()).max() < 1e-5
            assert np.abs(runner.start(batch=2).read([short, long[:3]])[0] - runner.logits(short).numpy()).max() < 1e-5
        else:
            mask = np.array([[1] * 5, [1, 1, 1, 0, 0]])
            given = runner.encoder.run({"input_ids": np.array([long, [*short, 1, 1]]), "attention_mask": mask})
            kept = {name.replace("present", "past_key_values"): value for name, value in given.items()}
            feeds = {"input_ids": np.array([target_ids] * 2), "encoder_attention_mask": mask, **kept, **runner.start([long, long])._past}
            found = runner.decoder.array(runner.decoder.run(feeds)["logits"])
            assert np.abs(found[1] - runner.logits(target_ids, short).numpy()).max() < 1e-5


# Models that were trained


@pytest.mark.parametrize("name", ["gpt2", "llama", pytest.param("qwen2", marks=pytest.mark.slow), "t5", "bart"])
def test_onnx_runtime_computes_what_was_trained(name, student, tmp_path):  # noqa: F811
    made = packed_artifact(student(name), QUANT, tmp_path / "packed")
    found = to_onnx(made, tmp_path / "onnx")
    weights, shipped = found["weights"], found["as_shipped"]
    assert weights["bit_identical"] == weights["tensors"] and weights["largest_relative_difference"] == 0.0
    assert weights["types"]["2 bit"] >= 8
    assert found["float_activations"]["relative_logit_difference"] < 2e-6  # far below what is allowed
    assert shipped["perplexity"] == pytest.approx(shipped["perplexity_trained"], rel=0.05)
    assert shipped["perplexity"] < 0.8 * len(load_tokenizer(made[1]))  # it learned something
    assert shipped["top1_agreement"] > 0.9 and shipped["kl_nats"] < 0.01
    assert shipped["relative_l2"] > 1e-4  # ONNX Runtime does quantize activations
    runner, told = OnnxRunner(tmp_path / "onnx", accuracy_level=0), io.StringIO()
    with contextlib.redirect_stdout(told):
        text = runner.generate("the cat sees", 8, stream=True)
    assert text == complete(load_artifact(made[1], "dense"), made[1], "the cat sees", 8)
    assert told.getvalue().strip() == text.strip() and text


def test_verify_notices_a_flipped_bit(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"is not what was trained \(largest difference"):
        to_onnx(made, tmp_path / "onnx", spoil=lambda folder: flip(folder / WEIGHTS, 70))


def without_a_scale(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("c_fc.weight.scale"))
    model.graph.initializer.remove(scale)
    onnx.save(model, folder / "model.onnx")
    write_list(folder / "onnx.json")


def cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def cut_and_described(folder):
    cut(folder, WEIGHTS)
    write_list(folder / "onnx.json")


def edited(folder):
    (folder / "onnx.json").write_text((folder / "onnx.json").read_text().replace("model.onnx", "model.onny"))


def says(text):
    return lambda folder: (folder / "onnx.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: cut(folder, WEIGHTS), r"model\.onnx\.data: has \d+ bytes, onnx.json says \d+; it is truncated"),
        (lambda folder: cut(folder, "model.onnx"), r"model\.onnx: has \d+ bytes"),
        (lambda folder: flip(folder / WEIGHTS, 70), r"model\.onnx\.data: does not have the hash in onnx.json; a byte was changed"),
        (lambda folder: flip(folder / "model.onnx", 70), r"model\.onnx: does not have the hash"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has 0 bytes"),
        (lambda folder: (folder / "onnx.json").unlink(), r"onnx.json: cannot be read \(FileNotFoundError.* Export the run again with"),
        (lambda folder: flip(folder / "config.json", 70), r"config\.json: does not have the hash in onnx.json; a byte was changed"),
        (lambda folder: cut(folder, "tokenizer.json"), r"tokenizer\.json: has \d+ bytes, onnx.json says"),
        (lambda folder: of_format(folder / "onnx.json", 1), r"onnx\.json: has format 1, this dqtrain reads 2\. Export the run again"),
        (lambda folder: of_format(folder / "onnx.json", 3), r"onnx\.json: has format 3, this dqtrain reads 2\. Export the run again"),
        (edited, r"onnx\.json: does not have the hash in its last line; it was edited or damaged"),
        (says("[]"), r"onnx\.json: cannot be read \(TypeError"),
        (says("{}"), r"onnx\.json: cannot be read \(KeyError"),
        (says('{"format": 2}'), r"onnx\.json: does not have the hash in its last line"),
        (without_a_scale, r"onnxruntime .* does not load model\.onnx"),
        (cut_and_described, r"onnxruntime .* does not load model\.onnx"),
    ],
)
def test_damaged_files_are_refused(spoil, message, world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with opened(made) as target:
        (tmp_path / "onnx").mkdir()
        target.write(tmp_path / "onnx")
    OnnxRunner(tmp_path / "onnx")
    spoil(tmp_path / "onnx")
    with pytest.raises(CheckpointError, match=message):
        OnnxRunner(tmp_path / "onnx")


PART_BYTES = 20_000


def test_a_large_model_is_in_parts(student, tmp_path, monkeypatch):  # noqa: F811
    """Weights, logits and sizes are proven on them; texts and bytes of tensors are those of one file."""
    made = packed_artifact(student("bart"), QUANT, tmp_path / "packed", steps=0)
    (tmp_path / "whole").mkdir()
    with opened(made) as target:
        target.write(tmp_path / "whole")
    expected = target.stored_bytes(tmp_path / "whole")
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", PART_BYTES)
    found = to_onnx(made, tmp_path / "parts")
    listed = check_list(tmp_path / "parts/onnx.json")
    parts = [file for file in listed if file.endswith(".data")]
    assert parts == [f"model-{number:05d}-of-{len(parts):05d}.onnx.data" for number in range(1, len(parts) + 1)] and len(parts) > 3
    graphs = [onnx.load(tmp_path / "parts" / file, load_external_data=False).graph for file in listed if file.endswith(".onnx")]
    stored = [[given.value for given in tensor.external_data[:2]] for graph in graphs for tensor in graph.initializer if tensor.external_data]
    assert {file for file, _ in stored} == set(parts)
    for part in parts:  # a tensor is never cut
        assert (tmp_path / "parts" / part).stat().st_size <= PART_BYTES or len({offset for file, offset in stored if file == part}) == 1
    assert found["bytes"]["tensors"] == expected["tensors"] == sum((tmp_path / "parts" / part).stat().st_size for part in parts)
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"]
    texts = [OnnxRunner(tmp_path / folder).generate("the cat sees", 8) for folder in ("whole", "parts")]
    assert texts[0] == texts[1]


def test_damaged_parts_are_refused_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 5_000)
    for number, name in enumerate(("onnx", "other")):
        model = FAMILIES["gpt2"]()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor += 0.01 * number
        made = with_tokenizer(world, model, QUANT, tmp_path / f"packed {name}")
        with opened(made) as target:
            (tmp_path / name).mkdir()
            target.write(tmp_path / name)
    content = {path: path.read_bytes() for path in (tmp_path / "onnx").glob("*.data")}
    harms = {
        r"{}: has 0 bytes, onnx\.json says \d+; it is truncated or missing": Path.unlink,
        r"{}: has \d+ bytes, onnx\.json says \d+; it is truncated or missing": lambda part: cut(part.parent, part.name),
        r"{}: does not have the hash in onnx\.json": lambda part: shutil.copy(tmp_path / "other" / part.name, part),
    }
    for message, harm in harms.items():
        for part in (min(content), max(content)):
            harm(part)
            with pytest.raises(CheckpointError, match=message.format(re.escape(str(part)))):
                OnnxRunner(part.parent)
            part.write_bytes(content[part])
    OnnxRunner(tmp_path / "onnx")


def test_an_unreadable_graph(tmp_path, world):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"model\.onnx: is no graph that can be read"):
        to_onnx(made, tmp_path / "onnx", spoil=lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 50))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PegasusConfig(), r"writes gpt2, opt, llama, mistral, qwen2, qwen3, bart, mbart, t5, and this model is pegasus\. Use the target packed, or hf"),
        (GPT2Config(activation_function="mish"), "activation_function of this gpt2 is mish, but its graph computes gelu_new, "),
        (GPT2Config(add_cross_attention=True), "add_cross_attention of this gpt2 is True, but its graph computes False"),
        (OPTConfig(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine of this opt is False"),
        (BartConfig(activation_function="mish"), "activation_function of this bart is mish"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_type of this llama is dynamic, but its graph computes"),
        (T5Config(feed_forward_proj="gated-mish"), "dense_act_fn of this t5 is mish"),
    ],
)
def test_models_that_the_graphs_compute_otherwise_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        check_family(config, "onnx")


def test_groups_that_no_block_divides_are_refused_or_floats(world, tmp_path):
    model = FAMILIES["llama"]()
    quant = settings(
        4,
        4,
        activations=None,
        overrides=({"match": "*.down_proj.weight", "weights": {"bits": 4, "grid": "lsq", "granularity": "per_group", "group_size": 24}},),
    )
    made = with_tokenizer(world, model, quant, tmp_path / "packed")
    with opened(made) as target:
        coverage = target.packed.coverage
    message = r"onnx cannot hold model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight: groups of 24 are no multiple of 16.* --allow-inexact"
    with pytest.raises(ConfigError, match=message):
        OnnxTarget.check(quant, model.config, coverage, world / "tokenizer", Export())
    notes = OnnxTarget.check(quant, model.config, coverage, world / "tokenizer", Export(allow_inexact=True))
    assert notes[0].startswith("onnx: F32 for model.layers.0.mlp.down_proj.weight") and "set group_size to 16 or 128" in notes[0]
    described = OnnxTarget.describe(quant, model.config, coverage, [(32,)] * 5, Export())
    assert "bytes of tensors; 4 bit for 14, F32 for 2 of 16 quantized weights" in described[0] and "onnx cannot hold" in described[-1]
    weights = to_onnx(made, tmp_path / "onnx", allow_inexact=True)["weights"]
    assert weights["types"] == {"4 bit": 14, "F32": 2} and weights["bit_identical"] == weights["tensors"]


def test_a_prompt_that_has_no_room(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](vocab_size=300), QUANT, tmp_path / "packed")
    with opened(made) as target:
        (tmp_path / "onnx").mkdir()
        target.write(tmp_path / "onnx")
    with pytest.raises(ConfigError, match=r"the prompt has \d tokens and 32 tokens are asked, but there is room for 32 in"):
        OnnxRunner(tmp_path / "onnx").generate("the cat", 32)


@pytest.mark.parametrize(("module", "needs"), [("onnx", onnx_package), ("onnxruntime", require_runtime)])
def test_without_the_packages_it_is_said_what_to_install(module, needs, monkeypatch):
    onnx_package.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the Python package {module}, .*pip install 'dqtrain\[runtimes\]'"):
        needs()
    onnx_package.cache_clear()


def test_the_same_student_is_the_same_file(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["bart"](), QUANT, tmp_path / "packed")
    for name in ("a", "b"):
        with opened(made) as target:
            (tmp_path / name).mkdir()
            target.write(tmp_path / name)
    assert (tmp_path / "a/onnx.json").read_text() == (tmp_path / "b/onnx.json").read_text()
    assert check_list(tmp_path / "a/onnx.json") == sorted(file.name for file in (tmp_path / "a").iterdir() if file.name != "onnx.json")
