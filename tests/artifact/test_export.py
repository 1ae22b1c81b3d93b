"""`export` of a run's checkpoint: as in memory, within bounds of memory, and with a card."""

import json
import re
import shutil

import pytest
import torch
import yaml
from families import FAMILIES
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dqtrain import tensor_file
from dqtrain.artifact import format, hf, parity
from dqtrain.artifact.description import LIST, PARITY, write_list
from dqtrain.artifact.export import check_targets, export
from dqtrain.artifact.load import chosen_checkpoint, load_artifact, trained_model
from dqtrain.artifact.size import artifact_bytes, export_about, float_part
from dqtrain.bench.export import SMALL, gpt2, measure, write_run
from dqtrain.bench.sharding import FREED
from dqtrain.cli import main
from dqtrain.config import Export, Quant, load_config
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.making import load_model, meta_model
from dqtrain.quant.modules import Coverage, quantize_model, served_parameters

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A teacher\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was never trained, with a checkpoint of four ranks of ZeRO-3."""
    run = write_run(tmp_path_factory.mktemp("runs") / "mine", gpt2(SMALL | {"n_layer": 2}))
    (run.path / "teacher").mkdir()
    (run.path / "teacher/README.md").write_text(CARD)
    return run


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(run):
    """(figures, files by target) of what is read a tensor at a time, nothing ever whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "WHOLE_BYTES", 0)
        found = export(run, chosen_checkpoint(run), Export(targets=("packed", "hf")))
    return found, {target: files_of(run.artifact(target)) for target in ("packed", "hf")}


def test_it_is_what_is_written_of_the_model_in_memory(run, exported, tmp_path):
    found, files = exported
    assert found["parity"]["relative_logit_difference"] == found["others"]["hf"]["parity"]["relative_logit_difference"] == 0.0
    model = trained_model(run, chosen_checkpoint(run))
    about = format.read_description(run.artifact("packed"))
    format.write(model, tmp_path, {key: about[key] for key in ("activations", "checkpoint", "parity", "coverage")})
    assert all((tmp_path / name).read_bytes() == files["packed"][name] for name in ("model.safetensors", "artifact.json"))
    served, plain = dict(served_parameters(model)), load_model(run.artifact("hf"))
    assert all(torch.equal(value, served[name]) for name, value in plain.named_parameters())
    load_artifact(run.artifact("packed"), "dense").save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").read_bytes() == files["hf"]["model.safetensors"]


def test_exported_whole_and_again_it_is_the_same(run, exported):
    files = []
    for _ in range(2):
        export(run, chosen_checkpoint(run), Export(targets=("packed", "hf")))
        files.append({target: files_of(run.artifact(target)) for target in ("packed", "hf")})
    assert files[0] == files[1] and files[0]["hf"] == exported[1]["hf"] and files[0]["packed"].keys() == exported[1]["packed"].keys()
    proof = {"artifact.json", "parity.json", "README.md"}  # more is looked at of what is whole
    assert {name for name, content in files[0]["packed"].items() if content != exported[1]["packed"][name]} == proof


def test_the_description_has_the_figures_of_the_proof(run, exported):
    figures = exported[0]["parity"]
    written = json.loads(exported[1]["packed"]["artifact.json"])
    expected = {name: (figures | figures["as_shipped"])[name] for name in PARITY}
    assert written["parity"] == pytest.approx(expected, rel=1e-3) and written["parity"]["perplexity"] > 100
    assert figures["as_shipped"]["target_tokens"] == 64 and "fast" not in figures  # a single text was read
    coverage = Coverage.from_json(run.coverage.read_text())
    foretold = artifact_bytes(coverage, float_part(meta_student(run)), export_about(coverage, run.load_config().quant))
    assert foretold.total == figures["bytes"]["file"] == sum(len(exported[1]["packed"][name]) for name in ("model.safetensors", "artifact.json"))


def meta_student(run):
    model = meta_model(run.student)
    quantize_model(model, run.load_config().quant, initialise=False)
    return model


