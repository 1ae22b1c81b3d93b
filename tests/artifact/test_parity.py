"""That the proof refuses what is not what was trained, and measures by the right thing."""

import contextlib
import json
import math

import gguf
import numpy as np
import onnx
import pytest
import torch
from conftest import edit_description
from families import FAMILIES
from test_gguf import QUANT, packed_artifact, student, to_gguf  # noqa: F401
from test_onnx import to_onnx, with_tokenizer
from test_packed import settings
from test_streaming import logits_of, write

from dqtrain.artifact import format, parity
from dqtrain.artifact.compressed.load import TransformersRunner
from dqtrain.artifact.description import PARITY, _in_equal_width, is_sound, sealed, with_parity, write_list
from dqtrain.artifact.graphs.graph import WEIGHTS
from dqtrain.artifact.load import load_artifact
from dqtrain.artifact.onnx.runtime import OnnxRunner
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.errors import CheckpointError
from dqtrain.models.language import LanguageModel, inputs_of
from dqtrain.quant.modules import QuantizedInput


def another_epsilon(folder):
    """The weights are those of training, but the graph computes something else of them."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 0.1
    onnx.save(model, folder / "model.onnx")
    write_list(folder / "onnx.json")


def a_tensor_too_many(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + bytes(64))
    write_list(folder / "onnx.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_epsilon, r"ONNX Runtime computes other logits of these weights \(relative_logit_difference .* more than 1e-05\)"),
        (a_tensor_too_many, r"its tensors take (\d+) bytes, but \d+ were foretold"),
    ],
)
def test_verify_notices_another_computation_and_another_size(spoil, message, world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=message):
        to_onnx(made, tmp_path / "onnx", spoil=spoil)


@pytest.mark.parametrize("place", ["with_float_activations", "as_shipped"])
def test_verify_notices_a_program_that_forgets_token_by_token(place, world, tmp_path, monkeypatch):
    """In one pass it computes what was trained; one by one it has lost what it read before."""

    class Forgets(OnnxRunner):
        def logits(self, ids, source=None, one_by_one=False):
            return torch.cat([super(Forgets, self).logits([token], source) for token in ids]) if one_by_one else super().logits(ids, source)

    @contextlib.contextmanager
    def forgetting(self, folder, longest):
        yield Forgets(folder, accuracy_level=0 if place == "with_float_activations" else None)

    monkeypatch.setattr(OnnxTarget, place, forgetting)
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    with pytest.raises(
        CheckpointError, match=r"computes other logits of these weights \(one_by_one" if place[0] == "w" else r"\(relative_l2_one_by_one\), more than 2 times"
    ):
        to_onnx(made, tmp_path / "onnx")


def test_activations_that_move_logits_too_far_are_refused_or_figures(world, tmp_path, monkeypatch):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    monkeypatch.setattr(parity, "TIMES_OWN_NOISE", 1e-3)
    with pytest.raises(CheckpointError, match=r"own 8-bit activations move the logits by .* \(relative_l2\), more than 0.001 times .* --allow-inexact"):
        to_onnx(made, tmp_path / "onnx")
    shipped = to_onnx(made, tmp_path / "onnx", allow_inexact=True)["as_shipped"]
    assert shipped["relative_l2"] > 1e-3 * shipped["own_8_bit_noise"] > 0


def test_verify_notices_a_tokenizer_that_the_file_does_not_have(student, tmp_path):  # noqa: F811
    def without_merges(path):
        file = tmp_path / "packed/tokenizer.json"
        told = json.loads(file.read_text())
        told["model"]["merges"] = told["model"]["merges"][:-20]
        file.write_text(json.dumps(told))

    made = packed_artifact(student("qwen2"), QUANT, tmp_path / "packed", steps=0)
    with pytest.raises(CheckpointError, match="llama.cpp makes other tokens than the tokenizer of"):
        to_gguf(made, tmp_path, spoil=without_merges)


def test_a_logit_that_is_no_number_is_the_largest_difference():
    sound, broken = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    for found in ([broken, sound], [sound, broken]):
        assert not parity._largest(found, [sound, sound]) <= 1e-5


def another_scale(path):
    """Of the first block of a weight, by 2 %."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.tensor_type.name == "Q4_0")
    tensor.data[:1, :2].view(np.float16)[:] *= 1.02


