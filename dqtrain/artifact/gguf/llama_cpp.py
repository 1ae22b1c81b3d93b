"""llama.cpp as a runtime: a GGUF file's tokens and logits, by the C interface of llama.h in the library that the wheel `xllamacpp` is built around.

The wheel's own server gives log-probabilities of decoders, and does not run encoders; the functions of llama.h give every logit of both. What
they take by value are structs that grow from version to version. So defaults come from the library itself, in more room than they need, and the few
fields that are set here are looked at first: where one has not its known default, the layout is another one, and this file refuses to guess.
"""

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqtrain.artifact.description import check_if_listed
from dqtrain.artifact.gguf.files import files_of
from dqtrain.artifact.target import extra
from dqtrain.artifact.text import Text, require_room
from dqtrain.data.chat import render_question
from dqtrain.errors import CheckpointError, ConfigError

LONGEST = 2048
"""Tokens that a runtime has room for where it is not said: each takes memory, used or not."""


class _Params(ctypes.Structure):
    """Any struct of parameters, with room to spare: larger ones than 16 bytes travel as a copy in memory, of which the library reads its part."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


_CONTEXT = {"n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_outputs_max_per_seq": (6, 1), "n_threads": (7, 4), "n_threads_batch": (8, 4)}
_CONTEXT |= {"flash_attn_type": (13, 2**32 - 1), "type_k": (26, 1), "type_v": (27, 1)}
"""Fields of llama_context_params that are set here: their word, and their default."""


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []  # errors since the last call, for a message


@_LOG
def _hear(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _said.append(text.decode(errors="replace").strip())


@functools.cache
def _library() -> Any:
    lib: Any = ctypes.CDLL(extra("xllamacpp", "running a GGUF file").xllamacpp.__file__)
    pointer, integer, flag, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
    tokens = ctypes.POINTER(ctypes.c_int32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [text, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_has_encoder": (flag, [pointer]),
        "llama_model_decoder_start_token": (integer, [pointer]),
        "llama_model_n_ctx_train": (integer, [pointer]),
        "llama_model_chat_template": (text, [pointer, text]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_vocab_is_eog": (flag, [pointer, integer]),
        "llama_vocab_eos": (integer, [pointer]),
        "llama_vocab_bos": (integer, [pointer]),
        "llama_vocab_get_text": (text, [pointer, integer]),
        "llama_tokenize": (integer, [pointer, text, integer, tokens, integer, flag, flag]),
        "llama_detokenize": (integer, [pointer, tokens, integer, text, integer, flag, flag]),
        "llama_batch_init": (_Batch, [integer, integer, integer]),
        "llama_batch_free": (None, [_Batch]),
        "llama_encode": (integer, [pointer, _Batch]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, flag]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise _unknown(f"has no {name}") from None
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_hear, None)
    lib.llama_backend_init()
    defaults = lib.llama_context_default_params().words
    other = next((name for name, (word, default) in _CONTEXT.items() if defaults[word] != default), None)
    if other is not None:
        raise _unknown(f"has another llama_context_params, in which {other} is not where it was")
    return lib


def _unknown(what: str) -> ConfigError:
    import xllamacpp

    return ConfigError(f"the llama.cpp of xllamacpp {xllamacpp.__version__} {what}. Install the version that dqtrain's constraints.txt names.")


def require_runtime() -> None:
    """Raise ConfigError where no llama.cpp that is known can be loaded."""
    _library()


class LlamaCpp:
    """A GGUF model in llama.cpp on this machine's CPU, one sequence at a time: a file, any part of one, or the folder. A context manager.

    There is room for `longest` tokens (default: those of its training, but `LONGEST` at most). Keys and values are kept in fp32 where llama.cpp's own default
    is fp16, with `exact_cache`. Raises ConfigError without `xllamacpp` and for one whose interface is not known, CheckpointError for a missing part, for a file that is not what the
    list beside it says, if there is one, and for one that llama.cpp does not load.
    """

    def __init__(self, path: Path, exact_cache: bool = False, longest: int | None = None) -> None:
        self._lib = _library()
        self._model = self._context = None
        _said.clear()
        files = files_of(path) or [path]
        for file in files:
            check_if_listed(file)
            if not file.is_file():
                raise CheckpointError(f"{file}: is no file. Export it with `dqtrain export RUN --to gguf`.")
        self._model = self._lib.llama_model_load_from_file(str(files[0]).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp does not load it ({'; '.join(_said[:2]) or 'it says no reason'}). Export it again.")
        self.longest = longest or min(LONGEST, self._lib.llama_model_n_ctx_train(self._model))
        params = self._lib.llama_context_default_params()
        threads = torch.get_num_threads()
        fields = {"n_ctx": self.longest, "n_batch": self.longest, "n_ubatch": self.longest, "n_outputs_max_per_seq": self.longest}
        fields |= {"n_threads": threads, "n_threads_batch": threads}
        if exact_cache:
            fields |= {"flash_attn_type": 0, "type_k": 0, "type_v": 0}
        for name, found in fields.items():
            params.words[_CONTEXT[name][0]] = found
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self._lib.llama_model_free(self._model)
            raise CheckpointError(f"{path}: llama.cpp makes no context of {self.longest} tokens for it ({'; '.join(_said[:2])}).")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)
        self.has_encoder = self._lib.llama_model_has_encoder(self._model)
        self.path = path

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None, one_by_one: bool = False) -> Tensor:
        """Logits behind each token of a decoder, fp32 [tokens, vocabulary], in one pass or token `one_by_one`; `source` is what the encoder reads first."""
        self._forget(source)
        if one_by_one:
            return torch.cat([self._decode([token], place) for place, token in enumerate(ids)])
        return self._decode(ids, 0)

    def encode(self, text: str, special: bool = False, parsed: bool = False) -> list[int]:
        """Token ids of a text; with those that the tokenizer puts around it if `special`, and with those that are written out in it if `parsed`."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, parsed)
        assert count >= 0, "a token is no shorter than a byte"
        return ids[:count]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special ones."""
        room = 64 + 64 * len(ids)
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._lib.llama_detokenize(self._vocab, (ctypes.c_int32 * len(ids))(*ids), len(ids), text, room, True, False)
            if count >= 0:
                return text.raw[:count].decode(errors="replace")
            room = -count

    def generate(self, prompt: str, tokens: int, stream: bool = False, alone: bool = False) -> str:
        """The prompt and its greedy continuation of up to `tokens` tokens; of an encoder-decoder what it writes for the prompt; printed as it is written with `stream`, and `alone` without the prompt.

        Where the file has a chat template the prompt is what a user says, and the answer alone is given. Raises ConfigError for too many tokens, DataError for a
        template that refuses the prompt.
        """
        source, num_hidden = None, 0
        template = self._lib.llama_model_chat_template(self._model, None)
        if self.has_encoder:
            eos = self._lib.llama_vocab_eos(self._vocab)
            source = self.encode(prompt, special=True, parsed=True)
            source += [] if source[-1:] == [eos] else [eos]
            require_room(self.path, self.longest, 0, len(source))
            ids, num_hidden = [self._lib.llama_model_decoder_start_token(self._model)], 1
        elif template is not None:
            found = {"bos_token": self._lib.llama_vocab_bos(self._vocab), "eos_token": self._lib.llama_vocab_eos(self._vocab)}
            special = {name: self._lib.llama_vocab_get_text(self._vocab, token).decode() for name, token in found.items() if token >= 0}
            ids = self.encode(render_question(template.decode(), prompt, special, str(self.path)), parsed=True)
            num_hidden = len(ids)
        else:
            ids = self.encode(prompt, parsed=True) or [self._lib.llama_vocab_eos(self._vocab)]
            num_hidden = len(ids) if alone else 0
        require_room(self.path, self.longest, tokens, 0 if self.has_encoder else len(ids))
        is_end = functools.partial(self._lib.llama_vocab_is_eog, self._vocab)
        return Text(self.decode, num_hidden, stream).write(ids, self.greedily(ids, source), tokens, is_end)

    def greedily(self, ids: Sequence[int], source: Sequence[int] | None = None) -> Iterator[int]:
        """The likeliest token behind `ids`, the one behind that, and so on without an end."""
        self._forget(source)
        self._run(self._lib.llama_decode, ids, 0, only_last=True)
        for place in itertools.count(len(ids)):
            token = int(self._logits(-1).argmax())
            yield token
            self._run(self._lib.llama_decode, [token], place)

    def _forget(self, source: Sequence[int] | None) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        if source is not None:
            self._run(self._lib.llama_encode, source, 0)

    def _decode(self, ids: Sequence[int], first: int) -> Tensor:
        self._run(self._lib.llama_decode, ids, first)
        return torch.from_numpy(np.stack([self._logits(i) for i in range(len(ids))]))

    def _logits(self, place: int) -> np.ndarray:
        """Of one token of the last call, -1 for its last; llama.cpp's own memory, until the next call."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, place), (self.vocab_size,))

    def _run(self, function: Any, ids: Sequence[int], first: int, only_last: bool = False) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), first + i, 1, 0
                batch.logits[i] = not only_last or i == len(ids) - 1
            _said.clear()
            code = function(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code:
            raise CheckpointError(f"{self.path}: llama.cpp refuses {len(ids)} tokens behind {first} (code {code}; {'; '.join(_said[:2])}).")
