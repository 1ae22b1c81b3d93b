"""How fast token samples are read, how soon a run goes on in mid-epoch, what an index of 10^12 tokens takes, and what a second process is worth when preparing.

Beside a bare gather and other libraries. Each reading is a process of its own; the readers take turns, and the table has medians. Peers that are not installed are
shown as absent, with what installs them; an environment of their own that sees this one keeps their pins apart.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dqtrain.bench.resident import resident
from dqtrain.config import Data, Source
from dqtrain.data import sources
from dqtrain.data.order import Order
from dqtrain.data.prepare import INDEX, VERSION, prepare, read_index, train_tokenizer
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stdlib import STDLIB, stdlib_texts
from dqtrain.data.stream import Stream

TOKENS, MICRO_BATCH, VOCABULARY = 1024, 8, 50257
SAMPLES = 98_304
"""Of 1,024 tokens: 100M tokens."""
_ROUNDS = 3
_PATIENCE_S = 1
"""CPU time after which the epoch of a slow reader is cut short."""
_TEXT_BYTES, _PART_BYTES = 2**26, 2**22
"""Of the corpus that is prepared, and of the parts that its processes take."""


def run() -> str:
    """The tables as text."""
    with tempfile.TemporaryDirectory(prefix="dqtrain-bench-") as name:
        folder = Path(name)
        _write_corpus(folder)
        found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
        absent: dict[str, str] = {}
        for _ in range(_ROUNDS):
            for reader in found.keys() - absent.keys():
                told = _child("read", reader, folder)
                if "absent" in told:
                    absent[reader] = told["absent"]
                else:
                    found[reader].append(told)
        first_batch = [_child("resume", str(position), folder) for position in (0, SAMPLES // 2, 10**9 // MICRO_BATCH * MICRO_BATCH)]
    bare = {order: _median(found[f"bare memmap, {order}"]) for order in ("in order", "shuffled")}
    lines = ["| reader | M tokens per CPU-s, first epoch | second epoch | of the bare gather |", "|---|---:|---:|---:|"]
    for reader, values in found.items():
        if reader in absent:
            lines.append(f"| {reader} | absent: {absent[reader]} | | |")
            continue
        median, beside = _median(values), bare["shuffled" if "shuffled" in reader else "in order"]
        lines.append(
            f"| {reader} | {median['first']:,.0f} | {median['second']:,.0f} | {median['first'] / beside['first']:.2f}, {median['second'] / beside['second']:.2f} |"
        )
    lines += [
        "",
        "From opening the folder to the first batch, at sample "
        + ", ".join(f"{told['position']:,}: {1000 * told['seconds']:.1f} ms" for told in first_batch)
        + ".",
    ]
    told = _child("large", "", Path())
    lines.append(
        f"An index of {told['tokens']:.0e} tokens in {told['shards']:,} shards: {told['mib']:.0f} MiB over the interpreter with its libraries, "
        f"{told['seconds']:.3f} s to the order of the first batch of one of 1,024 ranks."
    )
    with tempfile.TemporaryDirectory(prefix="dqtrain-bench-") as name:
        alone, both = (_child("prepare", str(workers), Path(name)) for workers in (1, 2))
    lines.append(
        f"Preparing {alone['tokens'] / 1e6:.1f}M tokens of text with one process, and with two: {alone['tokens'] / alone['seconds']:,.0f} and "
        f"{both['tokens'] / both['seconds']:,.0f} tokens/s, {alone['seconds'] / both['seconds']:.2f} times as fast."
    )
    return "\n".join(lines)


def _median(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(value[key] for value in values) for key in values[0]}


def _child(*arguments: str | Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "dqtrain.bench.data", *map(str, arguments)], capture_output=True, text=True, env=environment)
    if done.returncode:
        if arguments[0] != "read" or str(arguments[1]).startswith(("bare", "dqtrain")):
            raise RuntimeError(f"{' '.join(map(str, arguments))}: exit code {done.returncode}; {done.stderr}")
        return {"absent": (done.stderr.strip().splitlines() or ["killed"])[-1][:120]}  # another library, which does not run here
    return json.loads(done.stdout.splitlines()[-1])


def _write_corpus(folder: Path) -> None:
    """The same tokens as shards, as one flat file, and in the form of each peer that is there (made when it is first read)."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCABULARY, SAMPLES * TOKENS, dtype=np.uint16)
    np.append(tokens, np.uint16(0)).tofile(folder / "flat.bin")  # the last sample has a last label
    shards = []
    (folder / "shards").mkdir()
    for number, part in enumerate(np.split(tokens, 6)):
        path = folder / "shards" / f"shard-{number:05d}.bin"
        part = np.append(part, np.uint16(0))
        facts: Any = {"tokenizer_hash": "", "source": "", "split": "train", "num_bytes": 0, "pieces_end": 0}
        write_shard(path, part, np.array([len(part)]), vocab_size=VOCABULARY, **facts)
        shards.append({"file": path.name, "num_tokens": len(part), "num_documents": 1, "checksum": Shard(path).checksum})
    (folder / "shards" / INDEX).write_text(json.dumps({"version": VERSION, "tokenizer_hash": "", "vocab_size": VOCABULARY, "shards": shards}))


