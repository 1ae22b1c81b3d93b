import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from families import FAMILIES, IDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from dqtrain.errors import ConfigError
from dqtrain.quant import attention as attention_module
from dqtrain.quant.activation import ActivationQuantizer, calibrate, check_calibrated, watch_padding
from dqtrain.quant.attention import PLACES, check_attention_ran, quantize_attention, quantized_attention

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def gemma2(**more):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, pad_token_id=1, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=0.5, **more))


def gpt2_by_layer(**more):
    return FAMILIES["gpt2"](scale_attn_by_inverse_layer_idx=True, **more)


MODELS = {**FAMILIES, "gemma2": gemma2, "gpt2 by layer": gpt2_by_layer}
ATTENTIONS = {"bart": 3, "mbart": 3, "t5": 6}


class Nothing:
    """A quantizer that changes nothing."""

    scale, learned_names = "per_token", ()

    def __call__(self, x, module, is_real=None):
        return x


def inputs(model, ids=IDS, padded=True):
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -4:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given |= {"decoder_input_ids": ids[:, :-3].flip(0)}
    return given


def sharpen(model):
    """Random small models attend to all alike; then a wrong scale or mask would not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_without_rounding_it_is_each_familys_own_attention(name, dropout):
    model = sharpen(MODELS[name]()).train(dropout > 0)
    for module in model.modules():
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, dropout)
        if isinstance(getattr(module, "attn_dropout", None), nn.Dropout):
            module.attn_dropout.p = dropout
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")

    def run(model):
        torch.manual_seed(3)
        logits = model(**inputs(model)).logits
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith("_step")}

    expected, expected_grads = run(other)
    names = quantize_attention(model, 16, "per_token")
    assert len(names) == ATTENTIONS.get(name, 2)
    with pytest.raises(ConfigError, match=rf"attention of {len(names)} of {len(names)} modules was never quantized: {names[0]}"):
        check_attention_ran(model)
    near, near_grads = run(model)
    check_attention_ran(model)
    assert 0 < (near - expected).abs().max() < 1e-3 * expected.abs().max()
    model.zero_grad()
    for module_name in names:
        model.get_submodule(module_name).attention_quantizers = dict.fromkeys(PLACES, Nothing())
    same, same_grads = run(model)
    assert torch.equal(same, expected)
    for n, grad in expected_grads.items():
        torch.testing.assert_close(same_grads[n], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()) + 1e-12)
        torch.testing.assert_close(near_grads[n], grad, rtol=0, atol=1e-2 * float(grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", ["per_token", "per_tensor", "block_32", "learned"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_cached_decoding_computes_what_training_did(name, scale, bits):
    if scale == "block_32" and bits == 4:
        return
    model = sharpen(MODELS[name]()).eval()
    quantize_attention(model, bits, scale)
    watch_padding(model)
    given = inputs(model, padded=False)
    if scale == "learned":
        calibrate(model, lambda: model(**given))
    with torch.no_grad():
        whole = model(**given).logits
        tokens = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        ids = given.pop(tokens)
        cache, steps = None, []
        given.pop("attention_mask") if tokens == "input_ids" else None
        for i in range(ids.shape[1]):
            output = model(**{tokens: ids[:, i : i + 1]}, **given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    # A value on the border between two codes may fall on either side by a rounding error of the matrices before.
    difference = (torch.cat(steps, 1) - whole).abs()
    assert difference.median() < 1e-5 * whole.abs().max()
    assert difference.max() < (3e-2 if bits == 8 else 0.3) * whole.abs().max()
    assert (difference.amax(-1) < 1e-4 * whole.abs().max()).float().mean() > 0.7


def straight(x, value):
    return x + (value - x).detach()


def by_hand(query, key, value, mask, bits, scaling):
    """Grouped-query attention in float64, one query head after the other; rounding passes straight through."""
    top = 2 ** (bits - 1) - 1

    def symmetric(x):
        s = x.detach().abs().amax(-1, keepdim=True) / top
        return straight(x, torch.round(x / s) * s)

    outputs = []
    for head in range(query.shape[1]):
        shared = head * key.shape[1] // query.shape[1]
        q, k, v = symmetric(query[:, head]), symmetric(key[:, shared]), symmetric(value[:, shared])
        p = torch.softmax(q @ k.mT * scaling + mask[:, 0], -1)
        s = p.detach().amax(-1, keepdim=True) / (2**bits - 1)
        outputs.append(straight(p, torch.round(p / s) * s) @ v)
    return torch.stack(outputs, 2)


class Bare(nn.Module):
    """A module that holds quantizers, and nothing else."""

    def __init__(self, bits, scale="per_token"):
        super().__init__()
        self.attention_quantizers = {place: ActivationQuantizer(place, bits, scale, place == "probabilities") for place in PLACES}
        for quantizer in self.attention_quantizers.values():
            quantizer.register(self)


def operands(batch, heads, groups, tokens, keys, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads * groups, tokens, size), (batch, heads, keys, size), (batch, heads, keys, size))
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=30)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([4, 8]),
    st.integers(0, 999),
)
def test_values_and_gradients_by_hand(batch, heads, groups, tokens, keys, size, bits, seed):
    ours, theirs = (operands(batch, heads, groups, tokens, keys, size, seed) for _ in range(2))
    mask = torch.zeros(batch, 1, tokens, keys, dtype=torch.float64)
    mask[:, :, : tokens // 2, keys // 2 + 1 :] = torch.finfo(torch.float64).min
    output, _ = quantized_attention(Bare(bits), *ours, mask, scaling=0.7)
    expected = by_hand(*theirs, mask, bits, 0.7)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_quantized_probabilities_are_after_dropout():
    query, key, value = operands(1, 1, 1, 6, 6, 4)
    module = Bare(4).train()
    torch.manual_seed(1)
    output, probabilities = quantized_attention(module, query, key, value, None, dropout=0.5)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities.sum(-1)))  # those are before it
    torch.manual_seed(1)
    dropped = nn.functional.dropout(probabilities, 0.5)
    assert (dropped == 0).any() and dropped.max() > 0
    s = dropped.amax(-1, keepdim=True) / 15
    s = torch.where(s > 0, s, 1)
    v = module.attention_quantizers["value"](value, module)
    torch.testing.assert_close(output.transpose(1, 2), torch.round(dropped / s) * s @ v)
    output.sum().backward()
    assert query.grad.isfinite().all()


# Memory


class Kept:
    """Counts the distinct memory that is kept for backward, but for that of Parameters."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors, self.hooks = {}, saved_tensors_hooks(self.pack, lambda t: t)

    def pack(self, tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.parameters:
            self.tensors[pointer] = tensor
        return tensor

    @property
    def num_bytes(self):
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


@pytest.mark.parametrize("scale", ["per_token", "learned"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_no_more_is_kept_for_backward_than_by_eager_attention(name, scale):
    ids = torch.arange(128).view(2, 64) % 97
    more = {"max_position_embeddings": 64} if name == "bart" else {"n_positions": 64} if name == "gpt2" else {}
    eager = MODELS[name](**more).train()
    quantized = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    quantize_attention(quantized, 8, scale)
    for n, p in quantized.named_parameters():
        p.data.copy_(torch.full((1,), 0.02)) if n.endswith("_step") else p.data.zero_() if n.endswith("_zero_point") else None
    found = []
    for model in (eager, quantized):
        kept = Kept(model)
        with kept.hooks:
            loss = model(**inputs(model, ids)).logits.square().mean()
        found.append(kept.num_bytes)
        loss.backward()
    # Learned steps need the float operands beside the quantized ones, but not the probabilities twice, which are most of it here.
    assert found[1] <= (1.05 if scale == "per_token" else 1.25) * found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["per_token", "learned"])
def test_probabilities_made_again_are_the_same_bits(scale, dtype, monkeypatch):
    module = Bare(4, scale).train()
    for name, p in module.named_parameters():
        p.data.fill_(3.0 if name.endswith("point") else 0.1)

    def gradients():
        module.zero_grad()
        leaves = operands(2, 2, 2, 5, 7, 4, dtype=dtype)
        output, probabilities = quantized_attention(module, *leaves, None)
        assert output.dtype == dtype and probabilities.dtype == torch.float32
        (output.float() * torch.arange(output.numel()).view(output.shape)).sum().backward()
        return [leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()]

    made = []
    value = ActivationQuantizer.value
    monkeypatch.setattr(ActivationQuantizer, "value", lambda self, *args: made.append(self.place) or value(self, *args))
    again = gradients()
    assert made.count("probabilities") == 2  # in forward and in backward
    monkeypatch.setattr(attention_module, "_weighted_sum", lambda q, p, dropped, v, m, real, rate: q(dropped.transpose(1, 2), m, real).transpose(1, 2) @ v)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_activation_checkpointing_gives_the_same_gradients(name, reentrant):
    def gradients(checkpointing):
        model = sharpen(MODELS[name]()).train()
        quantize_attention(model, 8, "per_token")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs(model)).logits.square().mean().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(False)
    largest = max(gradient.abs().max() for gradient in expected)
    # Not to the bit: what is computed again may lie elsewhere in memory, and kernels of some processors sum otherwise there.
    for ours, theirs in zip(gradients(True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6 * float(largest))


def test_activation_checkpointing_keeps_no_probabilities():
    module, leaves, memory = Bare(8), operands(2, 2, 1, 8, 8, 4), []

    def attend(*operands):
        output, probabilities = quantized_attention(module, *operands, None)
        memory.append(weakref.ref(probabilities.untyped_storage()))
        return output

    output = checkpoint(attend, *leaves, use_reentrant=False)
    gc.collect()
    assert memory[0]() is None
    output.sum().backward()
    expected = operands(2, 2, 1, 8, 8, 4)
    quantized_attention(module, *expected, None)[0].sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, expected, strict=True))


