"""A student taught from a store, or on text that its teacher wrote: the same run as beside the teacher, without it."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import Run, config_text
from families import FAMILIES
from safetensors.torch import load_file, save_file

LONG = "{steps: 20, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"
LOGITS = "{logits: {weight: 1.0}}"


@pytest.fixture
def make(world, tmp_path):
    """make(name, source, ...): a Run with token shards, and with them stores, of this test alone."""

    def make(name, source, teacher=None, **changes):
        data = f"{{train: {world}/train.jsonl, validation: {world}/validation.jsonl, tokens_per_sample: 16, shards: {tmp_path}/shards}}"
        blocks = {"data": data, "teacher": f"{{path: {teacher or world / 'teacher'}, source: {source}}}", **changes}
        (tmp_path / f"{name}.yaml").write_text(config_text(world, tmp_path / name, **blocks))
        return Run(tmp_path / name, tmp_path / f"{name}.yaml")

    return make


def store(run, *arguments):
    """(folder, what rank 0 printed last) of `dqtrain cache-teacher`."""
    code, output = run.dqtrain("cache-teacher", str(run.config), *arguments)
    assert code == 0, output
    last = output.splitlines()[-1]
    return Path(last.split(" in ")[1]), last


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def result(run):
    return json.loads((run.path / "result.json").read_text())


@pytest.mark.slow
def test_hidden_states_of_two_ranks_train_as_the_teacher_itself(make, tmp_path):
    """2 ranks under ZeRO-3, contrast and dropout on, killed and resumed: bit for bit the log of an online run."""
    online, run = make("online", "online", train=LONG), make("hidden", "hidden", train=LONG)
    code, output = online.train()
    assert code == 0, output

    # A store is written by two ranks under ZeRO-3, one of which is killed on the way.
    process = run.start("cache-teacher", str(run.config), "--ranks", "2")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("shards/train-*/teacher-hidden-*/part-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(run.rank_pids()[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    (folder,) = tmp_path.glob("shards/train-*/teacher-hidden-*")
    assert process.returncode == 137 and not (folder / "index.json").exists(), output
    code, output = run.train(ranks=1)
    assert code == 3 and f"{folder}: what the teacher says about this corpus is not stored there, or not to the end. Run `dqtrain cache-teacher" in output
    assert "Traceback" not in output and not (run.path / "log.jsonl").exists()
    there, last = store(run, "--ranks", "2")
    assert there == folder and last.startswith("806 samples, 12,891 target tokens, 1.7 MB in ")

    # One rank with the whole teacher and other micro-batches writes the same bytes.
    two_ranks = content(folder)
    shutil.move(folder, tmp_path / "kept")
    there, _ = store(run, "zero.teacher=0", "train.micro_batch=8")
    assert there == folder and content(folder) == two_ranks

    process = run.start("train", str(run.config), "--ranks", "2")
    run.wait_for_step(8, process)
    os.kill(run.rank_pids()[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 137, process.communicate()[0]
    process.stdout.close()
    code, output = run.train()
    assert code == 0, output
    theirs = [{name: value for name, value in line.items() if "teacher" not in name and name != "validation_agreement"} for line in online.log()]
    assert run.log() == theirs and {"logits", "contrast"} <= theirs[0].keys()


@pytest.mark.slow
def test_one_rank_needs_no_teacher_but_the_right_store(make, world, tmp_path):
    """Bit for bit the log of an online run, test scores but the teacher's; the words of another teacher are refused before the first step."""
    data = f"{{train: {world}/train.jsonl, test: {world}/test.jsonl, tokens_per_sample: 16, shards: {tmp_path}/shards}}"
    changes = {"data": data, "zero": "{student: 1, teacher: 0}", "eval": "{}"}
    online, run = (make(name, name, shutil.copytree(world / "teacher", tmp_path / "teacher", dirs_exist_ok=True), **changes) for name in ("online", "hidden"))
    folder, _ = store(run)
    for each in (online, run):
        code, output = each.train(ranks=1)
        assert code == 0, output
    assert run.log() == online.log()
    ours, theirs = result(run)["test"], result(online)["test"]
    assert "teacher_loss" in theirs and ours == {name: value for name, value in theirs.items() if "teacher" not in name and name != "agreement"}

    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["transformer.ln_f.bias"][3] += 1e-6
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    other = make("other", "hidden", tmp_path / "teacher", **changes)
    code, output = other.train(ranks=1)
    assert code == 3 and "Traceback" not in output and not (other.path / "log.jsonl").exists()
    assert f"What is there ({folder.name}) is of another teacher or setting, and is not read. Run `dqtrain cache-teacher {other.path}/run.yaml`." in output