# --- readers: (folder, shuffled) -> a function that gives the batches of an epoch, int64 [MICRO_BATCH, TOKENS]


def _ours(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    steps = Stream(folder / "shards", TOKENS, 1, shuffled).steps(0, [0], MICRO_BATCH, MICRO_BATCH)
    return lambda: (next(steps)[0][1].input_ids for _ in range(SAMPLES // MICRO_BATCH))


def _rows(folder: Path) -> np.ndarray:
    return np.memmap(folder / "flat.bin", np.uint16, "r")[:-1].reshape(SAMPLES, TOKENS)


def _bare(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    rows = _rows(folder)
    order = np.random.default_rng(1).permutation(SAMPLES) if shuffled else np.arange(SAMPLES)
    return lambda: (rows[order[start : start + MICRO_BATCH]].astype(np.int64) for start in range(0, SAMPLES, MICRO_BATCH))


def _bare_with_labels(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    """What a trainer needs at least: ids, and labels one token further on."""
    tokens = np.memmap(folder / "flat.bin", np.uint16, "r")
    rows = np.lib.stride_tricks.sliding_window_view(tokens, TOKENS + 1)[::TOKENS]
    order = np.random.default_rng(1).permutation(SAMPLES) if shuffled else np.arange(SAMPLES)

    def batches() -> Iterator[Any]:
        for start in range(0, SAMPLES, MICRO_BATCH):
            ids = rows[order[start : start + MICRO_BATCH]].astype(np.int64)
            yield (ids[:, :-1], ids[:, 1:])[0]

    return batches


def _torch(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    rows = _rows(folder)

    class Rows(Dataset):
        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(rows[index].astype(np.int64))

    loader: Any = DataLoader(Rows(), MICRO_BATCH, shuffle=shuffled)
    return lambda: iter(loader)


def _datasets(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    from datasets import Dataset, Features, Sequence, Value

    if not (folder / "arrow").exists():
        rows = _rows(folder)
        features = Features({"ids": Sequence(Value("uint16"), TOKENS)})
        made: Any = Dataset.from_generator(lambda: ({"ids": row} for row in rows), features=features, cache_dir=str(folder / "made"))
        made.save_to_disk(folder / "arrow")
    data = Dataset.load_from_disk(str(folder / "arrow")).with_format("numpy")
    data = data.shuffle(seed=1) if shuffled else data
    return lambda: (batch["ids"].astype(np.int64) for batch in data.iter(MICRO_BATCH))


def _litdata(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    if not (folder / "litdata" / "index.json").exists():
        import torch

        tokens = torch.from_numpy(np.fromfile(folder / "flat.bin", np.uint16)[:-1].view(np.int16)).to(torch.uint16)
        writer: Any = BinaryWriter(str(folder / "litdata"), chunk_size=2**23 // TOKENS * TOKENS, item_loader=TokensLoader(TOKENS))
        for index, document in enumerate(tokens.split(2**20)):
            writer[index] = document
        writer.done()
        writer.merge()
    data: Any = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(TOKENS), shuffle=shuffled, seed=1)

    def batches() -> Iterator[Any]:
        items = iter(data)
        for _ in range(len(data) // MICRO_BATCH):
            yield np.stack([next(items).numpy() for _ in range(MICRO_BATCH)]).astype(np.int64)

    return batches


def _mosaic(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if not (folder / "mds" / "index.json").exists():
        rows = _rows(folder)
        with MDSWriter(out=str(folder / "mds"), columns={"ids": f"ndarray:uint16:{TOKENS}"}) as writer:
            for row in rows:
                writer.write({"ids": np.array(row)})
    clean_stale_shared_memory()
    data: Any = StreamingDataset(local=str(folder / "mds"), shuffle=shuffled, batch_size=MICRO_BATCH, num_canonical_nodes=1)

    def batches() -> Iterator[Any]:
        items = iter(data)
        for _ in range(SAMPLES // MICRO_BATCH):
            yield np.stack([next(items)["ids"] for _ in range(MICRO_BATCH)]).astype(np.int64)

    return batches


def _grain(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    import grain.python as grain

    rows = _rows(folder)

    class Rows:
        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> np.ndarray:
            return rows[index].astype(np.int64)

    data: Any = grain.MapDataset.source(Rows())
    data = (data.shuffle(seed=1) if shuffled else data).batch(MICRO_BATCH)
    return lambda: iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _megatron(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    """In order, the indexed file alone; shuffled, GPTDataset, which always is."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    prefix, document = folder / "megatron" / "tokens", 2**20
    if not prefix.with_suffix(".idx").exists():
        prefix.parent.mkdir()
        builder: Any = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for tokens in _rows(folder).reshape(-1, document):
            builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [document])
        builder.finalize(f"{prefix}.idx")
    data: Any = IndexedDataset(str(prefix))
    if shuffled:
        tokenizer: Any = SimpleNamespace(vocab_size=VOCABULARY, eod=0, unique_identifiers={})
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=TOKENS,
            blend=([str(prefix)], None),
            split="1,0,0",
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=str(prefix.parent),
        )
        samples: Any = GPTDataset(data, str(prefix), np.arange(len(data), dtype=np.int32), None, Split.train, config)
        return lambda: (
            torch.stack([samples[i]["tokens"] for i in range(start, start + MICRO_BATCH)]) for start in range(0, len(samples) - MICRO_BATCH, MICRO_BATCH)
        )
    each = document // TOKENS
    return lambda: (
        np.stack([data.get(i // each, offset=i % each * TOKENS, length=TOKENS) for i in range(start, start + MICRO_BATCH)]).astype(np.int64)
        for start in range(0, SAMPLES, MICRO_BATCH)
    )


def _datatrove(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    """Shuffled by a list of numbers, as trainers do: by itself it shuffles files alone."""
    import torch
    from datatrove.utils.dataset import DatatroveFolderDataset

    if not (folder / "datatrove").exists():
        (folder / "datatrove").mkdir()
        for number, part in enumerate(np.split(_rows(folder).reshape(-1), 6)):
            part.tofile(folder / "datatrove" / f"{number}.ds")
    data: Any = DatatroveFolderDataset(str(folder / "datatrove"), TOKENS)
    order = (np.random.default_rng(1).permutation(len(data)) if shuffled else np.arange(len(data))).tolist()
    return lambda: (
        torch.stack([data[i]["input_ids"][:-1] for i in order[start : start + MICRO_BATCH]]) for start in range(0, len(order) - MICRO_BATCH, MICRO_BATCH)
    )


_KINDS: dict[str, tuple[Any, str, str]] = {
    "bare memmap": (_bare, "flat.bin", ""),
    "bare memmap, with labels": (_bare_with_labels, "flat.bin", ""),
    "dqtrain": (_ours, "shards", ""),
    "torch DataLoader over memmap": (_torch, "flat.bin", ""),
    "datatrove (.ds)": (_datatrove, "datatrove", "datatrove"),
    "Hugging Face datasets (Arrow)": (_datasets, "arrow", ""),
    "litdata (TokensLoader)": (_litdata, "litdata", "litdata"),
    "Grain (over memmap)": (_grain, "flat.bin", "grain"),
    "Megatron (.bin)": (_megatron, "megatron", "megatron-core"),
    "mosaicml-streaming (MDS)": (_mosaic, "mds", "mosaicml-streaming"),
}
"""Name in the table -> reader, the files that it reads, and the package that it needs besides."""
READERS = {f"{name}, {order}": (*how, order == "shuffled") for name, how in _KINDS.items() for order in ("in order", "shuffled")}
"""What is timed, by the name in the table."""


def _read(reader: str, folder: Path) -> dict[str, Any]:
    """Tokens per CPU-second, in millions, in two epochs; those of a slow reader are cut short."""
    make, files, package, shuffled = READERS[reader]
    try:
        epoch = make(folder, shuffled)
    except ImportError as error:
        return {"absent": f"{error}; pip install {package}"}
    for path in [folder / files, *(folder / files).rglob("*")]:
        if path.is_file():
            path.read_bytes()  # every reader's files are as near to the processor
    rates = []
    for _ in range(2):
        started, count = time.process_time(), 0
        for batch in epoch():
            assert batch.shape == (MICRO_BATCH, TOKENS)
            count += MICRO_BATCH * TOKENS
            if count % 2**20 == 0 and time.process_time() - started > _PATIENCE_S:
                break
        rates.append(count / (time.process_time() - started) / 1e6)
    return {"first": rates[0], "second": rates[1]}


def _resume(position: int, folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    Stream(folder / "shards", TOKENS, 1, True).micro_batch(position // MICRO_BATCH, 0, MICRO_BATCH, MICRO_BATCH)
    return {"position": position, "seconds": time.perf_counter() - started}


def _large() -> dict[str, float]:
    """An index of 10^12 tokens, whose shards are not there: what it takes in memory, and the time to the samples of the first micro-batch of rank 1000 of 1,024."""
    size = 2**24  # of text in parts as prepare cuts it
    shards = 10**12 // size
    with tempfile.TemporaryDirectory() as name:
        text = json.dumps({"version": VERSION, "tokenizer_hash": "", "vocab_size": VOCABULARY, "shards": []})
        with (Path(name) / INDEX).open("w") as file:
            file.write(text.removesuffix("]}"))
            for n in range(shards):
                sizes = {"num_tokens": size + 1, "num_documents": 1000 + n, "bytes": 2 * size + n, "checksum": f"{n:016x}", "part": n}
                file.write("," * (n > 0) + json.dumps({"file": f"shard-{n:05d}-00000.bin", **sizes}))
            file.write("]}")
        before = resident("VmRSS", restart=True)
        started = time.perf_counter()
        stream = Stream(Path(name), TOKENS, 1, True, quarantine=print)
        batch = 1024 * MICRO_BATCH
        samples = stream.order.at(range(10**6 * batch + 1000 * MICRO_BATCH, 10**6 * batch + 1001 * MICRO_BATCH))
        seconds = time.perf_counter() - started
        peak = resident("VmHWM")
        # The order of this rank is that of any other, taken from a new one.
        again = Order([[size // TOKENS] * shards], 1, True)
        everywhere = np.random.default_rng(0).integers(0, again.num_samples, 10**5)
        assert (again.at(range(10**6 * batch + 1000 * MICRO_BATCH, 10**6 * batch + 1001 * MICRO_BATCH)) == samples).all()
        assert len(np.unique(again.at(np.unique(everywhere)))) == len(np.unique(everywhere))
    return {"tokens": float(shards * size), "shards": shards, "mib": (peak - before) / 2**20, "seconds": seconds}


def _prepare(workers: int, folder: Path) -> dict[str, float]:
    """Seconds from text to shards: the standard library again and again, in lines, with a tokenizer of its own."""
    sources.UNIT_BYTES = _PART_BYTES
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    if not text.exists():
        texts = [json.dumps({"text": text}) + "\n" for _, text in stdlib_texts()["train"]]
        with text.open("w") as file:
            for line in itertools.cycle(texts):
                if file.write(line) and file.tell() > _TEXT_BYTES:
                    break
        train_tokenizer([Source(path=STDLIB)], 4096, tokenizer)
    started = time.perf_counter()
    [made] = prepare(Data(train=str(text), tokens_per_sample=TOKENS), "train", tokenizer, folder / str(workers), workers=workers)
    return {"seconds": time.perf_counter() - started, "tokens": read_index(Path(made))["num_tokens"]}


if __name__ == "__main__":
    what, name, where = sys.argv[1:]
    acts: dict[str, Callable[[], dict[str, Any]]] = {
        "read": lambda: _read(name, Path(where)),
        "resume": lambda: _resume(int(name), Path(where)),
        "prepare": lambda: _prepare(int(name), Path(where)),
        "large": _large,
    }
    print(json.dumps(acts[what]()))
