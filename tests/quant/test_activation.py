import copy
import functools
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dqtrain.errors import ConfigError
from dqtrain.quant.activation import ActivationQuantizer, calibrate, check_calibrated, is_one_sided, real_positions, watch_padding

HOLDER = nn.Module()
SHAPES = st.one_of(
    st.tuples(st.integers(1, 7)), st.tuples(st.integers(1, 4), st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
)


def dynamic_by_hand(x, bits, asymmetric):
    """What shares one scale, in float64."""
    if not asymmetric:
        largest = 2 ** (bits - 1) - 1
        s = np.abs(x).max() / largest
        return np.rint(x / s) * s if s > 0 else x * 0
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    s = (high - low) / (2**bits - 1)
    if s == 0:
        return x * 0
    z = np.rint(-low / s)
    return (np.clip(np.rint(x / s) + z, 0, 2**bits - 1) - z) * s


@settings(max_examples=60)
@given(
    SHAPES, st.sampled_from([4, 8, 16]), st.sampled_from(["per_token", "per_tensor"]), st.booleans(), st.integers(0, 10**6), st.sampled_from([1e-30, 1.0, 1e20])
)
def test_dynamic_values(shape, bits, scale, asymmetric, seed, unit):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * unit
    found = ActivationQuantizer("input", bits, scale, asymmetric)(x, HOLDER).numpy()
    if scale == "per_tensor":
        expected = dynamic_by_hand(x.numpy(), bits, asymmetric)
    else:
        expected = np.stack([dynamic_by_hand(token, bits, asymmetric) for token in x.reshape(-1, shape[-1]).numpy()]).reshape(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["per_token", "per_tensor", "block_32", "block_256"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_zeros_and_tiny_values_stay_finite(scale, asymmetric):
    quantizer = ActivationQuantizer("input", 8, scale, asymmetric)
    for x in (torch.zeros(2, 256), torch.full((2, 256), 1e-45), torch.full((2, 256), 1e-40)):
        assert (quantizer(x, HOLDER).abs() <= 1e-38).all()
    assert quantizer(torch.zeros(0, 256), HOLDER).shape == (0, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["per_token", "per_tensor", "block_32"])
def test_half_precision_is_computed_in_fp32(dtype, scale):
    torch.manual_seed(0)
    x = torch.randn(3, 64).to(dtype)
    quantizer = ActivationQuantizer("input", 8, scale, False)
    found = quantizer(x, HOLDER)
    assert found.dtype == dtype
    assert torch.equal(found, quantizer(x.float(), HOLDER).to(dtype))


def ggml_block(x, block):
    """`quantize_row_q8_0_ref` (ties to even, as on AVX and NEON) and `quantize_row_q8_K_ref`, then `dequantize_row_*`, scalar by scalar."""
    f = np.float32
    result = np.zeros_like(x)
    for start in range(0, len(x), block):
        values = x[start : start + block]
        if block == 32:
            d = f(np.abs(values).max() / f(127))
            inverse = f(1) / d if d else f(0)
            d = f(np.float16(d))
            codes = [int(np.rint(f(v * inverse))) for v in values]
        else:
            largest = values[np.abs(values).argmax()]
            if not largest:
                continue
            inverse = f(-127) / largest
            codes = [min(127, int(np.rint(f(inverse * v)))) for v in values]
            d = f(1) / inverse
        result[start : start + block] = [f(d * f(c)) for c in codes]
    return result


@settings(max_examples=15)
@given(st.sampled_from([32, 256]), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e4]), st.booleans())
def test_blocks_are_llama_cpps(block, count, seed, unit, coarse):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, block * count)) * unit).astype(np.float32)
    if coarse:  # many ties
        x = (rng.integers(-254, 255, x.shape) * 0.5).astype(np.float32)
        x[:, ::block] = 127
    x[0, :block] = 0
    found = ActivationQuantizer("input", 8, f"block_{block}", True)(torch.from_numpy(x), HOLDER).numpy()
    np.testing.assert_array_equal(found, np.stack([ggml_block(row, block) for row in x]))


