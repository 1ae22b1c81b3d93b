"""transformers' own from_pretrained gives the model that was trained, in each mode, for every family; without dqtrain it fails."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import edit_description
from families import FAMILIES, IDS, logits_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import dqtrain
from dqtrain.artifact import format
from dqtrain.artifact.pretrained import name_in_config
from dqtrain.cli import main
from dqtrain.config import BITS_OF_GRID, Quant
from dqtrain.data.prepare import load_tokenizer
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import quantize_model, quantized_parameters, served_parameters


def settings(linears=2, embeddings=2, positions=8, activations=8, grid="dynamic", granularity="per_tensor", group_size=None, scale="per_token", **more):
    def weights(bits, granularity, grid="dynamic", group_size=None):
        return None if bits is None else {"bits": bits, "granularity": granularity, "grid": grid, "group_size": group_size}

    return Quant.model_validate(
        {
            "linears": weights(linears, granularity, grid, group_size),
            "embeddings": weights(embeddings, "per_row", grid),
            "positions": weights(positions, "per_row"),
            "activations": activations and {"bits": activations, "scale": scale, "attention": more.pop("attention", False)},
            **more,
        }
    )


def write(folder, quant, family="gpt2", rounded=False, **shape):
    """A small quantized model with scales as training might leave them, and its artifact in `folder`."""
    model = FAMILIES[family](**shape)
    coverage = quantize_model(model, quant, rounded=rounded)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter in quantized_parameters(model):
            for learned in parameter.learned:
                learned *= torch.rand_like(learned) + 0.5
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_()
    calibrate(model, lambda: logits_of(model))
    folder.mkdir(exist_ok=True)
    model.eval().save_pretrained(folder)  # config.json and generation_config.json; the weights are written over
    activations = quant.activations.model_dump() if quant.activations else None
    format.write(model, folder, {"activations": activations, "coverage": json.loads(coverage.to_json())})
    name_in_config(folder, type(model).__name__)
    return model


def auto(model):
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


def same_weights(found, model):
    names = dict(found.named_parameters())
    served = dict(served_parameters(model))
    assert names.keys() == served.keys() and all(torch.equal(names[name], served[name]) for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_was_trained(family, tmp_path):
    model = write(tmp_path, settings(activations=8, attention=family != "mixtral"), family)
    found, report = auto(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not found.training
    same_weights(found, model)
    assert len({id(p) for p in found.parameters()}) == len({id(p) for p in model.parameters()}) - sum(len(p.learned) for p in quantized_parameters(model))
    with torch.no_grad():
        assert torch.equal(logits_of(found), logits_of(model))
    generated = [m.generate(IDS, max_new_tokens=4, do_sample=False, min_new_tokens=4) for m in (found, model)]
    assert torch.equal(*generated)
    assert torch.equal(logits_of(dqtrain.load_artifact(tmp_path)), logits_of(found))


GRIDS = [settings(bits, bits, grid=grid) for grid, widths in BITS_OF_GRID.items() for bits in widths]


@pytest.mark.parametrize(
    ("quant", "rounded"),
    [
        *((quant, False) for quant in GRIDS),
        (settings(3, 3, None, grid="affine", granularity="per_group", group_size=8), False),
        (settings(2, 4, vectors="bf16", scale_dtype="fp32", activations=None), False),
        (settings(4, 4, scale="learned", attention=True), False),
        (settings(2, 4, None, float_head=True, scale="per_tensor"), True),
    ],
    ids=lambda value: f"{value.linears.grid}-{value.linears.bits}" if isinstance(value, Quant) else str(value),
)
def test_every_grid(quant, rounded, tmp_path):
    model = write(tmp_path, quant, rounded=rounded)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_weights(found, model)
    with torch.no_grad():
        assert torch.equal(logits_of(found), logits_of(model))


@pytest.mark.parametrize("family", ["gpt2", "mbart", "t5", "mixtral"])
def test_dense_is_a_plain_float_model(family, tmp_path):
    model = write(tmp_path / "packed", settings(), family)
    found = dqtrain.load_artifact(tmp_path / "packed", mode="dense")
    assert type(found) is type(FAMILIES[family]()) and {type(m).__module__.split(".")[0] for m in found.modules()} <= {"torch", "transformers"}
    same_weights(found, model)
    plain = FAMILIES[family]().eval()
    state = dict(served_parameters(model)) | dict(model.named_buffers())
    plain.load_state_dict({name: state.get(name, tensor) for name, tensor in plain.state_dict().items()}, strict=True)
    plain.tie_weights()
    with torch.no_grad():
        assert torch.equal(logits_of(found), logits_of(plain))
    found.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    again = auto(model).from_pretrained(tmp_path / "float")
    with torch.no_grad():
        assert torch.equal(logits_of(again), logits_of(found))
    half = auto(model).from_pretrained(tmp_path / "packed", config=with_mode(tmp_path / "packed", "dense"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    names = dict(half.named_parameters())
    assert all(torch.equal(names[name], p.bfloat16()) for name, p in found.named_parameters())


def with_mode(folder, mode):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["mode"] = mode
    return config


def test_what_would_not_be_what_was_trained_is_refused(tmp_path):
    write(tmp_path, settings())
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(ConfigError, match=r"exact of a packed artifact computes in torch.float32, not in torch.bfloat16. Give dtype=torch.float32, or another"):
        load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="mode fast of a packed artifact computes in torch.bfloat16"):
        load(tmp_path, config=with_mode(tmp_path, "fast"))
    with pytest.raises(ConfigError, match="mode quick of a packed artifact is unknown. Give one of exact, dense, fast"):
        load(tmp_path, config=with_mode(tmp_path, "quick"))
    with pytest.raises(ConfigError, match="runs on one device, not on meta. Load it with device_map='cpu' or 'cuda'"):
        load(tmp_path, config=with_mode(tmp_path, "fast"), dtype=torch.bfloat16, device_map="meta")
    where = load(tmp_path, config=with_mode(tmp_path, "fast"), dtype=torch.bfloat16, device_map="auto").device.type
    assert where == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="is not saved again: copy .* as it is"):
        load(tmp_path).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def damage(folder, change):
    content = bytearray((folder / "model.safetensors").read_bytes())
    change(content)
    (folder / "model.safetensors").write_bytes(content)


def flip(content):
    content[-100] ^= 1


def cut(content):
    del content[-7:]


def describe(change):
    return lambda folder: edit_description(folder, change)


def row(about, name):
    return next(row for row in about["coverage"] if row[0] == name)


WPE, WTE = "transformer.wpe.weight", "transformer.wte.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: damage(folder, flip), "a byte was changed"),
        (lambda folder: damage(folder, cut), "is truncated or missing"),
        (lambda folder: (folder / "artifact.json").unlink(), "artifact.json"),
        (describe(lambda about: about.update(format=2)), "has format 2, this dqtrain reads 4"),
        (describe(lambda about: about["coverage"].append(["extra", *row(about, WTE)[1:]])), r"lists \(no extra\)"),
        (describe(lambda about: about["coverage"].remove(row(about, WPE))), rf"{WPE} has shape \(1024,\), the model's {WPE} is \(32, 32\)"),
        (describe(lambda about: row(about, WTE).__setitem__(1, [98, 32])), rf"{WTE} has 621 values, not 628"),
        (describe(lambda about: about["settings"][row(about, WTE)[2]]["quantizer"].update(granularity="per_tensor")), rf"{WTE}.scale has 97 values, not 1"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "dense", "fast"])
def test_damage_is_said(harm, message, mode, tmp_path):
    write(tmp_path, settings())
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=with_mode(tmp_path, mode), dtype=torch.bfloat16 if mode == "fast" else torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("bits", [2, 8])
def test_without_dqtrain_it_fails(family, bits, tmp_path):
    """Where 8-bit codes had the float weights' shape too, they would load as weights."""
    model = write(tmp_path, settings(bits, bits, 8), family)
    code = f"import transformers; transformers.{auto(model).__name__}.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Unknown quantization type, got dqtrain" in done.stderr and "RuntimeError" in done.stderr, done.stderr


