"""Every mistake ends in its exit code and one message: what is, what must be, what to do. Nothing complete is lost."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from dqtrain import checkpoint
from dqtrain.cli import main


def refused(capfd, *arguments):
    """(exit code, message) of a command that stops before any rank starts."""
    code = main([str(argument) for argument in arguments])
    output = capfd.readouterr().err
    assert "Traceback" not in output
    return code, output


def refused_by_a_rank(run, *overrides):
    code, output = run.train(*overrides, ranks=1)
    assert "Traceback" not in output
    return code, output


def test_help_needs_no_torch():
    code = "import sys, dqtrain.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_command_has_help_with_an_example(capfd):
    for command in ("train", "resume", "prepare", "eval", "export", "generate", "quickstart"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0 and "example:" in capfd.readouterr().out


def test_unknown_option_and_stray_words(capfd):
    for arguments in (["train", "x.yaml", "--rank", "2", "--what"], ["resume", "a", "b"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


def test_closed_pipe_is_no_traceback(make_run, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dqtrain", "prepare", str(make_run().config), f"data.shards={tmp_path}/shards"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")


def test_missing_teacher(make_run, capfd, tmp_path):
    run = make_run(teacher=f"{{path: {tmp_path}/nowhere}}")
    code, message = refused(capfd, "train", run.config)
    assert code == 2 and f"{tmp_path}/nowhere: no config.json there" in message and "Give" in message
    assert not run.path.exists()


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_teacher_that_cannot_learn_from_text(make_run, tmp_path, family):
    small = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if family == "bert":
        model = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **small))
    else:
        model = BartForConditionalGeneration(
            BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, **small, decoder_start_token_id=0, forced_eos_token_id=0)
        )
    model.save_pretrained(tmp_path / "teacher")
    run = make_run(teacher=f"{{path: {tmp_path / 'teacher'}}}")
    config = run.config.read_text().replace("tokens_per_sample: 16", f"tokens_per_sample: 16, tokenizer: {tmp_path}/tokenizer")
    run.config.write_text(config)
    from conftest import WORDS

    from dqtrain.config import Source
    from dqtrain.data.prepare import train_tokenizer

    (tmp_path / "words.txt").write_text(" ".join(WORDS * 20))
    train_tokenizer([Source(path=str(tmp_path / "words.txt"))], 270, tmp_path / "tokenizer")
    code, message = refused_by_a_rank(run)
    expected = f"holds {type(model).__name__}, but a language model is needed" if family == "bert" else "but data.pairs is null"
    assert code == 2 and expected in message


def test_tokenizer_with_more_words_than_the_model(make_run, world, tmp_path):
    from dqtrain.config import Source
    from dqtrain.data.prepare import train_tokenizer

    train_tokenizer([Source(path=str(world / "train.jsonl"))], 310, tmp_path / "tokenizer")
    run = make_run()
    run.config.write_text(run.config.read_text().replace("tokens_per_sample: 16", f"tokens_per_sample: 16, tokenizer: {tmp_path}/tokenizer"))
    code, message = refused_by_a_rank(run)
    assert code == 3 and "has 310 entries" in message and "300 word embeddings" in message and "data.tokenizer" in message


def test_tokenizer_of_another_model(make_run, tmp_path):
    from conftest import write_corpus

    from dqtrain.config import Source
    from dqtrain.data.prepare import train_tokenizer

    other = write_corpus(tmp_path / "other.jsonl", 400, 9)
    other.write_text(other.read_text().replace("the", "zebra").replace("and", "quickly walks"))
    train_tokenizer([Source(path=str(other))], 300, tmp_path / "tokenizer")
    run = make_run()
    run.config.write_text(run.config.read_text().replace("tokens_per_sample: 16", f"tokens_per_sample: 16, tokenizer: {tmp_path}/tokenizer"))
    code, message = refused_by_a_rank(run)
    assert code == 3 and f"tokenizer {tmp_path}/tokenizer gives" in message and "Set data.tokenizer to null" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty.jsonl"), ('{"text": "a"}\n{"text": \n', "empty.jsonl:2"), ('{"words": "a"}\n', "text")],
    ids=["empty", "bad JSON", "no field"],
)
def test_corpus_that_holds_nothing_usable(make_run, tmp_path, text, message, capfd):
    (tmp_path / "empty.jsonl").write_text(text)
    run = make_run()
    code, output = refused(capfd, "prepare", run.config, f"data.train={tmp_path}/empty.jsonl", f"data.shards={tmp_path}/shards")
    assert code == 3 and message in output


def test_missing_corpus(make_run, capfd, tmp_path):
    code, message = refused(capfd, "train", make_run().config, f"data.test={tmp_path}/no.jsonl")
    assert code == 2 and "no.jsonl is not a file" in message


def test_bits_out_of_range(make_run, capfd):
    code, message = refused(capfd, "train", make_run().config, "quant.linears.bits=5")
    assert code == 2 and "quant.linears.bits: is 5, but input should be 1, 2, 3, 4, 8 or 'ternary'" in message


def test_global_batch_that_the_ranks_cannot_share(make_run, capfd):
    run = make_run()
    code, message = refused(capfd, "train", run.config, "--ranks", "5")
    assert code == 2 and "4 micro-batches" in message and "5 ranks cannot share" in message
    code, message = refused(capfd, "train", run.config, "--ranks", "0")
    assert code == 2 and "--ranks is 0" in message
    code, message = refused(capfd, "train", run.config, "train.micro_batch=3")
    assert code == 2 and "must divide train.global_batch, 8" in message


def test_samples_longer_than_the_model_and_the_mended_config(make_run):
    run = make_run()
    code, message = refused_by_a_rank(run, "data.tokens_per_sample=64")
    assert code == 2 and "data.tokens_per_sample is 64" in message and "32 positions" in message
    code, message = run.train("train.steps=2", ranks=1)  # nothing was trained, so the directory takes the mended config
    assert code == 0, message


def test_truncated_teacher(make_run, world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, message = refused_by_a_rank(make_run(teacher=f"{{path: {tmp_path / 'teacher'}}}"))
    assert code == 2 and "its safetensors files cannot be read" in message


def test_architecture_that_makes_no_model(world, make_run):
    for text, message in (("n_embd: 32, n_head: 3", "makes no language model"), ("n_embdd: 32", "has no such key")):
        run = make_run(
            teacher="null",
            student=f"{{architecture: {{model_type: gpt2, {text}}}}}",
            quant="null",
            distill="{task: 1.0}",
            data=f"{{train: {world}/train.jsonl, tokenizer: {world}/tokenizer, tokens_per_sample: 16, shards: {world}/shards}}",
            eval="{}",
        )
        code, output = refused_by_a_rank(run)
        assert code == 2 and message in output


def test_full_disk_while_running(stopped, tmp_path):
    """A real, tiny file system that fills up: the run ends with its code, and goes on when there is space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        pytest.skip("mounting a tmpfs needs root")
    try:
        from conftest import Run

        shutil.copytree(stopped.path, disk / "run")
        run = Run(disk / "run", disk / "run/run.yaml")
        run.config.write_text(run.config.read_text().replace(str(stopped.path), str(run.path)))
        first = json.loads((checkpoint.newest(run.path / "checkpoints")[0] / "state.json").read_text())["step"]
        process = run.start("resume", str(run.path))
        run.wait_for_step(first + 2, process)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"0" * 4096):
                pass
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 4 and "No space left on device" in output and "Traceback" not in output, output
        code, output = run.dqtrain("resume", str(run.path))
        assert code == 4 and "No space left on device" in output and "Traceback" not in output, output
        (disk / "filler").unlink()
        kept, passed_over = checkpoint.newest(run.path / "checkpoints")
        assert kept is not None and not passed_over
        process = run.start("resume", str(run.path))
        run.wait_for_step(json.loads((kept / "state.json").read_text())["step"] + 4, process)
        process.terminate()
        assert "saved" in process.communicate(timeout=60)[0] and process.returncode == 75
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_glob_that_matches_nothing(make_run):
    code, message = refused_by_a_rank(make_run(), 'quant.overrides=[{match: "encoder.*", keep_float: true}]')
    assert code == 2 and "quant.overrides has `encoder.*`" in message