def test_bad_settings_say_what_to_do():
    with pytest.raises(ConfigError, match="block_32, llama.cpp's 8-bit arithmetic, but 4 bits; set bits to 8 or scale to per_token"):
        ActivationQuantizer("input", 4, "block_32", False)
    with pytest.raises(ConfigError, match="`per_row`, which is none of per_token"):
        ActivationQuantizer("input", 8, "per_row", False)
    linear = nn.Linear(48, 3)
    with pytest.raises(ConfigError, match=r"Linear's input has 48 input features, which blocks of 32 do not divide.*per_token"):
        ActivationQuantizer("input", 8, "block_32", False)(torch.ones(2, 48), linear)
    with pytest.raises(ConfigError, match=r"96 input features, which blocks of 256 do not divide. Set the scale of activations to block_32 or per_token"):
        ActivationQuantizer("input", 8, "block_256", False)(torch.ones(2, 96), linear)


# Padding


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_padding_does_not_move_a_scale_of_the_tensor(batch, tokens, features, asymmetric, flat, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, features, generator=generator, dtype=torch.float64)
    is_real = torch.rand(batch, tokens, generator=generator) > 0.4
    x[~is_real] *= 100
    quantizer = ActivationQuantizer("input", 8, "per_tensor", asymmetric)
    found = quantizer(x.flatten(0, 1), HOLDER, is_real.flatten()).view(x.shape) if flat else quantizer(x, HOLDER, is_real)
    real = x[is_real].numpy()
    assert found.isfinite().all()
    if real.size:
        np.testing.assert_allclose(found[is_real].numpy(), dynamic_by_hand(real, 8, asymmetric), rtol=1e-12)
        low, high = (min(real.min(), 0), max(real.max(), 0)) if asymmetric else (-np.abs(real).max(), np.abs(real).max())
        slack = (high - low) / 255
        assert (found >= low - slack).all() and (found <= high + slack).all()


def quantize_inputs(model, scale="per_tensor", bits=8, asymmetric=True):
    """Quantize the input of every linear layer and of experts by hooks; routers and heads stay float."""
    quantizer = ActivationQuantizer("input", bits, scale, asymmetric)

    def before(module, args):
        return (quantizer(args[0], module, real_positions(args[0], module)), *args[1:])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) or name.endswith("experts"):
            quantizer.register(module)
            module.register_forward_pre_hook(before)
    watch_padding(model)
    return model


def inputs(family, ids, mask):
    given = {"input_ids": ids, "attention_mask": mask}
    if family in ("bart", "mbart", "t5"):  # other texts and another length there
        given |= {"decoder_input_ids": ids.flip(1)[:, 2:], "decoder_attention_mask": mask.flip(1)[:, 2:]}
        given["decoder_input_ids"], given["decoder_attention_mask"] = given["decoder_input_ids"].flip(1), given["decoder_attention_mask"].flip(1)
    return given


def batch():
    ids = torch.arange(18).view(2, 9) * 5 % 89 + 2
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mixtral", "bart", "t5"])
def test_more_padding_changes_nothing(family):
    model = quantize_inputs(FAMILIES[family]()).eval()
    ids, mask = batch()
    with torch.no_grad():  # what is padded would rule the scale, behind a norm too
        model.get_input_embeddings().weight[91:95] = 0
        model.get_input_embeddings().weight[91:95, 3] = 50
    longer, longer_mask = F.pad(ids, (0, 3), value=93), F.pad(mask, (0, 3))
    ids = ids.where(mask.bool(), 92)
    first = inputs(family, ids, mask)
    more = inputs(family, longer.where(longer_mask.bool(), 93), longer_mask)
    if "decoder_input_ids" in first:  # the decoder's own padding too
        keep = first["decoder_input_ids"].shape[1]
        more["decoder_input_ids"] = F.pad(first["decoder_input_ids"], (0, 4), value=93)
        more["decoder_attention_mask"] = F.pad(first["decoder_attention_mask"], (0, 4))
    else:
        keep = ids.shape[1]
    real = first.get("decoder_attention_mask", mask).bool()
    with torch.no_grad():
        short, long = model(**first).logits, model(**more).logits[:, :keep]
        ignorant = copy.deepcopy(model)
        for module in ignorant.modules():
            module.__dict__.pop("padding_watch", None)
        wrong = ignorant(**more).logits[:, :keep]
    torch.testing.assert_close(long[real], short[real], rtol=1e-4, atol=1e-5)
    assert (wrong - short)[real].abs().max() > 100 * (long - short)[real].abs().max() + 1e-4  # else this test says nothing


