"""Directories of compressed-tensors: codes that its own decompression reads back to the bit, models that transformers runs as they were trained, and what it would get wrong."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import flip, of_format
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_gguf import packed_artifact, student  # noqa: F401
from test_packed import about, settings
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from dqtrain import tensor_file
from dqtrain.artifact import format, parity
from dqtrain.artifact.compressed.load import DESCRIPTION, load_compressed
from dqtrain.artifact.compressed.plan import plan
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.load import load_any, load_artifact, load_spread
from dqtrain.artifact.serve import serve
from dqtrain.cli import main
from dqtrain.config import BITS_OF_GRID, Export, Quant
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.models.making import load_model, meta_model
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import Coverage, quantize_model
from launch.local import free_port

A8, LEARNED = {"bits": 8}, {"bits": 8, "scale": "learned"}
W4, W8 = {"bits": 4, "granularity": "per_row"}, {"bits": 8, "granularity": "per_row"}


def quant(linears=4, embeddings=None, positions=None, activations=None, **more):
    """`settings`, but activations are float or a block of their own."""
    return Quant.model_validate(settings(linears, embeddings, positions, None, **more).model_dump() | {"activations": activations})


def words(model):
    """Something that any model reads."""
    ids = torch.arange(12)[None] * 5 % model.config.vocab_size
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Inputs(ids, everything, ids.flip(1), everything) if model.config.is_encoder_decoder else Inputs(ids, everything)


def made(family, quant, folder, **more):
    """(small random student, its packed artifact, no held-out text)."""
    model = FAMILIES[family](**more)
    coverage = quantize_model(model, quant)
    calibrate(model, lambda: LanguageModel(model).logits(words(model)))
    folder.mkdir()
    model.config.save_pretrained(folder)
    format.write(model, folder, about(quant, coverage))
    return model, folder, None


def export(trained, folder, layout="transformers", allow_inexact=False, spoil=lambda folder: None):
    """Figures of the directory that is made, and spoiled before it is looked at."""
    model, packed, held_out = trained
    folder.mkdir(exist_ok=True)
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        target = CompressedTarget(tensors, model.config, Export(compressed_tensors=layout))
        target.write(folder)
        spoil(folder)
        return parity.verify_target(model, packed, folder, target, held_out, allow_inexact)


@pytest.mark.parametrize(
    ("name", "settings", "layout", "types"),
    [
        ("gpt2", quant(2, 2, 8), "transformers", {"W2A16": 9, "F32": 1}),
        ("llama", quant(8, 8, activations=A8), "transformers", {"W8A8": 15, "F32": 1}),
        pytest.param("qwen2", quant(2, 2, activations=A8, granularity="per_row"), "transformers", {"W2A8": 14, "BF16": 1}, marks=pytest.mark.slow),
        pytest.param("t5", quant(4, 4, granularity="per_group", group_size=64), "transformers", None, marks=pytest.mark.slow),
        pytest.param("t5", quant(8, 8, 8, activations=A8, granularity="per_row"), "transformers", None, marks=pytest.mark.slow),
        pytest.param("bart", quant(2, 2, 8, activations=A8), "transformers", None, marks=pytest.mark.slow),
        ("gpt2", quant(8, 8, 8, activations=A8), "vllm", {"W8A8": 8, "F32": 2}),
        pytest.param("llama", quant(4, 4, granularity="per_row"), "vllm", {"W4A16": 14, "F32": 2}, marks=pytest.mark.slow),
    ],
)
def test_trained_students_compute_what_was_trained(name, settings, layout, types, student, tmp_path):  # noqa: F811
    found = export(packed_artifact(student(name), settings, tmp_path / "packed"), tmp_path / "made", layout)
    weights, shipped = found["weights"], found["as_shipped"]
    assert weights["bit_identical"] == weights["tensors"] and weights["largest_relative_difference"] == 0.0
    assert types is None or weights["types"] == types
    assert shipped["held_out_text"] and shipped["perplexity"] == pytest.approx(shipped["perplexity_trained"], rel=0.02)
    assert shipped["top1_agreement"] > 0.95
    if settings.activations is None:
        assert shipped["relative_l2_to_trained"] < 1e-6


@pytest.mark.parametrize(
    ("family", "settings", "layout", "more"),
    [
        ("llama", quant(2, 2, activations=LEARNED), "transformers", {"tie_word_embeddings": True}),  # the input of a tied head, too
        ("llama", quant(8, activations={**LEARNED, "asymmetric": "everywhere"}), "transformers", {}),
        ("bart", quant(8, 8, 8, LEARNED), "transformers", {}),
        ("t5", quant(8, 8, 8, LEARNED), "transformers", {}),
        ("opt", quant(4, 4, 8, LEARNED), "transformers", {}),
        ("mbart", quant(4, 4, 4, granularity="per_row", grid="affine"), "transformers", {}),
        (
            "llama",
            quant(4, overrides=({"match": "*.down_proj.weight", "weights": W8}, {"match": "*.0.*.q_proj.weight", "keep_float": True})),
            "transformers",
            {},
        ),
        ("gpt2", quant(4, 4, 8, float_head=True), "transformers", {}),
        ("gpt2", quant(4, 4, 8, float_head=True, granularity="per_group", group_size=16, grid="affine"), "vllm", {}),
        ("mistral", quant(3, granularity="per_group", group_size=8), "vllm", {}),
    ],
)
def test_where_nothing_is_rounded_logits_are_those_of_training(family, settings, layout, more, tmp_path):
    """Learned scales of activations are of the format; dynamic ones it divides by 127.5 where training divides by 127."""
    found = export(made(family, settings, tmp_path / "packed", **more), tmp_path / "made", layout)
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"]
    assert found["as_shipped"]["relative_l2_to_trained"] < 1e-6, found["as_shipped"]
    assert bool(settings.activations) == (found["as_shipped"]["relative_l2"] > 1e-4)


@pytest.mark.parametrize(("family", "layout"), [("llama", "transformers"), ("gpt2", "vllm"), pytest.param("gpt2", "transformers", marks=pytest.mark.slow)])
def test_every_grid_is_read_back_to_the_bit(family, layout, tmp_path):
    """All fit in 8 bits: half-step grids at twice the code. Rows of Conv1D lie across for transformers, where zero points of rows have no place."""
    cases = [(grid, bits, "per_row", None) for grid, widths in BITS_OF_GRID.items() for bits in widths]
    cases += [("affine", 3, "per_group", 8), ("seq", 2, "per_group", 16), ("lsq", 2, "per_tensor", None), ("minmax_affine", 4, "per_tensor", None)]
    for number, (grid, bits, granularity, group_size) in enumerate(cases):
        folder = tmp_path / str(number)
        model, packed, _ = made(family, quant(bits, grid=grid, granularity=granularity, group_size=group_size), folder)
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            target = CompressedTarget(tensors, model.config, Export(compressed_tensors=layout))
            has_no_place = family == "gpt2" and layout == "transformers" and (group_size or granularity == "per_row" and "affine" in grid)
            assert bool(target.plan.refused) == bool(has_no_place), target.plan.refused
            out = tmp_path / f"{number}-out"
            out.mkdir()
            target.write(out)
            found = parity.verify_weights(model, out, target)
        assert found["bit_identical"] == found["tensors"] and found["types"].keys() <= {"F32", "BF16", "W2A16", "W3A16", "W4A16", "W8A16"}


def test_the_layout_of_vllm(tmp_path):
    """[outputs, inputs], but int8 codes of Conv1D as they are, since vLLM transposes what is called weight; a scale for each output; decoded here by hand."""
    model, packed, _ = trained = made("gpt2", quant(8, 8, 8, A8, overrides=({"match": "*.c_fc.weight", "weights": W4},)), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="was written for vLLM"):
        export(trained, tmp_path / "vllm", "vllm", allow_inexact=True)
        load_compressed(tmp_path / "vllm")
    stored = load_file(tmp_path / "vllm/model.safetensors")
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        codes = {name: tensors.codes(f"transformer.h.0.{name}.weight").codes for name in ("attn.c_attn", "mlp.c_fc")}
    assert torch.equal(stored["transformer.h.0.attn.c_attn.weight"], codes["attn.c_attn"]) and codes["attn.c_attn"].shape == (32, 96)
    assert stored["transformer.h.0.attn.c_attn.weight_scale"].shape == (96, 1)
    words = stored["transformer.h.0.mlp.c_fc.weight_packed"].numpy().view(np.uint32)  # eight 4-bit codes + 8, the first lowest
    digits = np.stack([words >> np.uint32(4 * place) & np.uint32(15) for place in range(8)], -1).reshape(len(words), -1).astype(int) - 8
    assert np.array_equal(digits, codes["mlp.c_fc"].T.numpy()) and stored["transformer.h.0.mlp.c_fc.weight_shape"].tolist() == [128, 32]
    written = json.loads((tmp_path / "vllm/config.json").read_text())["quantization_config"]
    groups = {tuple(group["targets"][:1]): group for group in written["config_groups"].values()}
    assert groups["transformer.h.0.attn.c_attn",]["format"] == "int-quantized" and groups["transformer.h.0.mlp.c_fc",]["format"] == "pack-quantized"
    assert groups["transformer.h.0.attn.c_attn",]["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    assert not any("lm_head" in group["targets"] or "transformer.wte" in group["targets"] for group in groups.values())


EXPERTS = "has no layout for experts such as model.layers.0.mlp.experts.gate_up_proj"
MIXED = ({"match": "*.c_fc.weight", "weights": W8},)


@pytest.mark.parametrize(
    ("family", "settings", "layout", "message"),
    [
        ("gpt2", quant(8, 8, 8, A8), "transformers", r"quantized activations of Conv1D, which transformers drops without a word where it dequantizes; set quant.activations to null, or export"),
        ("gpt2", quant(4, overrides=MIXED), "transformers", r"h.0.mlp.c_fc.weight, .*: transformers dequantizes Conv1D, and then reads every weight as W4A16; train one width"),
        ("gpt2", quant(4, granularity="per_group", group_size=8), "transformers", r"where groups of inputs are no neighbours; train per_row, or"),
        ("gpt2", quant(4, granularity="per_row", grid="affine"), "transformers", r"zero points of rows have no place"),
        ("llama", quant(4, activations={"bits": 4}), "transformers", r"and 12 more: 4-bit activations are nothing that its programs run; train 8 bits"),
        ("llama", quant(4, activations={"bits": 8, "scale": "block_32"}, overrides=({"match": "*.down_proj.weight", "keep_float": True},)), "transformers", "block_32 is llama.cpp's arithmetic"),
        ("opt", quant(8, 8, 8, A8), "transformers", r"OPT flattens them, and compressed-tensors then takes one scale for all tokens"),
        ("t5", quant(2, activations=A8), "transformers", r"quantized activations of T5, which transformers drops .* or quant.linears to 8 bits and per_row"),
        ("mixtral", quant(4), "transformers", EXPERTS),
        ("mixtral", quant(4), "vllm", EXPERTS),
        ("bart", quant(4), "vllm", r"is written for gpt2, llama, mistral, qwen2, qwen3, and this model is bart. Set export.compressed_tensors to transformers"),
        ("llama", quant(8, activations={"bits": 8, "scale": "per_tensor"}), "vllm", r"no scale for a whole tensor that is computed while it runs"),
        ("llama", quant(8, activations=LEARNED), "vllm", r"whose learned scales vLLM makes one of where it fuses projections"),
        ("llama", quant(2, activations=A8), "vllm", r"down_proj.weight: inputs, which vLLM runs beside 2-bit weights per token and without zero points alone; set quant.activations.asymmetric to nowhere"),
        ("llama", quant(4, scale_dtype="fp32"), "vllm", r"vLLM rounds these fp32 scales to bf16; set quant.scale_dtype to portable"),
        ("qwen2", quant(4, overrides=({"match": "*.k_proj.weight", "weights": W8},)), "vllm", r"q_proj, k_proj, v_proj of model.layers.0.self_attn differ, and vLLM, which fuses them"),
        ("llama", quant(4, overrides=({"match": "*.1.mlp.gate_proj.weight", "keep_float": True},)), "vllm", r"gate_proj, up_proj of model.layers.1.mlp differ"),
    ],
)  # fmt: skip
def test_what_these_programs_get_wrong_is_refused_before_training(family, settings, layout, message, tmp_path):
    model = FAMILIES[family]()
    coverage = quantize_model(model, settings)
    asked = Export(compressed_tensors=layout)
    with pytest.raises(ConfigError, match=message) as refused:
        CompressedTarget.check(settings, model.config, coverage, tmp_path, asked)
    if "--allow-inexact" in str(refused.value):
        assert str(refused.value) in CompressedTarget.describe(settings, model.config, coverage, [], asked)
        CompressedTarget.check(settings, model.config, coverage, tmp_path, Export(compressed_tensors=layout, allow_inexact=True))


def test_settings_that_would_be_dropped_are_refused(tmp_path):
    attention = quant(4, activations={"bits": 8, "attention": True})
    for asked, family, message in (
        (attention, "llama", "quant.activations.attention would be dropped without a word"),
        (quant(4, 4, float_head=True), "bart", "which transformers would tie again"),
    ):
        model = FAMILIES[family]()
        coverage = quantize_model(model, asked)
        with pytest.raises(ConfigError, match=message):
            CompressedTarget.check(asked, model.config, coverage, tmp_path, Export())
        assert any(message in line for line in CompressedTarget.describe(asked, model.config, coverage, [], Export()))
    model = FAMILIES["llama"]()
    CompressedTarget.check(attention, model.config, quantize_model(model, attention), tmp_path, Export(allow_inexact=True))


def test_what_is_allowed_all_the_same_is_floats_and_said(tmp_path):
    settings = quant(4, 4, 8, A8, overrides=MIXED)
    found = export(made("gpt2", settings, tmp_path / "packed"), tmp_path / "made", allow_inexact=True)
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"] and found["weights"]["types"] == {"W4A16": 7, "F32": 3}
    assert found["as_shipped"]["relative_l2"] < 1e-6 < found["as_shipped"]["relative_l2_to_trained"]  # activations are float
    notes = plan(FAMILIES["gpt2"]().config, Coverage(quantize_model(FAMILIES["gpt2"](), quant(4, 4, 8)).rows), Export()).notes
    assert notes == [
        "F32 for transformer.wpe.weight, exactly, 4,096 bytes where codes take 1,168: transformers dequantizes all weights by one scheme, which is that of the linears"
    ]


def test_why_several_widths_are_not_dequantized(tmp_path):
    """As the directory says it is exact, which the tests above show; asked to make it dense, transformers reads the second width at the first one."""
    trained = made("llama", quant(4, overrides=({"match": "*.down_proj.weight", "weights": W8},)), tmp_path / "packed")
    export(trained, tmp_path / "made")
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "made", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32)
    ids = words(trained[0]).ids
    with torch.no_grad():
        assert (dense(ids).logits - load_artifact(trained[1])(ids).logits).abs().max() > 0.01


def test_generate_and_load(tmp_path, world, capsys):
    """Through the command line's own ways, and refused where a float model is needed: int8 codes have the shapes of weights."""
    trained = made("llama", quant(8, 8, activations=LEARNED), tmp_path / "packed", vocab_size=300)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / file).write_bytes((world / "teacher" / file).read_bytes())
    export(trained, tmp_path / "made")
    said = []
    for folder in ("made", "packed"):
        assert main(["generate", str(tmp_path / folder), "the cat", "--tokens", "8"]) == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1] and said[0].err == ""
    ids = words(trained[0]).ids
    with torch.no_grad():
        assert torch.equal(load_any(tmp_path / "made")(ids).logits, load_spread(tmp_path / "made")(ids).logits)
    for load in (load_model, meta_model):
        with pytest.raises(ConfigError, match="holds weights in the format of compressed-tensors, but a float model is needed"):
            load(tmp_path / "made")


