"""Of a chat, exactly what the assistant says is predicted, whatever the template looks like; a template that does not tell is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_one
from hypothesis import given
from hypothesis import strategies as st

from dqtrain.config import Source
from dqtrain.data.chat import encode_chats, render_chat
from dqtrain.data.prepare import load_tokenizer, read_index, train_tokenizer
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
INSTRUCT = """{% for message in messages %}{% if message.role == "user" %}[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
FORGETFUL = """{% for message in messages %}{% if message.role != "assistant" or loop.last %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRICT = (
    """{% for message in messages %}{% if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}{% endfor %}"""
    + CHATML
)

CHAT = [
    {"role": "system", "content": "Answer in short."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "assistant\nIt is 5. <- say so é"},
    {"role": "assistant", "content": "No, naïve one."},
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "a.txt").write_text("user and assistant say It is so, and what is it?\n" * 9)
    train_tokenizer([Source(path=str(folder / "a.txt"))], 280, folder / "plain")
    tokenizer = load_tokenizer(folder / "plain")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder / "bare")
    return folder / "bare"


@pytest.fixture
def make(bare, tmp_path):
    """make(template) -> folder of a tokenizer with it."""

    def make(template: str) -> Path:
        load_tokenizer(bare).save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "tokenizer/chat_template.jinja").write_text(template)
        return tmp_path / "tokenizer"

    return make


def said(tokenizer, messages) -> tuple[str, str]:
    """(the whole text, what is predicted of it) as the ids of a chat decode."""
    [(ids, predicted)] = encode_chats(tokenizer, [render_chat(tokenizer, messages)])
    return tokenizer.decode(ids), "|".join(tokenizer.decode(run) for run in runs(ids, predicted))


def runs(ids, predicted) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], predicted.astype(int), [0]])))
    return [list(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "ends"), [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (INSTRUCT, "<|endoftext|>")], ids=["prefixes", "marked", "no generation prompt"]
)
def test_what_the_assistant_says_is_predicted_and_nothing_else(make, template, ends):
    tokenizer = load_tokenizer(make(template))
    messages = CHAT if template != INSTRUCT else CHAT[1:]
    text, predicted = said(tokenizer, messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    space = " " if template == INSTRUCT else ""
    assert predicted == f"{space}It is 4.{ends}|{space}No, naïve one.{ends}"


words = st.text(st.sampled_from("ab é\n<|>im_end"), min_size=1, max_size=12)


@given(st.lists(words, min_size=1, max_size=6))
def test_both_ways_find_the_same(bare, tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("both")
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    found = []
    for number, template in enumerate((CHATML, MARKED)):
        load_tokenizer(bare).save_pretrained(folder / str(number))
        (folder / str(number) / "chat_template.jinja").write_text(template)
        found.append(said(load_tokenizer(folder / str(number)), messages))
    assert found[0] == found[1]
    assert found[0][1] == "|".join(f"{content}<|im_end|>" for content in contents[1::2])


def test_a_token_that_is_the_assistants_in_part_is_not_predicted(bare):
    tokenizer, text = load_tokenizer(bare), "user and assistant say It is so, naïve"
    assert len(tokenizer(text)["input_ids"]) < len(text) - 10  # there are tokens of several characters
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            [(ids, predicted)] = encode_chats(tokenizer, [(text, [(start, stop)])])
            assert all(tokenizer.decode(run) in text[start:stop] for run in runs(ids, predicted))


def test_a_template_that_renders_otherwise_later_is_refused(make):
    tokenizer = load_tokenizer(make(FORGETFUL))
    assert said(tokenizer, CHAT[:3])[1] == "It is 4.<|im_end|>"
    with pytest.raises(DataError, match=r"renders its first 3 messages otherwise than as the beginning .*Mark them in the template with \{% generation %\}"):
        render_chat(tokenizer, CHAT)


def write(path: Path, chats) -> Source:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return Source(path=str(path), messages="messages")


@pytest.mark.parametrize("samples", ["packed", "documents"])
def test_chats_become_shards_with_a_mask(make, tmp_path, samples):
    folder = make(CHATML)
    chats = [CHAT, CHAT[:2], CHAT[:3], [], [{"role": "assistant", "content": "Hello."}]]
    made = prepare_one(write(tmp_path / "a.jsonl", chats), "train", folder, tmp_path, samples=samples)
    index, shard, tokenizer = read_index(made), Shard(made / "shard-00000-00000.bin"), load_tokenizer(folder)
    assert index["kind"] == "chat" and index["num_documents"] == 3 and index["num_empty"] == 2
    ids, predicted = shard.read(0, shard.num_tokens), shard.read_predicted(0, shard.num_tokens)
    documents = np.split(ids, shard.document_ends)[:-1]
    assert [tokenizer.decode(document) for document in documents] == [tokenizer.apply_chat_template(chats[i], tokenize=False) for i in (0, 2, 4)]
    assert [tokenizer.decode(run) for run in runs(ids, predicted)] == [
        f"{text}<|im_end|>" for text in ("It is 4.", "No, naïve one.", "It is 4.", "<|im_start|>assistant\nHello.")
    ]
    assert index["num_bytes"] == sum(len(tokenizer.apply_chat_template(chats[i], tokenize=False).encode()) for i in (0, 2, 4))


def test_chats_that_cannot_be_rendered_are_named(bare, make, tmp_path):
    source = write(tmp_path / "a.jsonl", [CHAT[1:], CHAT])
    with pytest.raises(DataError, match=r"tokenizer .*/bare has no chat template, .* put a chat_template\.jinja into its folder"):
        prepare_one(source, "train", bare, tmp_path)
    folder = make(STRICT)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template of .* refuses it \(TemplateError: roles must alternate\)"):
        prepare_one(source, "train", folder, tmp_path)
    made = prepare_one(source.model_copy(update={"max_bad_lines": 1}), "train", folder, tmp_path)
    assert read_index(made)["num_bad_lines"] == 1 and "a.jsonl:2: the chat template" in read_index(made)["first_bad_line"]
    with pytest.raises(DataError, match=r"a\.jsonl has no chats with an assistant for the split train"):
        prepare_one(write(tmp_path / "a.jsonl", [CHAT[:2]]), "train", make(CHATML), tmp_path)


def test_a_run_learns_from_texts_tables_and_chats_in_their_shares(world, make_run, tmp_path):
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chats = [[{"role": "user", "content": f"a cat {i}"}, {"role": "assistant", "content": f"a dog {i}"}] for i in range(40)]
    write(tmp_path / "chats.jsonl", chats)
    (tmp_path / "rows.csv").write_text("title,body\n" + "the cat,sees a small dog and then a bird\n" * 40)
    entries = (
        f"{{path: {world}/train.jsonl, weight: 2}}, {{path: {tmp_path}/rows.csv, text: '{{title}} {{body}}', weight: 1}}, "
        f"{{path: {tmp_path}/chats.jsonl, messages: messages, weight: 1}}"
    )
    run = make_run(
        data=f"{{train: [{entries}], tokenizer: {tmp_path}/tokenizer, tokens_per_sample: 16}}",
        eval="{}",
        train="{steps: 3, global_batch: 8, micro_batch: 4, lr: 1.0e-3}",
        quant="null",
        distill="{task: 1.0}",
    )
    code, output = run.train(ranks=1)
    assert code == 0, output
    assert run.log()[-1]["step"] == 3
    code, output = run.dqtrain("data", "info", str(run.path))
    assert code == 0 and [line.split()[1] for line in output.splitlines() if line.startswith("  weight")] == ["2", "1", "1"]
