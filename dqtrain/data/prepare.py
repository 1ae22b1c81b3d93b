"""Sources -> token ids -> shards: tokenised once, found again by content, continued after a kill where it stopped.

Each source has a folder of its own, named after everything that decides its content, so that it is never stale. The source alone says into which parts it is
cut; a part is made by one process, in shards of its own, and ends with a record of them; the index is written when every part has its record, by whoever
made the last one. So any number of processes, or tasks on several machines, make the same files, and none waits for another.

Of text, a document is a text and its end; of a chat, what the template makes of it; of pairs, documents 2i and 2i + 1 are the source and the target of pair i,
in one shard. Needs transformers and tokenizers for the tokenizer (imported on use), numpy for the rest; no torch.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dqtrain.config import Data, Pairs, Source
from dqtrain.data import sources as files
from dqtrain.data.chat import ChatText, chat_template, encode_chats, render_chat
from dqtrain.data.corpus import Corpus, chats, documents, find_corpus, texts_of
from dqtrain.data.corpus import pairs as pairs_of
from dqtrain.data.shard import Shard, write_shard, writing
from dqtrain.data.sources import LeftOut, Unit, is_tokens
from dqtrain.data.work import Report, share_out
from dqtrain.errors import DataError
from dqtrain.files import sync_path, temporary_beside, write_text

VERSION = 2
"""Format of the folder: the shards, their index, and how text becomes tokens."""
INDEX = "index.json"
END_OF_TEXT = "<|endoftext|>"
TOKENS_PER_SHARD = 2**25
"""More than a part of text usually has, so that it makes one shard."""
_BATCH_CHARS = 2**20
_ABANDONED_S = 3600
"""A file that is being written is not touched for so long by no living writer."""


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


def train_tokenizer(sources: Sequence[Source], vocab_size: int, out: Path, progress: Callable[[str], None] | None = None, pairs: Pairs | None = None) -> None:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, section 2.2) on the train split and save it as a directory for AutoTokenizer.

    It gives back every text exactly; `<|endoftext|>` is its `eos_token`. Of `pairs` it reads sources, in their template, and targets.
    Does nothing when `out` exists. Raises DataError when the corpus is too small for `vocab_size` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if out.exists():
        return
    name = ", ".join(source.path for source in sources)
    if progress:
        progress(f"training a tokenizer of {vocab_size:,} entries on {name}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts_of(sources, "train", pairs), trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise DataError(
            f"{name} gives a tokenizer of {bpe.get_vocab_size()} entries, but data.train_tokenizer.vocab_size is {vocab_size}. "
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
    data: Data,
    split: str,
    tokenizer: Path,
    root: Path,
    *,
    encoder_decoder: bool = False,
    progress: Report | None = None,
    workers: int | None = None,
    share: tuple[int, int] | None = None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> list[Path | str]:
    """Tokenise the sources of a split, each into the shards of one folder below `root`; the folders in their order. What is there already is kept.

    A source that is tokens already stays where it is: its path, or address, is in the place of the folder.

    Every text is followed by one `eos_token`. With `data.pairs`, a source in its template and a target are cut to the tokens of the settings; for
    `encoder_decoder` both have the special tokens of the tokenizer, and an `eos_token` behind them if it gives none; else only targets have an `eos_token`,
    and sources are cut on the left. A part is cut into shards of `tokens_per_shard` tokens or a little more.
    `workers`: processes (default: one for each processor); `share` (k, n): make only every n-th part, from k, for n tasks that share the work; the folders
    are complete when all of them are done. Killed and started again, it keeps the shards that are complete.
    Raises DataError for a corpus, tokenizer or disk that cannot be used, or when more lines are bad than a source allows.
    """
    sources = data.sources(split)
    if not sources:
        raise DataError(f"data.{split} names no source; give it a path.")
    planned = [
        _tokens_of(source, data, tokenizer, encoder_decoder)
        if is_tokens(source)
        else _plan_job(source, data, split, tokenizer, root, encoder_decoder, tokens_per_shard)
        for source in sources
    ]
    for job in planned:
        if isinstance(job, _Job):
            _run(job, progress, workers, share)
    return [job.folder if isinstance(job, _Job) else job for job in planned]


def folders_of(data: Data, split: str, tokenizer: Path, root: Path, encoder_decoder: bool = False) -> list[Path | str]:
    """Where `prepare` puts the sources of a split, whether or not they are there."""
    return [
        _tokens_of(source, data, tokenizer, encoder_decoder)
        if is_tokens(source)
        else _plan_job(source, data, split, tokenizer, root, encoder_decoder, TOKENS_PER_SHARD).folder
        for source in data.sources(split)
    ]


def _tokens_of(source: Source, data: Data, tokenizer: Path, encoder_decoder: bool) -> Path | str:
    """Where the tokens of a source are. Raises DataError for those that another tokenizer made, or that were cut in another way."""
    path = source.path.removesuffix("/" + INDEX)
    where: Path | str = path if "://" in path else Path(path)
    if path.endswith((".bin", ".ds")):
        if data.pairs is not None:
            raise DataError(
                f"{path} holds text, without sources and targets, but data.pairs asks for pairs; prepare them from a file of text, or remove data.pairs."
            )
        return where
    if isinstance(where, Path):
        index = read_index(where)
    else:
        with files.reading(path), files.open_bytes(f"{path}/{INDEX}") as file:
            index = parse_index(f"{path}/{INDEX}", file.read())
    if index["tokenizer_hash"] != (hashed := tokenizer_hash(tokenizer)):
        raise DataError(
            f"the tokens in {path} were made by a tokenizer with the hash {index['tokenizer_hash'][:12]}, but {tokenizer} has {hashed[:12]}: the model would read "
            "other words. Prepare them with the tokenizer of this run, or set data.tokenizer to theirs."
        )
    asked = {"pairs": data.pairs.model_dump(), "encoder_decoder": encoder_decoder} if data.pairs else {}
    found = {key: index[key] for key in ("pairs", "encoder_decoder") if key in index}
    if asked != found or data.samples == "documents" != index["samples"]:
        what = f"{json.dumps(found)}, but this run asks for {json.dumps(asked)}" if asked != found else "samples: packed, but this run asks for documents"
        raise DataError(f"the tokens in {path} were made with {what}; prepare the text of them again, or change data.")
    return where


@dataclass(frozen=True)
class _Job:
    """All that decides what is in a folder; goes to other processes."""

    corpus: Corpus
    split: str
    tokenizer: Path
    tokenizer_hash: str
    folder: Path
    samples: str
    encoder_decoder: bool
    tokens_per_shard: int
    parts: tuple[tuple[Unit, ...], ...]

    def record(self, part: int) -> Path:
        """The file that says that a part is complete."""
        return self.folder / f"part-{part:05d}.json"


def _plan_job(source: Source, data: Data, split: str, tokenizer: Path, root: Path, encoder_decoder: bool, tokens_per_shard: int) -> _Job:
    corpus = find_corpus(source, split, data.pairs, whole_texts=data.samples == "documents")
    hashed = tokenizer_hash(tokenizer)
    how = {"pairs": data.pairs.model_dump(), "encoder_decoder": encoder_decoder} if data.pairs else {"text": source.text, "messages": source.messages}
    identity = json.dumps([VERSION, corpus.about, split, data.samples, how, hashed, tokens_per_shard, files.UNIT_BYTES])
    folder = root / f"{split}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return _Job(corpus, split, tokenizer, hashed, folder, data.samples, encoder_decoder, tokens_per_shard, _parts(corpus.units))


def _parts(units: Sequence[Unit]) -> tuple[tuple[Unit, ...], ...]:
    """Units side by side, until they are about as large as one can be."""
    parts: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    for unit in units:
        group.append(unit)
        if sum(unit.num_bytes for unit in group) >= files.UNIT_BYTES // 2:
            parts.append(tuple(group))
            group = []
    return (*parts, tuple(group)) if group else tuple(parts)


def _run(job: _Job, progress: Report | None, workers: int | None, share: tuple[int, int] | None) -> None:
    """Make what is missing of a folder."""
    index = read_index(job.folder) if (job.folder / INDEX).is_file() else None
    if index is None:
        missing = [part for part in range(len(job.parts)) if not job.record(part).is_file()]
    else:
        missing = sorted({entry["part"] for entry in index["shards"] if not (job.folder / entry["file"]).is_file()})
    mine = [part for part in missing if share is None or part % share[1] == share[0]]
    if mine:
        _tokenizer(job.tokenizer, job.tokenizer_hash)  # so that a mistake is told once
        num_bytes = sum(unit.num_bytes for part in mine for unit in job.parts[part])
        share_out(functools.partial(_make_part, job), mine, workers, f"tokenising {job.split} of {job.corpus.source.path}", num_bytes, progress)
    if index is None:
        index = _write_index(job)
    else:
        _check_made_again(job, index, mine)
    if index is None:
        if progress:
            left = sum(not job.record(part).is_file() for part in range(len(job.parts)))
            progress(f"{left} of {len(job.parts)} parts of {job.corpus.source.path} are left to other tasks", None)
        return
    left_out = LeftOut(job.corpus.source.max_bad_lines)
    left_out.num_bad = index["num_bad_lines"]
    left_out.check(index["first_bad_line"])  # the allowance may be another one now
    said = [f"{index['num_bad_lines']:,} bad lines, such as {index['first_bad_line']}"] * bool(left_out.num_bad)
    said += [f"{index['num_empty']:,} documents without text"] * bool(index["num_empty"])
    if said and mine and progress:
        progress(f"{job.corpus.source.path}: left out {' and '.join(said)}", None)


def _write_index(job: _Job) -> dict[str, Any] | None:
    """The last file, without which the others do not count; None when parts of other tasks are missing. Whoever comes last writes it, or several do, the same."""
    try:
        records = [json.loads(job.record(part).read_bytes()) for part in range(len(job.parts))]
    except FileNotFoundError:  # not made yet; or another task has just written the index
        if not (job.folder / INDEX).is_file():
            return None
        _tidy(job.folder)
        return read_index(job.folder)
    source = job.corpus.source
    if not any(record["shards"] for record in records):
        shutil.rmtree(job.folder, ignore_errors=True)
        what = {"text": "text", "pairs": "pairs", "chat": "chats with an assistant"}[job.corpus.kind]
        raise DataError(f"corpus {source.path} has no {what} for the split {job.split}; name a source that has.")
    totals = {key: sum(record[key] for record in records) for key in ("num_tokens", "num_documents", "num_bytes", "num_empty", "num_bad_lines")}
    left_out = LeftOut(source.max_bad_lines)
    left_out.num_bad, first = totals["num_bad_lines"], next((record["first_bad_line"] for record in records if record["first_bad_line"]), "")
    left_out.check(first)
    index = {
        "version": VERSION,
        "split": job.split,
        "source": job.corpus.about,
        "kind": job.corpus.kind,
        "samples": job.samples,
        "tokenizer": str(job.tokenizer.absolute()),
        "tokenizer_hash": job.tokenizer_hash,
        "vocab_size": _vocab_size(_tokenizer(job.tokenizer, job.tokenizer_hash)),
        **({"pairs": job.corpus.pairs.model_dump(), "encoder_decoder": job.encoder_decoder} if job.corpus.pairs else {}),
        **totals,
        "first_bad_line": first,
        "lengths": _join_lengths([record["lengths"] for record in records]),
        "shards": [{**shard, "part": part} for part, record in enumerate(records) for shard in record["shards"]],
    }
    with writing(job.folder / INDEX):
        write_text(job.folder / INDEX, json.dumps(index))
    _tidy(job.folder)
    return index


def _tidy(folder: Path) -> None:
    """Remove what a folder with an index does not need any more: the records of parts, and what killed writers left."""
    for path in folder.glob("part-*.json"):
        path.unlink(missing_ok=True)
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


def _check_made_again(job: _Job, index: dict[str, Any], parts: Sequence[int]) -> None:
    """Shards that were lost must come out as they were, or the index is about others."""
    for part in parts:
        made = json.loads(job.record(part).read_bytes())["shards"]
        if made != [{key: value for key, value in entry.items() if key != "part"} for entry in index["shards"] if entry["part"] == part]:
            raise DataError(
                f"the shards of part {part} in {job.folder} came out otherwise than the index says; delete {job.folder} and run dqtrain prepare again."
            )
        job.record(part).unlink(missing_ok=True)


def _make_part(job: _Job, part: int, report: Callable[[int, int, int], None]) -> None:
    """Write the shards of a part that are not there, and its record. `report` is called with more (documents, tokens, bytes of the source)."""
    fast = _tokenizer(job.tokenizer, job.tokenizer_hash)
    left_out = LeftOut(job.corpus.source.max_bad_lines)
    shards = _complete_shards(job, part)
    num_done = shards[-1].header["pieces_end"] if shards else 0
    vocab_size = _vocab_size(fast)
    groups = _groups(_batches(job, part, fast, left_out, num_done, report), job.tokens_per_shard, whole_documents=job.samples == "documents")
    for group in groups:
        path = job.folder / f"shard-{part:05d}-{len(shards):05d}.bin"
        num_done += len(group.piece_ends)
        write_shard(
            path,
            group.ids,
            group.document_ends,
            vocab_size=vocab_size,
            tokenizer_hash=job.tokenizer_hash,
            source=job.corpus.source.path,
            split=job.split,
            num_bytes=int(group.piece_bytes.sum()),
            pieces_end=num_done,
            predicted=group.predicted,
        )
        shards.append(Shard(path))
    record = {
        **{key: sum(shard.header[key] for shard in shards) for key in ("num_tokens", "num_documents", "num_bytes")},
        "num_empty": left_out.num_empty,
        "num_bad_lines": left_out.num_bad,
        "first_bad_line": left_out.first_bad,
        "lengths": _lengths(shards, job.corpus.kind),
        "shards": [
            {
                "file": shard.path.name,
                "num_tokens": shard.num_tokens,
                "num_documents": shard.header["num_documents"],
                "bytes": shard.path.stat().st_size,
                "checksum": shard.checksum,
            }
            for shard in shards
        ],
    }
    with writing(job.record(part)):
        write_text(job.record(part), json.dumps(record))


@functools.lru_cache(1)
def _tokenizer(path: Path, hashed: str) -> Any:
    return load_tokenizer(path)


def _complete_shards(job: _Job, part: int) -> list[Shard]:
    paths = itertools.takewhile(Path.is_file, (job.folder / f"shard-{part:05d}-{number:05d}.bin" for number in itertools.count()))
    return [Shard(path) for path in paths]


def _vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _lengths(shards: Sequence[Shard], kind: str) -> dict[str, Any]:
    """How long the documents of a part are, by powers of two; and the tokens before its first end and behind its last, whose documents may go on elsewhere."""
    names = ("sources", "targets") if kind == "pairs" else ("documents",)
    counts: dict[str, list[int]] = {name: [] for name in names}
    first: int | None = None
    behind = 0
    for shard in shards:
        ends = shard.document_ends
        if len(ends):
            lengths = np.diff(ends, prepend=-behind)
            if first is None:
                first, lengths, skipped = int(lengths[0]), lengths[1:], 1
            else:
                skipped = 0
            for number, name in enumerate(names):
                counts[name] = _add(counts[name], _by_power(lengths[(number - skipped) % len(names) :: len(names)]))
        behind = shard.num_tokens - (int(ends[-1]) if len(ends) else -behind)
    return {"counts": counts, "first": first, "behind": behind}


def _join_lengths(parts: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Name -> how many documents have a length in [2**i, 2**(i + 1)), of all parts."""
    counts: dict[str, list[int]] = {name: [] for name in parts[0]["counts"]}
    begun = 0
    for part in parts:
        for name, values in part["counts"].items():
            counts[name] = _add(counts[name], values)
        if part["first"] is not None:
            name = next(iter(counts))  # of a pair, the source is first
            counts[name] = _add(counts[name], _by_power(np.array([begun + part["first"]])))
            begun = 0
        begun += part["behind"]
    return counts


