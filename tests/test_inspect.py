"""`dqtrain inspect`: its figures against plain ones, on every kind of model directory; and its mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import config_text
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dqtrain.artifact import format
from dqtrain.artifact.load import chosen_checkpoint, trained_model
from dqtrain.artifact.size import export_about
from dqtrain.cli import main
from dqtrain.config import BITS_OF_GRID, ActivationQuant, WeightQuant
from dqtrain.errors import ConfigError
from dqtrain.inspect import draw_errors, draw_words, open_model, shorthand
from dqtrain.quant.diagnose import effective_rank, mean_cosine
from dqtrain.quant.modules import quantize_model, quantized_parameters, served_parameters
from dqtrain.rundir import RunDir


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a directory of its small model, written on demand."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family):
        if family not in made:
            FAMILIES[family]().save_pretrained(root / family)
            made[family] = root / family
        return made[family]

    return folder


def dqtrain(capsys, *arguments):
    """(exit code, output, errors) of a command in this process."""
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def figures(capsys, *arguments):
    code, out, err = dqtrain(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# The shorthand


def test_shorthand_is_what_it_says():
    quant = shorthand("2-4-8")
    assert quant.linears == WeightQuant(grid="dynamic", bits=2, granularity="per_tensor")
    assert quant.embeddings == WeightQuant(grid="dynamic", bits=4, granularity="per_row")
    assert quant.positions == WeightQuant(grid="dynamic", bits=8, granularity="per_row")
    assert quant.vectors == "bf16" and quant.activations == ActivationQuant(bits=8, scale="per_token")
    quant = shorthand("ternary-32-4", "seq", 64)
    assert quant.linears == WeightQuant(grid="seq", bits="ternary", granularity="per_group", group_size=64)
    assert quant.embeddings is None and quant.activations == ActivationQuant(bits=4)
    assert shorthand("1-1-32", "mean43").activations is None and shorthand("32-8-16").activations is None
    assert shorthand("32-8-16").linears is None


@pytest.mark.parametrize("grid", BITS_OF_GRID)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, "ternary"])
def test_shorthand_takes_the_widths_that_config_takes(grid, bits):
    if bits in BITS_OF_GRID[grid]:
        assert shorthand(f"{bits}-{bits}-8", grid).linears.bits == bits
    else:
        with pytest.raises(ConfigError, match=rf"--quant {bits}-{bits}-8: linears: grid {grid} does not exist in {bits} bits, but in .*grids with {bits} are "):
            shorthand(f"{bits}-{bits}-8", grid)


@pytest.mark.parametrize(
    "text, grid, group_size, message",
    [
        ("2-2", "dynamic", None, "--quant 2-2: has 2 parts, but must have 3; give W-E-A"),
        ("2", "dynamic", None, "has 1 part, but"),
        ("2-2-8-8", "dynamic", None, "has 4 parts"),
        ("5-2-8", "dynamic", None, "linears have `5` bits, but must have one of 1, 2, 3, 4, 8, ternary, 32"),
        ("2-16-8", "dynamic", None, "embeddings have `16` bits"),
        ("2-2-2", "dynamic", None, "activations have `2` bits, but must have one of 4, 8, 16"),
        ("2-2-ternary", "dynamic", None, "activations have `ternary` bits"),
        ("two-2-8", "dynamic", None, "linears have `two` bits"),
        ("2-2- 8", "dynamic", None, "activations have ` 8` bits"),
        ("", "dynamic", None, "has 1 part"),
        ("32-32-8", "dynamic", None, "leaves linears and embeddings float"),
        ("2-2-8", "dynamik", None, "linears: grid is 'dynamik', but input should be 'dynamic', 'twn'"),
        ("2-2-8", "dynamic", 0, "linears: group_size is 0, but input should be greater than or equal to 1"),
        ("32-2-8", "dynamic", 64, "--group-size 64: is for linears, which --quant 32-2-8 leaves float"),
        ("4-1-8", "lsq", None, "embeddings: grid lsq does not exist in 1 bits"),
    ],
)
def test_shorthand_refuses(text, grid, group_size, message):
    with pytest.raises(ConfigError) as caught:
        shorthand(text, grid, group_size)
    assert message in str(caught.value)


# Figures


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_of_every_family(capsys, folders, family):
    path = folders(family)
    found = figures(capsys, path, "--quant", "2-4-8", "--grid", "dynamic", "--grid", "affine")
    auto = AutoModelForSeq2SeqLM if family in ("bart", "mbart", "t5") else AutoModelForCausalLM
    errors, words = {}, {}
    for grid in ("dynamic", "affine"):
        model = auto.from_pretrained(path, dtype=torch.float32)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        coverage = quantize_model(model, shorthand("2-4-8", grid))
        quantized = {parameter.name for parameter in quantized_parameters(model)}
        served = {name: value for name, value in served_parameters(model) if name in quantized}
        errors[grid] = {name: float((value - weights[name]).square().sum() / weights[name].square().sum()) for name, value in served.items()}
        total = sum((value - weights[name]).double().square().sum() for name, value in served.items()) / sum(weights[n].double().square().sum() for n in served)
        assert found["errors"]["total"][grid] == pytest.approx(float(total), rel=1e-5)
        table = next(row.name for row in coverage.rows if row.kind == "embeddings")
        words[grid], words["float"] = served[table], weights[table]
        assert found["coverage"][grid] == json.loads(coverage.to_json())
        (path.parent / f"{family}-{grid}").mkdir(exist_ok=True)
        format.write(model, path.parent / f"{family}-{grid}", export_about(coverage, shorthand("2-4-8")))
        sizes = [(path.parent / f"{family}-{grid}" / name).stat().st_size for name in ("model.safetensors", "artifact.json")]
        ours = found["sizes"]["artifact"][grid]
        assert [ours["model.safetensors"]["bytes"], ours["artifact.json"]] == sizes
        assert ours["total"]["bytes"] == sum(sizes)
        assert ours["total"]["ratio"] == pytest.approx(4 * found["sizes"]["parameters"] / sum(sizes))
    assert found["sizes"]["parameters"] == sum(weight.numel() for weight in weights.values())
    for grid, expected in errors.items():
        assert {name: by_grid[grid] for name, by_grid in found["errors"]["modules"].items()} == pytest.approx(expected, rel=1e-5)
    worst = [max(by_grid.values()) for by_grid in found["errors"]["modules"].values()]
    assert worst == sorted(worst, reverse=True)
    (homogeneity,) = found["homogeneity"]
    assert homogeneity["name"] == table and homogeneity["rows"] == [i * 97 // 48 for i in range(48)]
    for label, values in words.items():
        assert homogeneity["tables"][label] == pytest.approx({"mean_cosine": mean_cosine(values), "effective_rank": effective_rank(values)}, rel=1e-6)


def test_text_has_the_same_figures(capsys, folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    arguments = (folders("gpt2"), "--quant", "2-2-8", "--grid", "dynamic", "--grid", "seq")
    found = figures(capsys, *arguments)
    code, out, _ = dqtrain(capsys, *arguments)
    assert code == 0 and max(map(len, out.split("\n"))) <= 110
    assert "GPT2LMHeadModel, 2-2-8 on dynamic, seq" in out
    assert "transformer.h.0-1.attn.c_attn.weight  32 x 96   ternary dynamic per_tensor  8 bit per_token" in out
    assert "100.0% of the elements of these parameters are quantized." in out and "The same parameters on seq." in out
    for line in ("float, fp32", "as the papers count", "and an fp32 scale per word", "our model.safetensors, dynamic", "our model.safetensors, seq"):
        assert line in out
    assert f"{found['sizes']['artifact']['seq']['model.safetensors']['bytes']:,}" in out
    assert f"{found['sizes']['as_the_papers_count']['seq']['with_row_scales']['bytes']:,}" in out
    assert "tokenizer" not in out
    lines = out.split("\n")
    start = lines.index("RELATIVE SQUARED ERROR of quantized weights, worst first")
    for line, (name, errors) in zip(lines[start + 2 :], found["errors"]["modules"].items(), strict=False):
        assert line.split()[0] == name and f"{errors['dynamic']:.4f}" in line or "wpe" in name
    assert "█" in lines[start + 2]
    total = next(line for line in lines if line.startswith("  total"))
    assert f"{found['errors']['total']['dynamic']:.4f}" in total and f"{found['errors']['total']['seq']:.4f}" in total
    assert f"{found['homogeneity'][0]['tables']['seq']['effective_rank']:.1f}" in out
    titles = next(i for i, line in enumerate(lines) if line.split() == ["float", "dynamic", "seq"])
    # Three squares side by side; every word is like itself.
    second = lines[titles].index("dynamic")
    assert lines[titles + 1][2:4].strip() and lines[titles + 1][second : second + 2].strip()


def test_collapsed_words_are_seen(capsys, tmp_path):
    model = FAMILIES["gpt2"]()
    model.transformer.wte.weight.data += 1.0
    model.save_pretrained(tmp_path)
    _, out, _ = dqtrain(capsys, tmp_path, "--quant", "4-4-8")
    picture = out.split("float ")[-1]
    assert picture.count("█") > 900
    assert figures(capsys, tmp_path, "--quant", "2-2-8")["homogeneity"][0]["tables"]["float"]["mean_cosine"] > 0.9


def test_sizes_and_reasons_of_what_stays_float(capsys, folders):
    code, out, _ = dqtrain(capsys, folders("mixtral"), "--quant", "8-32-16")
    assert code == 0 and "routers stay float unless quant.overrides names them" in " ".join(out.split())
    assert "quant.embeddings is null" in out
    found = figures(capsys, folders("mixtral"), "--quant", "8-32-16")
    assert list(found["homogeneity"][0]["tables"]) == ["float"]  # words are looked at, though they stay as they are
    assert not any("embed" in name for name in found["errors"]["modules"])


@pytest.mark.parametrize("grids", [1, 2, 4])
@pytest.mark.parametrize("width", [48, 80, 120, 200])
def test_tables_keep_to_the_width(width, grids):
    labels = ["dynamic", "seq", "minmax_affine", "laq"][:grids]
    names = [f"model.decoder.layers.{i}.encoder_attn.out_proj.weight" for i in range(11)]
    errors = {"modules": {name: dict.fromkeys(labels, 0.5 / (i + 1)) for i, name in enumerate(names)}, "total": dict.fromkeys(labels, 1e-5)}
    lines = draw_errors(errors, width).split("\n")
    if 18 + grids * (max(9, *map(len, labels)) + 3) <= width:
        assert max(map(len, lines)) <= width
    assert all(f"{0.5 / (i + 1):.4f}" in line for i, line in enumerate(lines[1:12]))
    if width == 200:
        assert all(line.count("█") > 3 for line in lines[1:3])
        assert [line.split()[0] for line in lines[1:12]] == names
    words = {"name": "wte.weight", "shape": (60, 4), "rows": list(range(48))}
    words |= {"tables": dict.fromkeys(["float", *labels], {"mean_cosine": 0.5, "effective_rank": float("nan")})}
    words |= {"samples": dict.fromkeys(["float", *labels], torch.ones(48, 4))}
    drawn = draw_words(words, width).split("\n")
    assert max(map(len, drawn)) <= width and "nan" not in "".join(drawn)
    assert sum(line.count("█") for line in drawn[8:]) >= (grids + 1) * 24 * 12


# Where weights come from


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def is_streamed(source):
    return source.read.__name__ == "<lambda>"


def same_as_transformers(folder, auto=AutoModelForCausalLM):
    """Every parameter of the source is transformers' own; the source."""
    source, model = open_model(folder), auto.from_pretrained(folder, dtype=torch.float32)
    expected = dict(model.named_parameters())
    assert dict(source.model.named_parameters()).keys() == expected.keys()
    assert all(parameter.is_meta for parameter in source.model.parameters())
    for name, parameter in expected.items():
        assert torch.equal(source.read(name).float(), parameter), name
    return source


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_one_at_a_time(folders, family):
    source = same_as_transformers(folders(family), AutoModelForSeq2SeqLM if family in ("bart", "mbart", "t5") else AutoModelForCausalLM)
    assert is_streamed(source) == (family != "mixtral")  # whose experts lie in the files one by one
    assert not source.nonzero_buffers


