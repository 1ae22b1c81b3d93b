"""`LanguageModel` says what transformers says, padding changes nothing, and a student is cut out of the layers that its map names."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from families import FAMILIES, IDS, cut_copy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BertModel, BloomConfig, Gemma2Config, Gemma2ForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dqtrain import tensor_file
from dqtrain.config import ActivationQuant, Data, Pairs, Quant, WeightQuant
from dqtrain.data.stream import Batch
from dqtrain.engine import materialise
from dqtrain.errors import ConfigError, DataError
from dqtrain.models.checks import check_confined, check_length, check_vocabulary
from dqtrain.models.language import HeadLinear, Inputs, LanguageModel, inputs_of
from dqtrain.models.layers import DQ_BART_MAPS, LayerMaps, all_layers, layer_map
from dqtrain.models.making import checked, cut, empty_model, load_model, meta_model, new_model, read_model_config
from dqtrain.models.weights import open_weights
from dqtrain.quant.modules import quantize_model
from dqtrain.tensor_file import MappedFiles

LENGTHS, SOURCE_LENGTHS = (12, 7), (10, 6)
KINDS = ["float", "per_token", "per_tensor"]


def sharpen(model):
    """Random small models attend to all alike, and their logits are near 0; then an error would not show."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
        for name, bias in model.named_buffers():
            if name == "final_logits_bias":  # BART's, zeros until it is loaded
                bias.copy_(torch.randn_like(bias))
    return model


def make(name, kind="float", **more):
    model = sharpen(FAMILIES[name](**more)).eval()
    return model if kind == "float" else quantized(model, kind)


def quantized(model, scale="per_token"):
    """4 bit weights, 8 bit activations, attention too."""
    weights = WeightQuant(bits=4, granularity="per_row")
    activations = ActivationQuant(bits=8, scale=scale, attention=True)
    quantize_model(model, Quant(linears=weights, embeddings=weights, positions=weights, activations=activations))
    return model


def inputs_for(model, longer=0):
    """Two samples, the second padded in source and target; `longer`: so many more padded positions."""
    draw = torch.Generator().manual_seed(0)

    def side(ids, lengths):
        ids = torch.cat([ids, torch.randint(97, (2, longer), generator=draw)], 1)
        return ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]

    ids, is_target = side(IDS, LENGTHS)
    return Inputs(ids, is_target, *(side(IDS.flip(1)[:, :10], SOURCE_LENGTHS) if model.config.is_encoder_decoder else ()))


def transformers_says(model, inputs, **wanted):
    """The whole model's own forward, as anybody would call it."""
    if inputs.source_ids is None:
        return model(input_ids=inputs.ids, attention_mask=inputs.is_target.long(), **wanted)
    source = {"input_ids": inputs.source_ids, "attention_mask": inputs.source_is_real.long()}
    return model(**source, decoder_input_ids=inputs.ids, decoder_attention_mask=inputs.is_target.long(), **wanted)