def _by_power(lengths: np.ndarray) -> list[int]:
    return np.bincount(np.frexp(lengths)[1] - 1).tolist() if len(lengths) else []


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in itertools.zip_longest(a, b, fillvalue=0)]


def read_index(folder: Path) -> dict[str, Any]:
    """Return the `index.json` of a folder that `prepare` made. Raises DataError when it is missing, damaged or of another version."""
    path = folder / INDEX
    try:
        return parse_index(str(path), path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): the shards are not complete. Run dqtrain prepare again.") from None


def parse_index(name: str, content: bytes) -> dict[str, Any]:
    """Return what `index.json` says, which is at `name`. Raises DataError as `read_index` does."""
    remedy = f"delete {name.removesuffix('/' + INDEX)} and run dqtrain prepare again"
    try:
        text = content.decode()
        del content  # of a large corpus it takes as much memory as what it says
        index = json.loads(text)
        version = index["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name} is not an index of shards ({error}); {remedy}.") from None
    if version != VERSION:
        raise DataError(f"{name} has format version {version}, but this dqtrain reads {VERSION}; {remedy}.")
    return index


@dataclass(frozen=True)
class _Tokens:
    """Pieces behind one another; no shard takes a piece apart."""

    ids: np.ndarray  # uint32 [tokens]
    piece_ends: np.ndarray  # int64 [pieces]: offset behind the last token of each
    piece_bytes: np.ndarray  # int64 [pieces]: UTF-8 bytes of its text
    document_ends: np.ndarray  # int64 [documents that end here]
    predicted: np.ndarray | None = None  # bool [tokens]; None: all

    def split(self, num_pieces: int) -> tuple["_Tokens", "_Tokens"]:
        """The first pieces, and the others."""
        cut = int(self.piece_ends[num_pieces - 1]) if num_pieces else 0
        documents = int(np.searchsorted(self.document_ends, cut, side="right"))
        masks = (None, None) if self.predicted is None else (self.predicted[:cut], self.predicted[cut:])
        return (
            _Tokens(self.ids[:cut], self.piece_ends[:num_pieces], self.piece_bytes[:num_pieces], self.document_ends[:documents], masks[0]),
            _Tokens(self.ids[cut:], self.piece_ends[num_pieces:] - cut, self.piece_bytes[num_pieces:], self.document_ends[documents:] - cut, masks[1]),
        )


