"""How fast token samples are read, how soon a run goes on in mid-epoch, and what an index of 10^12 tokens takes, beside a bare gather and other libraries.

Each reading is a process of its own; the readers take turns, and the table has medians. Peers that are not installed are shown as absent: they may be in a folder of
their own, which BENCH_PEERS names (`pip install --target FOLDER mosaicml-streaming litdata datasets`).
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dqtrain.data.order import Order
from dqtrain.data.prepare import INDEX, VERSION
from dqtrain.data.shard import Shard, write_shard
from dqtrain.data.stream import Stream

TOKENS, MICRO_BATCH, VOCABULARY = 1024, 8, 50257
SAMPLES = 98_304
"""Of 1,024 tokens: 100M tokens."""
_ROUNDS = 3


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
    return "\n".join(lines)


def _median(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(value[key] for value in values) for key in values[0]}


def _child(*arguments: str | Path) -> dict[str, Any]:
    peers = os.environ.get("BENCH_PEERS", "")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), peers]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "dqtrain.bench.data", *map(str, arguments)], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"absent": (done.stderr.strip().splitlines() or ["killed"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def _write_corpus(folder: Path) -> None:
    """The same tokens as shards, as one flat file, and in the form of each peer that is there (made when it is first read)."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCABULARY, SAMPLES * TOKENS, dtype=np.uint16)
    tokens.tofile(folder / "flat.bin")
    shards = []
    (folder / "shards").mkdir()
    for number, part in enumerate(np.split(tokens, 6)):
        path = folder / "shards" / f"shard-{number:05d}.bin"
        part = np.append(part, np.uint16(0))  # the last sample of a shard has a last label
        facts: Any = {"tokenizer_hash": "", "source": "", "split": "train", "num_bytes": 0, "pieces_end": 0}
        write_shard(path, part, np.array([len(part)]), vocab_size=VOCABULARY, **facts)
        shards.append({"file": path.name, "num_tokens": len(part), "num_documents": 1, "checksum": Shard(path).checksum})
    (folder / "shards" / INDEX).write_text(json.dumps({"version": VERSION, "tokenizer_hash": "", "vocab_size": VOCABULARY, "shards": shards}))


# --- readers: (folder, shuffled) -> a function that gives the batches of an epoch, int64 [MICRO_BATCH, TOKENS]


def _ours(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    steps = Stream(folder / "shards", TOKENS, 1, shuffled).steps(0, [0], MICRO_BATCH, MICRO_BATCH)
    return lambda: (next(steps)[0][1].input_ids for _ in range(SAMPLES // MICRO_BATCH))


def _bare(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    rows = np.memmap(folder / "flat.bin", np.uint16, "r").reshape(SAMPLES, TOKENS)
    order = np.random.default_rng(1).permutation(SAMPLES) if shuffled else np.arange(SAMPLES)
    return lambda: (rows[order[start : start + MICRO_BATCH]].astype(np.int64) for start in range(0, SAMPLES, MICRO_BATCH))


def _torch(folder: Path, shuffled: bool) -> Callable[[], Iterator[Any]]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    rows = np.memmap(folder / "flat.bin", np.uint16, "r").reshape(SAMPLES, TOKENS)

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
        rows = np.memmap(folder / "flat.bin", np.uint16, "r").reshape(SAMPLES, TOKENS)
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

        tokens = torch.from_numpy(np.fromfile(folder / "flat.bin", np.uint16).view(np.int16)).to(torch.uint16)
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
        rows = np.memmap(folder / "flat.bin", np.uint16, "r").reshape(SAMPLES, TOKENS)
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


_KINDS = {
    "bare memmap": _bare,
    "dqtrain": _ours,
    "torch DataLoader over memmap": _torch,
    "Hugging Face datasets (Arrow)": _datasets,
    "litdata (TokensLoader)": _litdata,
    "mosaicml-streaming (MDS)": _mosaic,
}
_FILES: dict[Any, str] = {_ours: "shards", _datasets: "arrow", _litdata: "litdata", _mosaic: "mds"}
READERS = {f"{name}, {order}": (make, order == "shuffled") for name, make in _KINDS.items() for order in ("in order", "shuffled")}
"""What is timed, by the name in the table."""


def _read(reader: str, folder: Path) -> dict[str, float]:
    """Tokens per CPU-second, in millions, in two epochs; slow readers are cut short after 5 s of CPU time."""
    make, shuffled = READERS[reader]
    epoch = make(folder, shuffled)
    for path in (folder / _FILES[make]).rglob("*") if make is not _bare and make is not _torch else [folder / "flat.bin"]:
        if path.is_file():
            path.read_bytes()  # every reader's files are as near to the processor
    rates = []
    for _ in range(2):
        started, count = time.process_time(), 0
        for batch in epoch():
            assert batch.shape == (MICRO_BATCH, TOKENS)
            count += MICRO_BATCH * TOKENS
            if count % 2**20 == 0 and time.process_time() - started > 5:
                break
        rates.append(count / (time.process_time() - started) / 1e6)
    return {"first": rates[0], "second": rates[1]}


def _resume(position: int, folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    Stream(folder / "shards", TOKENS, 1, True).micro_batch(position // MICRO_BATCH, 0, MICRO_BATCH, MICRO_BATCH)
    return {"position": position, "seconds": time.perf_counter() - started}


def _large() -> dict[str, float]:
    """An index of 10^12 tokens, whose shards are not there: what it takes in memory, and the time to the samples of the first micro-batch of rank 1000 of 1,024."""
    size = 2**26
    shards = 10**12 // size
    entry = {"num_tokens": size + 1, "num_documents": 1000, "bytes": 2 * size, "checksum": "0" * 16}
    with tempfile.TemporaryDirectory() as name:
        text = json.dumps({"version": VERSION, "tokenizer_hash": "", "vocab_size": VOCABULARY, "shards": []})
        listed = ",".join(json.dumps({"file": f"shard-{number:05d}.bin", **entry}) for number in range(shards))
        (Path(name) / INDEX).write_text(text.replace('"shards": []', f'"shards": [{listed}]'))
        del listed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        stream = Stream(Path(name), TOKENS, 1, True, quarantine=print)
        batch = 1024 * MICRO_BATCH
        samples = stream.order.at(range(10**6 * batch + 1000 * MICRO_BATCH, 10**6 * batch + 1001 * MICRO_BATCH))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The order of this rank is that of any other, taken from a new one.
        again = Order([[size // TOKENS] * shards], 1, True)
        everywhere = np.random.default_rng(0).integers(0, again.num_samples, 10**5)
        assert (again.at(range(10**6 * batch + 1000 * MICRO_BATCH, 10**6 * batch + 1001 * MICRO_BATCH)) == samples).all()
        assert len(np.unique(again.at(np.unique(everywhere)))) == len(np.unique(everywhere))
    return {"tokens": float(shards * size), "shards": shards, "mib": (peak - before) / 1024, "seconds": seconds}


if __name__ == "__main__":
    what, name, where = sys.argv[1:]
    print(json.dumps(_read(name, Path(where)) if what == "read" else _resume(int(name), Path(where)) if what == "resume" else _large()))