def assert_near(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def real_of(outputs, inputs):
    """Everything in Outputs at real positions: name -> tensor of the real positions, attention to real keys alone."""
    found = {"hidden": outputs.hidden[inputs.is_target]}
    sides = {"decoder": (outputs.decoder, inputs.is_target)} | ({} if inputs.source_ids is None else {"encoder": (outputs.encoder, inputs.source_is_real)})
    for side, (layers, is_real) in sides.items():
        for n, state in enumerate(layers.states):
            found[f"{side} state {n}"] = state[is_real]
        for kind, keys_are_real in (("attentions", is_real), ("cross", inputs.source_is_real)):
            for n, attention in enumerate(getattr(layers, kind)):
                pairs = (is_real[:, :, None] & keys_are_real[:, None, :])[:, None].expand_as(attention)
                assert attention.masked_fill(pairs, 0.0).transpose(1, 2)[is_real].abs().max() == 0  # real queries look at nothing else
                found[f"{side} {kind} {n}"] = attention[pairs]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_states_and_attention_are_those_of_transformers(name, kind):
    model = make(name, kind)
    inputs = inputs_for(model)
    own = copy.deepcopy(model)
    if kind == "float":
        own.set_attn_implementation("eager")
    said = transformers_says(own, inputs, output_hidden_states=True, output_attentions=True)
    expected = said.logits[inputs.is_target]
    assert_near(LanguageModel(copy.deepcopy(model)).logits(inputs), expected)
    ours = LanguageModel(model, states=True, attentions=True)
    assert_near(ours.logits(inputs), expected)
    found = ours(inputs)
    if inputs.source_ids is None:
        pairs = [(found.decoder.states, said.hidden_states), (found.decoder.attentions, said.attentions)]
        assert found.encoder == ((), (), ()) and found.decoder.cross == ()
    else:
        pairs = [(found.decoder.states, said.decoder_hidden_states), (found.encoder.states, said.encoder_hidden_states)]
        pairs += [(found.decoder.attentions, said.decoder_attentions), (found.encoder.attentions, said.encoder_attentions)]
        pairs += [(found.decoder.cross, said.cross_attentions)]
    layers = all_layers(model.config)
    counts = [len(layers.decoder) + 1, len(layers.encoder) + 1, len(layers.decoder), len(layers.encoder), len(layers.decoder)]
    for (ours, theirs), count in zip(pairs, counts if inputs.source_ids is not None else counts[::2], strict=False):
        assert len(ours) == len(theirs) == count
        for tensor, reference in zip(ours, theirs, strict=True):
            is_real = inputs.is_target if tensor.shape[-2] == inputs.ids.shape[1] else inputs.source_is_real
            tensor, reference = (x.transpose(1, 2) if x.ndim == 4 else x for x in (tensor, reference))
            assert_near(tensor[is_real], reference[is_real])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padded_positions_change_nothing(name, kind):
    model = LanguageModel(make(name, kind), states=True, attentions=True)
    expected, found = (real_of(model(inputs), inputs) for inputs in (inputs_for(model.model), inputs_for(model.model, longer=7)))
    assert expected.keys() == found.keys() and len(found) >= 4
    for key, tensor in expected.items():
        assert_near(found[key], tensor)
    assert_near(model.logits(inputs_for(model.model, longer=7)), model.logits(inputs_for(model.model)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
@pytest.mark.parametrize("kind", KINDS[:2])
@torch.no_grad()
def test_attention_is_that_before_dropout(name, kind):
    model = make(name, kind)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            for attribute in ("dropout", "attention_dropout", "attn_dropout"):
                if isinstance(getattr(module, attribute, None), nn.Dropout):
                    getattr(module, attribute).p = 0.4
                elif hasattr(module, attribute):
                    setattr(module, attribute, 0.4)
    ours = LanguageModel(model, states=True, attentions=True)
    inputs = inputs_for(model)
    steady, noisy = ours.eval()(inputs), ours.train()(inputs)
    assert not torch.allclose(steady.hidden, noisy.hidden, atol=1e-3)  # dropout is at work
    for side in (noisy.decoder, noisy.encoder):
        for attention in side.attentions + side.cross:
            assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.equal(steady.decoder.attentions[0], noisy.decoder.attentions[0])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_quantized_before_or_after_and_copies_say_the_same(name):
    model = make(name)
    before = LanguageModel(quantized(copy.deepcopy(model)), states=True, attentions=True)
    after = LanguageModel(model, states=True, attentions=True)
    quantized(after.model)
    again = LanguageModel(after.model, states=True, attentions=True)
    pickles = [pickle.dumps(module) for module in (before, after)]  # before transformers puts its hooks there, which cannot be pickled
    inputs = inputs_for(model)
    expected, logits = real_of(before(inputs), inputs), before.logits(inputs)
    assert not torch.allclose(logits, LanguageModel(make(name)).logits(inputs), rtol=1e-3)
    for other in (after, again, copy.deepcopy(before), copy.deepcopy(after), *map(pickle.loads, pickles)):
        found = real_of(other(inputs), inputs)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        assert torch.equal(other.logits(inputs), logits)
        assert isinstance(other.model.get_output_embeddings(), HeadLinear)
    twin = copy.deepcopy(before)
    for p in twin.parameters():
        p.zero_()
    assert torch.equal(before.logits(inputs), logits)  # nothing is shared with the copy


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_copies_of_a_float_model_say_the_same(name):
    model = LanguageModel(make(name))
    inputs = inputs_for(model.model)
    expected = model.logits(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.logits(inputs), expected)
    plain = model.plain_head().logits(model(inputs).hidden[inputs.is_target])
    assert torch.equal(plain, expected)
    assert {id(p) for p in model.head_parameters()} <= {id(p) for p in model.parameters()}


def test_bf16_states_come_in_fp32_and_near():
    model = FAMILIES["t5"]().eval()
    inputs = inputs_for(model)
    exact, near = (LanguageModel(model, precision, states=True, attentions=True)(inputs) for precision in ("fp32", "bf16"))
    for key, tensor in real_of(near, inputs).items():
        assert tensor.dtype == torch.float32
        assert_near(tensor, real_of(exact, inputs)[key], 0.05)
    assert not torch.equal(near.hidden, exact.hidden)


def test_inputs_of_a_batch():
    labels = np.array([[5, -100, 7, -100], [-100, -100, -100, -100]])
    ids = np.arange(8).reshape(2, 4)
    inputs, found = inputs_of(Batch(ids, labels, np.arange(2)), torch.device("cpu"))
    assert found.tolist() == labels.tolist() and inputs.ids.tolist() == ids.tolist() and inputs.source_ids is None
    assert inputs.is_target.tolist() == [[True, False, True, False], [False] * 4]
    assert inputs.is_real.tolist() == [[True, True, True, False], [False] * 4]  # a prompt before the last target is read
    real = np.array([[True, False], [True, True]])
    inputs, _ = inputs_of(Batch(ids, labels, np.arange(2), ids[:, :2], real), torch.device("cpu"))
    assert inputs.source_ids.tolist() == ids[:, :2].tolist() and inputs.source_is_real.tolist() == real.tolist()


# --- samples of several documents

CAUSAL = {name: {} for name in FAMILIES if name not in ("bart", "mbart", "t5")} | {"mistral": {"sliding_window": 4}}
DOCUMENTS = [[5, 7], [3, 1, 8]]


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_packed_sample_says_what_its_documents_say_alone(name, kind):
    model = make(name, kind, **CAUSAL[name])
    everything = torch.ones_like(IDS, dtype=torch.bool)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS])
    for attentions in (False, True):
        reads = LanguageModel(copy.deepcopy(model), attentions=attentions)
        packed = reads.logits(Inputs(IDS, everything, positions=positions)).unflatten(0, IDS.shape)
        across = reads.logits(Inputs(IDS, everything)).unflatten(0, IDS.shape)
        for row, lengths in enumerate(DOCUMENTS):
            stop = 0
            for length in lengths:
                start, stop = stop, stop + length
                alone = reads.logits(Inputs(IDS[row : row + 1, start:stop], everything[:1, :length]))
                assert_near(packed[row, start:stop], alone)
                assert start == 0 or (across[row, start:stop] - alone).abs().max() > 0.01 * alone.abs().max()


def test_models_that_can_be_confined_are_told_from_those_that_cannot():
    for name in CAUSAL:
        check_confined(FAMILIES[name]().config, name)
    bloom = BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)  # has no positions that start again
    with pytest.raises(ConfigError, match=r"data.attention is within, but the attention of BloomForCausalLM \(there\) cannot be confined to a document"):
        check_confined(bloom, "there")


