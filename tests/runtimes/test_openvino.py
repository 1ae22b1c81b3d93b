"""OpenVINO, in an environment of its own, computes what was trained: `make runtimes`. What it holds, as told in docs/artifacts.md, is what running it gives."""

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Run, config_text, flip, of_format
from families import FAMILIES
from test_artifacts_doc import GRIDS, compare, families_table, in_runtime, table
from test_ggml_blocks import GRIDS_AND_BITS, drawn, quantizer_of
from test_gguf import packed_artifact, student  # noqa: F401 # a fixture
from test_onnx import CASES, MODELS, cut, with_tokenizer
from test_openvino_digits import SHAPES
from test_packed import settings

from dqtrain.artifact import format, parity
from dqtrain.artifact.description import write_list
from dqtrain.artifact.gguf.blocks import as_tensor, rows_of
from dqtrain.artifact.graphs.graph import Stored, Weight
from dqtrain.artifact.graphs.target import aligned
from dqtrain.artifact.load import complete, load_artifact
from dqtrain.artifact.openvino.digits import fit, num_bytes, pack, parts
from dqtrain.artifact.openvino.graph import WEIGHTS, IrGraph, openvino_package, write_ir
from dqtrain.artifact.openvino.runtime import IN_FP32, OpenVinoRunner, OpenVinoSession, read_values
from dqtrain.artifact.openvino.target import OpenVinoTarget
from dqtrain.config import Export
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.quant.grid import WeightQuantizer

QUANT = settings(2, 2, 8)


class Cases:
    """Weights in one graph: each is multiplied by a unit matrix and looked up whole."""

    def __init__(self):
        self.stored, self.weights, self.expected, self.content = {}, {}, {}, b""

    def add(self, name, quantizer, columns, seed=0):
        """Codes of 7 rows at random; the type that holds them."""
        shape, found = (7, columns), fit(quantizer, columns)
        if found.is_float:
            return "refused"
        codes, scale, zero_point = drawn(quantizer, shape if quantizer.row_axis == 0 else shape[::-1], seed)
        packed = pack(rows_of(codes, scale, zero_point, quantizer), quantizer, found)
        for end, (dtype, form) in parts(quantizer, found, shape, False).items():
            self.stored[f"{name}{end}"] = Stored(dtype, form, WEIGHTS, len(self.content), num_bytes(dtype, form))
            self.content += packed[end].tobytes().ljust(aligned(packed[end].nbytes), b"\0")
        self.weights[name], self.expected[name] = Weight(shape, found), (quantizer, quantizer.dequantize(codes, scale, zero_point))
        return found.type

    def check(self, folder):
        """OpenVINO's constants, its products in fp32 and its rows are the trained values, difference 0.0."""
        g = IrGraph(self.stored, self.weights)
        for name, (shape, _) in self.weights.items():
            g.output(g.linear(g.input(f"unit {name}", ("tokens", shape[1])), "none", name, name=f"product {name}"), ("rows", "columns"))
            g.output(g.rows(g.input(f"ids {name}", shape[:1], np.int64), name), ("rows", "columns"))
        (folder / WEIGHTS).write_bytes(self.content)
        write_ir({folder / "model.xml": g}, folder / WEIGHTS)
        values, session = read_values(folder), OpenVinoSession(folder / "model.xml", IN_FP32)
        units = {f"unit {name}": np.eye(shape[1], dtype=np.float32) for name, (shape, _) in self.weights.items()}
        last = {name: unit[-1:] for name, unit in units.items()}  # a kernel of its own
        found, alone = (iter(session.run(given | {f"ids {name}": np.arange(7) for name in self.weights}).values()) for given in (units, last))
        assert values.keys() == self.expected.keys()
        for name, (quantizer, value) in self.expected.items():
            (product, rows), (last_product, _) = ((next(outputs).T, next(outputs)) for outputs in (found, alone))
            for read in (values[name](), product, rows, np.concatenate([product[:, :-1], last_product], 1)):
                assert torch.equal(as_tensor(np.ascontiguousarray(read), quantizer), value), name


@pytest.mark.parametrize("grid", sorted({grid for grid, _ in GRIDS_AND_BITS}))
def test_openvino_reads_back_the_trained_values(grid, tmp_path):
    """By folding constants, by its kernel that multiplies codes, and by looking up; on every grid, width and shape."""
    cases = Cases()
    for bits in [bits for name, bits in GRIDS_AND_BITS if name == grid]:
        for number, (title, (granularity, group_size, columns)) in enumerate(SHAPES.items()):
            quantizer = quantizer_of(grid, bits, granularity, group_size, number % 2, portable=number % 3 > 0)
            cases.add(f"{bits} {title}", quantizer, columns, seed=number)
    cases.check(tmp_path)


