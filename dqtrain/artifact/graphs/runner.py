"""Texts that are read and written by programs which run dqtrain's own graphs (`graphs.family`), with the keys and values of what was read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from dqtrain.artifact.text import Text, decoder, read_prompt, require_room
from dqtrain.data.prepare import encode_sources, load_tokenizer
from dqtrain.models.making import read_model_config


class Session(Protocol):
    """A graph that a program has loaded."""

    @property
    def inputs(self) -> Mapping[str, Sequence[Any]]:
        """Names and shapes; what varies is no number."""
        ...

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its outputs: arrays of the program's, which it may be given again beside those of numpy."""
        ...

    def array(self, value: Any) -> np.ndarray:
        """One of them."""
        ...


class GraphRunner:
    """A student in a program that runs graphs: a decoder, and perhaps an encoder, beside the config and tokenizer of `folder`."""

    def __init__(self, folder: Path, decoder: Session, encoder: Session | None) -> None:
        self.folder, self.decoder, self.encoder = folder, decoder, encoder
        self.config = read_model_config(folder)

    def start(self, source: Sequence[Sequence[int]] | None = None, batch: int = 1) -> "Reading":
        """Begin texts, for an encoder-decoder with the ids of their sources, all of one length."""
        return Reading(self, source, batch)

    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None, one_by_one: bool = False) -> Tensor:
        """Logits behind each token of a decoder, fp32 [tokens, vocabulary], in one pass or token `one_by_one`; `source` is what the encoder reads first."""
        reading = self.start(None if source is None else [source])
        parts = [[token] for token in ids] if one_by_one else [list(ids)]
        return torch.cat([torch.from_numpy(reading.read([part])[0]) for part in parts])

    def generate(self, prompt: str, tokens: int, stream: bool = False, alone: bool = False) -> str:
        """The prompt and its greedy continuation of up to `tokens` tokens, as `load.complete` gives it; printed as it is written with `stream`, and `alone` without the prompt.

        Raises ConfigError for too many tokens, DataError for a chat template that refuses the prompt.
        """
        tokenizer, longest = load_tokenizer(self.folder), getattr(self.config, "max_position_embeddings", None)
        file = self.folder / "generation_config.json"
        search: Any = GenerationConfig.from_pretrained(self.folder) if file.is_file() else GenerationConfig.from_model_config(self.config)
        if self.encoder is not None:
            require_room(self.folder, longest, tokens)
            [source] = encode_sources(tokenizer, [prompt], longest or 2**20, True)
            start = getattr(self.config, "decoder_start_token_id", None)
            ids, num_hidden = [search.decoder_start_token_id if start is None else start], 1
            forced = None if search.forced_bos_token_id == tokenizer.bos_token_id else search.forced_bos_token_id
            following, ends = self.greedily(ids, source, forced), [tokenizer.eos_token_id]
        else:
            ids, is_chat = read_prompt(tokenizer, prompt)
            require_room(self.folder, longest, tokens, len(ids))
            num_hidden = len(ids) if is_chat or alone else 0
            following, ends = self.greedily(ids), search.eos_token_id if isinstance(search.eos_token_id, list) else [search.eos_token_id]
        text = Text(decoder(tokenizer), num_hidden, stream)
        return text.write(ids, following, tokens, ends.__contains__)

    def greedily(self, ids: Sequence[int], source: Sequence[int] | None = None, forced: int | None = None) -> Iterator[int]:
        """The likeliest token behind `ids`, or the `forced` one, the likeliest behind that, and so on without an end."""
        reading, given = self.start(None if source is None else [source]), list(ids)
        while True:
            scores = reading.read([given])[0, -1]
            given, forced = [int(scores.argmax()) if forced is None else forced], None
            yield given[0]


class Reading:
    """Texts that are read on."""

    def __init__(self, runner: GraphRunner, source: Sequence[Sequence[int]] | None, batch: int) -> None:
        self._decoder = runner.decoder
        self._num_read, self._batch = 0, batch if source is None else len(source)
        self._kept = {}  # what every pass is given as it is
        if source is not None:
            assert runner.encoder is not None, "a causal model reads no source"
            mask = np.ones((len(source), len(source[0])), np.int64)
            found = runner.encoder.run({"input_ids": np.array(source, np.int64), "attention_mask": mask})
            self._kept = {name.replace("present", "past_key_values"): value for name, value in found.items()} | {"encoder_attention_mask": mask}
        empty = {name: shape for name, shape in self._decoder.inputs.items() if name.startswith("past_key_values") and name not in self._kept}
        self._past = {name: np.zeros((self._batch, shape[1], 0, shape[3]), np.float32) for name, shape in empty.items()}

    def read(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits behind each of these tokens, fp32 [batch, tokens, vocabulary]."""
        given = np.array(ids, np.int64)
        self._num_read += given.shape[1]
        feeds = {"input_ids": given, **self._kept, **self._past}
        if "attention_mask" in self._decoder.inputs:
            feeds["attention_mask"] = np.ones((self._batch, self._num_read), np.int64)
        found = self._decoder.run(feeds)
        logits = self._decoder.array(found.pop("logits"))
        self._past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits
