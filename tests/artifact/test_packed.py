"""The artifact computes what was trained, and refuses to load when anything about it is wrong."""

import copy
import json
import re
import shutil

import pytest
import torch
from conftest import edit_description
from families import FAMILIES, IDS
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

import dqtrain
from dqtrain.artifact import format, parity
from dqtrain.artifact.load import load_artifact
from dqtrain.artifact.size import artifact_bytes, float_part
from dqtrain.config import BITS_OF_GRID, Quant
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import digest
from dqtrain.models.making import load_model
from dqtrain.quant.modules import is_learned_scale, quantize_model, quantized_parameters
from dqtrain.quant.pack import packed_bytes


def settings(linears=2, embeddings=2, positions=8, activations=8, grid="dynamic", granularity="per_tensor", group_size=None, attention=False, **more):
    def weights(bits, granularity, grid="dynamic", group_size=None):
        return None if bits is None else {"bits": bits, "granularity": granularity, "grid": grid, "group_size": group_size}

    return Quant.model_validate(
        {
            "linears": weights(linears, granularity, grid, group_size),
            "embeddings": weights(embeddings, "per_row", grid),
            "positions": weights(positions, "per_row"),
            "activations": activations and {"bits": activations, "attention": attention},
            **more,
        }
    )


def about(quant, coverage):
    return {"activations": quant.activations.model_dump() if quant.activations else None, "coverage": json.loads(coverage.to_json())}


def write(world, folder, quant, rounded=False):
    """A quantized copy of the tiny teacher with scales that training has moved, written as an artifact."""
    model = load_model(world / "teacher")
    coverage = quantize_model(model, quant, rounded=rounded)
    torch.manual_seed(1)
    for parameter in quantized_parameters(model):
        for learned in parameter.learned:
            learned.data *= torch.rand_like(learned) + 0.5
        parameter.weight.data[0] = 0  # a row of zeros
    folder.mkdir()
    model.config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / "teacher" / file, folder)
    format.write(model, folder, about(quant, coverage))
    return model


