"""torch's integer kernels on an artifact's codes compute what its values say, as nearly as bf16 allows."""

import copy
import itertools

import pytest
import torch
from families import FAMILIES, IDS, logits_of
from test_pretrained import settings, write
from torch import nn

import dqtrain
from dqtrain.artifact import fast, fast_step, format
from dqtrain.artifact.fast import FastEmbedding, FastLinear
from dqtrain.config import BITS_OF_GRID
from dqtrain.errors import ConfigError

ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16, which has 8 significant bits."""

WIDE = {"n_embd": 64, "n_head": 2, "vocab_size": 331}  # inputs that the int4 kernel takes, and rows that 16 does not divide, over a chunk


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FastLinear | FastEmbedding)}


def check_layers(found, dense):
    """Each layer on its own against float64. Inputs are bf16 and sums fp32; rounded to bf16 are the product, the product with what was lost of z added, and that with the bias.

    Of many rows the product of the codes is, and that with the scale.
    """
    modules = layers(found)
    assert modules
    for name, module in modules.items():
        weight = dense.get_submodule(name).weight.detach().double()
        if isinstance(module, FastEmbedding):
            ids = torch.arange(module.num_embeddings)[None]
            scale = getattr(module, "embed_scale", 1.0)
            torch.testing.assert_close(module(ids)[0].double(), weight * scale, rtol=(1 + ROUNDING) ** (1 + (scale != 1.0)) - 1, atol=0.0)
            continue
        if not isinstance(dense.get_submodule(name), nn.Linear):
            weight = weight.T
        assert weight.shape == (module.out_features, module.in_features)
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
        for tokens in (3, fast.MANY):
            x = torch.randn(2, tokens, module.in_features).bfloat16()
            exact = x.double() @ weight.T
            expected = exact + bias.double()
            step = module.scales.double().view(-1, module.codes.shape[0], 2)[..., 0].amax(0) if module.group else module.scales.double()
            sums = x.double().abs().sum(-1, keepdim=True) * step[: len(weight)]  # of |x|, in steps
            bound = 16 * sums * module.in_features * 2.0**-23 + ROUNDING * 1.01 * (exact.abs() + expected.abs() * (module.bias is not None))
            if module.lost is not None:  # at most ROUNDING of 8 steps, the sums of x and the product rounded, and then their sum with the rest
                bound += 2.02 * ROUNDING * (8 * ROUNDING * sums) + ROUNDING * 1.01 * (exact.abs() + 8 * ROUNDING * sums)
            if module.values is not None and tokens == fast.MANY:
                bound += ROUNDING * 1.01 * exact.abs()
            error = (module(x).double() - expected).abs()
            assert (error <= bound).all(), (name, (error / bound).max())


CASES = [
    *((settings(bits, bits, grid=grid), WIDE) for grid, widths in BITS_OF_GRID.items() for bits in widths if not ("affine" in grid and bits == 8)),
    *((settings(bits, bits, grid="affine", granularity="per_group", group_size=32), WIDE) for bits in (2, 3, 4)),
    (settings(4, 3, grid="lsq", granularity="per_group", group_size=64), WIDE),
    (settings(2, 2, grid="seq", granularity="per_row"), {"n_embd": 48, "vocab_size": 50}),
    (settings(4, 4, grid="affine", granularity="per_row"), {"n_embd": 48, "vocab_size": 50}),
    (settings(8, 8, grid="lsq", granularity="per_row"), WIDE),
    (settings(2, 4, float_head=True), WIDE),
    (settings(2, None, None), WIDE),
]


@pytest.mark.parametrize(
    ("quant", "shape"), CASES, ids=lambda value: f"{value.linears.grid}-{value.linears.bits}-{value.linears.granularity}" if hasattr(value, "linears") else ""
)
def test_every_grid(quant, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK_ELEMENTS", 1)  # then matrices of more than 320 rows come in pieces
    write(tmp_path, quant, **shape)
    check_layers(dqtrain.load_artifact(tmp_path, mode="fast"), dqtrain.load_artifact(tmp_path, mode="dense"))


FITTING = [family for family in FAMILIES if family != "mixtral"]


@pytest.mark.parametrize("family", FITTING)
def test_every_family_is_as_near_as_bf16(family, tmp_path):
    """Beside the same values in transformers' own bf16 model, whose weights are rounded as well."""
    write(tmp_path, settings(activations=None), family)
    exact, dense, found = (dqtrain.load_artifact(tmp_path, mode=mode) for mode in ("exact", "dense", "fast"))
    check_layers(found, dense)
    with torch.no_grad():
        expected, ours, theirs = (logits_of(model).double() for model in (exact, found, dense.to(torch.bfloat16)))
        scale = expected.norm()
        assert (ours - expected).norm() / scale <= 2 * (theirs - expected).norm() / scale
        agreed = (ours.argmax(-1) == expected.argmax(-1)).double().mean()
    assert agreed >= 0.75
    out = found.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached = found.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert out.shape == cached.shape and (out == cached).double().mean() > 0.75