def test_what_fails_leaves_no_half_and_what_was_killed_last_leaves_the_older_one(run, exported, monkeypatch):
    folder = run.artifact("packed")
    before = files_of(folder)
    folder.rename(folder.with_name(".old-packed"))  # as a kill between the last two renames leaves it
    with monkeypatch.context() as patch:
        patch.setattr(parity, "LOGITS_TOLERANCE", -1.0)
        with pytest.raises(CheckpointError, match="its logits differ"):
            export(run, chosen_checkpoint(run), Export(targets=("packed",)))
    assert files_of(folder) == before and not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_in_parts(run, exported, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 60_000)
    export(run, chosen_checkpoint(run), Export(targets=("packed", "hf")))
    parts = {target: sorted(path.name for path in run.artifact(target).glob("*.safetensors*")) for target in ("packed", "hf")}
    assert len(parts["packed"]) == 4 and len(parts["hf"]) > 5 and all(names[-1] == tensor_file.INDEX for names in parts.values())
    assert parity.verify(trained_model(run, chosen_checkpoint(run)), run.artifact("packed"))["relative_logit_difference"] == 0.0
    assert torch.equal(*(AutoModelForCausalLM.from_pretrained(run.artifact(target)).transformer.wte.weight for target in ("packed", "hf")))


def test_the_card_says_what_the_hub_and_a_person_want_to_know(exported):
    found, files = exported
    for target in ("packed", "hf"):
        text = files[target]["README.md"].decode()
        card = ModelCard(text)
        assert card.data.license == "apache-2.0" and card.data.library_name == {"packed": "dqtrain", "hf": "transformers"}[target]
        assert {"dqtrain", "quantized", "distillation", "2-bit", target} <= set(card.data.tags) and card.data.pipeline_tag == "text-generation"
        assert "base_model" not in card.data.to_dict()  # a path of this machine, which the Hub does not know
        figures = found if target == "packed" else found["others"]["hf"]
        assert f"{figures['bytes']:,} bytes, {figures['ratio']:.2f} times smaller than the {figures['fp32_bytes']:,} bytes" in text
        assert "| relative logit difference | 0 |" in text and "taught by teacher" in text and "Trained by dqtrain for 1 steps" in text
        assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["quant"]["linears"]["bits"] == 2
        assert "transformer.h.0-1.attn.c_attn.weight" in text and "from_pretrained" in text
        assert ("import dqtrain" in text) == (target == "packed") and ("Activations are float here" in text) == (target == "hf")


def test_the_card_of_compressed_tensors_says_who_loads_its_layout(run, exported):
    for layout, library, use, program in (
        ("transformers", "transformers", 'AutoModelForCausalLM.from_pretrained(".")', "transformers with compressed-tensors"),
        ("vllm", "vllm", "vllm serve .", "transformers with the student's own quantizers"),
    ):
        found = export(run, chosen_checkpoint(run), Export(targets=("compressed-tensors",), compressed_tensors=layout, allow_inexact=True))
        text = (run.artifact("compressed-tensors") / "README.md").read_text()
        assert ModelCard(text).data.library_name == library and use in text and ("from_pretrained" in text) == (layout == "transformers")
        assert found["parity"]["as_shipped"]["program"] == program and f"| as shipped: program | {program} |" in text


def test_a_teacher_of_the_hub_is_the_base_model_and_one_that_is_gone_states_no_licence(run, exported, tmp_path):
    shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns("artifact", "teacher"))
    other = type(run)(tmp_path / "other")
    tree = yaml.safe_load(other.config.read_text())
    name = f"hf:someone/teacher@{40 * '0'}"
    other.config.write_text(yaml.safe_dump(tree | {"teacher": {"path": name}}))
    export(other, chosen_checkpoint(other))
    text = (other.artifact("packed") / "README.md").read_text()
    assert ModelCard(text).data.base_model == "someone/teacher" and ModelCard(text).data.base_model_relation == "quantized"
    assert "license" not in ModelCard(text).data.to_dict() and "No licence could be read beside the teacher." in text