def test_no_more_than_the_rounding_of_scales_is_allowed(student, tmp_path):  # noqa: F811
    made = packed_artifact(student("gpt2"), settings(4, 4, 8, scale_dtype="fp32"), tmp_path / "packed", steps=0)
    to_gguf(made, tmp_path, allow_inexact=True)
    with pytest.raises(CheckpointError, match=r"is not what was trained \(largest difference \d\.\de-0[23]"):
        to_gguf(made, tmp_path, allow_inexact=True, spoil=another_scale)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_noise_that_is_allowed_is_that_of_8_bits_per_token(bits, tmp_path):
    """Whatever activations a student has, a program's are measured by those that the same weights have with 8 bits."""
    quant = settings()
    assert quant.activations is not None
    write(tmp_path / "eight", quant.model_copy(update={"activations": quant.activations.model_copy(update={"asymmetric": "nowhere"})}))
    write(tmp_path / "other", settings(activations=bits))
    found = parity._with_8_bit_inputs(load_artifact, tmp_path / "other", format.read_description(tmp_path / "other"))
    with torch.no_grad():
        assert torch.equal(logits_of(found), logits_of(load_artifact(tmp_path / "eight")))


def test_figures_of_a_packed_artifact(student, tmp_path):  # noqa: F811
    """Its own perplexity is the student's, which is what torch makes of the texts; its codes on integer kernels are near."""
    model, folder, held_out = packed_artifact(student("gpt2"), QUANT, tmp_path / "packed")
    found = parity.verify_packed(model, folder, held_out)
    shipped = found["as_shipped"]
    assert found["relative_logit_difference"] == shipped["relative_l2_to_trained"] == shipped["kl_nats"] == 0.0 < shipped["own_noise"] < 0.1
    assert shipped["held_out_text"] and shipped["target_tokens"] >= parity.NUM_TOKENS and shipped["top1_agreement"] == 1.0
    assert found["float_activations"]["one_by_one"] <= 1e-5 and shipped["relative_l2_one_by_one"] <= 2 * shipped["own_noise"]
    nats, count, number = 0.0, 0, 0
    while count < shipped["target_tokens"]:
        inputs, labels = inputs_of(held_out.batch([number]), torch.device("cpu"))
        with torch.no_grad():
            said = LanguageModel(model).logits(inputs)
        nats += torch.nn.functional.cross_entropy(said, labels[inputs.is_target], reduction="sum").item()
        count, number = count + len(said), number + 1
    assert shipped["perplexity"] == shipped["perplexity_trained"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert 0 < found["fast"]["relative_l2_to_trained"] < 0.1 and found["fast"]["top1_agreement"] > 0.9
    assert found["fast"]["perplexity"] == pytest.approx(shipped["perplexity"], rel=0.05)


def forgets(patch, folder):
    """Each token is the first one."""

    class Forgets(TransformersRunner):
        def logits(self, ids, source=None, one_by_one=False):
            return torch.cat([super(Forgets, self).logits([token], source) for token in ids]) if one_by_one else super().logits(ids, source)

    patch.setattr(parity, "TransformersRunner", Forgets)


def louder(patch, folder):
    """The same with and without the cache, in mode exact."""

    class Louder(TransformersRunner):
        def logits(self, ids, source=None, one_by_one=False):
            is_exact = any(isinstance(module, QuantizedInput) for module in self.model.modules())
            return super().logits(ids, source, one_by_one) * (1.5 if is_exact else 1)

    patch.setattr(parity, "TransformersRunner", Louder)


def longer(patch, folder):
    edit_description(folder, lambda content: content.update(more="than there is"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forgets, "in mode dense it says something else of held-out text"),
        (louder, "in mode exact it says something else of held-out text"),
        (longer, r"its files take \d+ bytes, but \d+ were foretold"),
    ],
)
def test_verify_packed_notices(spoil, message, world, tmp_path, monkeypatch):
    made = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")
    parity.verify_packed(*made)
    spoil(monkeypatch, made[1])
    with pytest.raises(CheckpointError, match=message):
        parity.verify_packed(*made)


def test_a_student_that_learned_nothing_has_a_perplexity(world, tmp_path):
    model = with_tokenizer(world, FAMILIES["gpt2"](), QUANT, tmp_path / "packed")[0]
    sample = parity._samples(None, model.config)[0]
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3e4)
        assert parity._perplexity([sample.of(LanguageModel(model.eval()))], [sample]) == math.exp(700)


def test_grids_that_no_kernel_has_are_not_measured_in_mode_fast(world, tmp_path):
    made = with_tokenizer(world, FAMILIES["gpt2"](), settings(scale_dtype="fp32"), tmp_path / "packed")
    assert "its scales are fp32" in parity.verify_packed(*made)["fast"]["not_measured"]


def test_figures_change_no_size_of_the_description():
    before = sealed([f'"parity": {_in_equal_width(dict.fromkeys(PARITY))}', '"coverage": [\n [1],\n [2]\n]'])
    figures = dict(zip(PARITY, (9999, 1e-300, 0.0, 1.0, 3e-9, 5e10, 1.23456), strict=True))
    after = with_parity(before, figures)
    assert len(before) == len(after) and is_sound(after) and json.loads(after)["parity"] == pytest.approx(figures, rel=1e-3)
    assert with_parity(after, dict.fromkeys(PARITY)) == before
