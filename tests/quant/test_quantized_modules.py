import copy
import functools
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dqtrain.config import ActivationQuant, Quant, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.quant.grid import DynamicFakeQuantize, dequantize, dynamic_scale, fake_quantize
from dqtrain.quant.modules import (
    Coverage,
    QuantizedInput,
    WeightQuantizer,
    check_all_ran,
    quantize_input,
    quantize_model,
    quantized_parameters,
)


def settings(linears=2, embeddings=2, positions=None, activations=8, granularity="per_tensor", **more):
    def weight(bits, granularity):
        return WeightQuant(bits=bits, granularity=granularity) if bits else None

    return Quant(
        linears=weight(linears, granularity),
        embeddings=weight(embeddings, "per_row"),
        positions=weight(positions, "per_row"),
        activations=ActivationQuant(bits=activations) if activations else None,
        **more,
    )


def gpt2(tied=True, **more):
    torch.manual_seed(0)
    keys = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**keys, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0, **more}))


def bart():
    torch.manual_seed(0)
    keys = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
    keys |= {"decoder_attention_heads": 2, "max_position_embeddings": 32, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=32, scale_embedding=True, **keys)).eval()


IDS = torch.arange(24).reshape(2, 12) * 3 % 97


def loss_of(model):
    logits = model(IDS).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), IDS.roll(-1).flatten())


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
@pytest.mark.parametrize("make", [gpt2, bart, functools.partial(gpt2, tied=False)])
def test_gradients_are_those_of_a_plain_formulation(make, granularity):
    """The plain one: no mixin, no hooks; each weight is quantized once, outside, and the float model is called with the results."""
    model, plain = make(), make()
    quantize_model(model, settings(4, 2, positions=8, granularity=granularity, activations=None))
    loss, ours = gradients(model)
    model.zero_grad()
    values = {}
    for _, weight, gamma, q in quantized_parameters(model):
        values[weight] = DynamicFakeQuantize.apply(weight, gamma, q.bits, q.granularity, q.row_axis, q.portable)[0]
    weights = {name: values[p] for name, p in model.named_parameters(remove_duplicate=False) if p in values}
    plain_loss = loss_of(lambda ids: torch.func.functional_call(plain, weights, (ids,), tie_weights=False))
    plain_loss.backward()
    assert torch.equal(loss, plain_loss.detach())
    pairs = [(ours[name], weight.grad) for name, weight, _, _ in quantized_parameters(model)]
    pairs += [(ours[f"{name}_gamma"], gamma.grad) for name, _, gamma, _ in quantized_parameters(model)]
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for mine, theirs in pairs:
        if is_tied:  # the gradients of the two uses are summed behind the quantizer here, before it there
            np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=2e-5, atol=1e-7)
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
@pytest.mark.parametrize("make", [gpt2, bart])
def test_dropping_the_quantized_weight_changes_no_bit(make, autocast, monkeypatch):
    model = make()
    quantize_model(model, settings(2, 4, positions=8, granularity="per_row"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, ours = gradients(model)
        monkeypatch.setattr("dqtrain.quant.modules.saved_tensors_hooks", WithoutHooks)
        kept_loss, kept = gradients(model)
    assert torch.equal(loss, kept_loss) and ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], kept[name]) for name in ours)


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_dense_is_kept_for_backward(autocast, monkeypatch):
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 256), nn.Tanh(), Conv1D(32, 256), nn.Linear(32, 500))
    num_linear = sum(module.weight.numel() for module in model if isinstance(module, nn.Linear | Conv1D))
    kept: list[torch.Tensor] = []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        """The mixin's hooks, noting what they keep."""

        def __init__(self, pack, unpack):
            def noting(tensor):
                packed = pack(tensor)
                if isinstance(packed, torch.Tensor):
                    kept.append(packed)
                return packed

            super().__init__(noting, unpack)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def kept_bytes(forward):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            forward(torch.tensor([3])).float().sum()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    before = kept_bytes(model)
    quantize_model(model, settings(2, 2, activations=None))
    monkeypatch.setattr("dqtrain.quant.modules.saved_tensors_hooks", Spy)
    after = kept_bytes(model)
    num_gammas = sum(gamma.numel() for _, _, gamma, _ in quantized_parameters(model))
    assert after - before <= 8 * num_gammas  # a scale and a mean for each
    monkeypatch.setattr("dqtrain.quant.modules.saved_tensors_hooks", WithoutHooks)
    assert kept_bytes(model) - after == (2 if autocast else 4) * num_linear  # what the hooks save, and the measure sees