# Models of every family, untrained


@contextlib.contextmanager
def opened(made):
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        yield OpenVinoTarget(tensors, made[0].config, Export())


def to_openvino(made, folder, spoil=lambda folder: None):
    """Figures of the files that are made, and spoiled before they are looked at."""
    model, packed, held_out = made
    with opened(made) as target:
        folder.mkdir()
        target.write(folder)
        spoil(folder)
        return parity.verify_target(model, packed, folder, target, held_out, allow_inexact=False)


def written(made, folder):
    with opened(made) as target:
        folder.mkdir()
        target.write(folder)
    return folder


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
        folder = written(made, tmp_path / "openvino")
        weights = parity.verify_weights(model, folder, target)
        assert weights["bit_identical"] == weights["tensors"]
        parity._verify_size(folder, target, model)
    ids, source = torch.randint(97, (24,), generator=generator), torch.randint(97, (19,), generator=generator)
    read = (source[None], torch.ones(1, 19, dtype=torch.bool)) if model.config.is_encoder_decoder else (None, None)
    with torch.no_grad():
        expected = LanguageModel(load_artifact(tmp_path / "packed")).logits(Inputs(ids[None], torch.ones(1, 24, dtype=torch.bool), *read))
    runner = OpenVinoRunner(folder, IN_FP32)
    for one_by_one in (False, True):
        found = runner.logits(ids.tolist(), source.tolist() if model.config.is_encoder_decoder else None, one_by_one)
        assert (found - expected).abs().max() < 4e-6 * expected.abs().max()


def test_texts_of_a_batch_are_padded_as_transformers_pads_them(world, tmp_path):
    """A causal model's on the left, where positions do not count them; an encoder's on the right."""
    for family in ("gpt2", "llama", "bart", "t5"):
        made = with_tokenizer(world, FAMILIES[family](), settings(4, 4, activations=None), tmp_path / family)
        runner = OpenVinoRunner(written(made, tmp_path / f"{family}.ir"), IN_FP32)
        long, short, target_ids = [5, 6, 7, 8, 9], [11, 12, 13], [3, 4]
        if runner.encoder is None:
            feeds = {"input_ids": np.array([long, [0, 0, *short]]), "attention_mask": np.array([[1] * 5, [0, 0, 1, 1, 1]])}
            found = runner.decoder.run(feeds | runner.start(batch=2)._past)["logits"]
            assert np.abs(found[1, 2:] - runner.logits(short).numpy()).max() < 1e-5
            assert np.abs(runner.start(batch=2).read([short, long[:3]])[0] - runner.logits(short).numpy()).max() < 1e-5
        else:
            mask = np.array([[1] * 5, [1, 1, 1, 0, 0]])
            given = runner.encoder.run({"input_ids": np.array([long, [*short, 1, 1]]), "attention_mask": mask})
            kept = {name.replace("present", "past_key_values"): value for name, value in given.items()}
            feeds = {"input_ids": np.array([target_ids] * 2), "encoder_attention_mask": mask, **kept, **runner.start([long, long])._past}
            assert np.abs(runner.decoder.run(feeds)["logits"][1] - runner.logits(target_ids, short).numpy()).max() < 1e-5


def test_groups_that_its_kernels_do_not_know_are_floats(world, tmp_path):
    quant = settings(
        4,
        4,
        activations=None,
        overrides=({"match": "*.down_proj.weight", "weights": {"bits": 4, "grid": "lsq", "granularity": "per_group", "group_size": 24}},),
    )
    made = with_tokenizer(world, FAMILIES["llama"](), quant, tmp_path / "packed")
    with opened(made) as target:
        message = r"openvino cannot hold model.layers.0.mlp.down_proj.weight, .*: groups of 24 are multiplied wrongly by OpenVINO.* --allow-inexact"
        with pytest.raises(ConfigError, match=message):
            OpenVinoTarget.check(quant, made[0].config, target.packed.coverage, world / "tokenizer", Export())
    weights = to_openvino(made, tmp_path / "openvino")["weights"]
    assert weights["types"] == {"F32": 2, "i4": 14} and weights["bit_identical"] == weights["tensors"]


