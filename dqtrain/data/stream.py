"""Position in the data -> batch: a pure function, the same on any number of ranks, so that resuming needs one integer.

Packed text: sample i of a shard has the inputs [i*T, i*T + T) and, as labels, the tokens one further on: documents are packed, samples overlap by one token,
and every token but the first of a shard is predicted exactly once. Documents: sample i is document i of the corpus. Pairs: sample i is pair i; every token of its
target is predicted once. A batch of documents or pairs is as wide as its longest sample asks. Which sample stands at which position is in `order.py`.
Nothing here knows the rank. Needs numpy; the trainer makes tensors.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from dqtrain.data.folder import Folder, Tokens, open_folder
from dqtrain.data.order import Order, grouped
from dqtrain.data.rows import Rows
from dqtrain.errors import DataError
from dqtrain.files import write_whole

IGNORED = -100
"""Label where there is nothing to predict."""
_WIDTH = 8
"""Widths of batches that are padded are multiples of this, which matrix units like; few widths also mean few kernels."""
_OPEN_SHARDS = 8192
"""Shards that are mapped at a time; Linux lets a process have 65,530 maps."""
_FETCHERS = 4
"""Shards at an address that are fetched at a time, ahead of their use."""
_ORDERED, _JOINED = 4096, 64
"""Samples whose order is computed at a time, and samples of packed text that are read at a time: numpy's calls cost more than few numbers do."""
_CHECKED = 2**20
"""Tokens of packed text that are checked at a time, and known to be. Fewer make the first epoch slower, more read more for a first sample from anywhere."""
_UNREAD, _PLAIN, _CAREFUL = range(3)
"""What is known of samples: nothing; that their tokens are sound, and all there is; that they are sound, and something is padded, not predicted, or apart."""


class Batch(NamedTuple):
    """Samples side by side, padded on the right. Its arrays may share memory: they are not to be written to."""

    input_ids: np.ndarray
    """What the decoder, or the causal model, reads: int64 [samples, tokens]."""
    labels: np.ndarray
    """What it should say, already shifted: the token behind input t, or -100 where there is nothing to predict. int64 [samples, tokens]."""
    samples: np.ndarray
    """Number of each sample in the order of the corpus: int64 [samples]."""
    source_ids: np.ndarray | None = None
    """What the encoder reads: int64 [samples, source tokens]; None for a causal model."""
    source_is_real: np.ndarray | None = None
    """Where `source_ids` is no padding: bool [samples, source tokens]."""
    positions: np.ndarray | None = None
    """Where each input stands in its document, from 0 at the beginning of the sample: int64 [samples, tokens]; None where attention sees the whole sample."""
    left_out: np.ndarray | None = None
    """Samples of quarantined shards, which have no targets: bool [samples]; None: no sample."""

    def without_targets(self) -> "Batch":
        """The same inputs, and nothing to predict; another rank says what of them is left out."""
        return self._replace(labels=np.full_like(self.labels, IGNORED), left_out=None)


def write_batches(path: Path, batches: Sequence[tuple[int, Batch]]) -> None:
    """Keep micro-batches, with their numbers in the step, as safetensors NUMBER.FIELD. Raises OSError."""
    arrays = {f"{number}.{name}": np.ascontiguousarray(array) for number, batch in batches for name, array in batch._asdict().items() if array is not None}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, [save(arrays)])


@dataclass(frozen=True)
class Interleaving:
    """How the sources of a split, and its parts, take turns."""

    stages: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """(first position, weights of the sources), the first from 0; none: the sources are one corpus."""
    parts: int = 1
    """Streams that the order is made of, each over its own shards."""
    micro_batch: int = 1
    """Samples that a part gives at a time."""