def _tokens(pieces: Sequence[Sequence[int]], num_bytes: Sequence[int], document_ends: np.ndarray, predicted: np.ndarray | None = None) -> _Tokens:
    ids = np.fromiter(itertools.chain.from_iterable(pieces), np.uint32, sum(map(len, pieces)))
    return _Tokens(ids, np.cumsum([len(piece) for piece in pieces], dtype=np.int64), np.array(num_bytes, np.int64), document_ends, predicted)


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    starts = np.cumsum([0] + [len(part.ids) for part in parts])
    return _Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.piece_ends + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.piece_bytes for part in parts]),
        np.concatenate([part.document_ends + start for part, start in zip(parts, starts, strict=False)]),
        None if parts[0].predicted is None else np.concatenate([part.predicted for part in parts if part.predicted is not None]),
    )


def _batches(job: _Job, part: int, tokenizer: Any, left_out: LeftOut, num_done: int, report: Callable[[int, int, int], None]) -> Iterator[_Tokens]:
    """The pieces of a part behind the first `num_done`, tokenised side by side."""
    for unit in job.parts[part]:
        pieces, tokenise = _read(job, unit, tokenizer, left_out)
        for _ in itertools.islice(pieces, num_done):
            num_done -= 1
        while batch := list(_take(pieces, _BATCH_CHARS)):
            tokens = tokenise([piece for _, piece in batch])
            report(len(tokens.document_ends), len(tokens.ids), 0)
            yield tokens
        report(0, 0, unit.num_bytes)


