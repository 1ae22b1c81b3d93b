"""What a user does, one command after the other: pretrain, compress, start from a run, evaluate, export, generate."""

import json

import pytest

from dqtrain.artifact.description import read
from dqtrain.cli import main


@pytest.fixture(scope="module")
def chain(world, tmp_path_factory):
    """(float run with a tokenizer of its own, the run that compresses it)."""
    from conftest import Run, config_text

    folder = tmp_path_factory.mktemp("chain")
    corpus = f"train: {world}/train.jsonl, validation: {world}/validation.jsonl, test: {world}/test.jsonl, tokens_per_sample: 16"
    pretrain = config_text(
        world,
        folder / "float",
        teacher="null",
        student="{architecture: {model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 16}}",
        data=f"{{{corpus}, train_tokenizer: {{vocab_size: 300}}}}",
        quant="null",
        distill="{task: 1.0}",
        zero="{student: 2}",
        train="{steps: 60, global_batch: 16, micro_batch: 8, lr: 1.0e-2, warmup_steps: 5, decay: cosine}",
        eval="{every_steps: 20}",
        checkpoint="{every_steps: 50, keep_last: 1}",
        export="{checkpoint: best}",
    )
    (folder / "float.yaml").write_text(pretrain)
    first = Run(folder / "float", folder / "float.yaml")
    code, output = first.train(ranks=1)
    assert code == 0, output
    compress = config_text(
        world,
        folder / "small",
        teacher=f"{{path: {folder / 'float'}}}",
        data=f"{{{corpus}, shards: {folder / 'float' / 'shards'}}}",
        zero="{student: 1, teacher: 0}",
        train="{steps: 60, global_batch: 16, micro_batch: 8, lr: 5.0e-3, scale_lr: 5.0e-3, warmup_steps: 5}",
        eval="{every_steps: 30}",
    )
    (folder / "small.yaml").write_text(compress)
    second = Run(folder / "small", folder / "small.yaml")
    code, output = second.train(ranks=1)
    assert code == 0, output
    return first, second


def result(run):
    return json.loads((run.path / "result.json").read_text())


def test_pretraining_learns_and_exports_a_model_that_transformers_loads(chain):
    import math

    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = chain
    assert result(run)["test"]["loss"] < 0.7 * math.log(300)
    model = AutoModelForCausalLM.from_pretrained(run.path / "artifact/hf")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "artifact/hf")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0]).startswith("the cat")


EVERYTHING = """{linears: {grid: lsq, bits: 4, granularity: per_group, group_size: 16}, embeddings: {grid: seq, bits: 2, granularity: per_row},
 positions: {bits: 8, granularity: per_row}, vectors: bf16, activations: {bits: 8, scale: learned, attention: true},
 overrides: [{match: "*.mlp.c_proj.weight", weights: {grid: affine, bits: 3, granularity: per_row}, activations: {bits: 8, scale: per_tensor}},
 {match: "*.0.attn.c_proj.weight", keep_float: true}]}"""


def test_a_run_with_every_kind_of_quantizer_ends_with_its_proof(make_run):
    run = make_run(quant=EVERYTHING.replace("\n", ""), eval="{max_samples: 8}", checkpoint="{every_steps: 8}")
    code, output = run.train()
    assert code == 0, output
    parity = result(run)["export"]["parity"]
    assert parity["relative_logit_difference"] == 0.0
    about = read((run.path / "artifact/packed/artifact.json").read_text())
    assert {row["quantizer"]["grid"] for row in about["coverage"] if row["quantizer"]} == {"lsq", "seq", "dynamic", "affine"}
    code, again = run.dqtrain("eval", str(run.path / "artifact/packed"), "--data", str(run.config), "--tokens-per-sample", "16")
    assert code == 0 and json.loads(again.splitlines()[-1])["loss"] > 0
    code, text = run.dqtrain("generate", str(run.path / "artifact/packed"), "the cat", "--tokens", "4")
    assert code == 0 and text.startswith("the cat")


