"""What a person sees of prepared data: counts and lengths, decoded samples with what is predicted of them, and whether every byte is as it was written."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dqtrain.data.folder import open_folder
from dqtrain.data.prepare import INDEX, load_tokenizer, read_index, tokenizer_hash
from dqtrain.data.shard import Shard
from dqtrain.errors import DataError

_BAR = 40


def prepared_folders(path: Path) -> list[Path]:
    """A folder that `prepare` made, or those in a folder, sorted. Raises DataError when there is none."""
    found = [path] if (path / INDEX).is_file() else sorted(folder.parent for folder in path.glob(f"*/{INDEX}"))
    if not found:
        raise DataError(
            f"{path} holds no prepared data: there is no {INDEX} in it, nor in a folder of it. Run dqtrain prepare, and name a folder that it prints."
        )
    return found


def info(folder: Path, weight: float | None = None) -> str:
    """Counts, source, hashes and lengths of a folder, as lines of text; `weight` is what a config says of it. Raises DataError as `read_index`."""
    index = read_index(folder)
    source, num_bytes = index["source"], sum(shard["bytes"] for shard in index["shards"])
    of_files = f" ({len(source['files']):,} files)" if len(source.get("files", ())) > 1 else ""
    of_hub = "".join(f", {key} {source[key]}" for key in ("subset", "revision") if source.get(key))
    rows = {
        "split": index["split"],
        "source": f"{source['source']}{of_files}{of_hub}",
        "weight": "in proportion to its size" if weight is None else f"{weight:g}",
        "kind": index["kind"] + ", one per sample" * (index["kind"] != "pairs" and index["samples"] == "documents"),
        "documents": f"{index['num_documents'] // (2 if index['kind'] == 'pairs' else 1):,}" + " pairs" * (index["kind"] == "pairs"),
        "tokens": f"{index['num_tokens']:,} of {index['vocab_size']:,} words, {index['num_bytes'] / index['num_tokens']:.2f} bytes of text each",
        "shards": f"{len(index['shards']):,} of {num_bytes:,} bytes, sha256 {open_folder(folder).fingerprint()}",
        "left out": f"{index['num_empty']:,} without text, {index['num_bad_lines']:,} bad lines"
        + f", such as {index['first_bad_line']}" * bool(index["first_bad_line"]),
        "tokenizer": f"{index['tokenizer']}, sha256 {index['tokenizer_hash']}",
    }
    lines = [str(folder), *(f"  {name:<10} {value}" for name, value in rows.items())]
    for name, counts in index["lengths"].items():
        lines.append(f"  tokens in {name}:")
        first = next((power for power, count in enumerate(counts) if count), 0)
        for power, count in list(enumerate(counts))[first:]:
            lines.append(f"  {2**power:>11,} to {2 ** (power + 1) - 1:>11,} {count:>12,} {'#' * -(-_BAR * count // max(counts))}".rstrip())
    return "\n".join(lines)


def show(folder: Path, sample: int, tokens_per_sample: int | None = None, tokenizer: Path | None = None, coloured: bool = False) -> str:
    """One sample as text: a document, chat or pair, or with `tokens_per_sample` the packed one of that number, in the order of the corpus.

    What is predicted is green (without colours in « »), the rest is dim; a line stands where a document ends. `tokenizer`: where it is now, if it was moved.
    Raises DataError for a sample that is not there, shards that are damaged, and a tokenizer that is not the one that made them.
    """
    index = read_index(folder)
    path = tokenizer or Path(index["tokenizer"])
    if (found := tokenizer_hash(path)) != index["tokenizer_hash"]:
        raise DataError(
            f"tokenizer {path} has the hash {found[:12]}, but the tokens in {folder} were made by one with {index['tokenizer_hash'][:12]}: they would read as "
            "other words. Name its folder with --tokenizer."
        )
    ids, predicted, ends, place = _sample(folder, index, sample, tokens_per_sample)
    decode, marks = load_tokenizer(path).decode, ("\x1b[32m", "\x1b[0m", "\x1b[2m", "\x1b[0m") if coloured else ("«", "»", "", "")
    cuts = sorted({0, len(ids), *(int(end) for end in ends), *(np.flatnonzero(np.diff(predicted)) + 1).tolist()})
    text = ""
    for start, stop in zip(cuts, cuts[1:], strict=False):
        run = decode(ids[start:stop].tolist(), clean_up_tokenization_spaces=False).replace("\x1b", "\\x1b")  # data must not speak to the terminal
        text += marks[0] + run + marks[1] if predicted[start] else marks[2] + run + marks[3]
        text += "\n" + "-" * 20 + " document ends " + "-" * 20 + "\n" if stop in ends else ""
    return f"{place}: {len(ids):,} tokens, of which {int(predicted.sum()):,} are predicted\n{text}"


def _sample(folder: Path, index: dict[str, Any], sample: int, tokens_per_sample: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Token ids, which are predicted, where documents end among them, and where that is."""
    if tokens_per_sample is not None and index["kind"] == "pairs":
        raise DataError(f"{folder} holds pairs, which are not packed; leave out --tokens-per-sample.")
    per_sample, before = 2 if index["kind"] == "pairs" else 1, 0
    for entry in index["shards"]:
        count = entry["num_documents"] // per_sample if tokens_per_sample is None else -(-(entry["num_tokens"] - 1) // tokens_per_sample)
        if before <= sample < before + count:
            break
        before += count
    else:
        raise DataError(f"{folder} has {before:,} samples, counted from 0, but not number {sample:,}.")
    shard, number = Shard(folder / entry["file"]), sample - before
    all_ends = shard.document_ends
    if tokens_per_sample is not None:
        start, stop = number * tokens_per_sample, min((number + 1) * tokens_per_sample + 1, shard.num_tokens)
    else:
        edges = [0, *all_ends.tolist()]
        start, stop = edges[per_sample * number], edges[per_sample * (number + 1)]
    predicted = shard.read_predicted(start, stop)
    ends = all_ends[(all_ends > start) & (all_ends <= stop)] - start
    if per_sample == 2:
        predicted[: int(ends[0])] = False
    else:
        predicted[0] = False  # nothing in the sample is before it
    return shard.read(start, stop), predicted, ends, f"sample {sample:,} of {folder}, tokens {start:,} to {stop - 1:,} of {entry['file']}"


def verify(folders: Sequence[Path]) -> str:
    """Check every block of every shard against its checksum, in threads; what was read, and how fast. Raises DataError that names all damaged files."""
    started, checks = time.monotonic(), []
    for folder in folders:
        checks += [(folder / entry["file"], entry) for entry in read_index(folder)["shards"]]

    def check(path: Path, entry: dict[str, Any]) -> str | None:
        try:
            shard = Shard(path)
            if shard.checksum != entry["checksum"]:
                raise DataError(f"token shard {path} is not the one that the index names; delete it and run dqtrain prepare again.")
            shard.verify()
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        damaged = [message for message in pool.map(lambda pair: check(*pair), checks) if message is not None]
    if damaged:
        raise DataError("\n".join([f"{len(damaged)} of {len(checks)} shards are damaged:", *damaged]))
    num_bytes, passed = sum(entry["bytes"] for _, entry in checks), max(time.monotonic() - started, 1e-9)
    return f"{len(checks):,} shards in {len(folders):,} folders are as they were written: {num_bytes:,} bytes, {num_bytes / passed / 1e9:.2f} GB/s"