# --- students cut from teachers

DEEP = {name: {"num_hidden_layers": 4} for name in ("opt", "llama", "qwen2", "mistral", "mixtral")} | {"gpt2": {"n_layer": 4}}
DEEP |= {name: {"encoder_layers": 3, "decoder_layers": 4} for name in ("bart", "mbart")} | {"t5": {"num_layers": 3, "num_decoder_layers": 4}}
MAPS = [LayerMaps((3,), (2,)), LayerMaps((0, 2), (0, 1, 2)), LayerMaps((1, 2, 3), (1, 2)), LayerMaps((0, 1, 2, 3), (0, 1, 2))]


def gemma2(**more):
    """Every other layer looks at a window."""
    torch.manual_seed(0)
    keys = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    keys |= {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "pad_token_id": 1}
    return Gemma2ForCausalLM(Gemma2Config(**keys, **more))


CUT = {**{name: lambda name=name: make(name, **DEEP[name]) for name in FAMILIES}, "gemma2": lambda: sharpen(gemma2()).eval()}


def sliced(model, maps):
    """The teacher itself, with layers taken out of its lists."""
    model = copy.deepcopy(model)
    sides = [model.get_decoder(), *([model.get_encoder()] if model.config.is_encoder_decoder else [])]
    for side, kept in zip(sides, maps, strict=False):
        key = next(key for key in ("layers", "h", "block") if hasattr(side, key))
        layers = getattr(side, key)
        setattr(side, key, nn.ModuleList([layers[layer] for layer in kept]))
        if key == "block":
            first, source = getattr(side, key)[0].layer[0].SelfAttention, layers[0].layer[0].SelfAttention
            first.relative_attention_bias, first.has_relative_attention_bias = source.relative_attention_bias, True
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in maps.decoder]
        model.config.num_hidden_layers = len(maps.decoder)
    return model