@pytest.mark.parametrize("imports", ["dqtrain, transformers", "transformers, dqtrain", "dqtrain, transformers.quantizers.auto, transformers, dqtrain.cli"])
def test_dqtrain_is_imported_before_or_after_transformers(imports, tmp_path):
    write(tmp_path, settings())
    code = f"import {imports}; print(transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).config.quantization_config.mode)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "exact\n", done.stderr


def test_importing_dqtrain_imports_nothing_heavy():
    code = "import dqtrain, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_generate_on_the_command_line(tmp_path, tokenizers, capsys):
    """In every mode, as it is written, beside another model, and through a chat template."""
    for file in tokenizers["gpt2"].iterdir():
        shutil.copy(file, tmp_path)
    model = write(tmp_path, settings(), vocab_size=11)
    tokenizer = load_tokenizer(tmp_path)
    ids = torch.tensor([tokenizer.encode("a b say")])
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    for mode in ([], ["--mode", "exact"]):
        assert main(["generate", str(tmp_path), "a b say", "--tokens", "5", *mode]) == 0
        assert capsys.readouterr().out.split() == tokenizer.decode(out, skip_special_tokens=True).split()
    assert main(["generate", str(tmp_path), "a b", "--tokens", "3", "--mode", "fast", "--compare", str(tmp_path)]) == 0
    prompt, _, *rows = capsys.readouterr().out.splitlines()
    assert prompt == "a b" and "".join(row.split(" | ")[1] for row in rows[:-2]) == str(tmp_path) and rows[-1].split(" | ")[1:]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}say :"
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "a b", "--tokens", "5"]) == 0
    out = model.generate(torch.tensor([tokenizer.encode("a b say :")]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 4:]
    assert capsys.readouterr().out.split() == tokenizer.decode(out, skip_special_tokens=True).split()
    assert main(["generate", str(tmp_path / "none"), "a b", "--mode", "fast"]) == 4
    assert "no artifact.json there" in capsys.readouterr().err