def test_own_forward_of_a_subclass_is_kept():
    model = bart()
    with torch.no_grad():
        plain = model(IDS).logits
        coverage = quantize_model(model, settings(8, 8, positions=8, granularity="per_row"))
        quantized = model(IDS).logits
    assert isinstance(model.model.encoder.embed_tokens, BartScaledWordEmbedding)
    assert type(model.model.encoder.embed_tokens).__name__ == "QuantizedBartScaledWordEmbedding"
    assert coverage.fraction == 1
    assert (quantized - plain).abs().max() < 0.02 * plain.abs().max()
    assert not torch.equal(quantized, plain)


def test_float_settings_change_nothing():
    model = bart()
    plain = model(IDS).logits
    coverage = quantize_model(model, settings(2, None, keep_float=("*proj.weight", "*fc?.weight")))
    assert torch.equal(model(IDS).logits, plain) and coverage.fraction == 0
    assert not list(quantized_parameters(model))
    assert {row.reason for row in coverage.rows} == {
        "quant.embeddings is null",
        "quant.positions is null",
        "quant.keep_float has *proj.weight",
        "quant.keep_float has *fc?.weight",
    }


def test_module_computes_what_export_would_ship():
    for module, row_axis in ((nn.Linear(24, 10), 0), (Conv1D(10, 24), 1)):
        model = nn.Sequential(module)
        x = torch.randn(3, 24)
        coverage = quantize_model(model, settings(4, granularity="per_row", activations=None))
        (_, weight, gamma, quantizer), *_ = quantized_parameters(model)
        codes, scale = quantizer.quantize(weight, gamma)
        assert quantizer == WeightQuantizer(4, "per_row", row_axis, True) and coverage.rows[0].row_axis == row_axis
        assert gamma.shape == scale.shape == (10,) and codes.dtype == torch.int8
        shipped = dequantize(codes, scale, row_axis)
        assert torch.equal(model(x), x @ shipped.T + module.bias if row_axis == 0 else torch.addmm(module.bias, x, shipped))
        assert module.weight is weight  # the Parameter is back after the call


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_keys_are_kept(tied):
    model = gpt2(tied=tied)
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    quantize_model(model, settings())
    added = {key for key in model.state_dict() if key.endswith("weight_gamma")}
    assert [key for key in model.state_dict() if key not in added] == keys
    assert [name for name, _ in model.named_parameters() if name not in added] == parameters
    names = [name for name, *_ in quantized_parameters(model)]
    assert ("lm_head.weight" in names) == (not tied) and len(names) == len(set(names)) == (9 if tied else 10)
    assert [row.name for row in Coverage.from_json(quantize_model(gpt2(tied=tied), settings()).to_json()).rows if row.bits] == names


def test_a_tied_head_follows_the_embedding_and_its_input_is_quantized():
    model = gpt2()
    coverage = quantize_model(model, settings(2, 4))
    head, embedding = model.lm_head, model.transformer.wte
    assert head.weight is embedding.weight and head.weight_gamma is embedding.weight_gamma
    assert head.weight_quantizer == WeightQuantizer(4, "per_row", 0, True) and embedding.weight_gamma.shape == (97,)
    assert isinstance(head, QuantizedInput) and not isinstance(embedding, QuantizedInput)
    row = next(row for row in coverage.rows if row.name == "transformer.wte.weight")
    assert (row.bits, row.activation_bits, row.gamma_name) == (4, 8, "transformer.wte.weight_gamma")

    model = gpt2()
    quantize_model(model, settings(2, None))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.transformer.wte.weight

    model = gpt2(tied=False)
    rows = {row.name: row for row in quantize_model(model, settings(2, 4)).rows}
    assert rows["lm_head.weight"].bits == 2 and rows["lm_head.weight"].granularity == "per_tensor" and rows["lm_head.weight"].activation_bits == 8


def test_activations_are_quantized_at_the_input_of_linears_alone():
    x = torch.randn(2, 24)
    model = nn.Sequential(nn.Linear(24, 8))
    quantize_model(model, settings(8, granularity="per_row"))
    (_, weight, gamma, q), *_ = quantized_parameters(model)
    scale = x.abs().amax(-1, keepdim=True) / 127
    value = fake_quantize(weight, dynamic_scale(weight, gamma, 8, "per_row", 0, True), 8)
    torch.testing.assert_close(model(x), (x / scale).round() * scale @ value.T + model[0].bias)

    loaded = nn.Linear(24, 8)
    loaded.load_state_dict({"weight": value, "bias": model[0].bias})
    quantize_input(loaded, 8)
    assert torch.equal(loaded(x), model(x)) and list(loaded.state_dict()) == ["weight", "bias"]
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))


