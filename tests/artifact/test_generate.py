"""What is written for a prompt: as it comes and in whole characters, through a chat template, beside what another model writes, in the program that runs the artifact."""

import contextlib
import io
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from conftest import config_text
from test_gguf import byte_level, sentencepiece
from test_packed import about, settings
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, GPT2Config, PreTrainedTokenizerFast, T5Config

from dqtrain.artifact import format
from dqtrain.artifact.generate import generate, side_by_side
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.gguf.tokenizer import tokenizer_fields
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.artifact.text import Text, decoder
from dqtrain.cli import main
from dqtrain.config import Export
from dqtrain.data.chat import render_question
from dqtrain.data.prepare import encode_sources, load_tokenizer
from dqtrain.errors import ConfigError, DataError
from dqtrain.quant.modules import quantize_model

QUESTION, ANSWER = "what sees the cat?", "naïve é ☃ 日本\n  the dog"
CHATML = """{% for message in messages %}{% if message.content == "" %}{{ raise_exception("say something") }}{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHAPES = {
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "t5": (T5Config, {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0, "initializer_factor": 0.3}),
    "bart": (
        BartConfig,
        {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "dropout": 0.0},
    ),
}
PLACES = {"gpt2": ("packed", "gguf", "onnx"), "t5": ("packed", "gguf", "onnx"), "bart": ("packed", "onnx")}


@pytest.fixture(scope="module")
def knowing(world, tmp_path_factory):
    """Name of a family -> folder of packed, gguf and onnx artifacts of a student that was taught one answer; of a causal one, to a chat."""
    made: dict[str, Path] = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            _teach(family, world, made[family])
        return made[family]

    return make


def _teach(family, world, folder):
    packed = folder / "packed"
    tokenizer = load_tokenizer(world / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if family == "gpt2":
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(packed)
    kind, shape = SHAPES[family]
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    ids = {"eos_token_id": eos, "bos_token_id": eos, "pad_token_id": eos, "decoder_start_token_id": eos}
    config = kind(vocab_size=len(tokenizer), **ids, **shape)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    if config.is_encoder_decoder:
        given = {"input_ids": torch.tensor(encode_sources(tokenizer, [QUESTION], 99, True)), "labels": torch.tensor([[*tokenizer.encode(ANSWER), eos]])}
    else:
        chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        whole = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        given = {"input_ids": whole, "labels": whole}
        model.generation_config.eos_token_id = [eos, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-2 if family == "t5" else 1e-2)
    for _ in range(60):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    quant = settings(8, 8, 8, None)
    coverage = quantize_model(model.eval(), quant)
    model.config.save_pretrained(packed)
    model.generation_config.save_pretrained(packed)
    format.write(model, packed, about(quant, coverage))
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        for target, name in ((GgufTarget, "gguf"), (OnnxTarget, "onnx")):
            if name in PLACES[family]:
                (folder / name).mkdir()
                target(tensors, model.config, Export()).write(folder / name)


class Pieces(io.StringIO):
    """What was written, piece by piece."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces += [text] if text else []
        return len(text)


@pytest.mark.parametrize(("family", "place"), [(family, place) for family, places in PLACES.items() for place in places])
def test_an_answer_is_printed_as_it_is_written_and_in_whole_characters(family, place, knowing):
    folder = knowing(family) / place
    said = Pieces()
    with contextlib.redirect_stdout(said):
        text = generate(folder, QUESTION, 60, stream=True)
    assert text == ANSWER
    assert "".join(said.pieces) == ANSWER + "\n"
    assert len(said.pieces) > 8 and not any("\ufffd" in piece for piece in said.pieces)
    assert generate(folder, QUESTION, 2) == ANSWER[:2]


def test_a_gguf_file_alone_has_its_chat_template(knowing, tmp_path):
    shutil.copy(knowing("gpt2") / "gguf/model.gguf", tmp_path / "mine.gguf")
    assert generate(tmp_path / "mine.gguf", QUESTION, 60) == ANSWER


@pytest.mark.parametrize("place", PLACES["gpt2"])
def test_a_template_that_refuses_the_prompt(place, knowing):
    with pytest.raises(DataError, match=rf"the chat template of .*{place}.* refuses it \(TemplateError: say something\)"):
        generate(knowing("gpt2") / place, "", 4)


@pytest.mark.parametrize(("family", "place"), [("gpt2", "packed"), ("gpt2", "gguf"), ("t5", "gguf"), ("bart", "packed"), ("bart", "onnx")])
def test_more_than_the_positions_is_refused(family, place, knowing):
    read = r"the prompt has \d\d tokens and " if family == "gpt2" else ""
    with pytest.raises(ConfigError, match=rf"^{read}4000 tokens are asked, but there is room for (128|512|2048) in .*{place}.*; .* --tokens"):
        generate(knowing(family) / place, QUESTION, 4000)