def test_best_checkpoint_is_the_one_that_was_tested(chain):
    run, _ = chain
    losses = {line["step"]: line["validation_loss"] for line in run.log() if "validation_loss" in line}
    assert result(run)["step"] == min(losses, key=losses.get)
    code, output = run.dqtrain("eval", str(run.path))
    assert code == 0 and json.loads(output.splitlines()[-1])["loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_student_shares_the_shards_and_follows_the_teacher(chain):
    teacher, student = chain
    assert len(list((teacher.path / "shards").iterdir())) == 3
    test = result(student)["test"]
    assert test["teacher_loss"] == pytest.approx(result(teacher)["test"]["loss"], rel=1e-6)
    assert test["loss"] < test["teacher_loss"] + 1.0 and test["agreement"] > 0.3
    assert result(student)["export"]["ratio"] > 4


def test_eval_of_run_and_artifact_agree(chain):
    _, run = chain
    code, of_run = run.dqtrain("eval", str(run.path), "--split", "test")
    assert code == 0, of_run
    test = run.config.read_text().split("test: ")[1].split(",")[0]
    code, of_file = run.dqtrain("eval", str(run.path / "artifact/packed"), "--data", test, "--tokens-per-sample", "16")
    assert code == 0, of_file
    values = [json.loads(text.splitlines()[-1])["loss"] for text in (of_run, of_file)]
    assert values[0] == values[1] == pytest.approx(result(run)["test"]["loss"], rel=1e-6)


def test_export_again_gives_the_same_bytes(chain):
    _, run = chain
    before = (run.path / "artifact/packed/model.safetensors").read_bytes()
    code, output = run.dqtrain("export", str(run.path))
    assert code == 0 and json.loads(output)["parity"]["relative_logit_difference"] == 0.0
    assert (run.path / "artifact/packed/model.safetensors").read_bytes() == before


def test_a_float_student_in_bf16(chain, capsys):
    run, _ = chain
    asked = ["export", str(run.path), "--to", "hf", "--hf", "bf16"]
    assert main(asked) == 2 and "hf cannot hold transformer.wte.weight, transformer.wpe.weight, " in capsys.readouterr().err
    assert main([*asked, "--allow-inexact"]) == 0
    found = json.loads(capsys.readouterr().out)["parity"]
    assert found["tensors_bit_identical"] < found["tensors_rounded_to_bf16"] and 0 < found["largest_relative_difference"] <= 2**-8
    assert main(["export", str(run.path)]) == 0  # as other tests have it
    assert json.loads(capsys.readouterr().out)["parity"]["relative_logit_difference"] == 0.0


def test_generate(chain):
    _, run = chain
    code, output = run.dqtrain("generate", str(run.path / "artifact/packed"), "the cat sees", "--tokens", "4")
    assert code == 0 and output.startswith("the cat sees") and len(output) > len("the cat sees\n")


def test_finished_run_does_not_train_again(chain):
    _, run = chain
    code, output = run.train(ranks=1)
    assert code == 2 and "is a finished run" in output and "artifact/packed" in output


def test_init_from_a_run_starts_from_its_weights_and_scales(chain, tmp_path):
    from conftest import Run

    _, run = chain
    text = run.config.read_text().replace(str(run.path), str(tmp_path / "next"))
    text += f"student: {{init_from: {run.path}}}\n"
    (tmp_path / "next.yaml").write_text(text)
    again = Run(tmp_path / "next", tmp_path / "next.yaml")
    code, output = again.train("train.steps=1", "train.warmup_steps=0", "train.lr=1e-12", "train.scale_lr=1e-12", "eval.every_steps=1", ranks=1)
    assert code == 0, output
    last = [line["validation_loss"] for line in run.log() if "validation_loss" in line][-1]
    assert again.log()[-1]["validation_loss"] == pytest.approx(last, rel=1e-5)


def test_init_from_a_run_of_other_bits_finds_new_scales(chain, tmp_path):
    from conftest import Run

    _, run = chain
    text = run.config.read_text().replace(str(run.path), str(tmp_path / "wide"))
    (tmp_path / "wide.yaml").write_text(text + f"student: {{init_from: {run.path}}}\n")
    wide = Run(tmp_path / "wide", tmp_path / "wide.yaml")
    tiny = ("train.steps=1", "train.warmup_steps=0", "train.lr=1e-12", "train.scale_lr=1e-12", "eval.every_steps=1")
    code, output = wide.train(*tiny, "quant.linears.bits=8", "quant.embeddings.bits=8", ranks=1)
    assert code == 0, output
    # The latents as they are: the ternary clip factors would cut nearly all of them off at 8 bits.
    assert wide.log()[-1]["validation_loss"] < 2 * result(run)["test"]["loss"]
