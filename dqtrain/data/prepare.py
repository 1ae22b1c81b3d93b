"""Corpus -> token ids -> shards: tokenised once, found again by content, continued after a kill where it stopped.

The folder of the shards is named after everything that decides their content, so that it is never stale. Of text, a document is a text and its end;
of pairs, documents 2i and 2i + 1 are the source and the target of pair i, in one shard. Needs transformers and tokenizers for the tokenizer
(imported on use), numpy for the rest; no torch.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dqtrain.config import Pairs
from dqtrain.data.corpus import STDLIB, documents, stdlib_summary
from dqtrain.data.corpus import pairs as pairs_of
from dqtrain.data.docstrings import DOCSTRINGS, docstrings_summary
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


def train_tokenizer(
    sources: str | Sequence[str],
    text_field: str,
    vocab_size: int,
    out: Path,
    progress: Callable[[str], None] | None = None,
    pairs: Pairs | None = None,
) -> None:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, section 2.2) on the train split and save it as a directory for AutoTokenizer.

    It gives back every text exactly; `<|endoftext|>` is its `eos_token`. Of `pairs` it reads sources, in their template, and targets.
    Does nothing when `out` exists. Raises DataError when the corpus is too small for `vocab_size` entries.
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
    if pairs is None:
        texts: Iterator[str] = (text for text, _ in _pieces(sources, "train", text_field))
    else:
        texts = itertools.chain.from_iterable(_pairs(sources, "train", pairs))
    bpe.train_from_iterator(texts, trainer)
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
    pairs: Pairs | None = None,
    encoder_decoder: bool = False,
) -> Path:
    """Tokenise a split into the shards of one folder below `root`, and return the folder; returns at once what is there already.

    Every text is followed by one `eos_token`. A shard ends with the first corpus piece that brings it to `tokens_per_shard` tokens.
    With `pairs`, a piece is a source in its template and a target, both cut to the tokens of the settings. For `encoder_decoder` both have the special
    tokens of the tokenizer, and an `eos_token` behind them if it gives none; else only targets have an `eos_token`, and sources are cut on the left.
    Killed and started again, it keeps the shards that are complete. Raises DataError for a corpus, tokenizer or disk that cannot be used.
    """
    hashed = tokenizer_hash(tokenizer)
    described = [_describe(source, split, pairs) for source in _listed(sources)]
    kind = {"pairs": pairs.model_dump(), "encoder_decoder": encoder_decoder} if pairs else {}
    identity = json.dumps([VERSION, described, split, text_field, hashed, tokens_per_shard, *kind.values()])
    folder = root / f"{split}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if _is_complete(folder):
        return folder

    fast = load_tokenizer(tokenizer)
    vocab_size = max(fast.get_vocab().values()) + 1
    shards = _complete_shards(folder)
    num_done = shards[-1].header["pieces_end"] if shards else 0
    if pairs is None:
        pieces = _tokenised(itertools.islice(_pieces(sources, split, text_field), num_done, None), fast)
    else:
        pieces = _tokenised_pairs(itertools.islice(_pairs(sources, split, pairs), num_done, None), fast, pairs, encoder_decoder)
    for group in _groups(pieces, tokens_per_shard, _Report(split, progress)):
        path = folder / _file(len(shards))
        num_done += len(group)
        starts = itertools.accumulate((len(piece.ids) for piece in group), initial=0)
        write_shard(
            path,
            np.concatenate([piece.ids for piece in group]),
            np.array([start + end for start, piece in zip(starts, group, strict=False) for end in piece.document_ends], np.int64),
            vocab_size=vocab_size,
            tokenizer_hash=hashed,
            source=_name(sources),
            split=split,
            num_bytes=sum(piece.num_bytes for piece in group),
            pieces_end=num_done,
        )
        shards.append(Shard(path))
    if not shards:
        raise DataError(f"corpus {_name(sources)} has no {'pairs' if pairs else 'text'} for the split {split}; name a source that has.")
    index = {
        "version": VERSION,
        "split": split,
        "sources": described,
        "tokenizer_hash": hashed,
        "vocab_size": vocab_size,
        **kind,
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


def _pairs(sources: str | Sequence[str], split: str, settings: Pairs) -> Iterator[tuple[str, str]]:
    """The pairs of all sources, with what the template makes of a source."""
    for source, target in itertools.chain.from_iterable(pairs_of(name, split, settings) for name in _listed(sources)):
        yield settings.template.replace("{source}", source), target


def _describe(source: str, split: str, settings: Pairs | None) -> dict[str, Any]:
    """Return what changes when the text of a source does."""
    # Names a source that is missing or of the other kind.
    if settings is None:
        documents(source, split, "")
    else:
        pairs_of(source, split, settings)
    if source in (STDLIB, DOCSTRINGS):
        summary = stdlib_summary() if source == STDLIB else docstrings_summary()
        return {"source": source, "sha256": summary[split]["sha256"]}
    status = os.stat(source)
    return {"source": os.path.abspath(source), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_complete(folder: Path) -> bool:
    """Whether the index and every shard that it lists are there; their content is checked when it is read."""
    return (folder / INDEX).is_file() and all((folder / shard["file"]).is_file() for shard in read_index(folder)["shards"])


def _complete_shards(folder: Path) -> list[Shard]:
    paths = itertools.takewhile(Path.is_file, (folder / _file(number) for number in itertools.count()))
    return [Shard(path) for path in paths]


@dataclass(frozen=True)
class _Piece:
    """What no shard takes apart: `ids` uint32 [tokens], where documents end in them, and the UTF-8 bytes of the text."""

    ids: np.ndarray
    document_ends: tuple[int, ...]
    num_bytes: int


def _tokenised(pieces: Iterator[tuple[str, bool]], tokenizer: Any) -> Iterator[_Piece]:
    while batch := list(_take(pieces, _BATCH_CHARS, lambda piece: len(piece[0]))):
        for (text, ends_document), ids in zip(batch, _encode(tokenizer, text=[text for text, _ in batch], add_special_tokens=False), strict=True):
            end = [tokenizer.eos_token_id] if ends_document else []
            yield _Piece(np.array(ids + end, np.uint32), (len(ids) + 1,) if ends_document else (), len(text.encode()))


def _tokenised_pairs(pairs: Iterator[tuple[str, str]], tokenizer: Any, settings: Pairs, encoder_decoder: bool) -> Iterator[_Piece]:
    cut = _cut_for_encoder_decoder if encoder_decoder else _cut_for_causal
    while batch := list(_take(pairs, _BATCH_CHARS, lambda pair: len(pair[0]) + len(pair[1]))):
        sources, targets = cut([source for source, _ in batch], [target for _, target in batch], tokenizer, settings)
        for texts, source, target in zip(batch, sources, targets, strict=True):
            yield _Piece(np.array(source + target, np.uint32), (len(source), len(source) + len(target)), sum(len(text.encode()) for text in texts))


def _cut_for_encoder_decoder(sources: list[str], targets: list[str], tokenizer: Any, settings: Pairs) -> tuple[list[list[int]], list[list[int]]]:
    end = _missing_end(tokenizer)
    num_special = tokenizer.num_special_tokens_to_add() + len(end)
    _check_room(settings, num_special, num_special)
    target_ids = _encode(tokenizer, text_target=targets, truncation=True, max_length=settings.target_tokens - len(end))
    return encode_sources(tokenizer, sources, settings.source_tokens, encoder_decoder=True), [ids + end for ids in target_ids]


def _cut_for_causal(sources: list[str], targets: list[str], tokenizer: Any, settings: Pairs) -> tuple[list[list[int]], list[list[int]]]:
    _check_room(settings, 0, 1)
    target_ids = _encode(tokenizer, text=targets, add_special_tokens=False)
    ended = [[*ids[: settings.target_tokens - 1], tokenizer.eos_token_id] for ids in target_ids]
    return encode_sources(tokenizer, sources, settings.source_tokens, encoder_decoder=False), ended


def encode_sources(tokenizer: Any, sources: Sequence[str], source_tokens: int, encoder_decoder: bool) -> list[list[int]]:
    """Token ids of each source (template applied), cut to `source_tokens`, in training and in generation.

    For an encoder with the tokenizer's special tokens, an end of text among them; for a causal model without any and cut on the left, since the
    end of a prompt is what matters. Raises DataError for a source that gives a causal model nothing to continue.
    """
    if encoder_decoder:
        end = _missing_end(tokenizer)
        return [ids + end for ids in _encode(tokenizer, text=list(sources), truncation=True, max_length=source_tokens - len(end))]
    encoded = [ids[-source_tokens:] for ids in _encode(tokenizer, text=list(sources), add_special_tokens=False)]
    if [] in encoded:
        text = sources[encoded.index([])]
        raise DataError(f"the tokenizer makes no token of the source `{text[:40]}`, but a target must follow one; mend or remove the pair.")
    return encoded


def _missing_end(tokenizer: Any) -> list[int]:
    """The end of text, unless the tokenizer adds it as BART's and T5's do."""
    return [] if tokenizer.eos_token_id in _encode(tokenizer, text_target=["a"])[0] else [tokenizer.eos_token_id]


def _check_room(settings: Pairs, special_of_source: int, special_of_target: int) -> None:
    for name, num_tokens, num_special in (("source", settings.source_tokens, special_of_source), ("target", settings.target_tokens, special_of_target)):
        if num_tokens <= num_special:
            raise DataError(f"data.pairs.{name}_tokens is {num_tokens}, but {num_special} of a {name} are special tokens; set it to {num_special + 1} or more.")


def _encode(tokenizer: Any, **texts_and_settings: Any) -> list[list[int]]:
    encoded = tokenizer(**texts_and_settings, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return encoded["input_ids"]


def _take(pieces: Iterator[Any], num_chars: int, length: Callable[[Any], int]) -> Iterator[Any]:
    while num_chars > 0 and (piece := next(pieces, None)) is not None:
        num_chars -= length(piece)
        yield piece


def _groups(pieces: Iterator[_Piece], num_tokens: int, report: "_Report") -> Iterator[list[_Piece]]:
    """Gather pieces until they have `num_tokens` tokens: the content of one shard."""
    group: list[_Piece] = []
    missing = num_tokens
    for piece in pieces:
        report.count(len(piece.ids), len(piece.document_ends))
        group.append(piece)
        missing -= len(piece.ids)
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

    def count(self, num_tokens: int, num_documents: int) -> None:
        self.num_tokens += num_tokens
        self.num_documents += num_documents
        now = time.monotonic()
        if self.progress and now - self.told >= 1:
            self.told = now
            rate = self.num_tokens / (now - self.started)
            self.progress(f"tokenising {self.split}: {self.num_documents:,} documents, {self.num_tokens:,} tokens, {rate:,.0f} tokens/s")
