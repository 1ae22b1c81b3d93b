"""GGUF files: blocks that ggml reads back to the bit, and models that llama.cpp runs as they were trained."""

import fcntl
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import flip, of_format, prepare_one
from safetensors.torch import load_file, save_file
from test_packed import about, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from dqtrain import tensor_file
from dqtrain.artifact import format, kernels, parity
from dqtrain.artifact.export import export
from dqtrain.artifact.gguf.family import family
from dqtrain.artifact.gguf.files import files_of
from dqtrain.artifact.gguf.llama_cpp import LlamaCpp
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.gguf.tokenizer import tokenizer_fields
from dqtrain.artifact.load import chosen_checkpoint
from dqtrain.artifact.serve import serve
from dqtrain.cli import main
from dqtrain.config import Export, Pairs, Quant
from dqtrain.data.prepare import load_tokenizer
from dqtrain.data.stream import PairStream, Stream
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import LanguageModel, inputs_of
from dqtrain.models.making import load_model
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import quantize_model
from dqtrain.rundir import RunDir


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run whose config asks for packed codes, a GGUF file, graphs and floats."""
    from conftest import Run, config_text

    folder = tmp_path_factory.mktemp("gguf")
    changes = {
        "export": "{targets: [packed, gguf, onnx, hf]}",
        "train": "{steps: 30, global_batch: 8, micro_batch: 4, lr: 5.0e-3, scale_lr: 5.0e-3, warmup_steps: 2}",
    }
    (folder / "run.yaml").write_text(config_text(world, folder / "run", zero="{student: 1, teacher: 0}", checkpoint="{every_steps: 30}", **changes))
    run = Run(folder / "run", folder / "run.yaml")
    code, output = run.train(ranks=1)
    assert code == 0, output
    return run, output


def test_a_run_ends_with_every_target_that_it_was_asked_for(finished):
    run, output = finished
    assert "gguf: Q4_0 for " in output and "rows of 32 are no multiple of 256, the block of TQ1_0" in output
    found = json.loads((run.path / "result.json").read_text())["export"]
    assert found["path"].endswith("packed") and found["others"].keys() == {"gguf", "onnx", "hf"}
    assert found["others"]["onnx"]["parity"]["weights"]["bit_identical"] == 28
    assert found["parity"]["as_shipped"]["held_out_text"] and found["parity"]["as_shipped"]["relative_l2_to_trained"] == 0.0
    parity = found["others"]["gguf"]["parity"]
    assert parity["weights"]["bit_identical"] == parity["weights"]["tensors"] == 28
    assert parity["as_shipped"]["held_out_text"] and parity["tokenizer"]["texts"] > 0
    assert json.loads((run.path / "artifact/gguf/parity.json").read_text()) == parity
    for figures in (found, *found["others"].values()):
        assert f"{figures['path']}: {figures['bytes']:,} bytes, {figures['ratio']:.2f} times smaller than the {figures['fp32_bytes']:,} bytes" in output
    for target in ("packed", "hf"):  # servers choose their code by it, and the teacher's config may not say it
        assert json.loads((run.path / "artifact" / target / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_exported_again_it_is_the_same_file(finished):
    run, _ = finished
    before = (run.path / "artifact/gguf/model.gguf").read_bytes()
    code, output = run.dqtrain("export", str(run.path), "--to", "gguf")
    assert code == 0, output
    assert json.loads(output)["path"].endswith("gguf") and "others" not in json.loads(output)  # the codes were there
    assert (run.path / "artifact/gguf/model.gguf").read_bytes() == before


def test_kernels_that_are_slower_than_those_of_8_bits_are_told(finished, tmp_path, monkeypatch):
    path = shutil.copytree(finished[0].path, tmp_path / "run", ignore=shutil.ignore_patterns("gguf", "onnx"))
    run, said = RunDir(path), []

    def exported(*targets):
        return export(run, chosen_checkpoint(run), Export(targets=targets), say=said.append)

    monkeypatch.setattr(kernels, "NOISE", -1.0)  # anything is slower than nothing
    first = exported("gguf", "onnx")
    for target, figures in (("gguf", first), ("onnx", first["others"]["onnx"])):
        told = figures["notes"][-1]
        assert figures["parity"]["kernels"].keys() == {"ms_per_token", "ms_per_token_8_bit"} and "for the same weights in 8 bits" in told
        assert told in said and f"- {told}" in (run.artifact(target) / "README.md").read_text()
        assert all(file.is_file() and not file.name.startswith(".") for file in run.artifact(target).iterdir())
    monkeypatch.setattr(kernels, "NOISE", 1e9)
    assert not any("in 8 bits" in note for note in exported("onnx")["notes"])
    monkeypatch.setattr(parity, "WHOLE_BYTES", 0)
    assert exported("onnx")["parity"]["kernels"] == {"not_measured": "the student takes more than 0 bytes as floats"}


def test_generate_runs_it(finished):
    run, _ = finished
    texts = {}
    for place in ("gguf", "gguf/model.gguf", "onnx", "packed"):
        code, texts[place] = run.dqtrain("generate", str(run.path / "artifact" / place), "the cat sees", "--tokens", "8")
        assert code == 0, texts[place]
    assert texts["gguf"] == texts["gguf/model.gguf"] and texts["gguf"].startswith("the cat sees")
    assert texts["gguf"] == texts["onnx"] == texts["packed"]  # the words are far enough apart for 8-bit activations of either kind


def test_a_run_writes_beside_its_teacher(finished, world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    run, _ = finished
    told = []
    for model in (run.path, run.path / "artifact/packed"):
        assert main(["generate", str(model), "the cat sees", "--tokens", "4", "--compare"]) == 0
        prompt, _, headings, _, *rows = capsys.readouterr().out.splitlines()
        assert prompt == "the cat sees" and headings.split(" | ") == [f"teacher: {world / 'teacher'}".ljust(198), f"student: {model}"]
        told.append(rows)
    assert told[0] == told[1] and len(told[0][0].split(" | ")) == 2
    assert main(["generate", str(run.path), "the cat sees", "--tokens", "4"]) == 0
    assert capsys.readouterr().out == f"the cat sees{told[0][0].split(' | ')[1]}\n"


def test_codes_and_floats_of_a_run_whose_corpus_is_gone(finished, world, tmp_path, capsys):
    """They are held to what was trained on random words; another program's own activations are not."""
    run = tmp_path / "run"
    shutil.copytree(finished[0].path, run)
    (run / "run.yaml").write_text(
        (run / "run.yaml").read_text().replace(str(world), str(tmp_path / "gone")).replace(str(tmp_path / "gone/teacher"), str(world / "teacher"))
    )
    assert main(["export", str(run), "--to", "packed,hf"]) == 0
    out, err = capsys.readouterr()
    assert not json.loads(out)["parity"]["as_shipped"]["held_out_text"]
    assert "gone/test.jsonl" in err and "random words are what the artifact is compared on" in err
    assert main(["export", str(run), "--to", "gguf"]) == 3 and "gone/test.jsonl" in capsys.readouterr().err