def test_spaces_are_printed_as_they_are(tmp_path):
    """Where a tokenizer tidies them, what was printed would be another text by then."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "they": 1, "do": 2, "n't": 3, "know": 4, ".": 5}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True, unk_token="<unk>")
    said = Pieces()
    with contextlib.redirect_stdout(said):
        text = Text(decoder(tokenizer), stream=True).write([1], [2, 3, 4, 5], 9, lambda token: False)
    assert "".join(said.pieces) == text + "\n" and text == "they do n't know ."


def test_a_tokenizer_that_has_no_bos_token_writes_none_in_a_chat(world, tmp_path):
    tokenizer = load_tokenizer(world / "tokenizer")
    tokenizer.bos_token = None
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(None, "gpt2")
    tokenizer_fields(tmp_path, GPT2Config(vocab_size=len(tokenizer)), writer)
    template = writer.kv_data[0]["tokenizer.chat_template"].value
    for question in ("the cat", "a"):
        here = render_question(template, question, {"bos_token": "<|end|>", "eos_token": "<|end|>"}, "it")
        assert here == render_question(tokenizer.chat_template, question, tokenizer.special_tokens_map, "it")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_text_is_that_of_all_its_tokens(make, world, tmp_path):
    make(world, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    text = "the cat é ☃日本\n\n  sees 🂡"
    ids, said = tokenizer.encode(text, add_special_tokens=False), Pieces()
    printed = []

    def following():
        for token in ids[2:]:
            printed.append("".join(said.pieces))
            yield token

    with contextlib.redirect_stdout(said):
        written = Text(tokenizer.decode, stream=True).write(ids[:2], following(), 99, lambda token: False)
    assert written == text and "".join(said.pieces) == text + "\n"
    assert not any("\ufffd" in piece for piece in said.pieces)
    assert printed[0] == tokenizer.decode(ids[:2]) and printed[-1].endswith("sees ") and len(set(printed)) > 5  # before the next token is found
    said = Pieces()
    with contextlib.redirect_stdout(said):
        cut = Text(tokenizer.decode, stream=True).write([], ids, len(ids) - 1, lambda token: False)
    assert cut.endswith("\ufffd") and "".join(said.pieces) == cut + "\n"  # what has no end is shown in the end


def test_the_default_of_several_templates_is_in_a_gguf_file(world, tmp_path):
    tokenizer = load_tokenizer(world / "tokenizer")
    tokenizer.chat_template = {"default": CHATML, "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(None, "gpt2")
    tokenizer_fields(tmp_path, GPT2Config(vocab_size=len(tokenizer)), writer)
    assert writer.kv_data[0]["tokenizer.chat_template"].value.endswith(CHATML)


# Beside another model


def test_columns():
    made = side_by_side(("teacher: a", "student: b"), ("def f():\n    return one or another or a third", "é\n\nx"), 20)
    assert made.splitlines() == [
        "teacher: a                     | student: b",
        f"{'-' * 30}-+-{'-' * 30}",
        "def f():                       | é",
        "    return one or another or a |",
        "third                          | x",
    ]
    assert side_by_side(("a", "b"), ("c " * 50, "d"), 103).splitlines()[2].startswith("c " * 25 + " | d")


def test_two_models_are_printed_beside_each_other(knowing, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = knowing("gpt2")
    assert main(["generate", str(folder / "gguf"), QUESTION, "--tokens", "60", "--compare", str(folder / "packed")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [QUESTION, ""]
    assert [line.split(" | ")[0].rstrip() for line in out if " | " in line] == [str(folder / "packed"), *ANSWER.splitlines()]
    assert [line.split(" | ")[1] for line in out if " | " in line] == [str(folder / "gguf"), *ANSWER.splitlines()]
    assert main(["generate", str(folder / "gguf"), QUESTION, "--mode", "fast", "--compare", str(folder / "packed")]) == 2
    assert f"--mode is for packed artifacts, but llama.cpp runs {folder}/gguf" in capsys.readouterr().err


def run_of(world, folder, **changes):
    """A folder with a run.yaml and an artifact's place, as far as a look for the teacher goes."""
    (folder / "artifact/packed").mkdir(parents=True)
    (folder / "run.yaml").write_text(config_text(world, folder, **changes))
    return folder


def test_the_teacher_of_the_run_is_the_default(knowing, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = run_of(world, tmp_path / "run")
    shutil.copytree(knowing("gpt2") / "gguf", run / "artifact/gguf")
    for name in ("gguf", "gguf/model.gguf"):
        place = run / "artifact" / name
        assert main(["generate", str(place), QUESTION, "--tokens", "5", "--compare"]) == 0
        rows = [[cell.strip() for cell in line.split(" | ")] for line in capsys.readouterr().out.splitlines() if " | " in line]
        assert rows[0] == [f"teacher: {world / 'teacher'}", f"student: {place}"]
        assert rows[1][1] and ANSWER.startswith(rows[1][1])
        assert rows[1][0] == generate(world / "teacher", QUESTION, 5).removeprefix(QUESTION).strip()


def test_a_teacher_that_is_not_there(world, tmp_path, capsys):
    lonely = tmp_path / "packed"
    lonely.mkdir()
    alone = run_of(world, tmp_path / "alone", teacher="null", distill="{task: 1.0}", student=f"{{init_from: {world / 'teacher'}}}")
    cases = {
        lonely: f"{lonely} is neither a run nor in RUN/artifact, so that nothing tells its teacher ({lonely}/run.yaml is not there)",
        run_of(world, tmp_path / "gone", teacher="{path: gone}") / "artifact/packed": f"gone, the teacher.path of {tmp_path}/gone/run.yaml, is not there",
        alone: f"{alone}/run.yaml names no teacher (teacher: null)",
    }
    for path, message in cases.items():
        assert main(["generate", str(path), "a", "--compare"]) == 2
        error = capsys.readouterr().err
        assert f"--compare: {message}" in error and "--compare MODEL" in error
