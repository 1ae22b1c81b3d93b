"""Every recipe, with every override that its header or docs/recipes.md names, loads and gives a student that learns; every value says where it comes from."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, cut_copy, whole_student

from dqtrain.arguments import parse
from dqtrain.config import PASSIVE, check_ranks, load_config
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.engine import _parameter_groups
from dqtrain.models.language import Inputs, LanguageModel, Taught
from dqtrain.models.layers import LayerMaps, all_layers, layer_map
from dqtrain.models.making import load_model
from dqtrain.quant.modules import quantize_model
from launch.site import load_site
from launch.sweep import load_sweep, points

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for pattern in ("quantgpt-*", "quantbart-*", "dq-bart-*") for path in (ROOT / "configs").glob(f"{pattern}.yaml"))
OVERRIDES = r"[a-z_.]+=\S+(?: [a-z_.]+=\S+)*"
SOURCE = re.compile(r"\b(QuantGPT|DQ-BART|TBT|TernaryBERT|BART-base's own|Hugging Face's|mbart-large-en-ro's own|on the hub|docs/recipes\.md|ours|yours)\b")


def header(path):
    """What the comments above the first key say: name of a variant -> its overrides."""
    lines = path.read_text().split("\nrun:")[0].splitlines()
    return {match[1]: match[2].split(" ") for line in lines if (match := re.fullmatch(rf"#   (\S+): ({OVERRIDES})", line))}


def tables():
    """The rows of docs/recipes.md that have overrides: (config, first cell, overrides)."""
    config = None
    for line in (ROOT / "docs/recipes.md").read_text().splitlines():
        if match := re.match(r"On top of `(configs/[\w-]+\.yaml)`", line):
            config = ROOT / match[1]
        elif config and line.startswith("| ") and (fields := re.search(rf"\| `({OVERRIDES})` \|", line)):
            yield config, line.split("|")[1].strip(), fields[1].split(" ")


CASES = [(path, "as it is", []) for path in RECIPES]
CASES += [(path, name, overrides) for path in RECIPES for name, overrides in header(path).items()]
CASES += list(tables())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Small models of each recipe's family, the encoder-decoders with as many layers as its teacher has; groups of 128 divide the width of GPT-2."""
    root, bart = tmp_path_factory.mktemp("teachers"), {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    FAMILIES["gpt2"](n_embd=128).save_pretrained(root / "gpt2")
    FAMILIES["bart"](**bart, encoder_layers=6, decoder_layers=6).save_pretrained(root / "bart")
    FAMILIES["mbart"](**bart, encoder_layers=12, decoder_layers=12).save_pretrained(root / "mbart")
    return {"quantgpt": root / "gpt2", "quantbart": root / "bart", "dq": root / "bart", "dq-bart-wmt16-en-ro": root / "mbart"}


def teacher_of(path, teachers):
    return teachers.get(path.stem, teachers[path.stem.split("-")[0]])


def of_task(path, overrides, teachers):
    """The config of a case, with a small teacher in place of the placeholder."""
    return load_config(path, [f"teacher.path={teacher_of(path, teachers)}", "data.train=mine.jsonl", *overrides])


def test_there_is_a_recipe_for_every_task_and_a_line_for_every_variant():
    assert [path.stem for path in RECIPES] == sorted(
        "quantgpt-wikitext2 quantgpt-ptb quantgpt-wikitext103 quantgpt-personachat quantbart-xsum".split()
        + "dq-bart-xsum dq-bart-cnndm dq-bart-eli5 dq-bart-wmt16-en-ro".split()
    )
    for path in RECIPES:
        expected = {"8-8-8", "4-4-8"}
        if path.stem.startswith("dq-bart"):
            expected = {"8-8-8", "6-3", "6-1", "3-1", "1-1", "weighted", "one-GPU", "quirk-1", "quirk-2", "quirk-3", "quirk-4"}
        assert header(path).keys() >= expected, path.name
        assert f"configs/{path.name} " in path.read_text()  # the command at the top
        assert f"`{path.name}`" in (ROOT / "docs/recipes.md").read_text()
    assert len(list(tables())) >= 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(path):
    lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if not line.startswith("#")]
    unsaid = []
    for number, line in lines:
        key, value, comment = re.fullmatch(r" *([a-z_]+):(?: (.*?))??(?:  # (.*))?", line).groups()
        if value is not None and not (comment and SOURCE.search(comment)):
            unsaid.append(f"{path.name}:{number}: {key}")
        assert value is not None or comment is None
    assert unsaid == []
    assert max(len(line) for line in path.read_text().splitlines()) <= 160