def test_a_run_exports_parts_and_the_card_names_the_first(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0].path, tmp_path / "run")
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 5_000)
    assert main(["export", str(tmp_path / "run"), "--to", "gguf"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["path"])
    assert len(files_of(folder)) > 2 and f"llama-cli -m model-00001-of-{len(files_of(folder)):05d}.gguf " in (folder / "README.md").read_text()


def test_one_export_of_a_run_at_a_time(finished, capsys):
    run = finished[0]
    with (run.path / ".export").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["export", str(run.path), "--to", "hf"]) == 4
    assert f"{run.path}: another export of this run is at work. Wait for its end" in capsys.readouterr().err
    assert main(["export", str(run.path), "--to", "hf"]) == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_packed_artifact_is_what_was_exported(name, how, finished, tmp_path, capsys):
    """Of config and tokenizer, too: another epsilon would be another model."""
    folder = tmp_path / "packed"
    shutil.copytree(finished[0].path / "artifact/packed", folder)
    if how == "gone":
        (folder / name).unlink()
    elif name == "config.json":
        (folder / name).write_text((folder / name).read_text().replace("1e-05", "1e-02"))
    else:
        flip(folder / name)
    assert main(["generate", str(folder), "the cat", "--tokens", "2"]) == (2 if (name, how) == ("config.json", "gone") else 4)
    assert name in capsys.readouterr().err


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def without_a_tensor(path):
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "h.0.mlp.c_fc.bias" not in name}, path, {"format": "pt"})