def test_each_module_finds_the_mask_that_counts():
    model = FAMILIES["bart"]()
    seen = {}
    for name in ("model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, real_positions(args[0], m)))
    watch_padding(model)
    watch_padding(model)  # no second hook
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 4 + 4
    ids = torch.arange(12).view(2, 6) + 3
    encoder_mask, decoder_mask = torch.ones(2, 6), torch.ones(2, 6)
    encoder_mask[0, 4:], decoder_mask[1, 3:] = 0, 0
    model(ids, encoder_mask, ids, decoder_attention_mask=decoder_mask)
    assert torch.equal(seen["model.encoder.layers.0.fc1"], encoder_mask.bool())
    assert torch.equal(seen["model.decoder.layers.0.fc1"], decoder_mask.bool())
    assert torch.equal(seen["model.decoder.layers.0.encoder_attn.k_proj"], encoder_mask.bool())
    assert torch.equal(seen["lm_head"], decoder_mask.bool())
    model(ids, encoder_mask, ids)
    assert seen["model.decoder.layers.0.fc1"] is None  # nothing of the forward before
    assert torch.equal(seen["model.decoder.layers.0.encoder_attn.k_proj"], encoder_mask.bool())
    x = torch.zeros(12, 5)
    assert torch.equal(real_positions(x, model.model.encoder), encoder_mask.bool().flatten())
    assert real_positions(torch.zeros(7, 5), model.model.encoder) is None
    assert real_positions(torch.zeros(2, 5, 6), model.model.encoder) is None


def test_cached_decoding_sees_the_mask_of_its_own_tokens():
    model = FAMILIES["llama"]().eval()
    seen = []
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(real_positions(args[0], m)))
    watch_padding(model)
    ids, mask = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert torch.equal(seen[0], mask[:, :4].bool()) and torch.equal(seen[1], mask[:, 4:].bool())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_activation_checkpointing_finds_the_masks_again(family, reentrant):
    ids, mask = batch()
    given = inputs(family, ids, mask)
    teacher = quantize_inputs(FAMILIES[family]())

    def gradients(checkpointing):
        model = quantize_inputs(FAMILIES[family]()).train()
        with torch.no_grad():
            model.get_input_embeddings().weight[:40] *= 20
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**given).logits[given.get("decoder_attention_mask", mask).bool()].square().mean()
        teacher(**{name: torch.ones_like(value) for name, value in given.items()})  # another model runs before backward
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, again = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_layer_that_is_run_again_alone_finds_the_mask():
    model = quantize_inputs(FAMILIES["gpt2"]())
    ids, mask = batch()
    block = model.transformer.h[0]
    plain = block.mlp.forward
    calls = []
    block.mlp.c_fc.register_forward_pre_hook(lambda m, args: calls.append(real_positions(args[0], m)))
    block.mlp.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    model(ids, attention_mask=mask).logits.sum().backward()
    assert len(calls) == 2 and all(torch.equal(call, mask.bool()) for call in calls)


def test_copies_and_pickles_watch_for_themselves():
    model = quantize_inputs_by_class(FAMILIES["gpt2"]()).eval()
    ids, mask = batch()
    expected = model(ids, attention_mask=mask).logits
    assert model.transformer.padding_watch.mask is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.transformer.padding_watch is not model.transformer.padding_watch
        assert other.transformer.h[0].mlp.c_fc.padding_watch is other.transformer.padding_watch
        assert other.transformer.padding_watch.mask is None  # masks do not go with it
        assert torch.equal(other(ids, attention_mask=mask).logits, expected)
        assert other.transformer.padding_watch.mask is not None


