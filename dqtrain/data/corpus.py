"""What a source says: texts, pairs of a source and a target, or chats, read as a stream from files (`sources.py`) or from what is on every machine.

Needs no torch, and a network only where an address does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqtrain.config import Pairs, Source
from dqtrain.data.docstrings import DOCSTRINGS, docstring_pairs, docstrings_summary
from dqtrain.data.sources import Files, LeftOut, Place, Unit, find_files, is_tokens
from dqtrain.data.stdlib import STDLIB, stdlib_summary, stdlib_texts
from dqtrain.errors import DataError

Message = dict[str, Any]
"""One turn of a chat: `role`, `content`, and what else the chat template knows."""


@dataclass(frozen=True)
class Corpus:
    """A source that was found; nothing of it is read yet."""

    source: Source
    split: str
    """That it has, not the one it is read for."""
    pairs: Pairs | None
    files: Files | None
    """None for what is built in."""
    units: tuple[Unit, ...]
    about: dict[str, Any]
    """What changes when the content does, as plain values."""

    @property
    def kind(self) -> str:
        """text, pairs or chat."""
        return "pairs" if self.pairs is not None else "chat" if self.source.messages is not None else "text"


def find_corpus(source: Source, split: str, pairs: Pairs | None = None, whole_texts: bool = False) -> Corpus:
    """The corpus that a source names for a split; `whole_texts`: no text is in two units. Raises DataError for one that is missing or of the other kind."""
    if is_tokens(source):
        raise DataError(f"{source.path} is tokens already, so that there is no text to read; name the text it was made of.")
    split = source.split or split
    builtin = {STDLIB: stdlib_summary, DOCSTRINGS: docstrings_summary}
    if source.path in builtin:
        if source.messages is not None or source.text != "{text}":
            raise DataError(f"corpus {source.path} has no fields; leave out text and messages.")
        if pairs is None and source.path == DOCSTRINGS:
            raise DataError(f"corpus {DOCSTRINGS} is pairs of a source and a target; set data.pairs, or name {STDLIB}.")
        if pairs is not None and source.path == STDLIB:
            raise DataError(f"corpus {STDLIB} is text without targets; remove data.pairs, or name {DOCSTRINGS}.")
        summary = builtin[source.path]()
        if split not in summary:
            raise DataError(f"corpus {source.path} has the splits {', '.join(summary)}, but not {split}; set `split` to one of them.")
        unit = Unit(source.path, 0, None, int(summary[split]["bytes"]))
        return Corpus(source, split, pairs, None, (unit,), {"source": source.path, "split": split, "sha256": summary[split]["sha256"]})
    if source.path.startswith("builtin:"):
        raise DataError(f"corpus `{source.path}` is not built in; give {STDLIB}, {DOCSTRINGS} or a file.")
    files = find_files(source, split, whole_texts)
    if pairs is not None and files.format == "text":
        raise DataError(f"corpus {source.path} is no file of pairs that can be read; give .jsonl, .csv or .parquet files of pairs, or {DOCSTRINGS}.")
    return Corpus(source, split, pairs, files, files.units, files.about)


def documents(corpus: Corpus, unit: Unit, left_out: LeftOut) -> Iterator[tuple[str, bool]]:
    """Yield (text, ends_document) pieces of a unit, in order; no piece is empty, and a document whose fields are all empty is left out.

    A file of plain text is one document, in pieces of about 1 MiB that end with a line; all else has one document per line, row or file.
    Raises DataError, with the file and line, for what cannot be read.
    """
    if corpus.files is None:
        yield from ((text, True) for _, text in stdlib_texts()[corpus.split])
        return
    if corpus.files.format == "text":
        yield from corpus.files.text_pieces(unit)
        return
    template = corpus.source.template
    fields = {field: "`text` of the source" for _, field in template if field is not None}
    for place, record in corpus.files.records(unit, fields, left_out):
        texts = _texts(place, record, fields, left_out)
        if texts is None:
            continue
        if any(texts.values()):
            yield "".join(literal + (texts[field] if field is not None else "") for literal, field in template), True
        else:
            left_out.num_empty += 1


def pairs(corpus: Corpus, unit: Unit, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yield (source, target) of a unit, in order and as they are there: the template of the settings is not applied.

    Of csv (RFC 4180) a header names the columns. Raises DataError, with its line, for a pair without a source or without a target.
    """
    if corpus.files is None:
        yield from docstring_pairs()[corpus.split]
        return
    assert corpus.pairs is not None
    names = {"source": corpus.pairs.source, "target": corpus.pairs.target}
    fields = {field: f"data.pairs.{key}" for key, field in names.items()}
    for place, record in corpus.files.records(unit, fields, left_out):
        texts = _texts(place, record, fields, left_out)
        if texts is None:
            continue
        empty = next((key for key, field in names.items() if not texts[field].strip()), None)
        if empty is None:
            yield texts[names["source"]], texts[names["target"]]
        else:
            left_out.bad(f"{place}: the {empty}, `{names[empty]}`, is empty, but a pair must have both. Mend or remove the line.")


