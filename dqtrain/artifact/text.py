"""A text that is written token by token, whichever program finds the tokens: what it begins with, the room that it needs, and how it is shown as it grows."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.generation.streamers import BaseStreamer

from dqtrain.data.chat import chat_template, render_question
from dqtrain.errors import ConfigError


class Text(BaseStreamer):
    """The text of tokens that are put one after the other, without the first `num_hidden`, such as a prompt that it answers. transformers takes it for a streamer.

    `decode` gives the text of token ids without special ones. With `stream` it is printed as it grows, in whole characters: one may be spread over tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], num_hidden: int = 0, stream: bool = False) -> None:
        self._decode, self._num_hidden, self._stream = decode, num_hidden, stream
        self._ids: list[int] = []
        self._num_printed = 0

    def __str__(self) -> str:
        return self._decode(self._ids[self._num_hidden :])

    def put(self, value: Any) -> None:
        """Add token ids: numbers, or a tensor of them."""
        self._ids += np.ravel(value).tolist()
        if self._stream and not (text := str(self)).endswith("\ufffd"):  # which stands for a character that is not whole
            print(text[self._num_printed :], end="", flush=True)
            self._num_printed = len(text)

    def end(self) -> None:
        """No token follows: the rest is printed, and the end of the line."""
        if self._stream:
            print(str(self)[self._num_printed :], flush=True)

    def write(self, ids: Sequence[int], following: Iterable[int], tokens: int, is_end: Callable[[int], bool]) -> str:
        """The whole text: of `ids`, and of up to `tokens` that follow, without the one that ends it."""
        self.put(ids)
        for token in itertools.takewhile(lambda token: not is_end(token), itertools.islice(following, tokens)):
            self.put(token)
        self.end()
        return str(self)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """The text of token ids, without special ones; more ids only add to it, so that spaces are not tidied."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read_prompt(tokenizer: Any, prompt: str) -> tuple[list[int], bool]:
    """Token ids that a causal model goes on from, and whether they are a user's turn of a chat, as the tokenizer's template has it. Raises DataError as the template."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id], False
    text = render_question(chat_template(tokenizer), prompt, tokenizer.special_tokens_map, tokenizer.name_or_path)
    return tokenizer.encode(text, add_special_tokens=False), True


def require_room(path: Path, longest: int | None, tokens: int, num_read: int = 0) -> None:
    """Raise ConfigError where `num_read` tokens of a prompt and `tokens` behind them are more than `longest`, the positions of the model at `path`."""
    if longest is not None and num_read + tokens > longest:
        needed = [f"the prompt has {num_read} tokens"] * (num_read > 0) + [f"{tokens} tokens are asked"] * (tokens > 0)
        raise ConfigError(f"{' and '.join(needed)}, but there is room for {longest} in {path}; shorten the prompt, or ask for fewer with --tokens.")