def _quantize_input(quantizer, module, args):
    return (quantizer(args[0], module, real_positions(args[0], module)),)


def quantize_inputs_by_class(model):
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.register_forward_pre_hook(functools.partial(_quantize_input, ActivationQuantizer("input", 8, "per_tensor", False)))
    watch_padding(model)
    return model


# One copy for all that read it


def storages(*outputs):
    """Bytes of the distinct memory that the graphs of these outputs keep, but for that of Parameters."""
    found, seen, todo, parameters = {}, set(), [output.grad_fn for output in outputs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            parameters.add(node.variable.untyped_storage().data_ptr())
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved")]
        for tensor in (*kept, *getattr(node, "saved_tensors", ())):
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo += [next_node for next_node, _ in node.next_functions]
    return sum(size for pointer, size in found.items() if pointer not in parameters)


@pytest.mark.parametrize("detached", [False, True])
def test_layers_that_read_the_same_keep_one_copy(detached):
    layers = [nn.Linear(64, 64, bias=bias) for bias in (True, False, True)]
    x = torch.randn(2, 16, 64, requires_grad=True).clone()
    quantizer = ActivationQuantizer("input", 8, "per_token", False)
    same = ActivationQuantizer("key", 8, "per_token", False)
    # DeepSpeed gives every layer a Tensor of its own over the same memory.
    own = (lambda: DeepSpeedLike.apply(x)) if detached else (lambda: x)
    outputs = [layer(q(own(), layer)) for layer, q in zip(layers, (quantizer, same, quantizer), strict=True)]
    assert storages(*outputs) == x.numel() * 4
    grads = torch.autograd.grad(sum(output.sum() for output in outputs), x)[0]
    torch.testing.assert_close(grads, sum(layer.weight.sum(0) for layer in layers).expand_as(x))


class DeepSpeedLike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_what_is_remembered_is_never_stale_and_never_outlives_its_use():
    quantizer = ActivationQuantizer("input", 8, "per_tensor", False)
    x = (torch.randn(2, 3, 8, requires_grad=True) * 1).detach().requires_grad_()
    y = x * 1
    with torch.no_grad():
        first = quantizer(y, HOLDER)
    second = quantizer(y, HOLDER)
    assert not first.requires_grad and second.requires_grad and second.data_ptr() == first.data_ptr()
    is_real = torch.tensor([[True, True, False], [True, False, False]])
    y.detach()[1, 2] = 50
    assert quantizer(y, HOLDER).max() > 40  # changed in place
    masked = quantizer(y, HOLDER, is_real)
    assert masked.max() < 10 and quantizer(y, HOLDER).max() > 40
    is_real[1, 2] = True
    assert quantizer(y, HOLDER, is_real).max() > 40  # the mask was changed in place
    memory = weakref.ref(masked.untyped_storage())
    del masked
    gc.collect()
    assert memory() is None  # although y lives
    for other in (
        ActivationQuantizer("input", 4, "per_tensor", False),
        ActivationQuantizer("input", 8, "per_token", False),
        ActivationQuantizer("input", 8, "per_tensor", True),
    ):
        assert torch.equal(quantizer(y, HOLDER), quantizer.value(y)) and torch.equal(other(y, HOLDER), other.value(y))
    assert quantizer(y[:1], HOLDER).shape == (1, 3, 8)  # another part of the same memory
    with torch.inference_mode():
        z = torch.randn(2, 8)
        quantizer(z, HOLDER)
        z *= 3
        assert torch.equal(quantizer(z, HOLDER), quantizer.value(z))


@pytest.mark.parametrize("scale", ["per_token", "per_tensor", "block_32"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradients_of_dynamic_scales_pass_straight_through(scale, asymmetric):
    x = torch.randn(3, 64, requires_grad=True)
    weight = torch.randn(3, 64)
    y = ActivationQuantizer("input", 8, scale, asymmetric)(x.clone(), HOLDER)
    assert storages(y) == 0
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


# Learned scales


def learned_module(quantizer, step, zero_point=None):
    module = nn.Linear(1, 1)
    quantizer.register(module)
    module.input_step.data.fill_(step)
    if zero_point is not None:
        module.input_zero_point.data.fill_(zero_point)
    return module


@settings(max_examples=50)
@given(st.sampled_from([4, 8]), st.booleans(), st.booleans(), st.floats(0.01, 0.5), st.floats(-3, 20), st.integers(1, 6), st.integers(0, 10**6))
def test_learned_scales_against_the_papers(bits, asymmetric, padded, step, zero_point, features, seed):
    """LSQ, eq. 1-3, and LSQ+ / EfficientQAT, element by element in float64."""
    rng = np.random.default_rng(seed)
    quantizer = ActivationQuantizer("input", bits, "learned", asymmetric)
    module = learned_module(quantizer, step, zero_point if asymmetric else None)
    x = torch.from_numpy(rng.standard_normal((2, 3, features)) * 2).requires_grad_()
    g = rng.standard_normal(x.shape)
    is_real = torch.from_numpy(rng.random((2, 3)) > 0.3) if padded else None
    y = quantizer(x, module, is_real)
    (y * torch.from_numpy(g)).sum().backward()

    s = module.input_step.item()
    top = 2**bits - 1
    low, high = (0, top) if asymmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    z = min(max(round(module.input_zero_point.item()), 0), top) if asymmetric else 0
    values, grad_x, grad_step, grad_zero = np.zeros(x.shape), np.zeros(x.shape), 0.0, 0.0
    for i in np.ndindex(*x.shape):
        v = x[i].item() / s
        unclamped = round(v) + z
        code = min(max(unclamped, low), high)
        inside = code == unclamped if asymmetric else low < v < high
        values[i] = (code - z) * s
        grad_x[i] = g[i] if inside else 0
        if is_real is None or is_real[i[:2]]:
            grad_step += g[i] * (code - z - v if inside else code - z)
            grad_zero += 0 if inside else -s * g[i]
    factor = 1 / math.sqrt(features * high)
    np.testing.assert_allclose(y.detach().numpy(), values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), grad_x)
    np.testing.assert_allclose(module.input_step.grad.item(), grad_step * factor, rtol=1e-5, atol=1e-6)
    if asymmetric:
        np.testing.assert_allclose(module.input_zero_point.grad.item(), grad_zero * factor, rtol=1e-5, atol=1e-6)


def test_what_is_learned_is_one_element_per_place():
    module = nn.Linear(2, 2)
    for place, asymmetric in (("input", False), ("key", True)):
        quantizer = ActivationQuantizer(place, 8, "learned", asymmetric)
        quantizer.register(module)
    ActivationQuantizer("value", 8, "per_token", True).register(module)
    names = ["input_step", "key_step", "key_zero_point"]
    assert [name for name, _ in module.named_parameters()][2:] == names
    assert all(getattr(module, name).shape == (1,) and getattr(module, name).isnan() and getattr(module, name).dtype == torch.float32 for name in names)


def test_a_step_that_became_negative_stays_finite():
    quantizer = ActivationQuantizer("input", 8, "learned", False)
    module = learned_module(quantizer, -0.1)
    x = torch.tensor([[0.0, 1.0, -2.0]], requires_grad=True)
    y = quantizer(x, module)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and module.input_step.grad.isfinite().all()
    module.zero_grad()
    (quantizer(x, module) - 2 * x.detach()).square().sum().backward()
    assert module.input_step.grad < 0  # it grows


@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_finds_a_good_step(bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))
    quantizers = [ActivationQuantizer("input", bits, "learned", False), ActivationQuantizer("input", bits, "learned", True)]
    for module, quantizer in zip((model[0], model[3]), quantizers, strict=True):
        quantizer.register(module)
        module.register_forward_pre_hook(functools.partial(_quantize_input, quantizer))
    model.train()
    model[2].eval()
    with pytest.raises(ConfigError, match=r"3 learned activation scales are not set: 0.input_step, 3.input_step, 3.input_zero_point. Call .*calibrate"):
        check_calibrated(model)
    batches = [torch.randn(256, 16).clamp(-3.5, 3.5) for _ in range(3)]
    grads = []

    def run():
        grads.append(torch.is_grad_enabled())
        for x in batches:
            assert torch.equal(model(x), F.linear(F.gelu(model[0](x)), model[3].weight, model[3].bias))  # float, in eval mode

    calibrate(model, run)
    assert grads == [False] and model.training and not model[2].training and model[0].training
    check_calibrated(model)
    x = torch.cat(batches)
    qmax = 2 ** (bits - 1) - 1

    def error(step):
        return float((torch.round(x / step).clamp(-qmax - 1, qmax) * step - x).square().mean())

    step = model[0].input_step.detach()
    assert error(step) <= 1.05 * min(error(2 * x.abs().mean() / math.sqrt(qmax)), error(x.abs().max() / qmax))
    hidden = F.gelu(F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(model[3].input_step.item(), ((hidden.max() - hidden.min()) / (2**bits - 1)).item())
    torch.testing.assert_close(model[3].input_zero_point.item(), (-hidden.min() / model[3].input_step).item())
    assert (quantizers[1](hidden, model[3]) - hidden).abs().max() <= model[3].input_step * 1.01


def test_calibration_sees_real_positions_alone_and_names_what_never_ran():
    model = quantize_inputs(FAMILIES["gpt2"](), "learned", asymmetric=True)
    ids, mask = batch()
    with torch.no_grad():
        model.get_input_embeddings().weight[90] = 0
        model.get_input_embeddings().weight[90, 3] = 50  # large behind a norm too
    ids = ids.where(mask.bool(), 90)
    calibrate(model, lambda: model(ids, attention_mask=mask))
    padded = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("_step", "_zero_point"))}
    calibrate(model, lambda: (model(ids[:1], attention_mask=mask[:1]), model(ids[1:, :6])))
    for name, p in padded.items():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-4, atol=1e-5)
    check_calibrated(model)

    idle = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    for module in idle.values():
        quantizer = ActivationQuantizer("input", 8, "learned", False)
        quantizer.register(module)
        module.register_forward_pre_hook(functools.partial(_quantize_input, quantizer))
    with pytest.raises(ConfigError, match=r"1 learned activation scales saw nothing real while calibrating: idle.input_step. Run"):
        calibrate(idle, lambda: idle["used"](torch.ones(2, 3)))
    assert idle.training
    with pytest.raises(ValueError, match="mine"):
        calibrate(idle, _fail)
    calibrate(idle["used"], lambda: idle["used"](torch.ones(2, 3)))
    assert idle["used"](torch.ones(2, 3)).isfinite().all()  # no longer calibrating