def _read(job: _Job, unit: Unit, tokenizer: Any, left_out: LeftOut) -> tuple[Iterator[tuple[int, Any]], Callable[[Sequence[Any]], _Tokens]]:
    """The pieces of a unit, each with its characters, and what makes tokens of several."""
    corpus = job.corpus
    if corpus.kind == "pairs":
        assert corpus.pairs is not None
        settings, cut = corpus.pairs, _cut_for_encoder_decoder if job.encoder_decoder else _cut_for_causal
        filled = ((settings.template.replace("{source}", source), target) for source, target in pairs_of(corpus, unit, left_out))
        return ((len(pair[0]) + len(pair[1]), pair) for pair in filled), functools.partial(_pair_tokens, tokenizer, settings, cut)
    if corpus.kind == "chat":
        return ((len(chat[0]), chat) for chat in _rendered(corpus, unit, tokenizer, left_out)), functools.partial(_chat_tokens, tokenizer)
    return ((len(piece[0]), piece) for piece in documents(corpus, unit, left_out)), functools.partial(_text_tokens, tokenizer)


def _rendered(corpus: Corpus, unit: Unit, tokenizer: Any, left_out: LeftOut) -> Iterator[ChatText]:
    chat_template(tokenizer)  # without one, no line is to blame
    for place, messages in chats(corpus, unit, left_out):
        try:
            chat = render_chat(tokenizer, messages)
        except DataError as error:
            left_out.bad(f"{place}: {error}")
            continue
        if chat[1]:
            yield chat
        else:
            left_out.num_empty += 1  # nothing that the assistant says


