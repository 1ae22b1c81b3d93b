"""A corpus that the teacher writes, for distillation without data.

LLM-QAT (Liu et al. 2023, section 3.1, https://arxiv.org/abs/2305.17888): a document starts with a word of the vocabulary, each in turn; the
next 3 to 5 tokens are the likeliest ones, so that the start is sound, and the others are drawn from the teacher's distribution, so that
texts differ.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from transformers import PreTrainedModel

from dqtrain.artifact.description import check_if_listed
from dqtrain.data.prepare import load_tokenizer, tokenizer_files
from dqtrain.data.shard import writing
from dqtrain.errors import ConfigError
from dqtrain.files import digest, sync_path, write_text
from dqtrain.models.making import load_model, read_model_config

VERSION = 1
"""Of how a document follows from the teacher, the seed and its number."""
NO_CHARACTER = "\ufffd"
"""What a decoder writes for bytes that are no character."""


def synthesize(
    teacher: Path,
    out: Path,
    num_documents: int,
    tokens: int,
    seed: int,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a .jsonl corpus of `num_documents` texts (field `text`) of up to `tokens` tokens each, by the causal model in the directory `teacher`.

    Document i depends on the teacher, `seed` and i, and on `batch` by rounding alone. Whole batches are appended to `out`.part; killed and started
    again, it goes on behind the last one. `out`.json keeps the settings: a finished file of the same ones is left alone. A GPU is used if there
    is one, in bf16. `progress` is called with (documents done, documents). Raises ConfigError for a teacher that cannot do it and for an `out` of other
    settings, DataError for a tokenizer or disk that cannot be used, CheckpointError for a teacher that is not what the list in its folder says.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: a corpus of documents is a .jsonl file; give a name that ends so.")
    for name, value, least in (("num_documents", num_documents, 1), ("tokens", tokens, 2), ("batch", batch, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}, but must be {least} or more.")
    check_if_listed(teacher)
    config = read_model_config(teacher)
    if config.is_encoder_decoder:
        raise ConfigError(f"{teacher}: {config.model_type} writes from a source alone, but a causal language model is needed. Give another teacher.")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ConfigError(f"tokens is {tokens}, but {teacher} has {longest} positions; set it to {longest} or less.")
    part, settings_file = (out.with_name(out.name + suffix) for suffix in (".part", ".json"))
    settings = {"version": VERSION, "teacher": _digest(teacher), "seed": seed, "tokens": tokens, "num_documents": num_documents}
    _keep_settings(settings_file, settings, (out, part))
    if out.exists():
        return

    tokenizer = load_tokenizer(teacher)
    words, texts_alone = _words(tokenizer, config.vocab_size)
    starts = np.random.default_rng(seed).permutation(texts_alone)
    model = _on_device(load_model(teacher))
    with writing(part), part.open("a+b") as file:
        done = _keep_whole_batches(file, batch)
        while done < num_documents:
            numbers = range(done, min(done + batch, num_documents))
            rows = _documents(model, numbers, starts, words, tokenizer.eos_token_id, tokens, seed)
            # The last token may be a piece of a character.
            texts = [text.rstrip(NO_CHARACTER) for text in tokenizer.batch_decode(rows)]
            file.write("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode())
            file.flush()
            os.fsync(file.fileno())
            done = numbers.stop
            if progress:
                progress(done, num_documents)
    with writing(out):
        os.replace(part, out)
        sync_path(out.parent)


def _digest(teacher: Path) -> str:
    """Of every file that decides what the teacher writes."""
    weights = [path for path in teacher.iterdir() if path.suffix in (".safetensors", ".bin")]
    files = sorted({teacher / "config.json", *weights, *tokenizer_files(teacher)})
    return xxhash.xxh3_128_hexdigest("".join(f"{path.name} {digest(path)}\n" for path in files).encode())


def _keep_settings(path: Path, settings: dict[str, Any], texts: tuple[Path, ...]) -> None:
    """Write down what `texts` are, before they are. Raises ConfigError where they are something else."""
    if not path.exists():
        unknown = next((text for text in texts if text.exists()), None)
        if unknown is not None:
            raise ConfigError(f"{unknown} is there, but {path}, which says what it was made with, is not; remove it or give another name.")
        with writing(path):
            write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        found = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not say what {texts[0]} was made with ({error}); remove both or give another name.") from None
    key = next((key for key, value in settings.items() if found.get(key) != value), None)
    if key is not None:
        raise ConfigError(f"{texts[0]} was begun with {key} {found.get(key)}, but this is {settings[key]}; remove it with {path}, or give another name.")


def _words(tokenizer: Any, vocab_size: int) -> tuple[list[int], list[int]]:
    """Ids of all tokens that are no special ones, ascending, and of those that are text on their own, not a piece of a character."""
    special = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
    words = sorted(id for id in tokenizer.get_vocab().values() if id < vocab_size and id not in special)
    texts = tokenizer.batch_decode([[id] for id in words])
    return words, [id for id, text in zip(words, texts, strict=True) if text and NO_CHARACTER not in text]


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    """On a GPU, if there is one, in bf16."""
    if torch.cuda.is_available():
        for parameter in model.parameters():  # not buffers: the frequencies of rotary embeddings need fp32
            parameter.data = parameter.data.to("cuda", torch.bfloat16)
        model.to("cuda")  # type: ignore[arg-type]
    return model


def _keep_whole_batches(file: IO[bytes], batch: int) -> int:
    """Cut off what follows the last whole batch of documents, such as a line that a kill tore; their number."""
    ends = [0]
    file.seek(0)
    for line in file:
        try:
            json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            break
        if not line.endswith(b"\n"):
            break
        ends.append(ends[-1] + len(line))
    done = (len(ends) - 1) // batch * batch
    file.truncate(ends[done])
    return done


@torch.no_grad()
def _documents(model: Any, numbers: range, starts: np.ndarray, words: list[int], end: int, tokens: int, seed: int) -> list[list[int]]:
    """Token ids of the documents of these numbers, without the end of text.

    All rows start with one token and grow by one per step, so that none needs padding; one that has ended reads ends on, ignored.
    Of what is no word, the end alone may be drawn: other special tokens, and rows of the embedding without an entry in the tokenizer, are no text.
    """
    device = model.device
    draws = [np.random.default_rng(xxhash.xxh64_intdigest(f"{seed}/{i}".encode())) for i in numbers]
    num_greedy = torch.tensor([draw.integers(3, 6) for draw in draws], device=device)
    uniform = torch.tensor(np.stack([draw.random(tokens) for draw in draws]), device=device)  # [documents, tokens]
    allowed = torch.tensor(sorted({*words, end}), device=device)
    written = torch.full((len(numbers), tokens), end, device=device)
    written[:, 0] = torch.tensor([starts[i % len(starts)] for i in numbers])
    cache = None
    for position in range(1, tokens):
        before = written[:, position - 1]
        said = model(input_ids=before[:, None], past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        probabilities = said.logits[:, -1, allowed].double().softmax(-1)
        # One number u draws each row's token: the first one at which the cumulative distribution passes u.
        cumulative = probabilities.cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, position, None] * cumulative[:, -1:], right=True)[:, 0].clamp(max=len(allowed) - 1)
        chosen = allowed[torch.where(position <= num_greedy, probabilities.argmax(-1), drawn)]
        written[:, position] = torch.where(before == end, end, chosen)
        if bool((written[:, position] == end).all()):
            break
    return [row[: row.index(end)] if end in row else row for row in written.tolist()]
