"""Encoder-decoders from the command line: a teacher, a student cut from it with every term on two ranks under ZeRO-3, its text, its artifact, its resume."""

import csv
import json
import os
import random
import signal

import pytest
import torch
from conftest import WORDS

import dqtrain
from dqtrain.config import Source
from dqtrain.data.prepare import train_tokenizer
from dqtrain.models.layers import all_layers

SIZES = {
    "bart": "d_model: 32, encoder_layers: 3, decoder_layers: 3, encoder_ffn_dim: 48, decoder_ffn_dim: 48, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, max_position_embeddings: 40",
    "t5": "d_model: 32, d_ff: 48, d_kv: 16, num_layers: 3, num_heads: 2",
}
TERMS = (
    "{task: 0.5, logits: {weight: 1.0, divergence: jensen_shannon, tokens: tsld}, hidden: {weight: 1.0}, attention: {weight: 1.0}, "
    "contrast: {weight: 0.1, negatives: 4}}"
)
GENERATION = "{every_steps: 4, generation: {max_new_tokens: 12, num_beams: 2, validation_samples: 5}}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of pairs: sources of words, targets that repeat some of them; test sources have two references each."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)

    def pair():
        words = draw.choices(WORDS, k=draw.randrange(3, 12))
        return {"facts": " ".join(words), "text": " ".join(words[:4])}

    rows = [pair() for _ in range(120)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:100]))
    for split, part in (("validation", rows[100:110]), ("test", rows[110:])):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["facts", "text"])
            table.writeheader()
            for row in part:
                table.writerows([row, {**row, "text": f"the {row['text']}"}])
    (folder / "words.txt").write_text("\n".join(f"{row['facts']} {row['text']}" for row in rows))
    train_tokenizer([Source(path=str(folder / "words.txt"))], 280, folder / "tokenizer")
    return folder


def data_of(pairs):
    files = ", ".join(f"{split}: {pairs}/{split}.{'jsonl' if split == 'train' else 'csv'}" for split in ("train", "validation", "test"))
    how = '{source: facts, target: text, template: "say: {source}", source_tokens: 36, target_tokens: 16}'
    return f"{{{files}, pairs: {how}, shards: {pairs}/shards, tokenizer: {pairs}/tokenizer}}"


@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_from_a_new_teacher_to_a_packed_student(family, pairs, make_run):
    data = data_of(pairs)
    architecture = f"{{architecture: {{model_type: {family}, {SIZES[family]}}}}}"
    teacher = make_run("teacher", teacher="null", student=architecture, quant="null", distill="{task: 1.0}", data=data, eval="{every_steps: 4}")
    code, output = teacher.train(ranks=1)
    assert code == 0, output

    taught = {
        "teacher": f"{{path: {teacher.path}}}",
        "student": f"{{encoder_layers: 2, decoder_layers: [{0 if family == 'bart' else 2}]}}",
        "distill": TERMS,
        "data": data,
        "eval": GENERATION,
    }
    student = make_run("student", **taught)
    code, output = student.train(ranks=2)
    assert code == 0, output
    first = student.log()[0]
    assert {"task", "logits", "hidden", "attention", "contrast"} <= first.keys()
    assert {"validation_bleu", "validation_rougeLsum"} <= next(line for line in student.log() if "validation_loss" in line).keys()
    result = json.loads((student.path / "result.json").read_text())
    assert {"loss", "teacher_loss", "agreement", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"} <= result["test"].keys()
    written = [json.loads(line) for line in (student.path / "predictions.jsonl").read_text().splitlines()]
    assert len(written) == 10 and all(len(row["references"]) == 2 and row["source"].startswith("say: ") for row in written)

    packed = student.path / "artifact" / "packed"
    loaded = dqtrain.load_artifact(packed)
    assert [len(layers) for layers in all_layers(loaded.config)] == [1, 2]
    assert result["export"]["parity"]["relative_logit_difference"] <= 1e-5

    scores = [
        json.loads(student.dqtrain("eval", *words, "--split", "test")[1].splitlines()[-1])
        for words in ((str(student.path),), (str(packed), "--config", str(student.config)))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)  # the run and its artifact
    # Other batches round 8-bit activations otherwise.
    assert scores[0]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-3) and scores[0].keys() <= result["test"].keys()
    code, output = student.dqtrain("generate", str(packed), "say: the cat sees a dog", "--tokens", "5")
    assert code == 0, output
    code, output = student.dqtrain("eval", str(packed), "--split", "test")
    assert code == 2 and "give --config YAML" in output and "Traceback" not in output
    code, output = student.dqtrain("eval", str(student.path), "--tokens-per-sample", "8")
    assert code == 2 and "--tokens-per-sample is for text" in output and "Traceback" not in output
    if family == "bart":
        code, output = student.dqtrain("generate", str(student.path), "say: the cat", "--tokens", "500")
        assert code == 2 and "500 tokens are asked" in output and "Traceback" not in output


@pytest.mark.slow
def test_an_interrupted_run_has_the_log_of_an_uninterrupted_one(pairs, make_run, tmp_path):
    """BART with dropout, every term, running means and a bank: stopped by a signal and resumed, bit for bit."""
    from transformers import BartConfig, BartForConditionalGeneration

    from dqtrain.data.prepare import load_tokenizer

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 0}
    model = BartForConditionalGeneration(BartConfig(vocab_size=280, decoder_attention_heads=2, max_position_embeddings=40, dropout=0.1, **sizes, **ids))
    model.save_pretrained(tmp_path / "bart")
    load_tokenizer(pairs / "tokenizer").save_pretrained(tmp_path / "bart")
    long = "{steps: 16, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2}"
    blocks = {"teacher": f"{{path: {tmp_path}/bart}}", "student": "{decoder_layers: 1}", "distill": TERMS, "data": data_of(pairs), "train": long}
    whole, broken = make_run("whole", **blocks), make_run("broken", **blocks)
    code, output = whole.train(ranks=2)
    assert code == 0, output
    process = broken.start("train", str(broken.config), "--ranks", "2")
    broken.wait_for_step(6, process)
    os.kill(broken.rank_pids()[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    code, output = broken.dqtrain("resume", str(broken.path))
    assert code == 0, output
    assert broken.log() == whole.log()


def test_an_encoder_decoder_without_pairs_and_a_map_out_of_range_are_refused(pairs, make_run, tmp_path):
    run = make_run("cut", student="{decoder_layers: 5}")
    code, output = run.train(ranks=1)
    assert code == 2 and "student.decoder_layers is 5, but there are 2 layers to keep" in output and "Traceback" not in output
    run = make_run("encoder", student="{encoder_layers: 1}")
    code, output = run.train(ranks=1)
    assert code == 2 and "has no encoder" in output and "Traceback" not in output
    run = make_run("layer", distill="{contrast: {weight: 0.1, layer: 2}}")
    code, output = run.train(ranks=1)
    assert code == 2 and "distill.contrast.layer is 2, but the student has 2 decoder layers" in output and "Traceback" not in output
