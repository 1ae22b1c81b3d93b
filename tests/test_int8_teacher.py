"""A teacher in int8: its codes out of files into partitions, and what it says, against weights that are quantized here."""

import json
import math

import pytest
import torch
from engine_worker import micro_batches, start_ranks
from families import BART, FAMILIES, LLAMA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.pytorch_utils import Conv1D

from dqtrain.errors import ConfigError
from dqtrain.models import int8
from dqtrain.models.int8 import in_int8
from dqtrain.models.language import LanguageModel
from dqtrain.models.weights import readers_of


def gpt_oss():
    """Experts whose outputs are columns."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=97, **LLAMA, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=8, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    return model


MODELS = {
    "gpt2": FAMILIES["gpt2"],
    "llama": FAMILIES["llama"],
    "bart": lambda: FAMILIES["bart"](**{**BART, "encoder_layers": 2, "decoder_layers": 2}, scale_embedding=True),
    "t5": FAMILIES["t5"],
    "opt": FAMILIES["opt"],
    "mixtral": FAMILIES["mixtral"],
    "gpt_oss": gpt_oss,
}
IN_BLOCKS = (".h.", ".layers.", ".block.")
FLOAT = ("mlp.gate.weight", "router.weight", "relative_attention_bias", "_bias", "bias")


def is_coded(name: str, p: torch.Tensor) -> bool:
    return p.ndim >= 2 and any(part in name for part in IN_BLOCKS) and not any(part in name for part in FLOAT)


def inputs_dim(family: str) -> int:
    return {"gpt2": 0, "gpt_oss": 1}.get(family, -1)


def by_hand(weight, dim):
    """(codes, scales) of a weight whose inputs are along a dimension."""
    scale = (weight.abs().amax(dim, keepdim=True) / 127).bfloat16()
    scale[scale == 0] = 2.0**-126  # of an output without weights: the smallest number of bf16 with all its digits
    codes = (weight / scale.float()).round()
    assert codes.abs().max() <= 127
    return codes.to(torch.int8), scale


def in_bf16(model):
    """Its parameters; buffers, such as the frequencies of positions, stay as they are."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder with what two ranks, and one alone, found."""
    folder = tmp_path_factory.mktemp("int8")
    for name, make in MODELS.items():
        make().save_pretrained(folder / "models" / name, max_shard_size="20KB")
    large = {"n_layer": 1, "n_embd": 1024, "n_inner": 16384, "n_head": 4}
    FAMILIES["gpt2"](**large).bfloat16().save_pretrained(folder / "large/columns")
    FAMILIES["llama"](num_hidden_layers=1, hidden_size=1024, intermediate_size=16384).bfloat16().save_pretrained(folder / "large/rows")
    start_ranks(folder, 2, [("int8_peak", {"files": "large"}), ("int8", {"files": "models", "name": "two", "stages": [0, 3]})])
    start_ranks(folder, 1, [("int8", {"files": "models", "name": "one", "stages": [3]})])
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_a_teacher_in_int8_says_what_its_rounded_weights_say(found, family):
    model, plain = MODELS[family]().eval(), in_bf16(MODELS[family]().eval())
    coded = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_coded(name, p):
                codes, scale = by_hand(p, inputs_dim(family))
                p.copy_(codes * scale.float())
                coded += p.numel()
    assert coded > 0.5 * sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in IN_BLOCKS))
    teacher, unquantized = LanguageModel(in_bf16(model), states=True), LanguageModel(plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks
    for how, ranks in (("two-{}-0", 2), ("two-{}-3", 2), ("one-{}-3", 1)):
        for rank in range(ranks):
            said = load_file(found / f"{how.format(family)}-{rank}.safetensors")
            for j, (inputs, _) in enumerate(micro_batches(0, "bart" if model.config.is_encoder_decoder else "gpt2")):
                with torch.no_grad():
                    expected = teacher(inputs)
                    assert torch.equal(said[f"{j}-hidden"], expected.hidden), (how, j)
                    assert torch.equal(said[f"{j}-logits"], teacher.plain_head().logits(expected.hidden[inputs.is_target]))
                    for side in ("decoder", "encoder"):
                        for i, state in enumerate(getattr(expected, side).states):
                            assert torch.equal(said[f"{j}-{side}-{i}"], state)
                    assert not torch.equal(expected.hidden, unquantized(inputs).hidden)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", MODELS)
def test_a_rank_keeps_a_byte_of_each_weight_and_its_share_of_the_scales(found, family):
    shapes = {}
    for name, p in MODELS[family]().named_parameters():
        coded = is_coded(name, p)
        shapes[name] = ("torch.int8", p.numel(), 1) if coded else ("torch.bfloat16", p.numel(), 2)
        if coded:
            shapes[f"{name}_scale"] = ("torch.bfloat16", p.numel() // p.shape[inputs_dim(family)], 2)
    for how, ranks, parts in (("two-{}-0", 2, 1), ("two-{}-3", 2, 2), ("one-{}-3", 1, 1)):
        for rank in range(ranks):
            report = json.loads((found / f"{how.format(family)}-{rank}.json").read_text())
            assert report["kept"] == {name: [dtype, size * math.ceil(numel / parts)] for name, (dtype, numel, size) in shapes.items()}
            assert report["whole"] == report["dense"] == []


def test_no_more_of_it_is_whole_than_was_asked_for(found):
    """Two layers and the next one, or the words and a layer; in elements, codes and scales."""
    for family, block in (("gpt2", "transformer.h.0."), ("llama", "model.layers.0.")):
        numel = {}
        for name, p in MODELS[family]().named_parameters():
            numel[name] = p.numel() + (p.numel() // p.shape[inputs_dim(family)] if is_coded(name, p) else 0)
        layer = sum(count for name, count in numel.items() if name.startswith(block))
        live = json.loads((found / f"two-{family}-3-0.json").read_text())["live"]
        assert 0 < live <= max(3 * layer, max(numel.values()) + layer)


def test_loading_holds_partitions_and_blocks(found):
    """Its largest matrix, 16.8 million weights, takes 34 MB in bf16 and 67 in fp32."""
    for rank in (0, 1):
        for partitions, peak in json.loads((found / f"int8_peak-{rank}.json").read_text()).values():
            assert 18e6 < partitions < 32e6
            assert peak < partitions + 25e6


class SomeExperts(nn.Module):
    """The shape of transformers' experts."""

    def __init__(self, num_experts, inputs, outputs, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.empty(num_experts, *((inputs, outputs) if is_transposed else (outputs, inputs))))


@settings(max_examples=200)
@given(st.data())
def test_slices_of_codes_and_scales_are_those_of_the_whole(data):
    inputs, outputs, experts = (data.draw(st.integers(1, size)) for size in (9, 7, 4))
    kind = data.draw(st.sampled_from(["linear", "conv1d", "experts", "transposed"]))
    make = {
        "linear": lambda: nn.Linear(inputs, outputs, bias=False),
        "conv1d": lambda: Conv1D(outputs, inputs),
        "experts": lambda: SomeExperts(experts, inputs, outputs, False),
        "transposed": lambda: SomeExperts(experts, inputs, outputs, True),
    }[kind]
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList([make()])
    shape = model.layers[0].weight.shape
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight = torch.randn(shape, generator=draw) * 10.0 ** data.draw(st.integers(-12, 12)) * (torch.rand(shape, generator=draw) < 0.7)
    codes, scale = by_hand(weight, -2 if kind in ("conv1d", "transposed") else -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "BLOCK_ELEMENTS", data.draw(st.integers(1, 40)))
        readers = in_int8(model, readers_of({"layers.0.weight": weight}))
        assert model.layers[0].weight_scale.shape == scale.shape
        for _ in range(3):
            name, whole = data.draw(st.sampled_from([("layers.0.weight", codes), ("layers.0.weight_scale", scale)]))
            start = data.draw(st.integers(0, whole.numel() - 1))
            out = torch.full((data.draw(st.integers(1, whole.numel() - start)),), 77, dtype=whole.dtype)
            readers[name](start, out)
            assert torch.equal(out, whole.reshape(-1)[start : start + len(out)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Linear(3, 4, bias=False)])
    weight = torch.ones(4, 3)
    weight[2, 1] = value
    readers = in_int8(model, readers_of({"layers.0.weight": weight}))
    readers["layers.0.weight"](0, torch.empty(5, dtype=torch.int8))  # the rows before it
    with pytest.raises(ConfigError, match=r"layers.0.weight holds NaN or infinite values.*teacher.dtype to bf16"):
        readers["layers.0.weight"](5, torch.empty(7, dtype=torch.int8))


@pytest.mark.slow
def test_runs_with_a_teacher_in_int8_are_one_run_whole_or_in_partitions(world, make_run):
    logs = {}
    for dtype, stage in (("int8", 3), ("int8", 0), ("bf16", 3)):
        run = make_run(f"{dtype}-{stage}", teacher=f"{{path: {world / 'teacher'}, dtype: {dtype}}}", zero=f"{{student: 3, teacher: {stage}}}")
        code, output = run.train()
        assert code == 0, output
        logs[dtype, stage] = [{key: value for key, value in line.items() if key != "teacher_live_elements"} for line in run.log()]
    assert logs["int8", 3] == logs["int8", 0]
    assert logs["int8", 3] != logs["bf16", 3]