def test_every_variant_is_another_config():
    for path, name, overrides in CASES:
        assert (load_config(path, overrides) == load_config(path)) == (not overrides), (path.name, name)


def test_steps_are_epochs_of_the_published_sizes():
    """By the formulas of the comments, from sizes and epochs written here a second time."""
    for task, epochs, tokens in (("wikitext2", 80, 2.4e6), ("ptb", 120, 1.1e6), ("wikitext103", 8, 118e6)):
        assert load_config(ROOT / f"configs/quantgpt-{task}.yaml").train.steps == pytest.approx(epochs * tokens / (512 * 32), rel=1e-3)
    assert load_config(ROOT / "configs/quantgpt-personachat.yaml").train.steps == round(3 * 131_438 / 16)
    assert load_config(ROOT / "configs/quantbart-xsum.yaml").train.steps == round(8 * 204_045 / 128)
    for task, pairs in (("xsum", 204_045), ("cnndm", 287_113), ("eli5", 272_634), ("wmt16-en-ro", 610_320)):
        path = ROOT / f"configs/dq-bart-{task}.yaml"
        for gpus, overrides in ((8, []), (1, header(path)["one-GPU"])):
            config = load_config(path, overrides)
            batches = -(-pairs // (8 * gpus))  # as the published script: batches of each GPU, then steps of two of them
            epoch = -(-batches // 2)
            assert (config.train.global_batch, config.train.steps) == (8 * 2 * gpus, 20 * epoch)
            assert config.train.warmup_steps == int(0.05 * 20 * epoch)
            assert (config.eval.every_steps, config.checkpoint.every_steps) == (epoch, epoch)


def test_student_of_every_variant_can_be_built_and_its_groups_have_the_stated_rates(teachers):
    built, models = set(), {folder: load_model(folder) for folder in set(teachers.values())}
    for path, name, overrides in CASES:
        config = of_task(path, overrides, teachers)
        assert config.quant is not None
        told = (teacher_of(path, teachers), config.quant, config.student, config.train.lr, config.train.scale_lr)
        if told in built:
            continue
        built.add(told)
        # As build.student_model does, but for reading each teacher from disk again and again.
        teacher = models[teacher_of(path, teachers)]
        everything, kept = all_layers(teacher.config), (config.student.decoder_layers, config.student.encoder_layers)
        maps = LayerMaps(*(layer_map(number, len(layers), "student") for number, layers in zip(kept, everything, strict=True)))
        student = cut_copy(teacher, maps) if maps != everything else copy.deepcopy(teacher)
        coverage = quantize_model(student, config.quant)
        assert {row.kind for row in coverage.rows} == {"linears", "embeddings", "positions"}
        for row in coverage.rows:
            wanted, found = getattr(config.quant, row.kind), row.quantizer
            assert (found is None) == (wanted is None), (path.name, name, row.name)
            assert found is None or (found.grid, found.bits, found.granularity) == (wanted.grid, wanted.bits, wanted.granularity), (path.name, name, row.name)
        if depths := re.fullmatch(r"(\d+)-(\d+)", name):
            assert (len(maps.encoder), len(maps.decoder)) == (int(depths[1]), int(depths[2])), path.name
        rates = {group["name"]: group["lr"] for group in _parameter_groups(student, config.train)}
        learning = {row.quantizer.grid for row in coverage.rows if row.quantizer and row.learned_names}
        expected = {"weights": config.train.lr, "vectors": config.train.lr}
        expected |= {"scales": 1e-3} if learning & {"dynamic", "affine"} else {}  # gammas, and zero points
        expected |= {"clips": config.train.lr} if learning - {"dynamic"} else {}  # clips and steps are in the unit of the weights
        assert rates == expected, (path.name, name)


def test_rates_are_those_of_the_papers():
    rates = {path.stem: (config.train.lr, config.train.scale_lr) for path in RECIPES for config in [load_config(path)]}
    for name, found in rates.items():
        assert found == ((3e-5, None) if name.startswith("dq-bart") else (2e-4 if "bart" in name else 5e-4, 1e-3)), name


IDS = torch.arange(40).reshape(4, 10) * 7 % 95 + 2
LABELS = IDS.roll(-1, 1)
LABELS[:, -1], LABELS[0, 6:] = -100, -100
SOURCES = torch.arange(48).reshape(4, 12) * 5 % 95 + 2
REAL = torch.arange(12) < torch.tensor([[12], [9], [12], [5]])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_term_of_a_recipe_is_finite_and_reaches_the_weights(path, teachers):
    torch.manual_seed(0)
    config = of_task(path, ["student.encoder_layers=3", "student.decoder_layers=1"] if path.stem.startswith("dq-bart") else [], teachers)
    wanted = needed_outputs(config.distill)
    student, maps = whole_student(config)
    float_config = config.model_copy(update={"quant": None, "student": type(config.student)()})
    teacher = LanguageModel(whole_student(float_config)[0], **wanted)
    objective = Objective(LanguageModel(student, **wanted), config.distill, maps, 12)
    inputs = Inputs(IDS, LABELS != -100, *((SOURCES, REAL) if config.data.pairs and "bart" in path.stem else ()))
    with torch.no_grad():
        taught = Taught(teacher(inputs), teacher.plain_head())
    loss = objective(inputs, LABELS, taught)
    loss.total.backward()
    assert loss.parts.keys() == set(config.distill.teacher_terms) | ({"task"} if config.distill.task else set())
    assert all(torch.isfinite(part) and part > 0 for part in loss.parts.values())
    still = [name for name, p in student.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert still == []


def test_published_quirks_are_off():
    for path in RECIPES:
        if path.stem.startswith("dq-bart"):
            config = load_config(path)
            assert config.quant and config.distill.hidden and config.eval.generation
            assert not (config.quant.float_head or config.distill.hidden.last_encoder_state_by_sample or config.distill.padding_counts)
            assert not config.eval.generation.dropout


def test_recipes_are_complete_in_themselves():
    """No block that a run needs is left to a default that could change unseen: what an optimizer or a loss reads is written out."""
    for path in RECIPES:
        tree = yaml.safe_load(path.read_text())
        config = load_config(path)
        assert set(tree["train"]) == {name for name in type(config.train).model_fields if f"train.{name}" not in PASSIVE}, path.name
        for name, block in tree["distill"].items():
            if isinstance(block, dict) and name == "contrast":
                assert set(block) == set(type(config.distill.contrast).model_fields), path.name


SHOWN = re.compile(r"dqtrain ((?:plan|submit|train|sweep) configs/\S+\.yaml[^#\\\[\n]*)")


def test_every_command_that_is_shown_has_work_for_all_of_its_ranks():
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml"), ROOT / "README.md", ROOT / "dqtrain/arguments.py"]
    shown = {
        re.split(r'  |\\n|"', match[1].replace("configs/mine", "configs/causal").replace("mysite.yaml", "slurm/sites/example.yaml"))[0]
        for page in pages
        for match in SHOWN.finditer(page.read_text())
    }
    commands = [parse(line.replace(" ...", "").split()) for line in sorted(shown)]
    assert {args.command for args in commands} == {"plan", "submit", "train", "sweep"}
    for args in commands:
        overrides = [word for word in args.overrides if word.startswith("train.")]
        file = ROOT / (args.sweep if args.command == "sweep" else args.config)
        configs = [point.config for point in points(load_sweep(file), overrides)] if args.command == "sweep" else [load_config(file, overrides)]
        nodes = {"plan": lambda args: args.nodes, "submit": lambda args: args.nodes[1]}.get(args.command, lambda args: 1)(args)
        of_a_node = args.gpus if args.command == "plan" else load_site(ROOT / args.site).ranks if getattr(args, "site", None) else args.ranks or 1
        for config in configs:
            check_ranks(config.train, nodes * of_a_node)