def edited(path):
    path.write_text(path.read_text().replace("bytes", "Bytes", 1))


def older(path):
    of_format(path, 1)


def newer(path):
    of_format(path, 3)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("hf/model.safetensors", flip_a_bit, r"model\.safetensors: does not have the hash in files\.json; a byte was changed"),
        ("hf/model.safetensors", cut, r"model\.safetensors: has \d+ bytes, files\.json says \d+; it is truncated or missing"),
        ("hf/model.safetensors", without_a_tensor, r"model\.safetensors: has \d+ bytes, files\.json says \d+"),
        ("hf/config.json", Path.unlink, r"config\.json: has 0 bytes, files\.json says \d+; it is truncated or missing"),
        ("hf/tokenizer.json", flip_a_bit, r"tokenizer\.json: does not have the hash in files\.json"),
        ("hf/files.json", edited, r"files\.json: does not have the hash in its last line; it was edited or damaged"),
        ("hf/files.json", older, r"files\.json: has format 1, this dqtrain reads 2"),
        ("hf/files.json", newer, r"files\.json: has format 3, this dqtrain reads 2"),
        ("gguf/model.gguf", flip_a_bit, r"model\.gguf: does not have the hash in files\.json; a byte was changed"),
        ("gguf/model.gguf", cut, r"model\.gguf: has \d+ bytes, files\.json says \d+; it is truncated or missing"),
        ("gguf/model.gguf", Path.unlink, r"model\.gguf: has 0 bytes, files\.json says \d+; it is truncated or missing"),
        ("gguf/files.json", older, r"files\.json: has format 1, this dqtrain reads 2"),
    ],
)
def test_folders_without_hashes_of_their_own_have_a_list(name, harm, message, finished, tmp_path, capsys):
    file = tmp_path / name
    shutil.copytree(finished[0].path / "artifact" / file.parent.name, file.parent)
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    harm(file)
    refusals = [["generate", str(file.parent), "the"]]
    refusals.append(["eval", str(file.parent), "--data", __file__] if file.parent.name == "hf" else ["generate", str(file.parent / "model.gguf"), "the"])
    for command in refusals:
        assert main(command) == 4 and re.match(f"dqtrain: {tmp_path}.*{message}", capsys.readouterr().err)
    with pytest.raises(CheckpointError, match=message):
        serve(file.parent, "127.0.0.1", 0, [])
    if harm is flip_a_bit and file.name != "tokenizer.json":  # what it was that the list alone knows, and a folder from elsewhere has none
        (file.parent / "files.json").unlink()
        assert main(["generate", str(file.parent), "the", "--tokens", "2"]) == 0
    for other, content in before.items():  # what a person adds, and the card, is nobody's business
        (file.parent / other).write_bytes(content)
    (file.parent / "README.md").write_text("# mine\n")
    assert main(["generate", str(file.parent), "the", "--tokens", "2"]) == 0


