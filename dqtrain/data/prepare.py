"""Corpus -> token ids -> shards: tokenised once, found again by content, continued after a kill where it stopped.

The folder of the shards is named after everything that decides their content, so that it is never stale. Needs transformers and tokenizers
for the tokenizer (imported on use), numpy for the rest; no torch.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqtrain.data.corpus import STDLIB, documents, stdlib_summary
from dqtrain.data.shard import Shard, write_shard, writing
from dqtrain.errors import DataError
from dqtrain.files import sync_path, temporary_beside, write_text

VERSION = 1
"""Format of the folder: the shards, their index, and how text becomes tokens."""
INDEX = "index.json"
END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARS = 2**22


def load_tokenizer(path: Path) -> Any:
    """Return the fast tokenizer of a Hugging Face directory. Raises DataError for one that cannot be loaded or has no `eos_token`."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise DataError(f"tokenizer {path} is not a directory; give one that holds tokenizer.json and tokenizer_config.json.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever they meet, bare Exception included
        raise DataError(f"tokenizer {path} cannot be loaded ({error}); it must hold a valid tokenizer.json and tokenizer_config.json.") from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {path} is a {type(tokenizer).__name__}, which has no fast version; convert it to a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {path} has no end of text; set `eos_token` in its tokenizer_config.json.")
    return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """The files that make a tokenizer, such as those that a copy of it needs. Raises DataError when there is none."""
    names = (
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    files = [path / name for name in names if (path / name).is_file()]
    if not any(file.name in names[:5] for file in files):
        raise DataError(f"tokenizer {path} holds no tokenizer.json; give a Hugging Face tokenizer directory.")
    return files


def tokenizer_hash(path: Path) -> str:
    """Return the sha256 of the files that make a tokenizer."""
    files = tokenizer_files(path)
    return hashlib.sha256(b"".join(file.name.encode() + hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def check_same_tokenizer(tokenizer: Path, model: Path) -> None:
    """Raise DataError when a tokenizer gives a word another id than the tokenizer in the directory of the model, if there is one."""
    if tokenizer == model or not (model / "tokenizer_config.json").is_file():
        return
    ours, theirs = load_tokenizer(tokenizer).get_vocab(), load_tokenizer(model).get_vocab()
    word = next((word for word in theirs if ours.get(word) != theirs[word]), None)
    if word is not None:
        raise DataError(
            f"tokenizer {tokenizer} gives `{word}` the id {ours.get(word)}, but the one beside the model in {model} gives it {theirs[word]}: the model would read "
            "other words. Set data.tokenizer to null, which takes the model's own."
        )


def train_tokenizer(sources: str | Sequence[str], text_field: str, vocab_size: int, out: Path, progress: Callable[[str], None] | None = None) -> None:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, section 2.2) on the train split and save it as a directory for AutoTokenizer.

    It gives back every text exactly; `<|endoftext|>` is its `eos_token`. Does nothing when `out` exists.
    Raises DataError when the corpus is too small for `vocab_size` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if out.exists():
        return
    if progress:
        progress(f"training a tokenizer of {vocab_size:,} entries on {_name(sources)}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((text for text, _ in _pieces(sources, "train", text_field)), trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise DataError(
            f"{_name(sources)} gives a tokenizer of {bpe.get_vocab_size()} entries, but data.train_tokenizer.vocab_size is {vocab_size}. "
            f"Set it to {bpe.get_vocab_size()} or less, or give more text."
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
    temporary = temporary_beside(out)
    try:
        with writing(out):
            temporary.mkdir()
            tokenizer.save_pretrained(temporary)
            for path in [*temporary.iterdir(), temporary]:
                sync_path(path)
            try:
                temporary.rename(out)
            except OSError:
                if not out.is_dir():  # else another process was first, with equal content
                    raise
            sync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(
    sources: str | Sequence[str],
    split: str,
    tokenizer: Path,
    root: Path,
    text_field: str = "text",
    progress: Callable[[str], None] | None = None,
    tokens_per_shard: int = 2**24,
) -> Path:
    """Tokenise a split into the shards of one folder below `root`, and return the folder; returns at once what is there already.

    Every document is followed by one `eos_token`. A shard ends with the first corpus piece that brings it to `tokens_per_shard` tokens.
    Killed and started again, it keeps the shards that are complete. Raises DataError for a corpus, tokenizer or disk that cannot be used.
    """
    hashed = tokenizer_hash(tokenizer)
    described = [_describe(source, split) for source in _listed(sources)]
    identity = json.dumps([VERSION, described, split, text_field, hashed, tokens_per_shard])
    folder = root / f"{split}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if _is_complete(folder):
        return folder

    fast = load_tokenizer(tokenizer)
    vocab_size = max(fast.get_vocab().values()) + 1
    shards = _complete_shards(folder)
    report = _Report(split, progress)
    tokenised = _tokenised(_pieces(sources, split, text_field), shards[-1].header["pieces_end"] if shards else 0, fast)
    for group in _groups(tokenised, tokens_per_shard, report):
        path = folder / _file(len(shards))
        lengths = np.array([len(ids) for ids, _, _ in group])
        write_shard(
            path,
            np.concatenate([ids for ids, _, _ in group]),
            np.cumsum(lengths)[[ends for _, ends, _ in group]],
            vocab_size=vocab_size,
            tokenizer_hash=hashed,
            source=_name(sources),
            split=split,
            num_bytes=sum(num_bytes for _, _, num_bytes in group),
            pieces_end=(shards[-1].header["pieces_end"] if shards else 0) + len(group),
        )
        shards.append(Shard(path))
    if not shards:
        raise DataError(f"corpus {_name(sources)} has no text for the split {split}; name a source that has.")
    index = {
        "version": VERSION,
        "split": split,
        "sources": described,
        "tokenizer_hash": hashed,
        "vocab_size": vocab_size,
        **{key: sum(shard.header[key] for shard in shards) for key in ("num_tokens", "num_documents", "num_bytes")},
        "shards": [
            {"file": shard.path.name, "num_tokens": shard.num_tokens, "num_documents": shard.header["num_documents"], "checksum": shard.checksum}
            for shard in shards
        ],
    }
    with writing(folder / INDEX):
        write_text(folder / INDEX, json.dumps(index, indent=1))
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """Return the `index.json` of a folder that `prepare` made. Raises DataError when it is missing, damaged or of another version."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        version = index["version"]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): the shards are not complete. Run dqtrain prepare again.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not an index of shards ({error}); delete {folder} and run dqtrain prepare again.") from None
    if version != VERSION:
        raise DataError(f"{path} has format version {version}, but this dqtrain reads {VERSION}; delete {folder} and run dqtrain prepare again.")
    return index


def _listed(sources: str | Sequence[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)


def _name(sources: str | Sequence[str]) -> str:
    return ", ".join(_listed(sources))


def _file(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _pieces(sources: str | Sequence[str], split: str, text_field: str) -> Iterator[tuple[str, bool]]:
    return itertools.chain.from_iterable(documents(source, split, text_field) for source in _listed(sources))


def _describe(source: str, split: str) -> dict[str, Any]:
    """Return what changes when the text of a source does."""
    if source == STDLIB:
        return {"source": source, "sha256": stdlib_summary()[split]["sha256"]}
    documents(source, split, "")  # names a source that is missing
    status = os.stat(source)
    return {"source": os.path.abspath(source), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_complete(folder: Path) -> bool:
    """Whether the index and every shard that it lists are there; their content is checked when it is read."""
    return (folder / INDEX).is_file() and all((folder / shard["file"]).is_file() for shard in read_index(folder)["shards"])


def _complete_shards(folder: Path) -> list[Shard]:
    paths = itertools.takewhile(Path.is_file, (folder / _file(number) for number in itertools.count()))
    return [Shard(path) for path in paths]


def _tokenised(pieces: Iterator[tuple[str, bool]], num_done: int, tokenizer: Any) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Yield (ids, ends_document, UTF-8 bytes) for every piece behind the first `num_done`."""
    pieces = itertools.islice(pieces, num_done, None)
    while batch := list(_take(pieces, _BATCH_CHARS)):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        for (text, ends_document), ids in zip(batch, encoded["input_ids"], strict=True):
            end = [tokenizer.eos_token_id] if ends_document else []
            yield np.array(ids + end, np.uint32), ends_document, len(text.encode())


def _take(pieces: Iterator[tuple[str, bool]], num_chars: int) -> Iterator[tuple[str, bool]]:
    while num_chars > 0 and (piece := next(pieces, None)) is not None:
        num_chars -= len(piece[0])
        yield piece


def _groups(tokenised: Iterator[tuple[np.ndarray, bool, int]], num_tokens: int, report: "_Report") -> Iterator[list[tuple[np.ndarray, bool, int]]]:
    """Gather pieces until they have `num_tokens` tokens: the content of one shard."""
    group: list[tuple[np.ndarray, bool, int]] = []
    missing = num_tokens
    for piece in tokenised:
        report.count(len(piece[0]), piece[1])
        group.append(piece)
        missing -= len(piece[0])
        if missing <= 0:
            yield group
            group, missing = [], num_tokens
    if group:
        yield group


class _Report:
    """Tells `progress` about once a second how far tokenising is."""

    def __init__(self, split: str, progress: Callable[[str], None] | None) -> None:
        self.split, self.progress = split, progress
        self.num_documents = self.num_tokens = 0
        self.started = self.told = time.monotonic()

    def count(self, num_tokens: int, ends_document: bool) -> None:
        self.num_tokens += num_tokens
        self.num_documents += ends_document
        now = time.monotonic()
        if self.progress and now - self.told >= 1:
            self.told = now
            rate = self.num_tokens / (now - self.started)
            self.progress(f"tokenising {self.split}: {self.num_documents:,} documents, {self.num_tokens:,} tokens, {rate:,.0f} tokens/s")