def test_a_licence_that_lies_beside_the_teacher_goes_with_the_student(run, exported, tmp_path):
    shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns("artifact"))
    other = type(run)(tmp_path / "other")
    other.config.write_text(yaml.safe_dump(yaml.safe_load(other.config.read_text()) | {"teacher": {"path": str(other.path / "teacher")}}))
    (other.path / "teacher/README.md").write_text("# No front matter\n")
    (other.path / "teacher/LICENSE.txt").write_text("Do as you like.\n")
    export(other, chosen_checkpoint(other))
    folder = other.artifact("packed")
    assert (folder / "LICENSE").read_text() == "Do as you like.\n"
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "other" and "The teacher's: LICENSE." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gguf", "fastest"], "--gguf fastest: gguf is not among the targets asked for, none by name. Add it with --to gguf"),
        (
            ["--to", "packed,gguf", "--compressed-tensors", "vllm"],
            "--compressed-tensors vllm: compressed-tensors is not among the targets asked for, packed, gguf.",
        ),
    ],
)
def test_a_layout_of_a_target_that_is_not_asked_for(options, message, run, capsys):
    assert main(["export", str(run.path), *options]) == 2
    assert message in capsys.readouterr().err


def test_another_models_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns("artifact"))
    config = json.loads((tmp_path / "other/student/config.json").read_text())
    other = type(run)(tmp_path / "other")
    for changes, message in (({"n_layer": 1}, r"has transformer\.h\.1\..*no place for"), ({"vocab_size": 511}, r"wte\.weight has shape \(512, 64\)")):
        (other.student / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            export(other, chosen_checkpoint(other))
        assert not other.artifact("packed").exists()


@pytest.mark.parametrize("family", ["mixtral", "bart", "t5"])
def test_floats_are_stored_as_transformers_stores_them(family, tmp_path, monkeypatch):
    """Experts one by one; a buffer; tied tables once."""
    config = FAMILIES[family]().config
    run = write_run(tmp_path / "run", config)
    monkeypatch.setattr(parity, "WHOLE_BYTES", 0)
    found = export(run, chosen_checkpoint(run), Export(targets=("packed", "hf")))
    assert found["others"]["hf"]["parity"]["tensors_bit_identical"] == found["parity"]["tensors_bit_identical"]
    load_artifact(run.artifact("packed"), "dense").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run.artifact("hf"), tmp_path / "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(".experts.2.w1.weight" in name for name in ours) == (family == "mixtral") and ("final_logits_bias" in ours) == (family == "bart")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bart"])