def test_autocast_keeps_gammas_in_fp32_and_close():
    model = gpt2()
    quantize_model(model, settings(2, 4, positions=8, activations=None))
    loss, exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low = gradients(model)
    assert low_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert all(gradient.dtype == torch.float32 for gradient in low.values())
    for kind in ("weight_gamma", "weight"):
        ours, theirs = (torch.cat([g.flatten() for name, g in every.items() if name.endswith(kind)]) for every in (low, exact))
        assert 0 < (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_copies_and_pickles_work_alike():
    model = gpt2()
    quantize_model(model, settings(4, 2))
    loss, expected = gradients(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.lm_head.weight_gamma is again.transformer.wte.weight_gamma is not model.lm_head.weight_gamma
        again_loss, found = gradients(again)
        assert torch.equal(again_loss, loss) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_gammas_to_be_overwritten_are_not_searched():
    model, again = gpt2(), gpt2()
    coverage = quantize_model(model, settings(granularity="per_row"))
    with torch.no_grad():
        again.transformer.wte.weight[3] = float("nan")  # would be refused by the search
    assert quantize_model(again, settings(granularity="per_row"), initialise=False) == coverage
    assert all((gamma == 1).all() for _, _, gamma, _ in quantized_parameters(again))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_weight_that_is_not_finite_is_refused():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN"):
        quantize_model(model, settings())


def test_keep_float_takes_globs_of_any_name_of_a_weight():
    rows = {row.name: row for row in quantize_model(gpt2(), settings(keep_float=("lm_head.weight", "*.0.attn.*"))).rows}
    assert rows["transformer.wte.weight"].reason == "quant.keep_float has lm_head.weight"
    assert rows["transformer.h.0.attn.c_attn.weight"].bits is None and rows["transformer.h.1.attn.c_attn.weight"].bits == 2
    with pytest.raises(ConfigError, match=r"quant.keep_float has `encoder\.\*`, which matches no matrix of the model; they are called like transformer"):
        quantize_model(gpt2(), settings(keep_float=("encoder.*",)))


def test_portable_scales_are_the_default_and_fp32_ones_are_not_snapped():
    for dtype, is_snapped in (("portable", True), ("fp32", False)):
        model = gpt2()
        quantize_model(model, settings(granularity="per_row", scale_dtype=dtype))
        scales = torch.cat([q.quantize(weight, gamma)[1] for _, weight, gamma, q in quantized_parameters(model)])
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
    with pytest.raises(
        ConfigError, match="1 of 2 quantizers never ran: read.weight. Their modules are read without being called; list them in quant.keep_float"
    ):
        check_all_ran(wrapper)

    model = bart()
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
    with pytest.raises(ConfigError, match=r"words\.weight is also head\.weight, where Head would read it unquantized; list words\.weight in quant\.keep_float"):
        quantize_model(model, settings())
    assert quantize_model(model, settings(keep_float=("words.weight",))).fraction == 0


def test_coverage_lists_every_matrix_and_why_it_stays_float():
    model = gpt2()
    model.experts = nn.ParameterList([nn.Parameter(torch.randn(3, 4, 5))])
    coverage = quantize_model(model, settings(4, 2, keep_float=("transformer.h.0.*",)))
    rows = {row.name: row for row in coverage.rows}
    assert list(rows) == [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert rows["experts.0"].reason == "ParameterList.0 is no weight of a Linear, Conv1D or Embedding"
    assert rows["transformer.wpe.weight"].reason == "quant.positions is null"
    row = rows["transformer.h.1.attn.c_attn.weight"]
    assert (row.shape, row.bits, row.granularity, row.grid, row.activation_bits, row.reason, row.row_axis) == ((32, 96), 4, "per_tensor", "dynamic", 8, None, 1)
    quantized = sum(weight.numel() for _, weight, _, _ in quantized_parameters(model))
    assert coverage.fraction == quantized / sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert Coverage.from_json(coverage.to_json()) == coverage and len(json.loads(coverage.to_json())) == len(rows)
    lines = coverage.table().splitlines()
    assert lines[0].split() == ["parameter", "shape", "weight", "input", "why", "float"] and len(lines) == len(rows) + 2
    assert lines[1].split() == ["transformer.wte.weight", "97", "x", "32", "2", "bit", "per_row", "8", "bit"]
    assert "quantized" in lines[-1] and f"{coverage.fraction:.1%}" in lines[-1]
