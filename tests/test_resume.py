"""The test of the project: an interrupted and resumed run has the log of an uninterrupted one, bit for bit."""

import json
import os
import signal

import pytest
import torch
from conftest import kill
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dqtrain import checkpoint
from dqtrain.artifact.load import load_any, load_spread
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.models.making import load_model

LONG = "{steps: 30, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """(config text for a run directory, log) of a 30-step run of 2 ranks under ZeRO-3, dropout on."""
    from conftest import Run, config_text

    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "run.yaml").write_text(config_text(world, folder / "run", train=LONG))
    run = Run(folder / "run", folder / "run.yaml")
    code, output = run.train()
    assert code == 0, output
    return run


def test_uninterrupted_run_is_whole(uninterrupted):
    log = uninterrupted.log()
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(2, 31, 2))
    assert steps[-1]["loss"] < steps[0]["loss"]
    rates = [1e-3 * min(1, 1 - (line["step"] - 3) / 28) for line in steps]  # 2 steps of warm-up, 28 of linear decay
    assert [line["lr_weights"] for line in steps] == pytest.approx(rates)
    assert {"logits", "contrast", "gradient_norm"} <= steps[0].keys()
    assert [line["step"] for line in log if "validation_loss" in line] == [4, 8, 12, 16, 20, 24, 28, 30]
    result = json.loads((uninterrupted.path / "result.json").read_text())
    assert result["export"]["parity"]["relative_logit_difference"] <= 1e-5
    assert 0 <= result["test"]["agreement"] <= 1
    assert not (uninterrupted.path / "owner.json").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(uninterrupted.path / "tensorboard")).Reload().Tags()
    assert {"loss", "logits", "tokens_per_s", "lr_scales", "gradient_norm", "validation_loss"} <= set(shown["scalars"])
    figures = ("scale", "gamma", "quantization_error", "clip_fraction", "codes_changed")
    assert {f"{figure}/transformer.h.0.attn.c_attn.weight" for figure in figures} <= set(shown["scalars"])
    assert {"scale/transformer.wte.weight", "codes/transformer.wte.weight"} <= set(shown["histograms"])
    alike = {f"{who}{what}" for who in ("", "teacher_") for what in ("word_cosine", "word_rank", "hidden_cosine", "hidden_rank")}
    assert alike <= set(shown["scalars"])
    events = [event for event in map(json.loads, (uninterrupted.path / "events.jsonl").read_text().splitlines()) if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == list(range(3, 31, 3))
    assert all(min(event["stall_s"], event["write_s"]) > 0 and event["bytes"] > 100_000 for event in events)
    # both ranks took part, and both left nothing on the error side
    assert (uninterrupted.path / "rank-0001.log").read_text().count("Traceback") == 0


@pytest.mark.parametrize("which", [pytest.param("one rank, SIGUSR1", marks=pytest.mark.slow), "Ctrl-C", pytest.param("the stop file", marks=pytest.mark.slow)])
def test_announced_stop_saves_and_continues_bit_for_bit(uninterrupted, make_run, which):
    run = make_run(train=LONG)
    process = run.start("train", str(run.config), "--ranks", "2")
    run.wait_for_step(6, process)
    if which == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    elif which == "the stop file":
        run.path.joinpath("stop").touch()
    else:
        os.kill(run.rank_pids()[1], signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert f"dqtrain resume {run.path}" in output
    stopped_at = int(output.split("stopped after step ")[1].split()[0])
    assert (run.path / "checkpoints" / "LATEST").read_text().strip() == f"step-{stopped_at:09d}"
    assert not (run.path / "stop").exists()
    code, output = run.dqtrain("resume", str(run.path))
    assert code == 0, output
    assert run.log() == uninterrupted.log()
    assert json.loads((run.path / "result.json").read_text())["test"] == json.loads((uninterrupted.path / "result.json").read_text())["test"]


def test_weights_come_out_of_any_checkpoint(uninterrupted, tmp_path):
    code, output = uninterrupted.dqtrain("weights", str(uninterrupted.path), str(tmp_path / "out"), "--step", "27", "--dtype", "bf16")
    assert code == 0 and "step-000000027 in bf16" in output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = dict(checkpoint.weights(uninterrupted.path / "checkpoints/step-000000027"))
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(p, trained[name].bfloat16()) for name, p in model.named_parameters())
    for arguments, message in (
        (["out"], "out exists, and nothing is overwritten"),
        (["new", "--step", "26"], "there is no checkpoint of step 26, but of "),
    ):
        code, output = uninterrupted.dqtrain("weights", str(uninterrupted.path), str(tmp_path / arguments[0]), *arguments[1:])
        assert code in (2, 4) and message in output


def test_a_run_that_does_not_fit_the_memory_computes_the_same(uninterrupted):
    ids = torch.arange(12).view(2, 6)
    inputs = Inputs(ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        whole, spread = (LanguageModel(model).logits(inputs) for model in (load_any(uninterrupted.path), load_spread(uninterrupted.path, {"cpu": 0})))
    assert torch.equal(whole, spread)


def test_resume_on_other_ranks_and_stage_reads_the_same_samples(uninterrupted, make_run):
    # Float activations: 8-bit rounding would amplify the order of sums.
    quant = "{linears: {bits: 2, granularity: per_tensor}, embeddings: {bits: 2, granularity: per_row}, positions: null, activations: null}"
    whole = make_run("whole", train=LONG, quant=quant)
    assert whole.train()[0] == 0
    run = make_run("elastic", train=LONG, quant=quant)
    process = run.start("train", str(run.config), "--ranks", "2")
    run.wait_for_step(6, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    code, output = run.train("zero.student=1", "zero.teacher=0", ranks=3)  # 4 micro-batches on 3 ranks: two ranks get an empty one
    assert code == 0, output
    for ours, theirs in zip(run.log(), whole.log(), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # Later a weight may be rounded to another code by the order of sums; other samples change a loss by a percent at once.
            near = 2e-5 if name != "gradient_norm" and ours["step"] <= 12 else 1e-3
            assert ours[name] == pytest.approx(value, rel=near), (ours["step"], name)


@pytest.mark.slow
def test_killed_on_two_ranks_in_mid_epoch_it_reads_the_same_samples_on_one_and_on_three(world, make_run):
    # A mixture that changes on the way; the second source, 30 lines, goes through several epochs.
    sources = f"[{{path: {world}/train.jsonl, weight: 0.7}}, {{path: {world}/validation.jsonl, weight: 0.3}}]"
    data = f"{{train: {sources}, test: {world}/test.jsonl, tokens_per_sample: 16, shards: {world}/shards, mixture: [{{from_step: 13, weights: [0.2, 0.8]}}]}}"
    plain = {"data": data, "teacher": "null", "student": f"{{init_from: {world}/teacher}}", "quant": "null", "distill": "{task: 1.0}"}
    plain |= {"eval": "{}", "log": "{every_steps: 1}"}
    plain["train"] = "{steps: 24, global_batch: 8, micro_batch: 2, lr: 1.0e-3}"
    whole, run = make_run("whole", **plain), make_run("killed", **plain)
    assert whole.train("zero.student=1", ranks=1)[0] == 0
    for ranks, step in ((2, 5), (1, 14)):
        process = run.start("train", str(run.config), "zero.student=1", "--ranks", str(ranks))
        run.wait_for_step(step, process)
        kill(*run.rank_pids().values())
        process.communicate(timeout=120)
    code, output = run.train("zero.student=1", ranks=3)
    assert code == 0, output
    ours, theirs = run.log(), whole.log()
    assert [line["step"] for line in ours] == list(range(1, 25))
    for line, expected in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-5), line["step"]
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3), line["step"]
    norms = [line["gradient_norm"] for line in theirs]
    assert sum(abs(a - b) / a > 2e-3 for a, b in zip(norms, norms[1:], strict=False)) >= 20  # other samples would show
    waits = [json.loads(line)["data_wait"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert all(0 <= wait <= 1 for wait in waits) and sorted(waits)[len(waits) // 2] < 0.01  # the first steps of a start wait for the first batches


ROUNDED = "{steps: 12, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, precision: bf16_weights}"


@pytest.mark.slow
def test_a_run_with_bf16_weights_is_partitioned_then_resumed_alone_and_exported(make_run):
    quant = "{linears: {bits: 2, granularity: per_tensor}, embeddings: {bits: 2, granularity: per_row}, positions: null, activations: {bits: 8}}"
    run = make_run(train=ROUNDED, quant=quant)
    process = run.start("train", str(run.config), "--ranks", "2")
    run.wait_for_step(4, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    code, output = run.train("train.precision=bf16", ranks=1)
    assert code == 2 and "train.precision" in output
    code, output = run.train("zero.student=1", "zero.teacher=0", ranks=1)
    assert code == 0, output
    assert [line["step"] for line in run.log() if "loss" in line] == [2, 4, 6, 8, 10, 12]
    result = json.loads((run.path / "result.json").read_text())
    assert result["export"]["parity"]["relative_logit_difference"] <= 1e-5
    latent = dict(checkpoint.weights(run.path / f"checkpoints/step-{result['step']:09d}"))
    stored = load_file(run.path / "artifact/packed/model.safetensors")
    positions = "transformer.wpe.weight"
    assert torch.equal(stored[positions], latent[positions].bfloat16()) and not torch.equal(stored[positions].float(), latent[positions])
    code, output = run.dqtrain("inspect", str(run.path), "--json")
    sizes = json.loads(output)["sizes"]["artifact"]["trained"]
    assert code == 0 and sizes["model.safetensors"]["bytes"] == result["export"]["bytes"]
    assert sizes["artifact.json"] == (run.path / "artifact/packed/artifact.json").stat().st_size


def test_a_float_run_with_bf16_weights_exports_what_forward_read(make_run):
    run = make_run(train=ROUNDED.replace("steps: 12", "steps: 4"), quant="null", eval="{every_steps: 4}", checkpoint="{every_steps: 4}")
    code, output = run.train()
    assert code == 0, output
    latent = dict(checkpoint.weights(run.path / "checkpoints/step-000000004"))
    exported = load_model(run.path / "artifact/hf")
    assert exported.lm_head.weight is exported.transformer.wte.weight
    for name, parameter in exported.named_parameters():
        expected = latent[name].bfloat16().float() if parameter.ndim >= 2 else latent[name]
        assert torch.equal(parameter, expected) and (parameter.ndim < 2) == torch.equal(parameter, latent[name])