@pytest.mark.parametrize(("bits", "type"), [(2, "u2"), (4, "i4"), (8, "i8")])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_plugin_multiplies_codes(family, bits, type, world, tmp_path):
    """No matrix is made float when the graph is loaded, the head that reads a table's bytes included."""
    config = {"n_embd": 64} if family == "gpt2" else {"d_model": 64}
    made = with_tokenizer(world, FAMILIES[family](**config), settings(bits, bits, 8, activations=None), tmp_path / "packed")
    folder = written(made, tmp_path / "openvino")
    openvino = openvino_package()
    model = openvino.Core().read_model(folder / ("model.xml" if family == "gpt2" else "decoder.xml"), folder / WEIGHTS)
    nodes = openvino.Core().compile_model(model, "CPU", IN_FP32).get_runtime_model().get_ordered_ops()
    read = [node.input(1).get_element_type() for node in nodes if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert len(read) >= 9 and set(read) == {getattr(openvino.Type, type)}


# Models that were trained


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_openvino_computes_what_was_trained(name, bits, student, tmp_path):  # noqa: F811
    made = packed_artifact(student(name), settings(bits, bits, 8), tmp_path / "packed")
    found = to_openvino(made, tmp_path / "openvino")
    weights, shipped = found["weights"], found["as_shipped"]
    assert weights["bit_identical"] == weights["tensors"] and weights["largest_relative_difference"] == 0.0
    assert weights["types"][{2: "u2", 4: "i4", 8: "i8"}[bits]] >= 8
    assert found["float_activations"]["relative_logit_difference"] < 4e-6  # far below what is allowed
    assert shipped["perplexity"] == pytest.approx(shipped["perplexity_trained"], rel=0.05)
    assert shipped["top1_agreement"] > 0.9 and shipped["kl_nats"] < 0.01
    runner, told = OpenVinoRunner(tmp_path / "openvino", IN_FP32), io.StringIO()
    with contextlib.redirect_stdout(told):
        text = runner.generate("the cat sees", 8, stream=True)
    assert text == complete(load_artifact(made[1], "dense"), made[1], "the cat sees", 8)
    assert told.getvalue().strip() == text.strip() and text


def test_verify_notices_a_flipped_bit(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"is not what was trained \(largest difference"):
        to_openvino(made, tmp_path / "openvino", spoil=lambda folder: flip(folder / WEIGHTS, 70))


def without_a_scale(folder):
    """A constant of the graph is gone, and the list knows nothing of it."""
    text = (folder / "model.xml").read_text()
    start = text.index('name="linear:transformer.h.0.mlp.c_fc.weight.scale"')
    start, end = text.rindex("<layer ", 0, start), text.index("</layer>", start) + len("</layer>")
    (folder / "model.xml").write_text(text[:start] + text[end:])
    write_list(folder / "openvino.json")


def cut_and_described(folder):
    cut(folder, WEIGHTS)
    write_list(folder / "openvino.json")


def unreadable(folder):
    (folder / "model.xml").write_bytes(b"\xff" * 50)
    write_list(folder / "openvino.json")


def edited(folder):
    (folder / "openvino.json").write_text((folder / "openvino.json").read_text().replace("model.xml", "model.xmm"))


DAMAGES = {
    "cut constants": (lambda folder: cut(folder, WEIGHTS), r"model\.bin: has \d+ bytes, openvino\.json says \d+; it is truncated"),
    "a cut graph": (lambda folder: cut(folder, "model.xml"), r"model\.xml: has \d+ bytes"),
    "a bit of the constants": (lambda folder: flip(folder / WEIGHTS, 70), r"model\.bin: does not have the hash in openvino\.json; a byte was changed"),
    "a bit of the graph": (lambda folder: flip(folder / "model.xml", 70), r"model\.xml: does not have the hash"),
    "no constants": (lambda folder: (folder / WEIGHTS).unlink(), "has 0 bytes"),
    "no list": (lambda folder: (folder / "openvino.json").unlink(), r"openvino\.json: cannot be read \(FileNotFoundError.* Export the run again with"),
    "a bit of the config": (lambda folder: flip(folder / "config.json", 70), r"config\.json: does not have the hash in openvino\.json"),
    "a cut tokenizer": (lambda folder: cut(folder, "tokenizer.json"), r"tokenizer\.json: has \d+ bytes, openvino\.json says"),
    "an older format": (lambda folder: of_format(folder / "openvino.json", 1), r"openvino\.json: has format 1, this dqtrain reads 2\. Export the run again"),
    "a newer format": (lambda folder: of_format(folder / "openvino.json", 3), r"openvino\.json: has format 3, this dqtrain reads 2\. Export the run again"),
    "an edited list": (edited, r"openvino\.json: does not have the hash in its last line; it was edited or damaged"),
    "no scale": (without_a_scale, r"model\.xml: openvino .* does not load it"),
    "cut constants, listed": (cut_and_described, r"model\.xml: openvino .* does not load it"),
    "no graph, listed": (unreadable, r"model\.xml: openvino .* does not load it"),
}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = with_tokenizer(world, FAMILIES["gpt2"](vocab_size=300), QUANT, folder / "packed")
    written(made, folder / "openvino")
    OpenVinoRunner(folder / "openvino")
    return folder / "openvino"


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(name, whole, tmp_path):
    spoil, message = DAMAGES[name]
    folder = shutil.copytree(whole, tmp_path / "openvino")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        OpenVinoRunner(folder)


def test_a_prompt_that_has_no_room(whole):
    with pytest.raises(ConfigError, match=r"the prompt has \d tokens and 32 tokens are asked, but there is room for 32 in"):
        OpenVinoRunner(whole).generate("the cat", 32)


def test_a_graph_that_cannot_be_written(world, tmp_path):
    """An OSError, which the export makes a message about the disk of."""
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    (tmp_path / "openvino/model.xml").mkdir(parents=True)
    with opened(made) as target, pytest.raises(OSError, match=r"OpenVINO did not write model\.xml: "):
        target.write(tmp_path / "openvino")


def test_a_graph_that_openvino_does_not_read_is_no_matter_of_the_disk(tmp_path):
    g = IrGraph({}, {})
    g.output(g.op("NoSuchOperator", g.input("x", (2,))), (2,))
    with pytest.raises(RuntimeError, match="NoSuchOperator"):
        write_ir({tmp_path / "model.xml": g}, tmp_path / WEIGHTS)


def test_the_same_student_is_the_same_files(world, tmp_path):
    """In a process that has made others before, too."""
    made = with_tokenizer(world, FAMILIES["bart"](), QUANT, tmp_path / "packed")
    first, second = (written(made, tmp_path / name) for name in ("a", "b"))
    assert (first / "openvino.json").read_text() == (second / "openvino.json").read_text()
    assert sorted(path.name for path in first.glob("*.*")) == sorted(json.loads((first / "openvino.json").read_text())["files"] | {"openvino.json": None})


def test_encoder_and_decoder_share_one_table(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["bart"](vocab_size=2000), QUANT, tmp_path / "packed")
    folder = written(made, tmp_path / "openvino")
    with opened(made) as target:
        sizes = target.stored_bytes(folder)
    assert sizes["tensors"] < 1.2 * (tmp_path / "packed/model.safetensors").stat().st_size
    assert sizes["file"] == sum((folder / name).stat().st_size for name in (WEIGHTS, "encoder.xml", "decoder.xml"))


# Through the command line


def test_a_run_ends_with_it_and_generate_runs_it(world, tmp_path):
    changes = {
        "export": "{targets: [packed, openvino]}",
        "train": "{steps: 30, global_batch: 8, micro_batch: 4, lr: 5.0e-3, scale_lr: 5.0e-3, warmup_steps: 2}",
    }
    (tmp_path / "run.yaml").write_text(config_text(world, tmp_path / "run", zero="{student: 1, teacher: 0}", checkpoint="{every_steps: 30}", **changes))
    run = Run(tmp_path / "run", tmp_path / "run.yaml")
    code, output = run.train(ranks=1)
    assert code == 0, output
    found = json.loads((run.path / "result.json").read_text())["export"]["others"]["openvino"]["parity"]
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"] == 28 and found["as_shipped"]["held_out_text"]
    card = (run.path / "artifact/openvino/README.md").read_text()
    assert "library_name: openvino" in card
    program = card.partition("```python\n")[2].partition("```")[0]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=run.path / "artifact/openvino")
    texts = {}
    for place in ("openvino", "packed"):
        code, texts[place] = run.dqtrain("generate", str(run.path / "artifact" / place), "the cat sees", "--tokens", "8")
        assert code == 0, texts[place]
    assert texts["openvino"] == texts["packed"]
    code, output = run.dqtrain("generate", str(run.path / "artifact/openvino"), "the cat sees", "--mode", "fast")
    assert code == 2 and "--mode is for packed artifacts, but OpenVINO runs" in output


# docs/artifacts.md


def test_constants_that_hold_a_grid(tmp_path):
    shapes = {
        "rows": ("per_row", None, 256, True),
        "groups of 128": ("per_group", 128, 256, True),
        "groups of 24": ("per_group", 24, 48, True),
        "fp32 scales": ("per_row", None, 40, False),
    }
    cases, found = Cases(), {("", name): {} for name in shapes}
    for (grid, bits), (name, (granularity, group_size, columns, portable)) in itertools.product(GRIDS, shapes.items()):
        quantizer = WeightQuantizer(grid, bits, granularity, group_size, 0, portable)
        found["", name][grid, bits] = cases.add(f"{grid} {bits} {name}", quantizer, columns)
    cases.check(tmp_path)
    compare("openvino", table(found))


def test_families_that_it_runs_on_every_grid(world):
    compare("families of openvino", families_table(world / "tokenizer", {"openvino: ": in_runtime("openvino")}))