def test_bf16_is_refused_where_it_rounds_or_rounds_once(family, tmp_path, monkeypatch, capsys):
    """Positions of 8 bits, norms and biases; matrices of 2 bits are held exactly."""
    run = write_run(tmp_path / "run", FAMILIES[family]().config)
    assert main(["export", str(run.path), "--to", "hf", "--hf", "bf16"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"hf cannot hold \S+, \S+, \S+ and \d+ more in bf16: up to 3.9e-3 of each value is rounded away; set export.hf to fp32", told)
    assert "--allow-inexact" in told and not run.artifact("hf").exists()
    served = dict(served_parameters(trained_model(run, chosen_checkpoint(run))))
    inexact = {name for name, tensor in served.items() if not torch.equal(tensor, tensor.bfloat16().float())}
    assert all(served[name].ndim == 1 or "position" in name or "wpe" in name or "gate.weight" in name for name in inexact)
    largest = max(float((tensor - tensor.bfloat16().float()).abs().max() / tensor.abs().max()) for tensor in served.values())
    sizes = {}
    for dtype, whole in (("bf16", True), ("bf16", False), ("fp32", True)):
        monkeypatch.setattr(parity, "WHOLE_BYTES", 2**30 if whole else 0)
        found = export(run, chosen_checkpoint(run), Export(targets=("hf",), hf=dtype, allow_inexact=True))
        found, sizes[dtype] = found if "parity" in found and found["path"].endswith("hf") else found["others"]["hf"], found["bytes"]
        loaded = AutoModelForCausalLM if family != "bart" else AutoModelForSeq2SeqLM
        model = loaded.from_pretrained(run.artifact("hf"))
        if dtype == "fp32":
            break
        assert model.dtype == torch.bfloat16 and json.loads((run.artifact("hf") / "config.json").read_text())["dtype"] == "bfloat16"
        assert all(torch.equal(value, served[name].bfloat16()) for name, value in model.named_parameters())
        assert (found["parity"]["tensors_bit_identical"], found["parity"]["tensors_rounded_to_bf16"]) == (len(served) - len(inexact), len(inexact))
        assert found["parity"]["largest_relative_difference"] == pytest.approx(largest) and 0 < found["parity"]["relative_logit_difference"] < 0.02
        assert f"| largest relative difference | {largest:.4g} |" in (run.artifact("hf") / "README.md").read_text()
    assert sizes["bf16"] < 0.55 * sizes["fp32"]


def test_bf16_that_rounds_is_told_before_training(run, tmp_path, capsys):
    config = tmp_path / "bf16.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(run.config.read_text()) | {"export": {"targets": ["packed", "hf"], "hf": "bf16"}}))
    asked = load_config(config)
    model = meta_model(run.student)
    coverage = quantize_model(model, asked.quant, initialise=False)
    with pytest.raises(ConfigError, match=r"hf cannot hold transformer\.wpe\.weight, .* set export\.hf to fp32"):
        check_targets(asked, asked.export, model, coverage, run.student)
    allowed = asked.export.model_copy(update={"allow_inexact": True})
    assert check_targets(asked, allowed, model, coverage, run.student)["hf"][0].startswith("hf: bf16 rounds transformer.wpe.weight, ")
    assert main(["inspect", str(run.student), "--config", str(config)]) == 0
    assert "hf cannot hold transformer.wpe.weight" in " ".join(capsys.readouterr().out.split())


def test_bf16_that_holds_all_needs_no_leave(run, exported, tmp_path):
    shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns("artifact"))
    other = type(run)(tmp_path / "other")
    tree = yaml.safe_load(other.config.read_text())
    tree["quant"] |= {"positions": {"bits": 2, "granularity": "per_row"}, "vectors": "bf16"}
    other.config.write_text(yaml.safe_dump(tree | {"export": {"hf": "bf16"}}))
    other.coverage.write_text(quantize_model(meta_model(other.student), Quant.model_validate(tree["quant"]), initialise=False).to_json())
    found = export(other, chosen_checkpoint(other), Export(targets=("packed", "hf"), hf="bf16"))
    assert found["others"]["hf"]["parity"].items() <= {key: value for key, value in found["parity"].items() if not isinstance(value, dict)}.items()
    assert found["parity"]["relative_logit_difference"] == 0.0
    assert {tensor.dtype for tensor in load_file(other.artifact("hf") / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"])
def test_a_tensor_that_is_neither_trained_nor_rounded_once(name, run, exported, tmp_path):
    """An error of one unit in the last place of bf16, in a tensor that may be rounded and in one that may not."""
    export(run, chosen_checkpoint(run), Export(targets=("hf",), hf="bf16", allow_inexact=True))
    folder = shutil.copytree(run.artifact("hf"), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.int16)[0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_list(folder / LIST)
    trained = trained_model(run, chosen_checkpoint(run))
    rounded = hf.rounded(Coverage.from_json(run.coverage.read_text()), float_part(trained), Export(hf="bf16"))
    assert ("transformer.wpe.weight" in rounded, "transformer.h.0.attn.c_attn.weight" in rounded) == (True, False)
    with pytest.raises(CheckpointError, match=f"{name} is not what was trained"):
        parity.verify(trained, folder, run.artifact("packed"), rounded)


@pytest.mark.slow
def test_memory_is_that_of_the_largest_matrix(tmp_path, monkeypatch):
    """110 million parameters, of 17 million in the largest matrix: never whole, and no file stays in memory as it is read.

    Their artifact would be loaded whole for the proof, were it not said to be too large.
    """
    program = "from dqtrain.artifact import parity; from dqtrain.cli import main; parity.WHOLE_BYTES = 0; raise SystemExit(main())"
    shape = {"n_embd": 1024, "n_layer": 7, "n_head": 16, "vocab_size": 16384}
    small, large = write_run(tmp_path / "small", gpt2(SMALL)), write_run(tmp_path / "large", gpt2(shape))
    for key, value in FREED.items():
        monkeypatch.setenv(key, value)
    peaks = [measure(run, "packed,hf", ("-c", program))["peak"] for run in (small, large)]
    largest, whole = 4 * 16384 * 1024, 4 * (16384 * 1024 + 1024 * 1024 + 7 * 12 * 1024**2)
    assert peaks[1] - peaks[0] < 3.75 * largest < 0.6 * whole, [peak / 2**20 for peak in peaks]
