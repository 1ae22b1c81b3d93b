import copy
import json
import pickle
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import FAMILIES, IDS, logits_of
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dqtrain.config import BITS_OF_GRID, ActivationQuant, Override, Quant, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.models.making import meta_model
from dqtrain.quant.activation import calibrate
from dqtrain.quant.grid import GRIDS, WeightQuantizer
from dqtrain.quant.modules import (
    Coverage,
    QuantizedInput,
    QuantizedParameters,
    check_all_ran,
    initial_scales,
    is_learned_scale,
    quantize_activations,
    quantize_model,
    quantized_parameters,
    read_in_bf16,
    round_matrices,
    served_parameters,
)


def settings(linears=2, embeddings=2, positions=None, activations=8, granularity="per_tensor", grid="dynamic", **more):
    def weight(bits, granularity, grid="dynamic"):
        return WeightQuant(bits=bits, granularity=granularity, grid=grid) if bits else None

    return Quant(
        linears=weight(linears, granularity, grid),
        embeddings=weight(embeddings, "per_row", grid),
        positions=weight(positions, "per_row"),
        activations=ActivationQuant(bits=activations) if activations else None,
        **more,
    )


def float_at(*globs):
    return tuple(Override(match=glob, keep_float=True) for glob in globs)


def loss_of(model, ids=IDS):
    return F.cross_entropy(logits_of(model, ids).flatten(0, 1).float(), ids.roll(-1).flatten())


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("grid", "rounded"), [("dynamic", False), ("dynamic", True), ("affine", False), ("twn", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_plain_formulation(family, grid, rounded, tied):
    """The plain one: no mixin, no hooks; each weight is quantized once, outside, and the float model is called with the results."""
    model, plain = FAMILIES[family](tie_word_embeddings=tied), FAMILIES[family](tie_word_embeddings=tied)
    bits = 2 if grid == "twn" else 4
    quantize_model(model, settings(bits, bits, positions=8, granularity="per_row", grid=grid, activations=None, vectors="bf16"), rounded=rounded)
    loss, ours = gradients(model)
    model.zero_grad()
    quantized = {parameter.weight: parameter for parameter in quantized_parameters(model)}

    def in_bf16(p):
        return p + (p.bfloat16().float() - p).detach()

    values = {
        p.weight: replace(p.quantizer, rounded=False).fake_quantize(in_bf16(p.weight) if rounded else p.weight, *p.learned)[0] for p in quantized.values()
    }
    is_vector = {p: p.ndim < 2 for name, p in model.named_parameters() if p not in quantized and not is_learned_scale(name)}
    vectors = {p: in_bf16(p) for p in is_vector if is_vector[p] or rounded}
    values |= vectors
    parameters = {name: values[p] for name, p in model.named_parameters(remove_duplicate=False) if p in values}

    def call(**inputs):
        return torch.func.functional_call(plain, parameters, (), inputs, tie_weights=False)

    call.config = plain.config
    plain_loss = loss_of(call)
    plain_loss.backward()
    assert torch.equal(loss, plain_loss.detach())
    floats = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}  # routers
    theirs_by_name = floats | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    pairs = [(ours[name], theirs_by_name[name]) for name in ours]
    assert len(pairs) == len(theirs_by_name) >= len(quantized)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for mine, theirs in pairs:
        if is_tied or vectors:  # the gradients of several uses are summed behind the quantizer here, before it there
            np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
        else:
            assert torch.equal(mine, theirs)


class WithoutHooks:
    """What `saved_tensors_hooks` is replaced by to see that dropping and making again changes no bit."""

    def __init__(self, *hooks):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bart", "t5", "mixtral"])
def test_dropping_the_quantized_weight_changes_no_bit(family, autocast, monkeypatch):
    model = FAMILIES[family]()
    quantize_model(model, settings(2, 4, positions=8, granularity="per_row"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, ours = gradients(model)
        monkeypatch.setattr("dqtrain.quant.saved.saved_tensors_hooks", WithoutHooks)
        kept_loss, kept = gradients(model)
    assert torch.equal(loss, kept_loss) and ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], kept[name]) for name in ours)