def test_a_file_that_the_list_beside_it_does_not_name_is_loaded(finished, tmp_path):
    folder = tmp_path / "gguf"
    shutil.copytree(finished[0].path / "artifact/gguf", folder)
    shutil.copy(folder / "model.gguf", folder / "mine.gguf")
    cut(folder / "model.gguf")
    with LlamaCpp(folder / "mine.gguf") as runtime:
        assert runtime.generate("the cat", 2).startswith("the cat")


# Models of every family, trained in this process


def byte_level(world, folder):
    shutil.copytree(world / "tokenizer", folder)


def sentencepiece(world, folder):
    """BPE as Llama's: a space in front of a text, bytes for what has no word, scores in the order of the merges."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    # The words of a text are cut for training alone: there are no spaces left to cut at afterwards.
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.train_from_iterator(lines(world), trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    told = json.loads(made.to_str())
    told["pre_tokenizer"] = None
    told["added_tokens"] = told["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(told))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def unigram(world, folder):
    """A unigram model as T5's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(lines(world), trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def lines(world, split="train"):
    return [json.loads(line)["text"] for line in (world / f"{split}.jsonl").read_text().splitlines()]


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GATED = {"feed_forward_proj": "gated-gelu", "d_ff": 256, "d_kv": 64, "num_heads": 4, "dropout_rate": 0.0, "initializer_factor": 0.1}
STUDENTS = {
    "gpt2": (byte_level, GPT2Config, {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": (sentencepiece, LlamaConfig, {**WIDE, "tie_word_embeddings": False}),
    "llama, other rotations, biases": (byte_level, LlamaConfig, {**WIDE, "rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": (byte_level, MistralConfig, {**WIDE, "sliding_window": None, "head_dim": 64}),
    "qwen2": (byte_level, Qwen2Config, {**WIDE, "tie_word_embeddings": True}),
    "qwen3": (byte_level, Qwen3Config, {**WIDE, "head_dim": 64, "tie_word_embeddings": True}),
    "t5": (unigram, T5Config, {**GATED, "feed_forward_proj": "relu", "d_model": 512, "num_layers": 2, "num_decoder_layers": 1}),
    "t5, gated, no factor before its head": (
        byte_level,
        T5Config,
        {**GATED, "d_model": 256, "num_layers": 1, "num_decoder_layers": 1, "tie_word_embeddings": False},
    ),
}
OTHERS = {  # that llama.cpp does not run
    "bart": (
        byte_level,
        BartConfig,
        {"d_model": 128, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 320, "decoder_ffn_dim": 320, "max_position_embeddings": 64, "dropout": 0.0},
    )
}
QUANT = settings(2, 2, 8)


@functools.cache
def _students():
    return {}


@pytest.fixture
def student(world, tmp_path_factory):
    """Name -> (folder of a small float model that was trained on the corpus, held-out text)."""

    def make(name):
        if name not in _students():
            folder = tmp_path_factory.mktemp("student")
            tokenizer, config, shape = (STUDENTS | OTHERS)[name]
            tokenizer(world, folder / "model")
            told = load_tokenizer(folder / "model")
            ids = {"eos_token_id": told.eos_token_id, "bos_token_id": told.bos_token_id or 0, "pad_token_id": told.pad_token_id, "decoder_start_token_id": 0}
            torch.manual_seed(0)
            model = AutoModel(config(vocab_size=len(told), **ids, **shape))
            streams = {split: stream_of(world, folder, split, model.config) for split in ("train", "test")}
            learn(model, streams["train"], 40, 2e-3)
            model.save_pretrained(folder / "model")
            _students()[name] = folder / "model", streams["test"]
        return _students()[name]

    return make


def AutoModel(config):
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def stream_of(world, folder, split, config):
    """Windows of text; of an encoder-decoder the two halves of each line."""
    if not config.is_encoder_decoder:
        return Stream(prepare_one(f"{world}/{split}.jsonl", split, folder / "model", folder / "shards"), 32, 0, split == "train")
    file = folder / f"{split}.jsonl"
    words = [line.split() for line in lines(world, split)]
    file.write_text("".join(json.dumps({"source": " ".join(w[: len(w) // 2]), "target": " ".join(w[len(w) // 2 :])}) + "\n" for w in words))
    pairs = Pairs(source_tokens=48, target_tokens=48)
    shards = prepare_one(str(file), split, folder / "model", folder / "shards", pairs=pairs, encoder_decoder=True)
    return PairStream(shards, config.pad_token_id or 0, config.decoder_start_token_id, 0, split == "train")


def learn(model, stream, steps, lr):
    """Steps of ordinary training, in place."""
    language_model, optimizer = LanguageModel(model.train()), torch.optim.AdamW(model.parameters(), lr)
    for step in range(steps):
        inputs, labels = inputs_of(stream.batch(range(step * 8, step * 8 + 8)), torch.device("cpu"))
        torch.nn.functional.cross_entropy(language_model.logits(inputs), labels[inputs.is_target]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def packed_artifact(student, quant, folder, steps=4):
    """(student trained on with this quantization, its packed artifact, held-out text)."""
    source, held_out = student
    model = load_model(source)
    coverage = quantize_model(model, quant)
    calibrate(model, lambda: LanguageModel(model)(inputs_of(held_out.batch(range(8)), torch.device("cpu"))[0]))
    learn(model, held_out, steps, 5e-4)  # any text will do
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    format.write(model, folder, about(quant, coverage))
    return model, folder, held_out


def to_gguf(made, folder, fastest=False, allow_inexact=False, spoil=lambda path: None):
    """Figures of the file that is made, and spoiled before it is looked at."""
    model, packed, held_out = made
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        target = GgufTarget(tensors, model.config, Export(gguf="fastest" if fastest else "smallest"))
        target.write(folder)
        spoil(folder / "model.gguf")
        return parity.verify_target(model, packed, folder, target, held_out, allow_inexact)


@pytest.mark.parametrize("name", STUDENTS)
def test_llama_cpp_computes_what_was_trained(name, student, tmp_path):
    made = packed_artifact(student(name), QUANT, tmp_path / "packed")
    for fastest in (False, True):
        found = to_gguf(made, tmp_path, fastest)
        weights, shipped = found["weights"], found["as_shipped"]
        assert weights["bit_identical"] == weights["tensors"] and weights["largest_relative_difference"] == 0.0
        assert weights["types"]["TQ2_0" if fastest else "TQ1_0"] >= 8
        assert shipped["perplexity"] == pytest.approx(shipped["perplexity_trained"], rel=0.05)
        assert shipped["perplexity"] < 0.8 * len(load_tokenizer(made[1]))  # it learned something
        assert shipped["top1_agreement"] > 0.9 and shipped["kl_nats"] < 0.01
        assert found["tokenizer"]["texts"] >= 8
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert ("output.weight" in [tensor.name for tensor in reader.tensors]) == (name in ("llama", "mistral"))


def test_activations_as_llama_cpp_computes_them_leave_its_rounding_alone(student, tmp_path):
    """A student of scale block_256 was trained with llama.cpp's own 8 bits: as shipped it is nearer to what was trained than to its float twin."""
    quant = QUANT.model_copy(update={"activations": QUANT.activations.model_copy(update={"scale": "block_256"})})
    shipped = to_gguf(packed_artifact(student("llama"), quant, tmp_path / "packed"), tmp_path)["as_shipped"]
    assert shipped["relative_l2_to_trained"] < 0.7 * shipped["relative_l2"]


def test_a_student_of_float_activations_is_compared_with_8_bit_noise(student, tmp_path):
    found = to_gguf(packed_artifact(student("qwen2"), settings(4, 4, activations=None), tmp_path / "packed"), tmp_path)
    assert 0 < found["as_shipped"]["relative_l2"] <= 2 * found["as_shipped"]["own_8_bit_noise"]
    assert found["weights"]["types"] == {"Q4_0": 15}


def test_learned_scales_of_activations_and_floats_of_conv1d(student, tmp_path):
    quant = Quant.model_validate(
        {
            "linears": {"bits": 3, "grid": "lsq", "granularity": "per_group", "group_size": 32},
            "embeddings": {"bits": 2, "grid": "seq", "granularity": "per_row"},
            "positions": None,
            "activations": {"bits": 8, "scale": "learned"},
            "overrides": [{"match": "*.0.mlp.c_fc.weight", "keep_float": True}],
            "float_head": True,
        }
    )
    found = to_gguf(packed_artifact(student("gpt2"), quant, tmp_path / "packed"), tmp_path)
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"] == 29  # the head is one of its own
    assert found["weights"]["types"] == {"Q2_K": 1, "Q4_0": 7}


def test_what_is_inexact_is_refused_or_said(student, tmp_path):
    """fp32 scales are rounded; a grid that ggml has not is stored as floats, exactly."""
    quant = settings(4, 4, 8, scale_dtype="fp32", overrides=({"match": "*.c_proj.weight", "weights": {"bits": 8, "grid": "affine", "granularity": "per_row"}},))
    made = packed_artifact(student("gpt2"), quant, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"is not what was trained"):
        to_gguf(made, tmp_path)
    weights = to_gguf(made, tmp_path, allow_inexact=True)["weights"]
    assert weights["types"] == {"F32": 4, "Q4_0": 5, "Q8_0": 1}
    assert weights["tensors"] - weights["bit_identical"] <= 6 and 0 < weights["largest_relative_difference"] < 5e-4


def test_verify_notices_a_flipped_bit(student, tmp_path):
    made = packed_artifact(student("llama"), QUANT, tmp_path / "packed", steps=0)
    with pytest.raises(CheckpointError, match=r"is not what was trained \(largest difference"):
        to_gguf(made, tmp_path, spoil=flip)


def test_a_damaged_file_that_no_list_names_is_refused(student, tmp_path):
    """By llama.cpp. A scale is a part of its block, so that none can be missing without its weight."""
    made = packed_artifact(student("llama"), QUANT, tmp_path / "packed", steps=0)
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        GgufTarget(tensors, made[0].config, Export()).write(tmp_path)
    whole, weight = (tmp_path / "model.gguf").read_bytes(), b"blk.0.ffn_up.weight"
    assert whole.count(weight) == 1 and whole[4:8] == b"\x03\0\0\0"  # the version of the format
    for content, reason in {
        whole[:100]: "",
        whole[:-100]: "",
        whole.replace(weight, weight[::-1]): r"tensor 'blk\.0\.ffn_up\.weight' not found",
        whole[:4] + b"\x01" + whole[5:]: "GGUFv1 is no longer supported",
        whole[:4] + b"\x63" + whole[5:]: "version 99",
    }.items():
        (tmp_path / "mine.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"mine.gguf: llama.cpp does not load it .*{reason}"):
            LlamaCpp(tmp_path / "mine.gguf")
    with pytest.raises(CheckpointError, match="is no file"):
        LlamaCpp(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BartConfig(), r"runs gpt2, llama, mistral, qwen2, qwen3, t5, and this model is bart\. Use the target packed, or hf"),
        (GPT2Config(activation_function="relu"), "activation_function of this gpt2 is relu, but llama.cpp computes gelu_new"),
        (MistralConfig(sliding_window=16), "sliding_window of this mistral is 16, but llama.cpp looks at all positions"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type of this llama is linear, but dqtrain writes default and",
        ),
        (T5Config(num_layers=1, num_decoder_layers=2), "1 encoder layers and 2 of its decoder, but llama.cpp has no room for a deeper decoder"),
        (T5Config(feed_forward_proj="gated-silu"), "feed_forward_proj of this t5 is gated-silu"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        family(config)


def word_level(world, folder):
    made = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", unk_token="<s>").save_pretrained(folder)


def own_words(world, folder):
    byte_level(world, folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, told["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("tokenizer", "size", "message"),
    [(word_level, 300, "its model is WordLevel"), (own_words, 300, "it cuts words by"), (byte_level, 299, "300 words, but the model 299")],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(tokenizer, size, message, world, tmp_path):
    tokenizer(world, tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=message):
        tokenizer_fields(tmp_path / "tokenizer", GPT2Config(vocab_size=size), gguf.GGUFWriter(None, "gpt2"))


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece, unigram])
def test_llama_cpp_makes_the_same_tokens(tokenizer, world, student, tmp_path):
    made = packed_artifact(student({byte_level: "qwen2", sentencepiece: "llama", unigram: "t5"}[tokenizer]), QUANT, tmp_path / "packed", steps=0)
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        GgufTarget(tensors, made[0].config, Export()).write(tmp_path)
    ours = load_tokenizer(made[1])
    texts = [*lines(world, "test"), "the  cat   sees", " the", "thecat, dog! 12345 a1b2", "don't we'll", "line\n\n\tnext", "é ☃ 日本", ""]
    if tokenizer is unigram:
        texts = [text for text in texts if text.isascii() and "\n" not in text]  # other words than its own are cut into unknowns elsewhere
    with LlamaCpp(tmp_path / "model.gguf") as runtime:
        for text in texts:
            assert runtime.encode(text) == ours.encode(text, add_special_tokens=False), text
            assert runtime.encode(text, special=True) == ours.encode(text), text
        for text in lines(world, "test"):
            assert runtime.decode(runtime.encode(text)) == text


def test_what_a_target_cannot_hold_is_said_before_training(make_run, tmp_path):
    quant = "{linears: {bits: 8, grid: affine, granularity: per_row}, embeddings: {bits: 4, granularity: per_row}, positions: null, activations: {bits: 8}}"
    run = make_run(quant=quant, export="{targets: [packed, gguf]}")
    code, output = run.train(ranks=1)
    assert code == 2 and not (run.path / "log.jsonl").exists()
    assert (
        "gguf cannot hold transformer.h.0.attn.c_attn.weight, transformer.h.0.attn.c_proj.weight, transformer.h.0.mlp.c_fc.weight and 5 more: 511 levels"
        in output
    )
    assert "a symmetric grid of 8 bits fits" in output and "--allow-inexact" in output
    teacher = run.config.read_text().split("teacher: {path: ")[1].split("}")[0]
    code, output = run.dqtrain("inspect", teacher, "--config", str(run.config))
    assert code == 0 and "gguf cannot hold transformer.h.0.attn.c_attn.weight" in " ".join(output.split()), output


def test_without_the_packages_it_is_said_what_to_install(finished):
    run, _ = finished
    for module, arguments in {"gguf": ["export", str(run.path), "--to", "gguf"], "xllamacpp": ["generate", str(run.path / "artifact/gguf"), "a"]}.items():
        program = f"import sys; sys.modules[{module!r}] = None; from dqtrain.cli import main; sys.exit(main({arguments!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 2 and f"needs the Python package {module}" in done.stderr and "pip install 'dqtrain[runtimes]'" in done.stderr, done.stderr
    assert (
        subprocess.run(
            [sys.executable, "-c", f"{program.split(';')[0]}; sys.modules['gguf'] = sys.modules['xllamacpp'] = None; import dqtrain, dqtrain.build"]
        ).returncode
        == 0
    )


def test_unknown_target(finished):
    run, _ = finished
    code, output = run.dqtrain("export", str(run.path), "--to", "packed,pickle")
    assert code == 2 and "--to pickle: there is no such target; give packed, gguf, onnx, openvino, compressed-tensors, hf." in output


# In parts

PART_BYTES = 50_000


def test_a_large_model_is_in_parts(student, tmp_path, monkeypatch, caplog):
    """Weights, logits, tokens and sizes are proven on them; texts and bytes of tensors are those of one file."""
    made = packed_artifact(student("llama"), QUANT, tmp_path / "packed")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    with format.PackedTensors(made[1], format.read_description(made[1])) as tensors:
        target = GgufTarget(tensors, made[0].config, Export())
        target.write(whole)
    expected = target.stored_bytes(whole)
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", PART_BYTES)
    found = to_gguf(made, parts)
    files = sorted(file.name for file in parts.glob("*"))
    assert files == ["files.json", *(f"model-{number:05d}-of-{len(files) - 1:05d}.gguf" for number in range(1, len(files)))] and len(files) > 3
    assert json.loads((parts / "files.json").read_text())["files"].keys() == set(files[1:])
    readers = [gguf.GGUFReader(parts / file) for file in files[1:]]
    assert all(len(reader.tensors) == 1 or sum(int(tensor.n_bytes) for tensor in reader.tensors) <= PART_BYTES for reader in readers)
    assert ["tokenizer.ggml.tokens" in reader.fields for reader in readers] == [True] + [False] * (len(files) - 2)
    assert found["bytes"]["tensors"] == expected["tensors"] and found["bytes"]["file"] == sum((parts / file).stat().st_size for file in files[1:])
    assert found["weights"]["bit_identical"] == found["weights"]["tensors"] == 21 and found["tokenizer"]["texts"] >= 8
    for path in (parts, parts / files[1], parts / files[2]):
        with LlamaCpp(path) as runtime, LlamaCpp(whole) as other:
            assert runtime.generate("the cat sees", 8) == other.generate("the cat sees", 8)
    assert not caplog.records  # of the writer's package


@pytest.fixture
def in_parts(student, tmp_path, monkeypatch):
    """A folder with a file in parts; beside it is `longer`, of the same student trained a step more."""
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", PART_BYTES)
    for steps, folder in enumerate((tmp_path / "gguf", tmp_path / "longer")):
        model, packed, _ = packed_artifact(student("llama"), QUANT, tmp_path / f"packed {steps}", steps=steps)
        folder.mkdir()
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            GgufTarget(tensors, model.config, Export()).write(folder)
    return tmp_path / "gguf"


def test_damaged_parts_are_refused_by_name(in_parts, tmp_path, capsys):
    parts = sorted(in_parts.glob("*.gguf"))
    content = {path: path.read_bytes() for path in in_parts.iterdir()}
    harms = {
        "missing": (Path.unlink, r"{}: has 0 bytes, files\.json says \d+; it is truncated or missing", r"{}: is no file\. Export it"),
        "cut": (cut, r"{}: has \d+ bytes, files\.json says \d+; it is truncated or missing", r".*: llama\.cpp does not load it"),
        "of another export": (lambda part: shutil.copy(tmp_path / "longer" / part.name, part), r"{}: does not have the hash in files\.json", None),
    }
    for harm, listed, alone in harms.values():
        for part in (parts[0], parts[1], parts[-1]):
            harm(part)
            for path in (in_parts, parts[0], parts[1]):
                assert main(["generate", str(path), "the"]) == 4
                assert re.match(f"dqtrain: {listed.format(re.escape(str(part)))}", capsys.readouterr().err)
                with pytest.raises(CheckpointError, match=listed.format(re.escape(str(part)))):
                    serve(path, "127.0.0.1", 0, [])
            (in_parts / "files.json").unlink()
            if alone is not None:
                assert main(["generate", str(in_parts), "the"]) == 4
                assert re.match(f"dqtrain: {alone.format(re.escape(str(part)))}", capsys.readouterr().err)
            for path, before in content.items():
                path.write_bytes(before)
    assert main(["generate", str(parts[-1]), "the", "--tokens", "2"]) == 0