def test_prompts_are_as_near_as_bf16(tmp_path):
    """With products of many rows."""
    write(tmp_path, settings(activations=None), "gpt2", **WIDE, initializer_range=0.5, n_positions=fast.MANY)
    exact, dense, found = (dqtrain.load_artifact(tmp_path, mode=mode) for mode in ("exact", "dense", "fast"))
    ids = torch.randint(331, (1, fast.MANY), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, ours, theirs = (logits_of(model, ids).double() for model in (exact, found, dense.to(torch.bfloat16)))
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # where else the layout is what those products read is not known
        assert found.transformer.h[0].attn.c_attn.values is not None


def next_logits(model, ids, mask, lengths):
    """Logits behind the last of each piece of the texts, read one after the other; [batch, pieces, vocabulary]."""
    places, cache, found = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache, "use_cache": True}
        out = model(input_ids=ids[:, start:end], **given)
        cache = out.past_key_values
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_single_tokens_read_without_modules_are_as_near_as_bf16(family, tmp_path, monkeypatch):
    """Texts of two lengths, as far as the logits of the fp32 model go; the room for keys and values is used up on the way."""
    monkeypatch.setattr(fast_step, "ROOM", 3)
    write(tmp_path, settings(activations=None), family, **{"init_std" if family == "opt" else "initializer_range": 0.5})  # so that tokens attend to each other
    dense, found = (dqtrain.load_artifact(tmp_path, mode=mode) for mode in ("dense", "fast"))
    used = [module for name, module in found.named_modules() if name.endswith("0.mlp") or name.endswith("0.fc1")]
    calls = []
    used[0].register_forward_hook(lambda *_: calls.append(1))
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    with torch.no_grad():
        ours = next_logits(found, IDS, mask, [4, *[1] * 8]).double()
        assert len(calls) == 1  # the prompt
        expected = next_logits(dense, IDS, mask, [4, *[1] * 8]).double()
        theirs = next_logits(dense.to(torch.bfloat16), IDS, mask, [4, *[1] * 8]).double()
    of_each = (ours - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
    assert of_each.max() <= 2 * ((theirs - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))).max()


def test_steps_and_modules_take_turns(tmp_path):
    """Whatever asks for more than the next logits goes through the modules, with the same cache; and back. A copy has a step of its own.

    The largest logit is 12; steps compute attention in fp32.
    """
    write(tmp_path, settings(activations=None), initializer_range=0.5)
    found = dqtrain.load_artifact(tmp_path, mode="fast")
    modules = copy.deepcopy(found)
    modules._step.reads = lambda *_: False
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        pieces = [4, 1, 1, 1, 3, 1, 1]
        by_modules = next_logits(modules, IDS, mask, pieces)
        torch.testing.assert_close(next_logits(found, IDS, mask, pieces), by_modules, atol=0.12, rtol=0.0)
        given = {"attention_mask": mask[:, :6], "position_ids": torch.full((2, 1), 5), "use_cache": True}
        cache = found(input_ids=IDS[:, :5]).past_key_values
        found(input_ids=IDS[:, 7:8], past_key_values=cache, **given)  # another token, taken back
        cache.crop(-1)
        hidden = found(input_ids=IDS[:, 5:6], past_key_values=cache, output_hidden_states=True, **given).hidden_states
        assert len(hidden) == 1 + found.config.n_layer
        torch.testing.assert_close(found.lm_head(hidden[-1])[:, 0], by_modules[:, 2], atol=0.12, rtol=0.0)
        cache.reorder_cache(torch.tensor([1, 0]))
        given |= {"attention_mask": mask[:, :7], "position_ids": torch.full((2, 1), 6)}
        swapped = found(input_ids=IDS.flip(0)[:, 6:7], past_key_values=cache, **given).logits[:, 0]
        torch.testing.assert_close(swapped.flip(0), by_modules[:, 3], atol=0.12, rtol=0.0)
        search = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
        assert torch.equal(found.generate(IDS, **search), modules.generate(IDS, **search))