@pytest.mark.slow
def test_drawn_ids(make, tmp_path):
    run = make("run", "sampled", distill=LOGITS)
    folder, last = store(run, "--ranks", "2", "teacher.draws=20")
    ids = json.loads((folder / "index.json").read_text())
    assert f", {ids['num_ids'] / ids['num_tokens']:.1f} ids per token, " in last and 18 < ids["num_ids"] / ids["num_tokens"] < 20
    two_ranks = content(folder)
    shutil.move(folder, tmp_path / "kept")
    assert store(run, "zero.teacher=0", "teacher.draws=20")[0] == folder and content(folder) == two_ranks

    code, output = run.train("teacher.draws=20")
    assert code == 0, output
    assert run.log()[-2]["logits"] > 0
    code, output = make("other", "sampled", distill=LOGITS).train("teacher.draws=21", ranks=1)
    assert code == 3 and f"What is there ({folder.name}) is of another teacher or setting" in output


def test_an_online_teacher_has_nothing_to_store(make, capfd):
    from dqtrain.cli import main

    run = make("run", "online")
    assert main(["cache-teacher", str(run.config)]) == 2
    assert "teacher.source is online, so that there is nothing to store. Set teacher.source to hidden, sampled or top_k." in capfd.readouterr().err
    assert not run.path.exists()


@pytest.mark.slow
def test_an_encoder_decoder(make, world, tmp_path):
    FAMILIES["bart"](vocab_size=300, dropout=0.1).save_pretrained(tmp_path / "bart")
    for file in (world / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "bart")
    draw = random.Random(0)
    lines = [{"source": "the cat " * draw.randrange(1, 9), "target": "sees " * draw.randrange(1, 12)} for _ in range(70)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"{{train: {tmp_path}/pairs.jsonl, test: {tmp_path}/pairs.jsonl, pairs: {{source_tokens: 16, target_tokens: 12}}, shards: {tmp_path}/shards}}"
    quant = "{linears: {bits: 2, granularity: per_tensor}, embeddings: null, positions: null, activations: null}"
    online, run = (make(name, name, tmp_path / "bart", data=data, quant=quant, eval="{}") for name in ("online", "hidden"))
    _, last = store(run)
    assert last.startswith("70 samples, ")
    for each in (online, run):
        code, output = each.train()
        assert code == 0, output
    for ours, theirs in zip(run.log(), online.log(), strict=True):  # what was stored was computed in batches of other widths
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)


@pytest.mark.slow
def test_without_data(make, world, tmp_path):
    """A teacher is trained, writes a corpus, says what it thinks of it, and a student learns from that alone."""
    corpus = f"train: {world}/train.jsonl, validation: {world}/validation.jsonl"
    pretrain = make(
        "float",
        "online",
        teacher="null",
        data=f"{{{corpus}, tokens_per_sample: 16}}",
        train="{steps: 40, global_batch: 16, micro_batch: 16, lr: 1.0e-2}",
        quant="null",
        distill="{task: 1.0}",
        zero="{student: 1}",
        checkpoint="{every_steps: 40}",
    )
    text = pretrain.config.read_text().replace("teacher: {path: null, source: online}", "teacher: null")
    pretrain.config.write_text(text + f"student: {{init_from: {world / 'teacher'}}}\n")
    code, output = pretrain.train(ranks=1)
    assert code == 0, output

    command = ("synthesize", str(pretrain.path), str(tmp_path / "written.jsonl"), "--documents", "200", "--tokens", "24")
    code, output = pretrain.dqtrain(*command)
    assert code == 0 and f"100% writing {tmp_path}/written.jsonl: 200 of 200" in output
    assert len((tmp_path / "written.jsonl").read_text().splitlines()) == 200
    data = f"{{train: {tmp_path}/written.jsonl, validation: {world}/validation.jsonl, tokens_per_sample: 16}}"
    train = "{steps: 60, global_batch: 16, micro_batch: 16, lr: 5.0e-3}"
    student = make("small", "sampled", pretrain.path, data=data, distill=LOGITS, train=train, eval="{every_steps: 60}", checkpoint="{every_steps: 60}")
    _, last = store(student)
    assert " ids per token, " in last
    code, output = student.train(ranks=1)
    assert code == 0, output
    losses = [[line["validation_loss"] for line in run.log() if "validation_loss" in line][-1] for run in (pretrain, student)]
    assert losses[0] < 4 and losses[1] < losses[0] + 1