def _fail():
    raise ValueError("mine")


def test_learned_scales_train():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    for asymmetric in (False, True):
        quantizer = ActivationQuantizer("input", 4, "learned", asymmetric)
        module = learned_module(quantizer, 0.02, 8.0 if asymmetric else None)

        def loss(quantizer=quantizer, module=module):
            return (quantizer(x, module) - x).square().mean()

        optimizer = torch.optim.Adam([p for name, p in module.named_parameters() if name.startswith("input_")], lr=0.02)
        start = loss().item()
        for _ in range(60):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < 0.05 * start


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.decoder.layers.0.fc2", True),
        ("transformer.h.3.mlp.c_proj", True),
        ("transformer.h.3.attn.c_proj", False),
        ("transformer.h.3.mlp.fc_out", True),
        ("model.layers.0.mlp.down_proj", True),
        ("encoder.block.0.layer.1.DenseReluDense.wo", True),
        ("model.layers.0.block_sparse_moe.experts.1.w2", True),
        ("h.0.mlp.dense_4h_to_h", True),
        ("model.layers.0.self_attn.o_proj", False),
        ("model.encoder.layers.0.self_attn.out_proj", False),
        ("model.layers.0.mlp.up_proj", False),
        ("fc2", True),
        ("lm_head", False),
    ],
)
def test_which_inputs_follow_an_activation(name, expected):
    assert is_one_sided(name) is expected