@pytest.mark.parametrize(
    "quant",
    [
        settings(),
        settings(4, 8, None),
        settings(8, None, 8),
        settings(2, 2, 8, activations=None),
        settings(2, 4, 8, scale_dtype="fp32"),
        settings(vectors="bf16", attention=True),
        *(settings(bits, bits, grid=grid, vectors="bf16") for grid, widths in BITS_OF_GRID.items() for bits in widths if grid != "dynamic"),
        settings(3, 3, grid="affine", granularity="per_group", group_size=8),
        settings(2, 2, grid="seq", granularity="per_row"),
    ],
    ids=lambda quant: f"{quant.linears.grid}-{quant.linears.bits}-{quant.embeddings and quant.embeddings.bits}",
)
def test_artifact_is_bit_identical(world, tmp_path, quant):
    model = write(world, tmp_path / "packed", quant)
    figures = parity.verify(model, tmp_path / "packed")
    assert figures["relative_logit_difference"] == 0.0
    assert figures["tensors_bit_identical"] == len([name for name, _ in model.named_parameters() if not is_learned_scale(name)])
    loaded = dqtrain.load_artifact(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # stored and loaded once
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out = loaded.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = model.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(out, expected)


def test_matrices_that_training_rounded_to_bf16_are_stored_so(world, tmp_path):
    """Codes of the rounded latents, and what stays float in two bytes: positions, one linear layer, and the head that reads the table before its codes."""
    quant = settings(2, 4, None, float_head=True, overrides=({"match": "transformer.h.1.mlp.c_fc.weight", "keep_float": True},))
    model, unrounded = write(world, tmp_path / "rounded", quant, rounded=True), write(world, tmp_path / "packed", quant)
    assert parity.verify(model, tmp_path / "rounded")["relative_logit_difference"] == 0.0
    stored, usual = (load_file(tmp_path / folder / "model.safetensors") for folder in ("rounded", "packed"))
    latent = dict(unrounded.named_parameters(remove_duplicate=False))
    for name in ("transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight", "lm_head.weight"):
        assert torch.equal(stored[name], latent[name].bfloat16()) and torch.equal(usual[name], latent[name])
    assert any(not torch.equal(stored[name], usual[name]) for name in stored if usual[name].dtype == torch.uint8)
    coverage = quantize_model(load_model(world / "teacher"), quant, initialise=False, rounded=True)
    assert artifact_bytes(coverage, float_part(model), about(quant, coverage)).total == sum(
        (tmp_path / "rounded" / name).stat().st_size for name in ("model.safetensors", "artifact.json")
    )
    parity.verify(unrounded, tmp_path / "packed")


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2", "opt"])
def test_other_families(tmp_path, family):
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    shape = {**small, "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": family != "llama", "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(tmp_path / "teacher")
    model = load_model(tmp_path / "teacher")
    coverage = quantize_model(model, settings())
    assert coverage.fraction == 1.0
    (tmp_path / "packed").mkdir()
    model.config.save_pretrained(tmp_path / "packed")
    format.write(model, tmp_path / "packed", about(settings(), coverage))
    figures = parity.verify(model.eval(), tmp_path / "packed")
    assert figures["relative_logit_difference"] == 0.0


def test_file_is_as_small_as_its_codes(world, tmp_path):
    model = write(world, tmp_path / "packed", settings())
    written = json.loads((tmp_path / "packed/artifact.json").read_text())
    quantized = {parameter.name: parameter for parameter in quantized_parameters(model)}
    codes = sum(packed_bytes(parameter.weight.numel(), parameter.quantizer.levels) for parameter in quantized.values())
    scales = sum(2 * parameter.learned[0].numel() for parameter in quantized.values())
    floats = sum(4 * p.numel() for name, p in model.named_parameters() if name not in quantized and not is_learned_scale(name))
    header = int.from_bytes((tmp_path / "packed/model.safetensors").read_bytes()[:8], "little") + 8
    assert written["sizes"]["packed_bytes"] == (tmp_path / "packed/model.safetensors").stat().st_size == codes + scales + floats + header


@pytest.fixture
def packed(world, tmp_path):
    write(world, tmp_path / "packed", settings())
    return tmp_path / "packed"


def test_flipped_byte_is_refused(packed):
    content = bytearray((packed / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (packed / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="a byte was changed"):
        load_artifact(packed)


def test_truncated_file_is_refused(packed):
    content = (packed / "model.safetensors").read_bytes()
    (packed / "model.safetensors").write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"has {len(content) - 7} bytes, artifact.json says {len(content)}"):
        load_artifact(packed)


@pytest.mark.parametrize("version", [1, 99])
def test_other_version_is_refused(version, packed):
    edit_description(packed, lambda about: about.update(format=version))
    with pytest.raises(CheckpointError, match=f"has format {version}, this dqtrain reads 4"):
        load_artifact(packed)


@pytest.mark.parametrize("change", ["missing", "too few"])
def test_missing_scale_is_refused(change, packed):
    """Of a file that is whole otherwise, hash included."""
    name, tensors = "transformer.wte.weight.scale", load_file(packed / "model.safetensors")
    scale = tensors.pop(name)
    save_file(tensors if change == "missing" else tensors | {name: scale[:-1]}, packed / "model.safetensors")
    size, hash = (packed / "model.safetensors").stat().st_size, digest(packed / "model.safetensors")
    edit_description(packed, lambda about: about.update(weights={"model.safetensors": {"bytes": size, "xxh3_128": hash}}))
    message = f"no {name}" if change == "missing" else f"{name} has {len(scale) - 1} values, not {len(scale)}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_artifact(packed)


def test_missing_tensor_is_refused(packed):
    edit_description(packed, lambda about: about["coverage"].append(["transformer.extra.weight", [4, 4], 0]))
    with pytest.raises(CheckpointError, match=r"transformer\.extra\.weight"):
        load_artifact(packed)


def test_no_artifact_is_refused(tmp_path, world):
    with pytest.raises(CheckpointError, match=r"no artifact\.json there"):
        load_artifact(world / "teacher")
    with pytest.raises((CheckpointError, ConfigError)):
        load_artifact(tmp_path)


def test_verify_notices_one_changed_weight(world, tmp_path):
    model = write(world, tmp_path / "packed", settings())
    model.transformer.h[0].attn.c_attn.weight.data[3, 5] += 1.0
    with pytest.raises(CheckpointError, match=r"c_attn\.weight is not what was trained"):
        parity.verify(model, tmp_path / "packed")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bart", "mbart", "t5"])
def test_a_head_that_reads_the_table_before_rounding_has_a_tensor_of_its_own(family, tmp_path):
    """`quant.float_head`, as in DQ-BART's published code: the tied table is in codes for the embedding and float for the head."""
    model = FAMILIES[family]().eval()
    assert model.config.tie_word_embeddings
    plain, quant = copy.deepcopy(model), settings(float_head=True)
    coverage = quantize_model(model, quant)
    hidden = torch.randn(3, model.get_output_embeddings().in_features)
    assert torch.equal(model.get_output_embeddings()(hidden), plain.get_output_embeddings()(hidden))
    assert not torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
    model.config.save_pretrained(tmp_path)
    format.write(model, tmp_path, {"checkpoint": "step-000000000", **about(quant, coverage)})
    parity.verify(model, tmp_path)
    loaded = load_artifact(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    assert not torch.equal(loaded.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert artifact_bytes(coverage, float_part(model), {"checkpoint": "step-000000000", **about(quant, coverage)}).weights == size


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {"embeddings": None})])
def test_a_float_head_that_would_change_nothing_is_refused(family, changes):
    with pytest.raises(ConfigError, match="quant.float_head is true, but .* has no head that is tied to quantized word embeddings"):
        quantize_model(FAMILIES[family](), settings(float_head=True, **changes))