class AnyStream(ABC):
    """The samples of folders that `prepare` made, in an order that depends on `seed` and `interleaving` alone.

    Raises DataError when an index is missing, damaged or of another version, when folders do not belong together, or when there is nothing to predict; and for a shard
    that is missing or damaged when it is read. With `quarantine`, which is told once why, such a shard's samples have no targets instead, and `left_out` says so.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path | Folder],
        seed: int,
        shuffle: bool,
        interleaving: Interleaving = Interleaving(),
        quarantine: Callable[[str], None] | None = None,
    ):
        listed = [folders] if isinstance(folders, Path) else folders
        self.folders = [open_folder(folder) if isinstance(folder, Path) else folder for folder in listed]
        first = self.folders[0]
        self.vocab_size = max(folder.vocab_size for folder in self.folders)
        for folder in self.folders:
            if None not in (folder.facts["tokenizer_hash"], first.facts["tokenizer_hash"]) and folder.facts["tokenizer_hash"] != first.facts["tokenizer_hash"]:
                raise DataError(f"{folder.name} and {first.name} were made with different tokenizers. Prepare both with the same one.")
            if quarantine is None:
                folder.check()
        sizes = [self._num_samples(folder) for folder in self.folders]
        for folder, count in zip(self.folders, sizes, strict=True):
            if not count.sum():
                raise DataError(f"the shards in {folder.name} hold {int(folder.num_tokens.sum())} token, but a sample needs 2; give a longer corpus.")
        self._sample_ends = np.cumsum(np.concatenate(sizes))
        self._shard_ends = np.cumsum([len(count) for count in sizes])
        self.num_samples = int(self._sample_ends[-1])
        self.order = Order([count.tolist() for count in sizes], seed, shuffle, interleaving.stages, interleaving.parts, interleaving.micro_batch)
        self._num_tokens = np.concatenate([folder.num_tokens for folder in self.folders])
        self._shards: OrderedDict[int, Tokens] = OrderedDict()
        self.quarantine, self.quarantined = quarantine, set[int]()
        self._fetchers, self._fetching = ThreadPoolExecutor(_FETCHERS, "fetcher"), dict[int, Future[Tokens]]()

    @property
    @abstractmethod
    def mean_tokens(self) -> float:
        """Tokens that a model reads per sample, on average and without padding."""

    @abstractmethod
    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what is read and what is predicted of sample i in corpus order: int64 [tokens] each."""

    @abstractmethod
    def _num_samples(self, folder: Folder) -> np.ndarray:
        """Samples of each shard."""

    @abstractmethod
    def _batch(self, samples: np.ndarray) -> Batch: ...

    def batch(self, positions: np.ndarray | range) -> Batch:
        """Return the samples at positions counted from the start of the run."""
        return self._batch(self.order.at(positions))

    def micro_batch(self, step: int, j: int, global_batch: int, micro_batch: int) -> Batch:
        """Return micro-batch j of a step, the same whichever rank asks; steps count from 0, sizes are in samples.

        Behind the last one they come again, without target tokens, for a rank that has no work left but takes part in the collectives.
        """
        return next(self.steps(step, [j], global_batch, micro_batch))[0][1]

    def steps(self, first: int, numbers: Sequence[int], global_batch: int, micro_batch: int) -> Iterator[list[tuple[int, Batch]]]:
        """Yield, for step `first` and all that follow it, (j, micro-batch j) for each j of `numbers`: what `micro_batch` gives, with less work for each."""
        count = global_batch // micro_batch
        is_far = self.order.parts > 1 and any(folder.copies is not None for folder in self.folders)
        is_all_real = max(numbers) < count
        ahead = 1  # the first step is wanted at once
        while True:
            if is_far:
                self._fetch_ahead([j % count for j in numbers], first * global_batch)
            starts = np.add.outer(np.arange(first, first + ahead) * global_batch, np.array(numbers) % count * micro_batch)
            samples = self.order.at(np.add.outer(starts, np.arange(micro_batch)).reshape(-1))
            batches = self._batches(samples, micro_batch)
            for _ in range(ahead):
                step = list(zip(numbers, batches, strict=False))
                yield step if is_all_real else [(j, batch if j < count else batch.without_targets()) for j, batch in step]
            first += ahead
            ahead = max(1, _ORDERED // (len(numbers) * micro_batch))

    def _batches(self, samples: np.ndarray, micro_batch: int) -> Iterator[Batch]:
        for start in range(0, len(samples), micro_batch):
            yield self._batch(samples[start : start + micro_batch])

    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard, counted over all folders, that holds each sample, and its number there."""
        shards = np.searchsorted(self._sample_ends, samples, side="right")
        return shards, samples - np.where(shards, self._sample_ends[shards - 1], 0)

    def folder_of(self, shard: int) -> tuple[Folder, int]:
        """The folder that holds a shard, counted over all folders, and its number there."""
        folder = int(np.searchsorted(self._shard_ends, shard, side="right"))
        return self.folders[folder], shard - (int(self._shard_ends[folder - 1]) if folder else 0)

    def _open(self, shard: int) -> Tokens:
        found = self._shards.get(shard)
        if found is None:
            folder, number = self.folder_of(shard)
            found = self._shards[shard] = folder.open(number)
            leaving = [next(iter(self._shards))] if len(self._shards) > _OPEN_SHARDS else []
            if folder.copies is not None:  # a copy that made room takes its space until it is unmapped
                leaving += [other for other, opened in self._shards.items() if other not in (shard, *leaving) and not opened.path.exists()]
            for other in leaving:
                self._close(other)
        return found

    def _close(self, shard: int) -> None:
        """Let go of a shard, if it is open; it is opened again when it is read again."""
        self._shards.pop(shard, None)

    def _fetch_ahead(self, numbers: Sequence[int], position: int) -> None:
        """Begin to fetch the shards at an address that micro-batches `numbers` of a step will need soon, from a position on."""
        parts = sorted({number % self.order.parts for number in numbers})
        ahead = dict.fromkeys(shard for part in parts for shard in self.order.ahead(part, position))
        self._fetching = {shard: future for shard, future in self._fetching.items() if shard in ahead}
        for shard in ahead:
            folder, number = self.folder_of(shard)
            if folder.copies is not None and shard not in self._fetching:
                # What goes wrong here shows when the shard is read, which tries again.
                self._fetching[shard] = self._fetchers.submit(folder.open, number)

    def _read(self, shards: np.ndarray, read: Callable[[Tokens, np.ndarray], None]) -> np.ndarray | None:
        """Call `read(shard, rows)` for each shard of `shards` [rows]; return which rows could not be read, if any may be: bool [rows]."""
        lost: np.ndarray | None = None
        for (number,), rows in grouped(shards):
            try:
                if number not in self.quarantined:
                    read(self._open(number), rows)
                    continue
            except DataError as error:
                if self.quarantine is None:
                    raise
                self.quarantined.add(number)
                self._close(number)
                self.quarantine(str(error))
            lost = np.zeros(len(shards), bool) if lost is None else lost
            lost[rows] = True
        return lost


class Stream(AnyStream):
    """Packed text: every sample has `tokens_per_sample` tokens. With `within`, a token is not to attend to other documents than its own."""

    def __init__(
        self,
        folders: Path | Sequence[Path | Folder],
        tokens_per_sample: int,
        seed: int,
        shuffle: bool,
        interleaving: Interleaving = Interleaving(),
        quarantine: Callable[[str], None] | None = None,
        within: bool = False,
    ) -> None:
        self.tokens_per_sample, self.within = tokens_per_sample, within
        super().__init__(folders, seed, shuffle, interleaving, quarantine)
        self._dtype = self.folders[0].dtype
        self._is_alike = all(folder.dtype == self._dtype for folder in self.folders)  # not so with files of other programs
        self._per_group = max(1, _CHECKED // tokens_per_sample)
        num_groups = np.diff(self._sample_ends, prepend=0) // self._per_group + 2
        self._first_group = np.cumsum(np.append(0, num_groups))
        self._known = np.full(self._first_group[-1], _UNREAD, np.int8)
        self._rows = Rows(len(self._num_tokens), self._dtype, tokens_per_sample + 1)  # of the shards of which something is known to be plain

    @property
    def mean_tokens(self) -> float:
        """`tokens_per_sample`."""
        return float(self.tokens_per_sample)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of sample i in corpus order, each int64 [tokens_per_sample], padded with 0 and -100."""
        batch = self._batch(np.array([i]))
        return batch.input_ids[0], batch.labels[0]

    def _num_samples(self, folder: Folder) -> np.ndarray:
        assert "pairs" not in folder.facts, f"{folder.name} holds pairs"
        return np.maximum(0, -(-(folder.num_tokens - 1) // self.tokens_per_sample))

    def _close(self, shard: int) -> None:
        super()._close(shard)
        self._rows.unmap(shard)
        self._known[self._first_group[shard] : self._first_group[shard + 1]] = _UNREAD

    def _batches(self, samples: np.ndarray, micro_batch: int) -> Iterator[Batch]:
        width = self.tokens_per_sample + 1
        shards, numbers = self._find(samples)
        starts = numbers * self.tokens_per_sample
        lengths = np.minimum(width, self._num_tokens[shards] - starts)
        is_whole = lengths == width
        groups = self._first_group[shards] + numbers // self._per_group + ~is_whole  # the last sample of a shard, if it is short, is a group of its own
        together = max(1, _JOINED // micro_batch) * micro_batch
        for first in range(0, len(samples), together):
            these = slice(first, first + together)
            opened, lost = None, None
            if np.count_nonzero(self._known[groups[these]] != _PLAIN):
                opened, lost = self._check(shards[these], numbers[these], groups[these], is_whole[these])
            if opened is None or not np.count_nonzero(self._known[groups[these]] != _PLAIN):
                ids = self._rows.gather(shards[these], starts[these]).astype(np.int64).reshape(-1, micro_batch, width)
                yield from map(Batch, ids[:, :, :-1], ids[:, :, 1:], samples[these].reshape(-1, micro_batch))
                continue
            for start in range(first, min(first + together, len(samples)), micro_batch):
                among = slice(start, start + micro_batch)
                left_out = None if lost is None else lost[start - first : start - first + micro_batch]
                yield self._careful_batch(samples[among], [opened.get(name) for name in shards[among].tolist()], starts[among], lengths[among], left_out)

    def _batch(self, samples: np.ndarray) -> Batch:
        return next(self._batches(samples, len(samples)))

    def _check(self, shards: np.ndarray, numbers: np.ndarray, groups: np.ndarray, is_whole: np.ndarray) -> tuple[dict[int, Tokens], np.ndarray | None]:
        """Open the shards of samples and check what is not known of them; the shards, and which samples are lost: bool [samples], None where none is."""
        width = self.tokens_per_sample + 1
        opened: dict[int, Tokens] = {}  # held here, since the copies of the first may make room for those of the last

        def check(shard: Tokens, rows: np.ndarray) -> None:
            name = int(shards[rows[0]])
            opened[name] = shard
            fresh = rows[self._known[groups[rows]] == _UNREAD]
            for group in sorted(set((numbers[fresh] // self._per_group).tolist())):
                start, stop = (number * self._per_group * self.tokens_per_sample for number in (group, group + 1))
                shard.check(start, min(stop + 1, shard.num_tokens))
            if self.within:
                _ = shard.document_ends
            if name not in self._rows and shard.num_tokens >= width and self._is_alike and not (self.within or shard.has_predicted):
                self._rows.map(name, shard.bytes)
            self._known[groups[fresh]] = np.where(is_whole[fresh] & (name in self._rows), _PLAIN, _CAREFUL)

        return opened, self._read(shards, check)

    def _careful_batch(self, samples: np.ndarray, shards: Sequence[Tokens | None], starts: np.ndarray, lengths: np.ndarray, lost: np.ndarray | None) -> Batch:
        """Samples of which something is padded, lost or not predicted, or that are to be attended to document by document."""
        input_ids, labels = (np.full((len(samples), self.tokens_per_sample), fill, np.int64) for fill in (0, IGNORED))
        positions = np.tile(np.arange(self.tokens_per_sample), (len(samples), 1)) if self.within else None
        for row, (shard, start, length) in enumerate(zip(shards, starts.tolist(), lengths.tolist(), strict=True)):
            if lost is not None and lost[row]:
                continue
            assert shard is not None
            tokens = shard.read(start, start + length)
            input_ids[row, : length - 1] = tokens[:-1]
            is_label = shard.read_predicted(start + 1, start + length)
            if positions is not None:
                places = _positions(shard.document_ends, start, length)
                positions[row, : length - 1] = places[:-1]
                is_label = is_label & (places[1:] > 0)  # no token that it may see says the first one of a document
            labels[row, : length - 1] = np.where(is_label, tokens[1:], IGNORED)
        return Batch(input_ids, labels, samples, positions=positions, left_out=lost)


def _positions(document_ends: np.ndarray, start: int, width: int) -> np.ndarray:
    """Where each token from `start` on stands in its document, or behind `start`, where that is nearer: int64 [width]."""
    first, last = np.searchsorted(document_ends, [start + 1, start + width])
    begins = np.zeros(width, np.int64)
    begins[document_ends[first:last] - start] = document_ends[first:last] - start
    return np.arange(width) - np.maximum.accumulate(begins)


class DocumentStream(AnyStream):
    """Text, one document per sample, of which what is beyond `tokens_per_sample` is cut off. Batches are padded with 0 to a multiple of 8."""

    def __init__(
        self,
        folders: Path | Sequence[Path | Folder],
        tokens_per_sample: int,
        seed: int,
        shuffle: bool,
        interleaving: Interleaving = Interleaving(),
        quarantine: Callable[[str], None] | None = None,
    ) -> None:
        self.tokens_per_sample = tokens_per_sample
        super().__init__(folders, seed, shuffle, interleaving, quarantine)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a document, or `tokens_per_sample` where that is less."""
        return min(float(self.tokens_per_sample), sum(int(folder.num_tokens.sum()) for folder in self.folders) / self.num_samples)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of document i: int64 [tokens], those it has without its last one. A document of one token has that and no label."""
        (shard,), (number,) = self._find(np.array([i]))
        return self._document(self._open(int(shard)), int(number))

    def _num_samples(self, folder: Folder) -> np.ndarray:
        assert "pairs" not in folder.facts, f"{folder.name} holds pairs"
        return folder.num_documents

    def _document(self, shard: Tokens, number: int) -> tuple[np.ndarray, np.ndarray]:
        ends = shard.read_document_ends(max(0, number - 1), number + 1).tolist()
        start = ends[0] if number else 0
        stop = min(ends[-1], start + self.tokens_per_sample + 1)
        tokens = shard.read(start, stop)
        labels = np.where(shard.read_predicted(start, stop), tokens, IGNORED)[1:]
        return (tokens[:-1], labels) if len(tokens) > 1 else (tokens, np.array([IGNORED]))

    def _batch(self, samples: np.ndarray) -> Batch:
        shards, numbers = self._find(samples)
        rows = [(np.zeros(1, np.int64), np.full(1, IGNORED))] * len(samples)

        def read(shard: Tokens, among: np.ndarray) -> None:
            for row in among.tolist():
                rows[row] = self._document(shard, int(numbers[row]))

        lost = self._read(shards, read)
        width = _width([len(ids) for ids, _ in rows], self.tokens_per_sample)
        return Batch(_padded([ids for ids, _ in rows], width, 0), _padded([labels for _, labels in rows], width, IGNORED), samples, left_out=lost)


class PairStream(AnyStream):
    """Pairs of a source and a target, for an encoder-decoder model, or for a causal one where `decoder_start_token_id` is None.

    `pad_token_id` pads what is read. Widths are a multiple of 8, or the longest that `prepare` cut to, whichever is less.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path | Folder],
        pad_token_id: int,
        decoder_start_token_id: int | None,
        seed: int,
        shuffle: bool,
        interleaving: Interleaving = Interleaving(),
        quarantine: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(folders, seed, shuffle, interleaving, quarantine)
        for folder in self.folders:
            assert folder.facts.get("encoder_decoder") == (decoder_start_token_id is not None), f"{folder.name} was not prepared for this model"
        self.pad_token_id = pad_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self._source_tokens: int = self.folders[0].facts["pairs"]["source_tokens"]
        self._target_tokens: int = self.folders[0].facts["pairs"]["target_tokens"]

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of source and target together."""
        return sum(int(folder.num_tokens.sum()) for folder in self.folders) / self.num_samples

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, target) of pair i in corpus order, with their special tokens: int64 [source tokens] and [target tokens]."""
        (shard,), (number,) = self._find(np.array([i]))
        return self._pair(self._open(int(shard)), int(number))

    def _num_samples(self, folder: Folder) -> np.ndarray:
        return folder.num_documents // 2

    def _pair(self, shard: Tokens, number: int) -> tuple[np.ndarray, np.ndarray]:
        ends = shard.read_document_ends(max(0, 2 * number - 1), 2 * number + 2).tolist()
        start, middle, end = ends if number else (0, *ends)
        tokens = shard.read(start, end)
        return tokens[: middle - start], tokens[middle - start :]

    def _batch(self, samples: np.ndarray) -> Batch:
        shards, numbers = self._find(samples)
        start = self.decoder_start_token_id
        pairs = [(np.array([self.pad_token_id]), np.array([IGNORED]))] * len(samples)

        def read(shard: Tokens, rows: np.ndarray) -> None:
            for row in rows.tolist():
                pairs[row] = self._pair(shard, int(numbers[row]))

        lost = self._read(shards, read)
        if start is None:
            width = _width([len(source) + len(target) - 1 for source, target in pairs], self._source_tokens + self._target_tokens)
            inputs = [np.append(source, target[:-1]) for source, target in pairs]
            # The last token of the source says the first one of the target.
            labels = [np.append(np.full(len(source) - 1, IGNORED), target) for source, target in pairs]
            return Batch(_padded(inputs, width, self.pad_token_id), _padded(labels, width, IGNORED), samples, left_out=lost)
        width = _width([len(target) for _, target in pairs], self._target_tokens)
        source_width = _width([len(source) for source, _ in pairs], self._source_tokens)
        return Batch(
            _padded([np.append(start, target[:-1]) for _, target in pairs], width, self.pad_token_id),
            _padded([target for _, target in pairs], width, IGNORED),
            samples,
            _padded([source for source, _ in pairs], source_width, self.pad_token_id),
            np.arange(source_width) < np.array([[len(source)] for source, _ in pairs]),
            left_out=lost,
        )


def _width(lengths: Sequence[int], longest: int) -> int:
    return min(-(-max(lengths) // _WIDTH) * _WIDTH, longest)


def _padded(rows: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    result = np.full((len(rows), width), fill, np.int64)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result