def flip_a_bit(folder):
    """Of the last tensor."""
    flip(folder / "model.safetensors")


def test_verify_notices_a_flipped_bit(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not what was trained \(largest difference"):
        export(made("llama", quant(8, activations=A8), tmp_path / "packed"), tmp_path / "made", spoil=flip_a_bit)


def flip_in_config(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"compressed-tensors"', '"compressed-tensorz"'))


def edited(folder):
    (folder / DESCRIPTION).write_text((folder / DESCRIPTION).read_text().replace('"config.json"', '"config.jsom"'))


@pytest.mark.parametrize("layout", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, r"model\.safetensors: does not have the hash in compressed-tensors.json; a byte was changed"),
        (lambda folder: cut(folder), r"model\.safetensors: has \d+ bytes, compressed-tensors.json says \d+; it is truncated or missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: has 0 bytes"),
        (lambda folder: without_a_scale(folder), r"model\.safetensors: has \d+ bytes, compressed-tensors.json says \d+"),
        (flip_in_config, r"config\.json: does not have the hash"),
        (lambda folder: of_format(folder / DESCRIPTION, 1), r"compressed-tensors\.json: has format 1, this dqtrain reads 2\. Export the run again"),
        (lambda folder: of_format(folder / DESCRIPTION, 3), r"compressed-tensors\.json: has format 3, this dqtrain reads 2\. Export the run again"),
        (edited, r"compressed-tensors\.json: does not have the hash in its last line; it was edited or damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), r"compressed-tensors\.json: cannot be read \(TypeError"),
    ],
)
def test_damage_is_noticed_on_load(spoil, message, layout, tmp_path, monkeypatch):
    """Of the layout for vLLM when it is handed over, which says that there is no vLLM as long as the files are whole."""
    monkeypatch.setenv("PATH", str(tmp_path))
    model, packed, _ = made("llama", quant(4, granularity="per_row"), tmp_path / "packed")
    folder = tmp_path / "made"
    folder.mkdir()
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        CompressedTarget(tensors, model.config, Export(compressed_tensors=layout)).write(folder)
    if layout == "transformers":
        load_any(folder)
    else:
        with pytest.raises(ConfigError, match="there is no `vllm` on PATH"):
            serve(folder, "127.0.0.1", free_port(), [])
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_any(folder)
    with pytest.raises(CheckpointError, match=message):
        serve(folder, "127.0.0.1", free_port(), [])


@pytest.mark.parametrize(("layout", "activations"), [("transformers", A8), ("vllm", None)])
def test_many_bytes_are_in_parts(layout, activations, tmp_path, monkeypatch):
    """As with a limit of 5 GB, of which each part has no more; the same tensors as in one file."""
    trained = made("llama", quant(8, activations=activations), tmp_path / "packed")
    whole = export(trained, tmp_path / "whole", layout)
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 10_000)
    found = export(trained, tmp_path / "made", layout)
    parts = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(parts) > 2 and all(len(load_file(part)) == 1 or part.stat().st_size < 16_000 for part in parts)
    stored = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    expected = load_file(tmp_path / "whole/model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    index = tmp_path / "made/model.safetensors.index.json"
    assert json.loads(index.read_text())["weight_map"].keys() == expected.keys()
    assert found["bytes"]["tensors"] == whole["bytes"]["tensors"]
    assert found["bytes"]["file"] == sum(file.stat().st_size for file in [*parts, index]) == found["bytes"]["tensors"] + found["bytes"]["header"]
    assert found["as_shipped"] == whole["as_shipped"]
    if layout == "transformers":
        parts[1].unlink()
        with pytest.raises(CheckpointError, match=rf"{parts[1].name}: has 0 bytes, compressed-tensors.json says"):
            load_compressed(tmp_path / "made")


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def without_a_scale(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_groups(folder):
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"]["config_groups"]["group_0"]["targets"].pop()
    (folder / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("activations", [None, A8], ids=["made dense", "as it is"])
@pytest.mark.parametrize("spoil", [cut, without_a_scale, without_groups])
def test_damaged_directories_are_refused(spoil, activations, tmp_path):
    trained = made("llama", quant(4, activations=activations), tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"can be read|holds no (model.layers|lm_head)"):
        export(trained, tmp_path / "made", spoil=spoil)
    if activations or spoil is not without_groups:  # made dense, names of modules are not looked at
        (tmp_path / "made/compressed-tensors.json").unlink()  # as one from elsewhere
        with pytest.raises(CheckpointError, match=r"compressed-tensors cannot load it|transformers finds no place, or no value"):
            load_compressed(tmp_path / "made")


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(ConfigError, match=r"needs the Python package compressed-tensors, .* pip install 'dqtrain\[runtimes\]'"):
        load_any(tmp_path)


@pytest.mark.slow
def test_a_run_ends_with_it(make_run):
    """Through the command line: trained, exported, generated from."""
    run = make_run(
        quant="{linears: {bits: 4, granularity: per_row}, embeddings: {bits: 4, granularity: per_row}, positions: null, activations: null}",
        export="{targets: [packed, compressed-tensors]}",
    )
    code, output = run.train(ranks=1)
    assert code == 0, output
    found = json.loads((run.path / "result.json").read_text())["export"]["others"]["compressed-tensors"]
    assert found["parity"]["weights"]["types"] == {"W4A16": 9} and found["parity"]["as_shipped"]["held_out_text"]
    texts = [run.dqtrain("generate", str(run.path / "artifact" / target), "the cat", "--tokens", "8") for target in ("compressed-tensors", "packed")]
    assert texts[0] == texts[1] and texts[0][0] == 0
    code, output = run.dqtrain("export", str(run.path), "--to", "compressed-tensors", "--compressed-tensors", "vllm")
    assert code == 0 and json.loads(output)["parity"]["weights"]["types"] == {"W4A16": 8, "F32": 1}, output


def test_what_vllm_has_kernels_for_on_gpus_alone_is_said():
    def notes(activations):
        quant = Quant.model_validate({"linears": {"bits": 4, "granularity": "per_row"}, "embeddings": None, "positions": None, "activations": activations})
        model = FAMILIES["llama"]()
        return plan(model.config, quantize_model(model, quant), Export(compressed_tensors="vllm")).notes

    said = "vLLM has kernels for W4A8 on GPUs alone"
    assert said in notes({"bits": 8, "asymmetric": "nowhere"}) and not any("on GPUs alone" in note for note in notes(None))
