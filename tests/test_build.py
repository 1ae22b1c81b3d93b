"""From a config to a student: which layers it has, which of the teacher's they are compared with, and what is refused before the first step."""

import json

import pytest
import torch
from conftest import config_text, flip
from families import ALONE, FAMILIES, whole_student

from dqtrain.artifact.description import LIST, write_list
from dqtrain.build import _check_models, student_model
from dqtrain.config import Distill, Hidden, load_config
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import Inputs, LanguageModel, Taught, inputs_of
from dqtrain.models.making import load_model

HIDDEN = "{task: 1.0, hidden: {weight: 1.0}, attention: {weight: 1.0}}"


def deep(family, layers=4, seed=0, **more):
    depth = {"gpt2": {"n_layer": layers}, "t5": {"num_layers": layers}}.get(family, {"num_hidden_layers": layers})
    depth |= {"word_embed_proj_dim": 32} if family == "opt" else {}
    model = FAMILIES[family](**({"encoder_layers": layers, "decoder_layers": layers} if "bart" in family else depth), **more)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3)  # norms other than 1, so that a norm too many or too few shows
    return model


@pytest.fixture
def make(tmp_path, world):
    """make(family, ...) -> (config, teacher's folder): a run whose teacher is of this family."""

    def make(family, student="{}", distill=HIDDEN, init_from=None, **blocks):
        deep(family).save_pretrained(tmp_path / family)
        if init_from is not None:
            init_from.save_pretrained(tmp_path / "start")
        is_pairs = family in ("bart", "mbart", "t5")
        how = "pairs: {source_tokens: 8, target_tokens: 8}" if is_pairs else "tokens_per_sample: 16"
        data = f"{{train: {world}/train.jsonl, tokenizer: {world}/tokenizer, {how}}}"
        text = config_text(
            world, tmp_path / "run", teacher=f"{{path: {tmp_path / family}}}", student=student, distill=distill, data=data, quant="null", eval="{}", **blocks
        )
        (tmp_path / "run.yaml").write_text(text)
        return load_config(tmp_path / "run.yaml"), tmp_path / family

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bart", "mbart", "t5"])
@pytest.mark.parametrize("kept", ["[0, 1, 2, 3]", "[0, 1]", "[0]"])
def test_a_student_that_is_the_beginning_of_its_teacher_has_no_distance(family, kept, make):
    """Embeddings, states and probabilities of the same layers are equal; where a norm would make them unequal, the map is refused."""
    config, folder = make(family, student=f"{{decoder_layers: {kept}}}")
    if kept != "[0, 1, 2, 3]" and family != "bart":
        with pytest.raises(ConfigError, match="has a norm behind its last layer"):
            student_model(config, 0, 0, ALONE)
        config, folder = make(family, student=f"{{decoder_layers: {kept}}}", distill="{task: 1.0, attention: {weight: 1.0}}")
    model, maps = whole_student(config)
    assert list(maps.decoder) == json.loads(kept)
    objective = Objective(LanguageModel(model, **needed_outputs(config.distill)), config.distill, maps)
    teacher = LanguageModel(load_model(folder), **needed_outputs(config.distill))
    ids = torch.arange(12).view(2, 6) % 97
    everything = torch.ones_like(ids, dtype=torch.bool)
    inputs = Inputs(ids, everything, ids.flip(1), everything) if model.config.is_encoder_decoder else Inputs(ids, everything)
    with torch.no_grad():
        parts = objective.eval()(inputs, ids, Taught(teacher(inputs), teacher.plain_head())).parts
    assert {"attention"} <= parts.keys()
    for name in parts.keys() - {"task"}:
        assert parts[name].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("kept", "expected"), [("[0, 3]", (0, 3)), ("[1, 3]", (1, 3)), ("2", (0, 3)), ("null", (0, 1, 2, 3))])
def test_layers_cut_from_a_start_of_the_teachers_depth_are_its_own(kept, expected, make, tmp_path):
    config, _ = make("gpt2", student=f"{{init_from: {tmp_path}/start, decoder_layers: {kept}}}", init_from=deep("gpt2", seed=1))
    assert student_model(config, 0, 0, ALONE).maps.decoder == expected


