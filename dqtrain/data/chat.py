"""A chat -> token ids, and which of them the assistant says, by the chat template of the tokenizer.

A template that marks them itself with `{% generation %}` is believed. Of any other, what the assistant says is what stands behind the prompt that asks
for it: the text of the messages before with the template's generation prompt, which must be how the whole text begins, or the template is refused.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dqtrain.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ChatText = tuple[str, list[tuple[int, int]]]
"""The text of a chat, and the characters [start, stop) that the assistant says."""


def chat_template(tokenizer: Any) -> str:
    """The template that renders chats. Raises DataError for a tokenizer without one."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path} has no chat template, so that messages cannot become text; put a chat_template.jinja into its folder."
        ) from None


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> ChatText:
    """The text of a chat with the spans that the assistant says. Raises DataError for a chat that the template refuses, or does not render turn by turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(tokenizer)
    known = [{key: value for key, value in message.items() if value is not None} for message in messages]  # templates test for keys

    def render(count: int, **how: Any) -> tuple[str, list[tuple[int, int]]]:
        rendered: Any = render_jinja_template([known[:count]], chat_template=template, **how, **tokenizer.special_tokens_map)
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    try:
        if _GENERATION.search(template):
            text, spans = render(len(known), return_assistant_tokens_mask=True)
            return text, [(start, stop) for start, stop in spans if start < stop]
        whole, _ = render(len(known))
        spans = []
        for number, message in enumerate(known):
            if message["role"] != "assistant":
                continue
            # A template may refuse a chat that begins with the assistant or ends without it, but there is no other way to ask.
            prompt = render(number, add_generation_prompt=True)[0] if number else ""
            turn, _ = render(number + 1)
            if not (whole.startswith(turn) and turn.startswith(prompt)):
                what = f"its messages before number {number + 1} with the prompt for it" if whole.startswith(turn) else f"its first {number + 1} messages"
                raise DataError(
                    f"the chat template of {tokenizer.name_or_path} renders {what} otherwise than as the beginning of the whole chat, so that nothing says which "
                    "tokens are the assistant's. Mark them in the template with {% generation %} and {% endgeneration %}."
                )
            spans.append((len(prompt), _without_layout(tokenizer, turn, len(prompt))))
        return whole, spans
    except DataError:
        raise
    except Exception as error:
        raise _refused(tokenizer.name_or_path, error) from None


def _refused(name: str, error: Exception) -> DataError:
    """Of jinja2's errors, `raise_exception` of the template, and what its expressions raise."""
    return DataError(f"the chat template of {name} refuses it ({type(error).__name__}: {error})")


def render_question(template: str, question: str, special: Mapping[str, Any], name: str) -> str:
    """The text of a chat in which a user asks, up to where the answer begins. `special`: the tokenizer's tokens, such as `eos_token`; `name`: whose template it is.

    Raises DataError for a template that refuses it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template([[{"role": "user", "content": question}]], chat_template=template, add_generation_prompt=True, **special)
    except Exception as error:
        raise _refused(name, error) from None
    return rendered[0][0]


def encode_chats(tokenizer: Any, chats: Sequence[ChatText]) -> list[tuple[list[int], np.ndarray]]:
    """(token ids, bool [tokens]: whether the assistant says it) of each chat. A token that is the assistant's in part alone is not."""
    encoded = tokenizer([text for text, _ in chats], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    found = []
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], chats, strict=True):
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        predicted = np.zeros(len(ids), bool)
        for start, stop in spans:
            predicted |= (starts >= start) & (stops <= stop) & (starts < stop)
        found.append((ids, predicted))
    return found


def _without_layout(tokenizer: Any, turn: str, start: int) -> int:
    """Where the assistant's turn ends: with the special token that ends it, if the template lays out what is behind that, such as a line end."""
    text = turn[start:].rstrip()
    return start + len(text) if text.endswith(_special(tokenizer)) else len(turn)


@functools.lru_cache
def _special(tokenizer: Any) -> tuple[str, ...]:
    return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