def test_a_prompt_of_one_token(tmp_path):
    write(tmp_path, settings(activations=None), initializer_range=0.5)
    found = dqtrain.load_artifact(tmp_path, mode="fast")
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = found.generate(IDS[:, :1], **search)
    found._step.reads = lambda *_: False
    assert torch.equal(written, found.generate(IDS[:, :1], **search)) and written.shape == (2, 5)


def test_no_matrix_is_dense_and_a_tied_one_is_there_once_for_each_use(tmp_path):
    model = write(tmp_path, settings(), "gpt2", **WIDE)
    found = dqtrain.load_artifact(tmp_path, mode="fast")
    assert {name for name, p in found.named_parameters() if p.ndim > 1} == {"transformer.wpe.weight"}
    with format.PackedTensors(tmp_path, format.read_description(tmp_path)) as packed:
        table = packed.stored("transformer.wte.weight").packed
    assert torch.equal(found.transformer.wte.bytes_, table)
    head = found.lm_head
    assert head.codes.numel() == 336 * 32 and head.codes.dtype == torch.uint8
    bart = (tmp_path / "bart").absolute()
    write(bart, settings(), "bart")
    found = dqtrain.load_artifact(bart, mode="fast").model
    assert len({module.bytes_.data_ptr() for module in (found.shared, found.encoder.embed_tokens, found.decoder.embed_tokens)}) == 1
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("quant", "family", "message"),
    [
        (
            settings(8, 8, grid="affine"),
            "gpt2",
            r"transformer\.h\.0\.attn\.c_attn\.weight: 8-bit codes with zero points fit no kernel. Load the artifact with mode exact",
        ),
        (settings(8, 4, granularity="per_group", group_size=32), "gpt2", r"transformer\.h\.0\.attn\.c_attn\.weight: 8-bit codes in groups fit no kernel"),
        (
            settings(4, 4, granularity="per_group", group_size=16),
            "gpt2",
            r"c_attn\.weight: the kernel takes groups of 32 inputs and multiples of that, not of 16",
        ),
        (settings(scale_dtype="fp32"), "gpt2", r"its scales are fp32 \(quant.scale_dtype\), which bf16 does not hold"),
        (settings(), "mixtral", r"experts\.gate_up_proj: MixtralExperts\.gate_up_proj is no weight of a linear layer"),
    ],
)
def test_what_no_kernel_holds_is_refused_by_name(quant, family, message, tmp_path):
    write(tmp_path, quant, family)
    with pytest.raises(ConfigError, match=message):
        dqtrain.load_artifact(tmp_path, mode="fast")
    dqtrain.load_artifact(tmp_path, mode="dense")


@pytest.mark.parametrize(("quant", "shape"), CASES, ids=lambda value: f"{value.linears.grid}-{value.linears.bits}" if hasattr(value, "linears") else "")
def test_kernels_of_gpus_are_given_what_they_take(quant, shape, tmp_path):
    """By what torch says of shapes and dtypes; that they compute it is tests/runtimes/test_gpu.py."""
    write(tmp_path, quant, **shape)
    found = dqtrain.load_artifact(tmp_path, mode="fast")
    with format.PackedTensors(tmp_path, format.read_description(tmp_path)) as packed:
        for layer in layers(found).values():
            if not isinstance(layer, FastLinear):
                continue
            made = fast._of_linear(layer, packed, packed.quantized[layer.name], torch.device("meta"))
            codes, scales, rows = made["codes"], made["scales"], layer.codes.shape[0]
            if layer.group:
                tiles = 2 * codes.shape[3]
                assert codes.dtype == torch.int32 and codes.shape == (rows / 8, layer.in_features / (16 * tiles), 32, tiles / 2)
                assert scales.shape == (layer.in_features / layer.group, rows, 2) and layer.group in (32, 64, 128, 256)
            else:
                assert codes.dtype == torch.int8 and codes.shape == (rows, layer.in_features) and scales.shape == (rows,)


def test_a_kernel_that_multiplies_other_codes_is_noticed(tmp_path):
    write(tmp_path, settings(), **WIDE)
    found = dqtrain.load_artifact(tmp_path, mode="fast")
    with format.PackedTensors(tmp_path, format.read_description(tmp_path)) as packed:
        for layer in layers(found).values():
            if isinstance(layer, FastLinear):
                fast.check_kernel(layer, packed, torch.device("cpu"))
        layer.codes = layer.codes.flip(0)
        with pytest.raises(
            ConfigError,
            match=rf"mode fast on cpu: .* does not multiply the codes of {layer.name} there \(gives another product\). Load the artifact with mode dense",
        ):
            fast.check_kernel(layer, packed, torch.device("cpu"))