def test_a_shallower_start_is_spaced_over_the_teacher(make, tmp_path):
    config, _ = make("gpt2", student=f"{{init_from: {tmp_path}/start}}", init_from=deep("gpt2", 2, seed=1))
    assert student_model(config, 0, 0, ALONE).maps.decoder == (0, 3)


def test_a_deeper_start_is_refused_where_layers_are_compared(make, tmp_path):
    start = f"{{init_from: {tmp_path}/start}}"
    config, _ = make("gpt2", student=start, init_from=deep("gpt2", 5, seed=1))
    with pytest.raises(ConfigError, match="the student has 5 decoder layers, but .* has 4"):
        student_model(config, 0, 0, ALONE)
    config, _ = make("gpt2", student=start, distill="{logits: {weight: 1.0}}")
    assert len(student_model(config, 0, 0, ALONE).model.transformer.h) == 5


def test_a_head_that_no_term_trains_is_refused(make):
    quant = "{linears: {bits: 4, granularity: per_row}, embeddings: null, positions: null, activations: null}"
    config, _ = make("llama", distill="{hidden: {weight: 1.0}}")
    config = config.model_copy(update={"quant": load_quant(quant)})
    with pytest.raises(ConfigError, match="is not tied to its embeddings and is quantized, but no live term trains it"):
        student_model(config, 0, 0, ALONE)


def load_quant(text):
    import yaml

    from dqtrain.config import Quant

    return Quant.model_validate_json(json.dumps(yaml.safe_load(text)))


def test_inputs_of_a_batch_know_their_padding():
    from dqtrain.data.stream import Batch

    labels = torch.tensor([[5, 6, -100], [-100, 7, 8]]).numpy()
    inputs, found = inputs_of(Batch(labels.clip(0), labels, labels[:, 0]), torch.device("cpu"))
    assert inputs.is_real.tolist() == [[True, True, False], [True, True, True]] and (found.numpy() == labels).all()


def test_settings_name_the_terms():
    assert Distill(task=1.0, hidden=Hidden(weight=0.0)).teacher_terms == ()


@pytest.mark.parametrize(
    ("family", "changes", "terms", "message"),
    [
        ("gpt2", {"vocab_size": 98}, "{logits: {weight: 1.0}}", "vocab_size is 97 in teacher.path, but 98 in student.init_from; distill compares them"),
        ("gpt2", {"n_embd": 64}, "{hidden: {weight: 1.0}}", "hidden_size is 32 in teacher.path, but 64"),
        ("gpt2", {"n_head": 8}, "{attention: {weight: 1.0}}", "num_attention_heads is 2 in teacher.path, but 8"),
        ("bart", {"decoder_start_token_id": 5}, "{logits: {weight: 1.0}}", "decoder_start_token_id is 2 in teacher.path, but 5"),
    ],
)
def test_models_that_do_not_go_together_are_refused(family, changes, terms, message, make, tmp_path):
    config, _ = make(family, student=f"{{init_from: {tmp_path}/start}}", distill=terms, init_from=deep(family, **changes))
    with pytest.raises(ConfigError, match=message):
        _check_models(config, ALONE)
    if not {"vocab_size", "decoder_start_token_id"} & changes.keys():  # nothing compares them
        _check_models(make(family, student=f"{{init_from: {tmp_path}/start}}", distill="{logits: {weight: 1.0}}")[0], ALONE)


@pytest.mark.parametrize("place", ["teacher", "start"])
def test_a_model_that_is_an_artifact_is_held_against_its_list(place, make, tmp_path):
    other = deep("gpt2")
    config, folder = make("gpt2", student=f"{{init_from: {tmp_path}/start}}", init_from=other)
    folder = folder if place == "teacher" else tmp_path / "start"
    write_list(folder / LIST)
    _check_models(config, ALONE)
    flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{folder}/model\.safetensors: does not have the hash in files\.json"):
        _check_models(config, ALONE)