def _text_tokens(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> _Tokens:
    encoded = _encode(tokenizer, text=[text for text, _ in pieces], add_special_tokens=False)
    encoded = [[*ids, tokenizer.eos_token_id] if ends else ids for ids, (_, ends) in zip(encoded, pieces, strict=True)]
    ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
    return _tokens(encoded, [len(text.encode()) for text, _ in pieces], ends[[ends_document for _, ends_document in pieces]])


def _chat_tokens(tokenizer: Any, pieces: Sequence[ChatText]) -> _Tokens:
    encoded = encode_chats(tokenizer, pieces)
    ends = np.cumsum([len(ids) for ids, _ in encoded], dtype=np.int64)
    return _tokens([ids for ids, _ in encoded], [len(text.encode()) for text, _ in pieces], ends, np.concatenate([said for _, said in encoded]))


def _pair_tokens(tokenizer: Any, settings: Pairs, cut: Callable[..., Any], pieces: Sequence[tuple[str, str]]) -> _Tokens:
    sources, targets = cut([source for source, _ in pieces], [target for _, target in pieces], tokenizer, settings)
    both = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
    ends = np.cumsum([len(ids) for pair in zip(sources, targets, strict=True) for ids in pair], dtype=np.int64)
    return _tokens(both, [len(source.encode()) + len(target.encode()) for source, target in pieces], ends)


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


def _take(pieces: Iterator[tuple[int, Any]], num_chars: int) -> Iterator[tuple[int, Any]]:
    while num_chars > 0 and (piece := next(pieces, None)) is not None:
        num_chars -= piece[0]
        yield piece


def _groups(batches: Iterator[_Tokens], num_tokens: int, whole_documents: bool) -> Iterator[_Tokens]:
    """Gather pieces until they have `num_tokens` tokens, and if asked for end a document: the content of one shard."""
    waiting: list[_Tokens] = []
    for batch in batches:
        while len(batch.ids):
            missing = num_tokens - sum(len(tokens.ids) for tokens in waiting)
            enough = batch.piece_ends >= missing
            if whole_documents:
                enough &= np.isin(batch.piece_ends, batch.document_ends)
            if not enough.any():
                break
            first, batch = batch.split(int(enough.argmax()) + 1)
            yield _joined([*waiting, first])
            waiting = []
        if len(batch.piece_ends):
            waiting.append(batch)
    if sum(len(tokens.ids) for tokens in waiting):
        yield _joined(waiting)