# Learned


def test_learned_steps_are_calibrated_and_padded_queries_do_not_count():
    model = sharpen(FAMILIES["gpt2"](n_layer=1)).train()
    assert quantize_attention(model, 8, "learned") == ["transformer.h.0.attn"]
    watch_padding(model)
    names = {n for n, p in model.named_parameters() if n.startswith("transformer.h.0.attn.") and p.shape == (1,)}
    assert {n.rpartition(".")[2] for n in names} == {"query_step", "key_step", "probabilities_step", "probabilities_zero_point", "value_step"}
    with pytest.raises(ConfigError, match="5 learned activation scales are not set"):
        check_calibrated(model)
    given = inputs(model)
    calibrate(model, lambda: model(**given))
    check_calibrated(model)
    attention = model.transformer.h[0].attn
    assert attention.probabilities_zero_point.item() == 0 and 0 < attention.probabilities_step.item() <= 1 / 255 + 1e-6
    for p in (attention.query_step, attention.probabilities_step):
        p.data.mul_(0.7)  # some are clamped

    def gradients(where):
        model.zero_grad()
        model(**given).logits[where].square().sum().backward()
        return [attention.query_step.grad.clone(), attention.probabilities_step.grad.clone()]

    real = given["attention_mask"].bool()
    for everywhere, of_real, of_padded in zip(gradients(torch.ones_like(real)), gradients(real), gradients(~real), strict=True):
        torch.testing.assert_close(everywhere, of_real, rtol=1e-4, atol=1e-6)
        assert of_real.abs() > 1e-4 and of_padded == 0