def test_truncated_shard(make_run, world, tmp_path):
    run = make_run()
    code, output = run.dqtrain("prepare", str(run.config), f"data.shards={tmp_path}/shards")
    assert code == 0, output
    shard = next((tmp_path / "shards").glob("train-*/*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    code, message = refused_by_a_rank(run, f"data.shards={tmp_path}/shards")
    assert code == 3 and str(shard) in message and "bytes" in message and "delete" in message


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run that was stopped after some steps."""
    from conftest import Run, config_text

    folder = tmp_path_factory.mktemp("stopped")
    (folder / "run.yaml").write_text(config_text(world, folder / "run", train="{steps: 500, global_batch: 8, micro_batch: 4, lr: 1.0e-3}", eval="{}"))
    run = Run(folder / "run", folder / "run.yaml")
    process = run.start("train", str(run.config))
    run.wait_for_step(8, process)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    return run


def test_another_config_in_the_same_directory(stopped, capfd):
    code, message = refused(capfd, "train", stopped.config, "train.lr=0.5")
    assert code == 2 and "train.lr: 0.001 -> 0.5" in message and "dqtrain resume" in message


def test_checkpoint_with_another_config(stopped, tmp_path):
    from conftest import Run

    shutil.copytree(stopped.path, tmp_path / "run")
    run = Run(tmp_path / "run", tmp_path / "run/run.yaml")
    run.config.write_text(run.config.read_text().replace("lr: 0.001", "lr: 0.002").replace(str(stopped.path), str(run.path)))
    code, message = run.dqtrain("resume", str(run.path))
    assert code == 4 and "train.lr: 0.001 there, 0.002 here" in message
    folder, passed_over = checkpoint.newest(run.path / "checkpoints")
    assert folder is not None and not passed_over


def test_export_of_an_unfinished_run(stopped, capfd):
    for arguments in (["export", stopped.path], ["eval", stopped.path]):
        code, message = refused(capfd, *arguments)
        assert code == 4 and "is unfinished" in message and f"dqtrain resume {stopped.path}" in message


def test_unfinished_run_as_teacher(stopped, make_run, capfd):
    code, message = refused(capfd, "train", make_run().config, f"teacher.path={stopped.path}")
    assert code == 4 and "is unfinished" in message


def test_second_start_of_a_live_run_is_refused(make_run):
    run = make_run(train="{steps: 5000, global_batch: 8, micro_batch: 4, lr: 1.0e-3}", eval="{}")
    process = run.start("train", str(run.config))
    run.wait_for_step(4, process)
    code, message = run.train(ranks=1)
    assert code == 2 and "is being run by process" in message
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    before = (run.path / "log.jsonl").read_text()
    assert json.loads(before.splitlines()[0])["step"] == 2


def test_directory_that_is_no_run(make_run, capfd, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    code, message = refused(capfd, "train", make_run("run").config)
    assert code == 2 and "thesis.tex" in message
    code, message = refused(capfd, "resume", tmp_path / "nowhere")
    assert code == 2 and "is not a run directory" in message