class Kept:
    """Bytes that a forward keeps for backward: of the unique storages that are saved, parameters apart."""

    def __init__(self, monkeypatch):
        self.tensors = []
        original = torch.autograd.graph.saved_tensors_hooks

        def spy(pack, unpack):  # the mixin's own hooks, noting what they keep
            return original(lambda tensor: self._note(pack(tensor)), unpack)

        self._hooks = lambda: original(self._note, lambda tensor: tensor)
        monkeypatch.setattr("dqtrain.quant.saved.saved_tensors_hooks", spy)

    def _note(self, packed):
        if isinstance(packed, torch.Tensor):
            self.tensors.append(packed)
        return packed

    def __call__(self, model, ids, autocast):
        self.tensors.clear()
        with self._hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        del loss
        return sum(size for pointer, size in storages.items() if pointer not in own)


WIDE = {
    "gpt2": {"n_positions": 512, "n_embd": 256, "n_head": 4},
    "llama": {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512},
    "t5": {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4},
    "bart": {"d_model": 256, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_position_embeddings": 512},
    "mixtral": {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", WIDE)
def test_nothing_dense_is_kept_for_backward(family, autocast, monkeypatch):
    """At most 0.05 bytes per parameter more than the float model keeps at the same tokens, with quantized inputs too."""
    kept = Kept(monkeypatch)
    plain, model, weights_alone = (FAMILIES[family](**WIDE[family], vocab_size=1000) for _ in range(3))
    if family == "mixtral":
        plain.set_experts_implementation("grouped_mm")
        weights_alone.set_experts_implementation("grouped_mm")
    quantize_model(model, settings(2, 2, positions=8, vectors="bf16"))
    quantize_model(weights_alone, settings(2, 2, positions=8, activations=None))
    num_parameters = sum(p.numel() for p in plain.parameters())
    for num_tokens in (8, 512):
        ids = torch.arange(num_tokens)[None] * 7 % 1000
        before = kept(plain, ids, autocast)
        for quantized in (model, weights_alone):
            assert kept(quantized, ids, autocast) - before <= 0.05 * num_parameters
    after = kept(weights_alone, ids, autocast)
    monkeypatch.setattr("dqtrain.quant.saved.saved_tensors_hooks", WithoutHooks)
    num_linear = sum(
        p.weight.numel() for p in quantized_parameters(weights_alone) if p.name.startswith(("transformer.h", "model.layers", "model.encoder", "encoder.block"))
    )
    assert kept(weights_alone, ids, autocast) - after >= (1.9 if autocast else 3.9) * num_linear  # what the hooks save, and the measure sees


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_activation_checkpointing_still_pays(family, monkeypatch):
    """With it a quantized model keeps no more than the float one; without it, many times as much."""
    kept = Kept(monkeypatch)
    plain, model = (FAMILIES[family](**WIDE[family], vocab_size=1000).train() for _ in range(2))
    quantize_model(model, settings(2, 2, positions=8, activations=None))  # 8 bits would turn the last bit of another kernel into a step
    loss, expected = gradients(model)
    ids = torch.arange(512)[None] * 7 % 1000
    without = kept(model, ids, False)
    for either in (plain, model):
        either.activation_checkpointing_enable({"use_reentrant": False})
    before, after = (kept(either, ids, False) for either in (plain, model))
    assert after - before <= 0.05 * sum(p.numel() for p in plain.parameters()) and after < 0.7 * without
    loss_again, again = gradients(model)
    torch.testing.assert_close(loss, loss_again, rtol=1e-6, atol=0)
    for name, gradient in expected.items():  # T5 sums the gradients of its shared bias in another order then
        np.testing.assert_allclose(again[name].numpy(), gradient.numpy(), rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


REAL = {
    "GPT-2 small": ("gpt2", {}),
    "BART-base": ("bart", {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}),
    "BART-large": ("bart", {}),
    "mBART": ("mbart", {}),
    "T5-base": ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "OPT-350m": ("opt", {"hidden_size": 1024, "word_embed_proj_dim": 512, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}),
    "Llama-2 7B": ("llama", {}),
    "Qwen2 7B": ("qwen2", {}),
    "Mistral 7B": ("mistral", {}),
    "Mixtral 8x7B": ("mixtral", {}),
    "GPT-OSS": ("gpt_oss", {"num_hidden_layers": 2}),
    "Qwen2-MoE": ("qwen2_moe", {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_covered(name):
    model_type, keys = REAL[name]
    config = AutoConfig.for_model(model_type, **keys)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
        coverage = quantize_model(model, settings(2, 2, positions=8), initialise=False)
    assert coverage.fraction >= 0.99
    assert sum(row.numel for row in coverage.rows) == sum(p.numel() for n, p in model.named_parameters() if p.ndim >= 2)
    assert all(bool(row.quantizer) != bool(row.reason) for row in coverage.rows)
    routers = [row for row in coverage.rows if "router" in row.name or "gate.weight" in row.name]
    assert all("routers stay float" in row.reason for row in routers) and bool(routers) == (model_type in ("mixtral", "gpt_oss", "qwen2_moe"))


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_virtual_bits_change_nothing(family):
    """BART's scaled embedding and position offset, T5's relative bias, OPT's projections, experts: what the subclasses do stays."""
    model, plain = FAMILIES[family](), FAMILIES[family]()
    classes = {name: type(module) for name, module in model.named_modules()}
    fine = WeightQuant.model_construct(grid="minmax", bits=16, granularity="per_row", group_size=None)
    coverage = quantize_model(model, Quant.model_construct(linears=fine, embeddings=fine, positions=fine, activations=None, scale_dtype="fp32", overrides=()))
    with torch.no_grad():
        ours, theirs = logits_of(model.eval()), logits_of(plain.eval())
    assert coverage.fraction >= (0.98 if family == "mixtral" else 1) and not torch.equal(ours, theirs)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
        if isinstance(module, QuantizedParameters):
            assert type(module).__name__ == f"Quantized{classes[name].__name__}"
    if family == "bart":
        assert isinstance(model.model.encoder.embed_tokens, BartScaledWordEmbedding)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_all_of_it(family):
    model = FAMILIES[family]()
    quantize_model(model, settings(2, 2, positions=8, vectors="bf16", grid="lsq"))
    loss, found = gradients(model)
    check_all_ran(model)
    named = dict(model.named_parameters())
    router = {name for name in named if name.endswith("mlp.gate.weight")}
    assert set(found) >= set(named) - router and all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.any() for name, gradient in found.items() if is_learned_scale(name))
    with torch.no_grad():
        for name, gradient in found.items():
            named[name] -= (1e-5 if is_learned_scale(name) else 1e-2) * gradient
    assert loss_of(model) < loss


def test_float_settings_change_nothing():
    model = FAMILIES["bart"]()
    plain = model(IDS).logits
    coverage = quantize_model(model, settings(2, None, overrides=float_at("*proj.weight", "*fc?.weight")))
    assert torch.equal(model(IDS).logits, plain) and coverage.fraction == 0
    assert not list(quantized_parameters(model))
    assert {row.reason for row in coverage.rows} == {
        "quant.embeddings is null",
        "quant.positions is null",
        "quant.overrides has *proj.weight",
        "quant.overrides has *fc?.weight",
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_module_computes_what_export_would_ship(grid):
    for module, row_axis in ((nn.Linear(24, 10), 0), (Conv1D(10, 24), 1)):
        model = nn.Sequential(module)
        x, bits = torch.randn(3, 24), BITS_OF_GRID[grid][-1]
        coverage = quantize_model(model, settings(bits, None, grid=grid, granularity="per_row", activations=None))
        (parameter,) = quantized_parameters(model)
        quantizer, scales = parameter.quantizer, parameter.scales()
        codes = quantizer.quantize(parameter.weight, scales)
        assert quantizer == WeightQuantizer(grid, bits, "per_row", None, row_axis, True) == coverage.rows[0].quantizer
        assert all(learned.shape == scales.scale.shape == (10,) for learned in parameter.learned) and codes.dtype == torch.int8
        shipped = quantizer.dequantize(codes, scales.scale, scales.zero_point)
        assert torch.equal(model(x), x @ shipped.T + module.bias if row_axis == 0 else torch.addmm(module.bias, x, shipped))
        assert torch.equal(dict(served_parameters(model))["0.weight"], shipped)
        assert module.weight is parameter.weight  # the Parameter is back after the call


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fake_quantized_checkpoint_loads_into_the_plain_model(family, tied, tmp_path):
    model = FAMILIES[family](tie_word_embeddings=tied)
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    coverage = quantize_model(model, settings(vectors="bf16"))
    added = {key for key in model.state_dict() if is_learned_scale(key)}
    assert [key for key in model.state_dict() if key not in added] == keys
    assert [name for name, _ in model.named_parameters() if name not in added] == parameters
    names = [parameter.name for parameter in quantized_parameters(model)]
    assert names == [row.name for row in coverage.rows if row.quantizer] == [row.name for row in Coverage.from_json(coverage.to_json()).rows if row.quantizer]
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    plain, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= added
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_a_tied_head_follows_the_embedding_and_its_input_is_quantized():
    model = FAMILIES["gpt2"]()
    coverage = quantize_model(model, settings(2, 4))
    head, embedding = model.lm_head, model.transformer.wte
    assert head.weight is embedding.weight and head.weight_gamma is embedding.weight_gamma
    assert head.weight_quantizers["weight"] == WeightQuantizer("dynamic", 4, "per_row", None, 0, True) and embedding.weight_gamma.shape == (97,)
    assert isinstance(head, QuantizedInput) and not isinstance(embedding, QuantizedInput)
    row = next(row for row in coverage.rows if row.name == "transformer.wte.weight")
    assert (row.quantizer.bits, row.input_quantizer.bits, row.learned_names) == (4, 8, ["transformer.wte.weight_gamma"])

    model = FAMILIES["gpt2"]()
    quantize_model(model, settings(2, None))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.transformer.wte.weight

    model = FAMILIES["gpt2"](tie_word_embeddings=False)
    rows = {row.name: row for row in quantize_model(model, settings(2, 4)).rows}
    head = rows["lm_head.weight"]
    assert head.quantizer.bits == 2 and head.quantizer.granularity == "per_tensor" and head.input_quantizer.bits == 8


def test_activations_are_quantized_at_the_input_of_linears_alone():
    x = torch.randn(2, 24)
    model = nn.Sequential(nn.Linear(24, 8))
    coverage = quantize_model(model, settings(8, granularity="per_row"))
    scale = x.abs().amax(-1, keepdim=True) / 127
    value = dict(served_parameters(model))["0.weight"]
    torch.testing.assert_close(model(x), (x / scale).round() * scale @ value.T + model[0].bias)

    loaded = nn.Sequential(nn.Linear(24, 8))
    loaded.load_state_dict({"0.weight": value, "0.bias": model[0].bias})
    quantize_activations(loaded, coverage, ActivationQuant(bits=8))
    assert torch.equal(loaded(x), model(x)) and list(loaded.state_dict()) == ["0.weight", "0.bias"]
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))


def test_inputs_that_follow_an_activation_have_a_zero_point():
    for family, one_sided in (("gpt2", "mlp.c_proj"), ("llama", "down_proj"), ("bart", "fc2"), ("t5", "wo"), ("opt", "fc2")):
        rows = quantize_model(FAMILIES[family](), settings()).rows
        asymmetric = {row.name for row in rows if row.input_quantizer and row.input_quantizer.asymmetric}
        assert asymmetric == {row.name for row in rows if row.name.endswith(f"{one_sided}.weight")} != set()
    for where, expected in (("everywhere", {True}), ("nowhere", {False})):
        quant = settings().model_copy(update={"activations": ActivationQuant(bits=8, asymmetric=where)})
        rows = quantize_model(FAMILIES["gpt2"](), quant).rows
        assert {row.input_quantizer.asymmetric for row in rows if row.input_quantizer} == expected


def test_autocast_keeps_learned_scales_in_fp32_and_close():
    model = FAMILIES["gpt2"]()
    quantize_model(model, settings(2, 4, positions=8, activations=None))
    loss, exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low = gradients(model)
    assert low_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert all(gradient.dtype == torch.float32 for gradient in low.values())
    for kind in ("weight_gamma", "weight"):
        ours, theirs = (torch.cat([g.flatten() for name, g in every.items() if name.endswith(kind)]) for every in (low, exact))
        assert 0 < (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_work_alike(family):
    model = FAMILIES[family]()
    quantize_model(model, settings(4, 2, vectors="bf16"))
    loss, expected = gradients(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again_loss, found = gradients(again)
        assert torch.equal(again_loss, loss) and all(torch.equal(found[name], expected[name]) for name in expected)
        if family == "gpt2":
            assert again.lm_head.weight_gamma is again.transformer.wte.weight_gamma is not model.lm_head.weight_gamma


def test_learned_scales_to_be_overwritten_are_not_searched():
    model, again = FAMILIES["gpt2"](), FAMILIES["gpt2"]()
    coverage = quantize_model(model, settings(granularity="per_row"))
    with torch.no_grad():
        again.transformer.wte.weight[3] = float("nan")  # would be refused by the search
    assert quantize_model(again, settings(granularity="per_row"), initialise=False) == coverage
    assert all((learned == 1).all() for parameter in quantized_parameters(again) for learned in parameter.learned)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_scales_of_a_model_without_memory_start_where_those_of_a_whole_one_do():
    model = FAMILIES["gpt2"]()
    again, weights = meta_model(model.config), {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize_model(model, settings(grid="affine"))
    quantize_model(again, settings(grid="affine"), initialise=False)
    read = []
    scales = initial_scales(quantized_parameters(again), lambda name: read.append(name) or weights[name])
    assert read == [parameter.name for parameter in quantized_parameters(model)]
    assert scales.keys() == {name for name, _ in model.named_parameters()} - weights.keys()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in scales.items())


def test_weight_that_is_not_finite_is_refused():
    model = FAMILIES["gpt2"]()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN"):
        quantize_model(model, settings())


def test_overrides_take_globs_of_any_name_of_a_weight_and_the_last_one_counts():
    group = WeightQuant(bits=4, granularity="per_group", group_size=16, grid="lsq")
    overrides = (*float_at("lm_head.weight", "*.0.attn.*"), Override(match="*.0.attn.c_proj.weight", weights=group, activations=ActivationQuant(bits=4)))
    rows = {row.name: row for row in quantize_model(FAMILIES["gpt2"](), settings(overrides=overrides)).rows}
    assert rows["transformer.wte.weight"].reason == "quant.overrides has lm_head.weight"
    assert rows["transformer.h.0.attn.c_attn.weight"].quantizer is None and rows["transformer.h.1.attn.c_attn.weight"].quantizer.bits == 2
    row = rows["transformer.h.0.attn.c_proj.weight"]
    assert row.quantizer == WeightQuantizer("lsq", 4, "per_group", 16, 1, True) and row.num_scales == 64 and row.input_quantizer.bits == 4
    with pytest.raises(ConfigError, match=r"quant.overrides has `encoder\.\*`, which matches no matrix of the model; they are called like transformer"):
        quantize_model(FAMILIES["gpt2"](), settings(overrides=float_at("encoder.*")))


def test_a_group_size_that_does_not_divide_is_refused():
    quant = settings().model_copy(update={"linears": WeightQuant(bits=4, granularity="per_group", group_size=24)})
    with pytest.raises(
        ConfigError, match=r"transformer\.h\.0\.attn\.c_attn\.weight has 32 inputs, which a group_size of 24 does not divide. Set it to (16|32)"
    ):
        quantize_model(FAMILIES["gpt2"](), quant)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
def test_each_expert_is_a_matrix_of_its_own(granularity):
    model = FAMILIES["mixtral"]()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] *= 100
    coverage = quantize_model(model, settings(granularity=granularity, grid="lsq"))
    name = "model.layers.0.mlp.experts.down_proj"
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj_step.shape == ((3,) if granularity == "per_tensor" else (96,))
    alone = nn.Linear(48, 32)
    alone.weight.data.copy_(experts.down_proj[1])
    quantize_model(alone, settings(granularity=granularity, grid="lsq"))
    assert torch.equal(experts.down_proj_step.view(3, -1)[1], alone.weight_step)
    assert next(row for row in coverage.rows if row.name == name).shape == (3, 32, 48)
    loss_of(model).backward()
    assert experts.down_proj_step.grad.abs().max() > 0


def test_inputs_of_experts_follow_the_weights_that_read_them():
    four = ActivationQuant(bits=4)
    overrides = (*float_at("*.0.mlp.experts.gate_up_proj"), Override(match="*.experts.down_proj", activations=four))
    model = FAMILIES["mixtral"]()
    rows = {row.name: row for row in quantize_model(model, settings(overrides=overrides)).rows}
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert not isinstance(first, QuantizedInput) and first.gated_quantizer.bits == second.gated_quantizer.bits == 4
    assert second.input_quantizer.bits == 8 and not second.input_quantizer.asymmetric and second.gated_quantizer.asymmetric
    assert rows["model.layers.1.mlp.experts.down_proj"].input_quantizer == second.gated_quantizer
    seen = []
    second.gated_quantizer = lambda x, module: seen.append(x.shape) or x  # what transformers' implementation of experts calls
    loss_of(model)
    assert seen == [(24 * 2, 48)]


def test_inputs_may_be_quantized_by_overrides_alone():
    quant = settings(activations=None, overrides=(Override(match="*.c_fc.weight", activations=ActivationQuant(bits=4)),))
    model = FAMILIES["gpt2"]()
    coverage = quantize_model(model, quant)
    assert [row.name for row in coverage.rows if row.input_quantizer] == [f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1)]
    assert model.transformer.h[0].mlp.c_fc.input_quantizer.bits == 4 and not isinstance(model.transformer.h[0].mlp.c_proj, QuantizedInput)


@pytest.mark.parametrize(
    "quant, message",
    [
        (settings(None, overrides=(Override(match="*.c_fc.weight", activations=ActivationQuant(bits=4)),)), "no quantized linear layer is called so"),
        (settings(overrides=(Override(match="*.wpe.weight", activations=ActivationQuant(bits=4)),)), "no quantized linear layer is called so"),
        (
            settings().model_copy(update={"activations": ActivationQuant(bits=8, scale="block_256")}),
            r"transformer\.wte\.weight has 32 input features, which blocks of 256 do not divide. Set the scale of activations to block_32 or per_token",
        ),
    ],
)
def test_activation_settings_that_cannot_be_are_refused(quant, message):
    with pytest.raises(ConfigError, match=message):
        quantize_model(FAMILIES["gpt2"](), quant)


def test_a_quantized_model_is_not_quantized_again():
    model = FAMILIES["gpt2"]()
    quantize_model(model, settings())
    with pytest.raises(ConfigError, match=r"transformer\.wte of this model is quantized already"):
        quantize_model(model, settings())


def test_learned_activation_scales_ask_for_calibration():
    model = FAMILIES["gpt2"]()
    quantize_model(model, settings().model_copy(update={"activations": ActivationQuant(bits=8, scale="learned", attention=True)}))
    with pytest.raises(ConfigError, match="learned activation scales are not set: input_step.*Call dqtrain.quant.activation.calibrate"):
        loss_of(model)
    calibrate(model, lambda: loss_of(model))
    found = [gradient for name, gradient in gradients(model)[1].items() if name.endswith("_step")]
    assert len(found) == 2 * (4 + 4) + 1 and all(gradient.isfinite().all() for gradient in found)


def test_vectors_that_are_read_without_calling_their_module_are_named():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

        def forward(self, x):
            return self.linear(x) * self.norm.weight

    model = Reader()
    quantize_model(model, settings(activations=None, vectors="bf16"))
    model(torch.randn(1, 8))
    with pytest.raises(ConfigError, match=r"2 of 3 quantizers never ran: norm\.weight, norm\.bias.*vectors: fp32"):
        check_all_ran(model)


def test_the_documented_block_is_a_config():
    text = (Path(__file__).parents[2] / "docs/quantization.md").read_text()
    block = yaml.safe_load(textwrap.dedent(text.split("## A weight\n")[1].split("\n\nOf")[0]))
    overrides = Quant.model_validate({"embeddings": None, "positions": None, **block["quant"]}).overrides
    assert [override.keep_float for override in overrides] == [False, True]


def test_a_router_is_quantized_where_an_override_names_it():
    quant = settings(overrides=(Override(match="*.mlp.gate.weight", weights=WeightQuant(bits=8, granularity="per_row")),))
    model = FAMILIES["mixtral"]()
    coverage = quantize_model(model, quant)
    assert coverage.fraction == 1
    loss_of(model)
    check_all_ran(model)


def test_vectors_are_rounded_straight_through():
    model, plain = FAMILIES["bart"](), FAMILIES["bart"]()
    quantize_model(model, settings(None, None, activations=None, vectors="bf16"))
    with torch.no_grad():
        for p in plain.parameters():
            if p.ndim < 2:
                p += 1e-3  # no bf16 value
        for name, p in model.named_parameters():
            p.copy_(plain.get_parameter(name))
        for p in plain.parameters():
            if p.ndim < 2:
                p.copy_(p.bfloat16().float())
    (loss, ours), (plain_loss, theirs) = gradients(model), gradients(plain)
    assert torch.equal(loss, plain_loss) and all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in served_parameters(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_float_matrices_are_rounded_straight_through(family, tied):
    """Those of a model that is not quantized at all; a head that no loss has called has not been read either."""
    model, plain = FAMILIES[family](tie_word_embeddings=tied), FAMILIES[family](tie_word_embeddings=tied)
    round_matrices(model)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(p.bfloat16().float() if p.ndim >= 2 else p)
    model.base_model(IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}))
    if "bart" in family and not tied:
        with pytest.raises(ConfigError, match="1 of 22 quantizers never ran: model.shared.weight"):  # which nothing reads
            check_all_ran(model)
    else:
        check_all_ran(model)
    (loss, ours), (plain_loss, theirs) = gradients(model), gradients(plain)
    assert torch.equal(loss, plain_loss) and all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in served_parameters(model))
    assert {p for p in read_in_bf16(model)} == {p for p in model.parameters() if p.ndim >= 2}


def test_what_is_read_in_bf16_alone():
    model = FAMILIES["gpt2"]()
    quantize_model(model, settings(2, 2, None, vectors="bf16", float_head=True), rounded=True)
    assert set(read_in_bf16(model)) == {p for name, p in model.named_parameters() if not is_learned_scale(name)}
    model = FAMILIES["gpt2"]()
    quantize_model(model, settings(2, 2, None, float_head=True))
    assert read_in_bf16(model) == []
    del model.lm_head.weight  # a holder that reads it as it is
    round_matrices(model)
    model.lm_head.weight = model.transformer.wpe.weight
    assert set(read_in_bf16(model)) == set()


def test_a_matrix_that_is_read_without_calling_its_module_cannot_be_rounded():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(self.called(x), self.read.weight)

    wrapper = nn.ModuleDict({"model": Reader()})
    round_matrices(wrapper["model"])
    wrapper["model"](torch.randn(1, 8))
    with pytest.raises(ConfigError, match=r"1 of 2 quantizers never ran: model\.read\.weight.*precision: bf16 where they are float"):
        check_all_ran(wrapper)


def test_coverage_of_earlier_runs_has_no_rounding():
    coverage, rounded = (quantize_model(FAMILIES["gpt2"](), settings(), rounded=which) for which in (False, True))
    rows = json.loads(coverage.to_json())
    for row in rows:
        if row["quantizer"] is not None:
            assert row["quantizer"].pop("rounded") is False
    assert Coverage.from_json(json.dumps(rows)) == coverage != rounded == Coverage.from_json(rounded.to_json())


def test_portable_scales_are_the_default_and_fp32_ones_are_not_snapped():
    for dtype, is_snapped in (("portable", True), ("fp32", False)):
        model = FAMILIES["gpt2"]()
        quantize_model(model, settings(granularity="per_row", scale_dtype=dtype))
        scales = torch.cat([parameter.scales().scale for parameter in quantized_parameters(model)])
        assert torch.equal(scales.bfloat16().float(), scales) == is_snapped


def test_quantizers_that_never_ran_are_named():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(self.called(x), self.read.weight)

    wrapper = nn.ModuleDict({"model": Reader()})
    quantize_model(wrapper["model"], settings())
    with pytest.raises(ConfigError, match="2 of 2 quantizers never ran: called.weight, read.weight"):
        check_all_ran(wrapper)
    wrapper["model"](torch.randn(1, 8))
    with pytest.raises(ConfigError, match="1 of 2 quantizers never ran: read.weight. Their modules are read without being called; keep them float"):
        check_all_ran(wrapper)

    model = FAMILIES["bart"]()
    quantize_model(model, settings())
    model(IDS)
    check_all_ran(model)  # `model.shared` is never called, but the modules that are tied to it are


def test_weight_shared_with_a_module_that_cannot_be_quantized_is_refused():
    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    model = nn.ModuleDict({"words": nn.Embedding(9, 4)})
    model["head"] = Head(model["words"].weight)
    with pytest.raises(ConfigError, match=r"words\.weight is also head\.weight, where Head would read it unquantized; keep it float with an entry of quant\."):
        quantize_model(model, settings())
    assert quantize_model(model, settings(overrides=float_at("words.weight"))).fraction == 0


def test_coverage_lists_every_matrix_and_why_it_stays_float():
    model: GPT2LMHeadModel = FAMILIES["gpt2"]()
    model.experts = nn.ParameterList([nn.Parameter(torch.randn(3, 4, 5))])
    coverage = quantize_model(model, settings(4, 2, overrides=float_at("transformer.h.0.*")))
    rows = {row.name: row for row in coverage.rows}
    assert list(rows) == [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert rows["experts.0"].reason == "ParameterList.0 is no weight of a Linear, Conv1D, Embedding or of experts"
    assert rows["transformer.wpe.weight"].reason == "quant.positions is null"
    row = rows["transformer.h.1.attn.c_attn.weight"]
    assert (row.shape, row.kind, row.quantizer, row.reason) == ((32, 96), "linears", WeightQuantizer("dynamic", 4, "per_tensor", None, 1, True), None)
    quantized = sum(parameter.weight.numel() for parameter in quantized_parameters(model))
    assert coverage.fraction == quantized / sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert Coverage.from_json(coverage.to_json()) == coverage and len(json.loads(coverage.to_json())) == len(rows)
    lines = coverage.table().splitlines()
    assert lines[0].split() == ["parameter", "shape", "weight", "input", "why", "float"] and len(lines) == len(rows) + 2
    assert lines[1].split() == ["transformer.wte.weight", "97", "x", "32", "ternary", "dynamic", "per_row", "8", "bit", "per_token"]
    assert "quantized" in lines[-1] and f"{coverage.fraction:.1%}" in lines[-1]


def test_an_override_of_the_weight_alone_leaves_its_input_as_it_is():
    four = Override(match="*.0.*.c_fc.weight", weights=WeightQuant(bits=4, granularity="per_row"))
    rows = {row.name: row for row in quantize_model(FAMILIES["gpt2"](), settings(overrides=(four,))).rows}
    first, second = (rows[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 1))
    assert first.quantizer.bits == 4 != second.quantizer.bits and first.input_quantizer == second.input_quantizer is not None


def test_inside_experts_each_token_has_a_scale_of_its_own():
    """Tokens are sorted there, so that which are padding is not known."""
    model = FAMILIES["mixtral"]()
    quantize_model(model, settings().model_copy(update={"activations": ActivationQuant(bits=8, scale="per_tensor")}))
    experts = model.model.layers[0].mlp.experts
    assert experts.input_quantizer.scale == "per_tensor" and experts.gated_quantizer.scale == "per_token"