@pytest.mark.parametrize("maps", MAPS, ids=str)
@pytest.mark.parametrize("name", CUT)
@torch.no_grad()
def test_a_cut_model_is_the_named_layers(name, maps, tmp_path):
    teacher = CUT[name]()
    if not teacher.config.is_encoder_decoder:
        maps = LayerMaps(maps.decoder)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    reference, student = sliced(teacher, maps), cut_copy(teacher, maps)
    assert not student.training and type(student) is type(teacher)
    inputs = inputs_for(teacher)
    expected = real_of(LanguageModel(reference, states=True, attentions=True)(inputs), inputs)
    logits = LanguageModel(reference).logits(inputs)

    def check(model):
        assert [len(side) for side in all_layers(model.config)] == [len(side) for side in maps]
        ours = LanguageModel(model, states=True, attentions=True)
        found = real_of(ours(inputs), inputs)
        assert found.keys() == expected.keys()
        for key in expected:
            assert_near(found[key], expected[key], 1e-6)
        assert_near(ours.logits(inputs), logits, 1e-6)
        is_tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied

    student.save_pretrained(tmp_path)
    check(student)
    check(load_model(tmp_path))
    assert read_model_config(tmp_path).to_dict().get("layer_types") == student.config.to_dict().get("layer_types")
    assert {p.data_ptr() for p in student.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    for p in student.parameters():
        p.zero_()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all_layers(teacher.config) != all_layers(student.config) or maps == all_layers(teacher.config)


def test_t5_keeps_its_relative_bias_and_writes_with_a_cache():
    teacher = CUT["t5"]()
    student = cut_copy(teacher, LayerMaps((2, 3), (1, 2)))  # transformers writes with no cache where a T5 has less layers in the encoder
    for side in ("encoder", "decoder"):
        ours, theirs = (getattr(model, side).block[0].layer[0].SelfAttention.relative_attention_bias.weight for model in (student, teacher))
        assert torch.equal(ours, theirs)
    inputs = inputs_for(teacher)
    given = {"input_ids": inputs.source_ids, "attention_mask": inputs.source_is_real.long(), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(**given, use_cache=True), student.generate(**given, use_cache=False))


@pytest.mark.parametrize("kept", DQ_BART_MAPS)
def test_layers_kept_of_six_are_dq_barts(kept):
    # github.com/amazon-science/dq-bart, run_summarization_no_trainer.py: distill_mappings
    published = {1: {0: 5}, 2: {0: 0, 1: 5}, 3: {0: 0, 1: 2, 2: 5}, 4: {0: 0, 1: 2, 2: 3, 3: 5}, 5: {0: 0, 1: 1, 2: 3, 3: 4, 4: 5}}
    assert dict(enumerate(layer_map(kept, 6, ""))) == published[kept]
    assert layer_map(6, 6, "") == layer_map(None, 6, "") == (0, 1, 2, 3, 4, 5)


@given(st.data(), st.integers(1, 100))
def test_layers_are_spaced_as_far_as_they_go(data, num_layers):
    kept = data.draw(st.integers(1, num_layers))
    found = layer_map(kept, num_layers, "")
    assert len(found) == kept and found[-1] == num_layers - 1
    if kept > 1:
        gaps = np.diff(found)
        assert found[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert layer_map(found, num_layers, "") == found


@pytest.mark.parametrize("kept", [(3, 1), (0, 0), (2, 6), 7])
def test_layers_that_are_not_there_are_refused(kept):
    with pytest.raises(ConfigError, match=r"^student.encoder_layers is .*, but .* 6 layers|^student.encoder_layers is .* from 0 to 5"):
        layer_map(kept, 6, "student.encoder_layers")


@pytest.mark.parametrize("name, key, value", [("gpt2", "scale_attn_by_inverse_layer_idx", True), ("llama", "no_rope_layers", [1, 0])])
def test_layers_that_depend_on_their_number_are_not_cut(name, key, value):
    model = make(name)
    setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=f"has {key}, by which a layer depends on its number, so that it cannot be cut"):
        cut(model, LayerMaps((1,)))


def test_a_list_of_special_tokens_is_none_of_layers():
    model = make("llama")
    model.config.eos_token_id = [0, 1]  # as many as there are layers
    assert all_layers(cut(model, LayerMaps((1,)))[0].config).decoder == (0,)


# --- what is read, made and refused


def pairs(source=16, target=8):
    return Data(train="x", pairs=Pairs(source_tokens=source, target_tokens=target))


def test_samples_longer_than_the_positions_are_refused():
    bart, gpt2, t5 = (FAMILIES[name]().config for name in ("bart", "gpt2", "t5"))  # 32 positions; as many; relative ones
    check_length(bart, pairs(32, 32), "X")
    check_length(gpt2, pairs(24, 8), "X")
    check_length(gpt2, Data(train="x", tokens_per_sample=32), "X")
    check_length(t5, pairs(5000, 4000), "X")
    for config, data, message in [
        (bart, pairs(33, 8), r"^data.pairs.source_tokens is 33, but X has 32 positions"),
        (bart, pairs(8, 33), r"^data.pairs.target_tokens is 33, but X has 32"),
        (gpt2, pairs(25, 8), r"^data.pairs.source_tokens \+ target_tokens is 33, but X has 32"),
        (gpt2, Data(train="x", tokens_per_sample=33), r"^data.tokens_per_sample is 33, but X has 32"),
        (t5, Data(train="x", tokens_per_sample=8), r"^X has an encoder and a decoder, .* data.pairs is null"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_length(config, data, "X")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path):
    config = FAMILIES["gpt2"]().config
    check_vocabulary(config, 97, "X", tmp_path)
    with pytest.raises(DataError, match="98 entries, but X has 97 word embeddings"):
        check_vocabulary(config, 98, "X", tmp_path)


SMALL_BERT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def test_what_is_no_language_model_is_refused(tmp_path):
    def refused(message):
        for call in (read_model_config, load_model, empty_model):
            with pytest.raises(ConfigError, match=message):
                call(tmp_path)

    refused("no config.json there")
    (tmp_path / "config.json").write_text("{")
    refused("transformers cannot read it")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    refused("transformers cannot read it")
    BertModel(BertConfig(**SMALL_BERT)).save_pretrained(tmp_path)
    refused("holds BertModel, but a language model is needed, which for bert is BertLMHeadModel")
    FAMILIES["t5"]().encoder.save_pretrained(tmp_path)
    refused("holds T5.*, but a language model is needed, which for t5 is T5ForConditionalGeneration")


def test_a_directory_that_lacks_tensors_is_refused(tmp_path):
    make("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match=r"its files lack \d+ tensors, such as model.layers.1"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        load_model(tmp_path)


class HeadOfAnotherKind(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = Conv1D(config.vocab_size, config.n_embd)


class ScaledLogits(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        said = super().forward(*args, **kwargs)
        said.logits = said.logits * 1.01
        return said


def test_models_that_cannot_be_split_are_refused(tmp_path):
    config = make("gpt2").config
    with pytest.raises(ConfigError, match="^X: the head of HeadOfAnotherKind is no linear layer"):
        checked(HeadOfAnotherKind(copy.deepcopy(config)), "X")
    with pytest.raises(ConfigError, match="^X: ScaledLogits does more than apply its head"):
        checked(sharpen(ScaledLogits(copy.deepcopy(config))), "X")
    for is_decoder, message in ((False, "BertLMHeadModel looks at later tokens"), (True, "BertLMHeadModel does more than apply its head")):
        sharpen(BertLMHeadModel(BertConfig(**SMALL_BERT, is_decoder=is_decoder))).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=message):
            load_model(tmp_path)


def test_every_family_is_read_back(tmp_path):
    for name in FAMILIES:
        model = make(name)
        model.save_pretrained(tmp_path / name)
        loaded, empty = load_model(tmp_path / name), empty_model(tmp_path / name)
        assert not loaded.training and loaded.state_dict().keys() == empty.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_model_without_memory_becomes_the_one_in_the_files(name, tmp_path):
    model = make(name)
    model.generation_config.max_length = 7
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    meta = meta_model(tmp_path)
    assert all(p.is_meta for p in meta.parameters()) and not meta.training and type(meta) is type(model)
    buffers, expected = dict(meta.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == expected.keys()  # rotary frequencies and the like are not in the files
    assert all(torch.equal(buffers[key], value) for key, value in expected.items() if key not in model.state_dict())
    materialise(meta, open_weights(tmp_path, meta))
    assert meta.generation_config.max_length == 7
    assert meta.state_dict().keys() == model.state_dict().keys()
    assert [key for key, value in model.state_dict().items() if not torch.equal(meta.state_dict()[key], value)] == []
    assert len(list(meta.parameters())) == len(list(model.parameters()))  # tied ones are one
    assert_near(LanguageModel(meta).logits(inputs_for(meta)), LanguageModel(model).logits(inputs_for(model)), 0)


@given(st.data())
def test_a_slice_is_read_alone(folder_of_tensors, data):
    folder, tensors = folder_of_tensors
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].reshape(-1)
    start = data.draw(st.integers(0, flat.numel() - 1))
    out = torch.empty(data.draw(st.integers(1, flat.numel() - start)), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PART_BYTES", data.draw(st.sampled_from([1, 20, 50, 1000])))
        MappedFiles().fill(folder / "model.safetensors", name, start, out)
    assert torch.equal(out, flat[start : start + len(out)].double())


@pytest.fixture(scope="module")
def folder_of_tensors(tmp_path_factory):
    shapes = {"vector": (7,), "one": (1,), "matrix": (5, 6), "experts": (3, 4, 5), "column": (9, 1), "number": ()}
    tensors = {name: torch.randn(shape).to(dtype) for (name, shape), dtype in zip(shapes.items(), [torch.bfloat16, torch.float32] * 3, strict=False)}
    folder = tmp_path_factory.mktemp("tensors")
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def test_files_of_the_model_without_its_head_are_read_too(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    save_file({key.removeprefix("transformer."): value for key, value in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "model.safetensors")
    meta = meta_model(tmp_path)
    materialise(meta, open_weights(tmp_path, meta))
    assert all(torch.equal(meta.state_dict()[key], value) for key, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in {
        ("num_hidden_layers", 2): r"its files lack \d+ tensors, such as model.layers.1",
        ("intermediate_size", 40): r"gate_proj.weight has shape \(48, 32\), but config.json makes it \(40, 32\). Save the model again whole",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(config | dict([change])))
        with pytest.raises(ConfigError, match=message):
            open_weights(tmp_path, meta_model(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="its safetensors files cannot be read"):
        open_weights(tmp_path, meta_model(tmp_path))
    with pytest.raises(ConfigError, match="x.weight: the model has this tensor, but what it starts from does not"):
        materialise(nn.ModuleDict({"x": nn.Linear(2, 2, device="meta")}), {})


SMALL = {
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
    | {"decoder_attention_heads": 2, "max_position_embeddings": 32},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_new_model_with_one_special_token_trains_and_writes(name):
    model = new_model({"model_type": name, **SMALL[name]}, vocab_size=97, eos_token_id=5, seed=3)
    config = model.config
    assert config.vocab_size == 97 and config.bos_token_id == config.eos_token_id == 5
    if config.is_encoder_decoder:
        assert config.pad_token_id == config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 5
    same, other = (new_model({"model_type": name, **SMALL[name]}, vocab_size=97, eos_token_id=5, seed=seed) for seed in (3, 4))
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight, same.get_input_embeddings().weight) and not torch.equal(weight, other.get_input_embeddings().weight)

    ours = LanguageModel(model).train()
    inputs = inputs_for(model)
    if config.is_encoder_decoder:
        ids = torch.cat([torch.full((2, 1), 5), inputs.ids[:, :-1]], 1)
        inputs = inputs._replace(ids=ids)
    labels = IDS[inputs.is_target]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(ours.logits(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(97), rel=0.3) and losses[-1] < 0.8 * losses[0]

    source = (inputs.source_ids, inputs.source_is_real) if config.is_encoder_decoder else (inputs.ids, torch.ones_like(inputs.ids))
    ours.eval()
    written = model.generate(source[0], attention_mask=source[1].long(), pad_token_id=5, max_new_tokens=6, min_new_tokens=3, do_sample=False)
    assert written.shape[0] == 2 and written.shape[1] > 3


def test_architectures_that_make_no_model_are_refused():
    for architecture, message in [
        ({"model_type": "no_such_model"}, r"^student.architecture: .*no_such_model"),
        ({"model_type": "gpt2", "n_layers": 2}, r"^student.architecture.n_layers: GPT2Config has no such key"),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, r"^student.architecture: GPT2Config makes no language model of these values"),
        ({"model_type": "bert", **SMALL_BERT}, r"^student.architecture: BertLMHeadModel looks at later tokens"),
        ({"model_type": "vit"}, r"^student.architecture: "),
    ]:
        with pytest.raises(ConfigError, match=message):
            new_model(architecture, vocab_size=97, eos_token_id=0, seed=1)


def test_no_vocabulary_of_a_family_is_lost():
    model = AutoModelForCausalLM.from_config(FAMILIES["opt"]().config)
    assert LanguageModel(model).logits(inputs_for(model)).shape == (sum(LENGTHS), 97)