def test_sharded_files(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert is_streamed(same_as_transformers(tmp_path))


def test_files_of_a_base_model(tmp_path):
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    assert is_streamed(same_as_transformers(tmp_path))


def test_half_precision_files(tmp_path, capsys):
    FAMILIES["gpt2"]().to(torch.bfloat16).save_pretrained(tmp_path)
    assert is_streamed(same_as_transformers(tmp_path))
    assert figures(capsys, tmp_path, "--quant", "2-2-8")["sizes"]["fp32"]["bytes"] == 4 * 29600


def test_a_tied_weight_that_lies_in_the_files_twice_is_transformers_to_judge(tmp_path, capsys):
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert not is_streamed(same_as_transformers(tmp_path))
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    same_as_transformers(tmp_path)
    found = figures(capsys, tmp_path, "--quant", "2-2-8")  # untied by transformers, and so here
    assert "lm_head.weight" in found["errors"]["modules"] and found["sizes"]["parameters"] == 29600 + 97 * 32


def test_old_pickled_files(tmp_path):
    model = FAMILIES["gpt2"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert not is_streamed(same_as_transformers(tmp_path))


def test_a_buffer_that_is_not_zero_is_counted(tmp_path, capsys):
    model = FAMILIES["bart"]()
    model.save_pretrained(tmp_path)
    before = figures(capsys, tmp_path, "--quant", "2-2-8")["sizes"]["artifact"]["dynamic"]["model.safetensors"]["bytes"]
    rewrite(tmp_path, lambda tensors: {**tensors, "final_logits_bias": torch.ones(1, 97)})
    assert list(open_model(tmp_path).nonzero_buffers) == ["final_logits_bias"]
    after = figures(capsys, tmp_path, "--quant", "2-2-8")["sizes"]["artifact"]["dynamic"]["model.safetensors"]["bytes"]
    assert after > before + 4 * 97


@pytest.mark.parametrize("family", ["gpt2", "bart", "t5", "mixtral"])
def test_a_config_alone_gives_coverage_and_sizes(capsys, folders, tmp_path, family):
    (tmp_path / "config.json").write_bytes((folders(family) / "config.json").read_bytes())
    whole, empty = (figures(capsys, path, "--quant", "2-2-8") for path in (folders(family), tmp_path))
    assert empty["coverage"] == whole["coverage"] and empty["sizes"] == whole["sizes"]
    assert empty["errors"] is None and empty["homogeneity"] is None
    code, out, _ = dqtrain(capsys, tmp_path, "--quant", "2-2-8")
    assert code == 0 and out.endswith(f"Errors and homogeneity need weights, and {tmp_path} holds a config.json alone.\n") and "RELATIVE" not in out


def test_tokenizer_has_a_line_of_its_own(capsys, world):
    found = figures(capsys, world / "teacher", "--quant", "2-2-8")
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    assert found["sizes"]["tokenizer_bytes"] == sum((world / "teacher" / n).stat().st_size for n in names if (world / "teacher" / n).exists())
    _, out, _ = dqtrain(capsys, world / "teacher", "--quant", "2-2-8")
    assert f"the tokenizer beside it          {found['sizes']['tokenizer_bytes']:,}" in " ".join(out.split("  ")) or "the tokenizer beside it" in out


def test_quant_block_of_a_config(capsys, world, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(config_text(world, tmp_path / "run"))
    found = figures(capsys, world / "teacher", "--config", config)
    assert list(found["errors"]["total"]) == ["mine"] and found["quant"]["mine"]["vectors"] == "fp32"
    assert found["errors"]["modules"] == {
        name: {"mine": errors["dynamic"]} for name, errors in figures(capsys, world / "teacher", "--quant", "2-2-8")["errors"]["modules"].items()
    }
    assert "the quant block of" in dqtrain(capsys, world / "teacher", "--config", config)[1]


def test_a_finished_run(capsys, make_run):
    run = make_run(train="{steps: 4, global_batch: 4, micro_batch: 4, lr: 1.0e-2, scale_lr: 1.0e-2}", eval="{every_steps: 4}")
    code, output = run.train(ranks=1)
    assert code == 0, output
    found = figures(capsys, run.path)
    assert list(found["errors"]["total"]) == ["trained"]
    packed = run.path / "artifact/packed"
    ours = found["sizes"]["artifact"]["trained"]
    assert ours["model.safetensors"]["bytes"] == (packed / "model.safetensors").stat().st_size
    assert ours["artifact.json"] == (packed / "artifact.json").stat().st_size
    assert found["coverage"]["trained"] == json.loads((run.path / "coverage.json").read_text())
    # As it was trained, with the scales that were learned.
    directory = RunDir(run.path)
    model = trained_model(directory, chosen_checkpoint(directory))
    latent = {parameter.name: parameter.weight.detach() for parameter in quantized_parameters(model)}
    served = {name: value for name, value in served_parameters(model) if name in latent}
    expected = {name: float((served[name] - weight).square().sum() / weight.square().sum()) for name, weight in latent.items()}
    assert {name: errors["trained"] for name, errors in found["errors"]["modules"].items()} == pytest.approx(expected, rel=1e-5)
    anew = figures(capsys, run.path, "--quant", "2-2-8")["errors"]["modules"]
    assert anew.keys() == expected.keys() and any(abs(anew[name]["dynamic"] / expected[name] - 1) > 1e-3 for name in expected)
    _, out, _ = dqtrain(capsys, run.path)
    assert "GPT2LMHeadModel, as it was trained" in out
    code, _, err = dqtrain(capsys, packed, "--quant", "2-2-8")
    assert code == 2 and "is a packed artifact, whose weights are codes already" in err
    (run.path / "result.json").unlink()
    code, _, err = dqtrain(capsys, run.path, "--quant", "2-2-8")
    assert code == 4 and "is unfinished" in err


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "is a float model, and nothing says how to quantize it; give --quant"),
        (("--quant", "2-2"), "--quant 2-2: has 2 parts"),
        (("--quant", "1-1-8"), "grid dynamic does not exist in 1 bits, but in ternary, 2, 3, 4, 8; grids with 1 are mean43."),
        (("--quant", "2-2-8", "--grid", "seq", "--grid", "nope"), "linears: grid is 'nope'"),
        (("--grid", "seq"), "--grid and --group-size go with --quant"),
        (("--config", "absent.yaml"), "absent.yaml: cannot be read"),
        (("--quant", "2-2-8", "--group-size", "24"), "has 32 inputs, which a group_size of 24 does not divide"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(capsys, folders, arguments, message):
    code, out, err = dqtrain(capsys, folders("gpt2"), *arguments)
    assert (code, out) == (2, "") and message in err and err.startswith("dqtrain: ") and err.count("\n") == 1


def test_directories_that_hold_no_float_model(capsys, folders, tmp_path):
    def refused(folder, message):
        code, out, err = dqtrain(capsys, folder, "--quant", "2-2-8")
        assert (code, out) == (2, "") and message in err, err

    refused(tmp_path / "absent", "no config.json there")
    broken = tmp_path / "broken"
    FAMILIES["gpt2"]().save_pretrained(broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:1000])
    refused(broken, "its safetensors files cannot be read")
    (broken / "model.safetensors").write_bytes(content)
    rewrite(broken, lambda tensors: {name: tensor for name, tensor in tensors.items() if "wpe" not in name})
    refused(broken, "its files lack 1 tensors, such as transformer.wpe.weight")
    (broken / "model.safetensors").write_bytes(content)
    rewrite(broken, lambda tensors: {**tensors, "transformer.wpe.weight": tensors["transformer.wpe.weight"] * float("nan")})
    code, _, err = dqtrain(capsys, broken, "--quant", "2-2-8")
    assert code == 2 and "transformer.wpe.weight holds NaN or infinite values" in err
    described = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**described, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    refused(broken, "is quantized already (quantization_config: gptq)")
    (broken / "config.json").write_text("{")
    refused(broken, "transformers cannot read it")
    (broken / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    refused(broken, "but a language model is needed")


def test_a_config_without_quantization(capsys, folders, world, tmp_path):
    config = tmp_path / "float.yaml"
    config.write_text(config_text(world, tmp_path / "run", quant="null"))
    code, _, err = dqtrain(capsys, folders("gpt2"), "--config", config)
    assert code == 2 and "quant is null, so there is nothing to look at" in err


def test_quant_and_config_exclude_each_other(capsys, folders):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(folders("gpt2")), "--quant", "2-2-8", "--config", "x.yaml"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_help_has_examples_and_does_not_import_torch():
    code = "import sys; from dqtrain.cli import main\ntry: main(['inspect', '--help'])\nfinally: assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "dqtrain inspect MODEL --quant 2-2-8 --grid dynamic --grid seq" in out and "minmax_affine" in out


def test_a_pipe_under_an_old_locale_gets_the_same_text(folders):
    command = [sys.executable, "-m", "dqtrain", "inspect", str(folders("gpt2")), "--quant", "2-2-8"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=env, check=True)
    assert "█" in done.stdout.decode("utf-8") and "\x1b" not in done.stdout.decode() and b"\r" not in done.stderr