def test_padding_is_not_seen_by_calibration():
    model = sharpen(FAMILIES["bart"]()).eval()
    quantize_attention(model, 8, "learned")
    watch_padding(model)
    given = inputs(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = 0
        model.get_input_embeddings().weight[96, 3] = 50  # large behind a norm too
        for name, p in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                p[:, 3] *= 30  # and in what is projected
    found = []
    for padding in (5, 96):
        given["input_ids"] = given["input_ids"].where(given["attention_mask"].bool(), padding)
        calibrate(model, lambda: model(**given))
        found.append([p.item() for n, p in model.named_parameters() if n.endswith(("_step", "_zero_point"))])
    assert len(found[0]) == 15 and found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-7)


# Refusals


def test_unknown_arguments_are_refused():
    query, key, value = operands(1, 1, 1, 2, 2, 4)
    with pytest.raises(ConfigError, match=r"Bare gives its attention s_aux, which dqtrain's attention does not know. Set quant.activations.attention to false"):
        quantized_attention(Bare(8), query, key, value, None, s_aux=torch.ones(1), sliding_window=3, cu_seq_lens_q=None)
    with pytest.raises(ConfigError, match=r"Linear has attn_implementation dqtrain and no quantizers. Call quantize_attention"):
        quantized_attention(nn.Linear(1, 1), query, key, value, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=9, rotary_dim=4)),
            "attention of GPTJForCausalLM cannot be quantized: GPTJAttention",
        ),
        (
            lambda: FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)),
            "FalconForCausalLM .* FalconAttention",
        ),
        (lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, pad_token_id=1)), "GptOssAttention has attention sinks"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, reorder_and_upcast_attn=True)), "reorder_and_upcast_attn"),
        (lambda: nn.Linear(2, 2), "attention of a Linear cannot be quantized"),
    ],
)
def test_what_cannot_be_quantized_is_named(make, message):
    model = make()
    with pytest.raises(ConfigError, match=message):
        quantize_attention(model, 8, "per_token")
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) != "dqtrain"
    assert not any(hasattr(module, "attention_quantizers") for module in model.modules())


def test_a_module_that_did_not_run_is_found():
    model = FAMILIES["llama"]()
    quantize_attention(model, 8, "per_token")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    model(IDS)
    with pytest.raises(ConfigError, match=r"attention of 1 of 2 modules was never quantized: model.layers.1.self_attn\. "):
        check_attention_ran(model)


def test_copies_and_pickles_are_quantized_too():
    model = sharpen(FAMILIES["llama"]()).eval()
    before = model(IDS).logits
    quantize_attention(model, 4, "per_token")
    expected = model(IDS).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)


def test_transformers_knows_it_by_name():
    assert AttentionInterface()["dqtrain"] is quantized_attention
    assert math.isclose(sum(quantized_attention(Bare(8), *operands(1, 1, 1, 1, 5, 4), None)[1].flatten().tolist()), 1, rel_tol=1e-6)
