"""Safetensors files, written and read one tensor at a time; the library's writer wants all of them at once.

A file (https://github.com/huggingface/safetensors#format) is 8 bytes, the length of the header; the header, JSON without spaces that is filled up with
spaces to a multiple of 8; and the tensors, the most aligned dtypes first, then by name: the library's own order, so that files are equal to its in every byte.
A model of many bytes is several files and an index, named as transformers does; those of other formats are parted like these.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from dqtrain.files import digest, sync_path, write_text

DTYPES = {  # in the order in which safetensors writes them: its enum, backwards
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: number for number, dtype in enumerate(DTYPES)}

METADATA = {"format": "pt"}
"""What transformers wants to see in a header."""

SHARD_BYTES = 5 * 10**9
"""Bytes of the tensors in one file of a model, at most."""

INDEX = "model.safetensors.index.json"

MAPPED_BYTES = 2**26
"""What is read of files before they are closed: until then pages of a mapped file count as memory of the process."""

PART_BYTES = 2**26
"""What is read of a tensor of floats at a time, so that the file's pages do not fill the memory."""

_BLOCK = 1 << 22

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""(dtype, shape) by name."""


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor's values."""
    return math.prod(shape) * dtype.itemsize


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """What stands before the tensors, and where in the file each of them starts, in the order of the file; `metadata` of at most one key."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(layout, key=lambda name: (_ORDER[layout[name][0]], name)):
        dtype, shape = layout[name]
        start, end = end, end + num_bytes(dtype, shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}


def file_bytes(layout: Layout, metadata: Mapping[str, str] | None = METADATA) -> int:
    """Size of a file with these tensors."""
    return len(_header(layout, metadata)[0]) + sum(num_bytes(*tensor) for tensor in layout.values())


def _blocks(tensor: Tensor) -> Iterator[Any]:
    """A CPU tensor's bytes, so few at a time that a thread which writes them does not keep the interpreter from the one that trains."""
    content = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
    for start in range(0, len(content), _BLOCK):
        yield content[start : start + _BLOCK]


def write_tensors(path: Path, layout: Layout, read: Callable[[str], Tensor]) -> tuple[int, str]:
    """Write and sync a file, asking `read` for one CPU tensor at a time; its bytes and hash. Raises OSError."""
    hashed = xxhash.xxh3_128()
    with path.open("wb") as file:

        def write(part: Any) -> None:
            file.write(part)
            hashed.update(part)

        head, starts = _header(layout, METADATA)
        write(head)
        for name in starts:
            for block in _blocks(read(name)):
                write(block)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), hashed.hexdigest()


def in_parts(name: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Tensors (bytes by name) in files of SHARD_BYTES at most each, in their order: one `name` holds all, or model-00001-of-00003.SUFFIX and so on. A larger tensor is alone."""
    parts: list[list[str]] = [[]]
    room = SHARD_BYTES
    for tensor, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(tensor)
        room -= size
    stem, _, suffix = name.partition(".")
    return {name if len(parts) == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}": part for number, part in enumerate(parts, 1)}


def model_files(layout: Layout) -> dict[str, Layout]:
    """The files that a model's tensors are in (`in_parts`)."""
    parts = in_parts("model.safetensors", {name: num_bytes(*tensor) for name, tensor in layout.items()})
    return {file: {name: layout[name] for name in part} for file, part in parts.items()}


def index_text(files: Mapping[str, Layout]) -> dict[str, str]:
    """The index of several files of tensors, under its name; nothing of one."""
    if len(files) == 1:
        return {}
    total = sum(num_bytes(*tensor) for part in files.values() for tensor in part.values())
    weight_map = {tensor: name for name, part in files.items() for tensor in part}
    return {INDEX: json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"}


def write_model_files(folder: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, str]]:
    """Write and sync a model's tensors, on CPU, in whatever order they come, one at a time: its files (`model_files`) and, of several, their index.

    Returns bytes and hash of each file. Raises OSError.
    """
    files = model_files(layout)
    with ExitStack() as opened:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for name, part in files.items():
            file: BinaryIO = opened.enter_context((folder / name).open("wb"))
            head, starts = _header(part, METADATA)
            file.write(head)
            places |= {tensor: (file, start) for tensor, start in starts.items()}
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == (layout[name][0], tuple(layout[name][1])), f"{name} is no {layout[name]}"
            file, start = places.pop(name)
            file.seek(start)
            for block in _blocks(tensor):
                file.write(block)
        assert not places, f"{min(places)} was not given"
    for name in files:
        sync_path(folder / name)
    index = index_text(files)
    for name, text in index.items():
        write_text(folder / name, text)
    return {name: ((folder / name).stat().st_size, digest(folder / name)) for name in (*files, *index)}


class MappedFiles:
    """Safetensors files that are read a tensor, or a part of one, at a time; opened when they are needed, and closed again and again (MAPPED_BYTES)."""

    def __init__(self) -> None:
        self._opened: dict[Path, Any] = {}
        self._read = 0

    def open(self, path: Path) -> Any:
        """The library's handle of a file. Raises SafetensorError, OSError."""
        if self._read > MAPPED_BYTES:
            self.close()
        if path not in self._opened:
            self._opened[path] = safe_open(path, "pt")
        return self._opened[path]

    def places(self, paths: Iterable[Path]) -> dict[str, Path]:
        """Tensor -> the file that holds it."""
        return {name: path for path in paths for name in self.open(path).keys()}  # noqa: SIM118 - no dict

    def shape(self, path: Path, name: str) -> tuple[int, ...]:
        """A tensor's."""
        return tuple(self.open(path).get_slice(name).get_shape())

    def read(self, path: Path, name: str) -> Tensor:
        """A tensor."""
        tensor = self.open(path).get_tensor(name)
        self._read += tensor.nbytes
        return tensor

    def read_part(self, path: Path, name: str, start: int, stop: int) -> Tensor:
        """Rows start, ..., stop - 1 of a tensor."""
        part = self.open(path).get_slice(name)[start:stop]
        self._read += part.nbytes
        return part

    def fill(self, path: Path, name: str, start: int, out: Tensor) -> None:
        """Copy elements start, start + 1, ... of a flattened tensor into a vector: the rows that hold them are read, and no others."""
        shape = self.shape(path, name)
        if not shape:
            out.copy_(self.read(path, name).reshape(1))
            return
        inner, end = math.prod(shape[1:]), start + out.numel()
        step = max(1, PART_BYTES // (4 * inner)) * inner
        for begin in range(start // inner * inner, end, step):
            low, high = max(begin, start), min(begin + step, end)
            part = self.read_part(path, name, begin // inner, -(-high // inner))
            out[low - start : high - start].copy_(part.reshape(-1)[low - begin : high - begin])

    def close(self) -> None:
        """Take the pages of the files out of memory."""
        self._opened.clear()
        self._read = 0
