"""Every shipped config loads; every mistake is one message that names file, line and key; no knob is dead."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dqtrain.config import PASSIVE, RunConfig, _parts_of, differences, dump_config, load_config, schema
from dqtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

SMALL = """\
run: {dir: runs/x, seed: 3}
teacher: {path: teacher}
data: {train: a.jsonl, tokens_per_sample: 32}
train:
  steps: 10
  global_batch: 8
  micro_batch: 4
  lr: 3e-5
quant: null
distill: {task: 1.0}
checkpoint: {every_steps: 5}
"""


@pytest.fixture
def small(tmp_path):
    def write(text=SMALL):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads_and_names_the_schema(path):
    assert isinstance(load_config(path), RunConfig)
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_schema_is_current():
    assert (ROOT / "configs/schema.json").read_text() == schema(), "write it again: python -c 'from dqtrain.config import schema; print(schema(), end=\"\")'"


def test_numbers_are_read_as_written(small):
    config = load_config(small(), ["train.weight_decay=1e-2", "train.steps=20"])
    assert (config.train.lr, config.train.weight_decay, config.train.steps) == (3e-5, 1e-2, 20)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 3e-5", "  lr: 3e-5\n  weight_dacay: 0.1", "x.yaml:9: train.weight_dacay: unknown key. Did you mean `weight_decay`?"),
        ("  lr: 3e-5", "  lr: 3e-5\n  lr: 4e-5", "x.yaml:9: train.lr: given twice"),
        ("steps: 10", "steps: true", "x.yaml:5: train.steps: is true, but input should be a valid integer."),
        ("steps: 10", "steps: 10.5", "x.yaml:5: train.steps: is 10.5"),
        ("steps: 10", "steps: 0", "x.yaml:5: train.steps: is 0, but input should be greater than or equal to 1."),
        ("steps: 10", "steps: 0x10", 'x.yaml:5: train.steps: is "0x10"'),
        ("  lr: 3e-5", "  lr: fast", 'x.yaml:8: train.lr: is "fast"'),
        ("  lr: 3e-5\n", "", "x.yaml:4: train.lr: missing"),
        ("micro_batch: 4", "micro_batch: 3", "train.micro_batch is 3, but it must divide train.global_batch, 8; set it to 2"),
        ("{task: 1.0}", "{task: 0.0}", "distill has no term with a weight above 0"),
        ("teacher: {path: teacher}", "teacher: null", "nothing says what the student is"),
        (
            "quant: null",
            "quant: {linears: {bits: 5, granularity: per_row}, embeddings: null, positions: null, activations: null}",
            "x.yaml:9: quant.linears.bits: is 5, but input should be 1, 2, 3, 4, 8 or 'ternary'.",
        ),
        ("run: {", "run: {dir: a}}", "x.yaml:1: not valid YAML"),
        ("{task: 1.0}", "{logits: {divergence: mse, temperature: 2.0}}", "temperature is 2.0, but mse compares raw logits"),
        ("{task: 1.0}", "{logits: {beta: 0.5}}", "beta is 0.5, but cross_entropy has none"),
        ("{task: 1.0}", "{logits: {divergence: jensen_shannon, beta: 1.0}}", "where jensen_shannon is 0 for any student"),
        ("{task: 1.0}", "{logits: {tokens: tsld}, padding_counts: true}", "distill.padding_counts counts what has no label"),
        ("{task: 1.0}", "{contrast: {negatives_from: random, bank: position}}", "draws words from the bank, but bank is position"),
        ("quant: null", "quant: null\nzero: {offload_optimizer: nvme}", "set zero.nvme to a folder on a local disk"),
        ("quant: null", "quant: null\nzero: {nvme: /scratch}", "zero.nvme is set, but nothing goes there"),
        ("quant: null", "quant: null\nzero: {student: 2, offload_optimizer: nvme, nvme: /scratch}", "offload_optimizer: nvme is for partitioned weights, but"),
    ],
)
def test_mistake_names_line_and_remedy(small, old, new, message):
    assert old in SMALL
    with pytest.raises(ConfigError) as error:
        load_config(small(SMALL.replace(old, new, 1)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "source, distill, message",
    [
        ("hidden", "{hidden: {}}", "distill.hidden needs more than teacher.source hidden stores"),
        ("hidden", "{contrast: {layer: 0}}", "distill.contrast.layer needs more than teacher.source hidden stores"),
        ("hidden", "{logits: {}, padding_counts: true}", "distill.padding_counts needs more than"),
        ("sampled", "{logits: {temperature: 4.0}}", "teacher.source sampled knows some ids alone"),
        ("top_k", "{logits: {divergence: forward_kl}}", "teacher.source top_k knows some ids alone"),
        ("sampled", "{logits: {tokens: entropy}}", "teacher.source sampled knows some ids alone"),
    ],
)
def test_a_term_that_a_store_does_not_know_is_named(small, source, distill, message):
    text = SMALL.replace("path: teacher", f"path: teacher, source: {source}").replace("{task: 1.0}", distill)
    with pytest.raises(ConfigError) as error:
        load_config(small(text))
    assert message in str(error.value)


@pytest.mark.parametrize("layers", ["0", "[]", "[1, 0]", "[0, 0]", "[-1, 2]"])
def test_layers_that_cannot_be_kept_take_one_line(small, layers):
    with pytest.raises(ConfigError) as error:
        load_config(small(), [f"student.decoder_layers={layers}"])
    assert "must be a number from 1, or ascending layers from 0" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "generation, message",
    [
        ("{max_new_tokens: 4, validation_samples: 2}", "data.validation is null"),
        ("{max_new_tokens: 4}", "eval.generation has nothing to write for"),
        ("{max_new_tokens: 4, min_new_tokens: 5}", "min_new_tokens is 5, more than max_new_tokens, 4"),
    ],
)
def test_text_that_nobody_would_write_is_refused(small, generation, message):
    pairs = ["data.pairs={source_tokens: 8, target_tokens: 8}", "data.tokens_per_sample=null", f"eval.generation={generation}"]
    with pytest.raises(ConfigError) as error:
        load_config(small(), pairs)
    assert message in str(error.value)


def test_override_mistake_names_the_command_line(small):
    with pytest.raises(ConfigError, match=r"command line: train\.stps: unknown key\. Did you mean `steps`\?"):
        load_config(small(), ["train.stps=3"])
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(small(), ["train.steps"])


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"run: missing"):
        load_config(tmp_path / "empty.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list"):
        load_config(tmp_path / "list.yaml")


@given(
    st.floats(1e-12, 1e3, allow_nan=False),
    st.integers(1, 2**40),
    st.floats(0, 10),
    st.sampled_from(["linear", "cosine", "constant"]),
    st.text("abc/._- é", min_size=1),
)
def test_resolved_config_reads_back_equal(lr, steps, decay, shape, name):
    tree = yaml.safe_load(SMALL)
    tree["train"] |= {"lr": lr, "steps": steps, "weight_decay": decay, "decay": shape}
    tree["data"]["train"] = name
    import json

    config = RunConfig.model_validate_json(json.dumps(tree))
    again = RunConfig.model_validate_json(json.dumps(yaml.safe_load(dump_config(config))))
    assert again == config


def test_differences_are_leaves(small):
    path = small()
    a, b = load_config(path), load_config(path, ["train.steps=11", "data.train=[b.txt]", "log.every_steps=3"])
    changed = differences(a, b)
    assert changed == {"train.steps": (10, 11), "data.train": ("a.jsonl", ["b.txt"]), "log.every_steps": (10, 3)}
    assert changed.keys() - PASSIVE == {"train.steps", "data.train"}


def _leaves(model, prefix=""):
    for name, field in model.model_fields.items():
        inner = [a for a in _parts_of(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:
            yield from _leaves(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_no_knob_is_dead_and_every_knob_is_documented():
    read = set()  # (what it is read from, field): `config.train.lr` and `train.lr` give ("train", "lr")
    for path in [*(ROOT / "dqtrain").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        if path.name != "config.py":
            attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            read |= {(node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", ""), node.attr) for node in attributes}

    blocks = [node for node in ast.parse((ROOT / "dqtrain/config.py").read_text()).body if isinstance(node, ast.ClassDef)]
    for block in blocks:
        for method in block.body:
            if isinstance(method, ast.FunctionDef) and (block.name.lower(), method.name) in read:  # a property that is read reads others
                read |= {(block.name.lower(), node.attr) for node in ast.walk(method) if isinstance(node, ast.Attribute)}

    def is_read(leaf):
        block, _, field = leaf.rpartition(".")
        owner = "source" if block in ("data.train", "data.validation", "data.test") else block.rpartition(".")[2]
        handed_on = dict.fromkeys(
            ("linears", "embeddings", "positions", "weights", "contrast", "distill", "logits", "hidden", "teacher", "generation", "pairs"), ("settings",)
        )
        handed_on |= {"mixture": ("stage",), "quant": ("config",), "activations": ("inputs", "settings"), "overrides": ("override",), "export": ("asked",)}
        return any((name, field) in read for name in (owner, *handed_on.get(owner, ())))

    assert [leaf for leaf in _leaves(RunConfig) if not is_read(leaf)] == []
    assert not is_read("train.nonsense") and not is_read("run.dir_") and not is_read("log.steps")

    def undocumented(model):
        for name, field in model.model_fields.items():
            inner = [a for a in _parts_of(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
            is_block = inner and inner[0].__name__ != "Source"  # the fields that hold sources say what for
            yield from undocumented(inner[0]) if inner else []
            yield from [] if is_block or field.description else [name]

    assert list(undocumented(RunConfig)) == []


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ("a.txt", [("a.txt", None)]),
        ("{path: a.jsonl, weight: 2}", [("a.jsonl", 2.0)]),
        ("[a.txt, {path: b.jsonl}]", [("a.txt", None), ("b.jsonl", None)]),
        ("[{path: a, weight: 0.5}, {path: b, weight: 0}]", [("a", 0.5), ("b", 0.0)]),
    ],
)
def test_a_source_is_a_path_or_a_block_or_there_is_a_list(small, train, found):
    path = small(re.sub("(?m)^data:.*$", f"data: {{train: {train}, tokens_per_sample: 8}}", SMALL))
    config = load_config(path)
    assert [(source.path, source.weight) for source in config.data.sources("train")] == found
    assert config.data.sources("validation") == ()
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[{path: a, wieght: 1}]", "data.train.0.wieght: unknown key. Did you mean `weight`?"),
        ("{pth: a}", "data.train.path: missing"),
        ("3", "data.train: is 3, but"),
        ("[a, {path: b, weight: 1}]", "of the sources of train, number 1 has no weight, but another one has"),
        ("[{path: b, weight: 0}]", "the sources of train have no weight above 0"),
        ("{path: b, weight: -1}", "data.train.weight: is -1"),
        ('{path: b, text: "{a"}', "data.train: text is `{a`, but"),
        ('{path: b, text: "{a!r}"}', "must hold names of fields in braces"),
        ('{path: b, text: "no field"}', "must hold names of fields in braces"),
        ('{path: b, text: "{a}", messages: m}', "text and messages are both set"),
        ("{path: b, subset: a}", "subset is for Hugging Face data sets"),
    ],
)
def test_a_mistake_in_a_source_is_told_once_and_named(small, train, message):
    path = small(re.sub("(?m)^data:.*$", f"data: {{train: {train}, tokens_per_sample: 8}}", SMALL))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == (2 if "pth" in train else 1)


def test_passive_fields_exist():
    assert {*_leaves(RunConfig), "eval.generation", "data.mixture"} >= PASSIVE  # a block that may be null is a leaf then, and so is a list