def chats(corpus: Corpus, unit: Unit, left_out: LeftOut) -> Iterator[tuple[Place, list[Message]]]:
    """Yield (place, messages) of a unit, in order; a chat without messages is left out. Raises DataError, with its line, for what is no chat."""
    assert corpus.files is not None, "find_corpus refuses them"
    field = corpus.source.messages
    assert field is not None
    for place, record in corpus.files.records(unit, {field: "`messages` of the source"}, left_out):
        found = record.get(field) if isinstance(record, dict) else None
        if not isinstance(found, list) or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in found):
            left_out.bad(_refusal(place, record, field, "a list of messages, each with `role` and `content`,", "`messages` of the source"))
        elif found:
            yield place, found
        else:
            left_out.num_empty += 1


def texts_of(sources: Sequence[Source], split: str, settings: Pairs | None = None) -> Iterator[str]:
    """Yield every text of the sources: pieces of documents, what messages say, sources (in the template) and targets of pairs."""
    for source in sources:
        corpus, left_out = find_corpus(source, split, settings), LeftOut(source.max_bad_lines)
        for unit in corpus.units:
            if corpus.kind == "pairs":
                assert settings is not None
                for text, target in pairs(corpus, unit, left_out):
                    yield settings.template.replace("{source}", text)
                    yield target
            elif corpus.kind == "chat":
                yield from (message["content"] for _, chat in chats(corpus, unit, left_out) for message in chat if isinstance(message.get("content"), str))
            else:
                yield from (text for text, _ in documents(corpus, unit, left_out))


def references(sources: Sequence[Source], split: str, settings: Pairs) -> list[tuple[str, list[str]]]:
    """Return every source of pairs once, in the order of the corpus, with all targets that it has there."""
    targets: dict[str, list[str]] = {}
    for entry in sources:
        corpus, left_out = find_corpus(entry, split, settings), LeftOut(entry.max_bad_lines)
        for unit in corpus.units:
            for source, target in pairs(corpus, unit, left_out):
                targets.setdefault(source, []).append(target)
    return list(targets.items())


def _texts(place: Place, record: Any, fields: Mapping[str, str], left_out: LeftOut) -> dict[str, str] | None:
    """Field -> its text in a record; None for a record that was counted as bad."""
    texts = {}
    for field, setting in fields.items():
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            left_out.bad(_refusal(place, record, field, "the text", setting))
            return None
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            left_out.bad(f"{place}: `{field}` is not Unicode text ({error}). Mend or remove the line.")
            return None
        texts[field] = text
    return texts


def _refusal(place: Place, record: Any, field: str, what: str, setting: str) -> str:
    found = f"the fields {', '.join(record) or '(none)'}" if isinstance(record, dict) else type(record).__name__
    found = f"{field} = {json.dumps(record[field], default=str)[:40]}" if isinstance(record, dict) and field in record else found
    return f"{place}: has {found}, but must have {what} in `{field}`. Set {setting}, or mend the line."
