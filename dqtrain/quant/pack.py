"""Integer codes <-> bytes: as many codes to a word as fit, in base L, the number of levels.

A word is one byte, or three where that holds more (5 to 8 levels: 8 codes in 3 bytes). It holds k = floor(log 256^bytes / log L)
codes as digits code - low, the first one lowest, the lowest byte first: 8 binary codes to a byte, 5 ternary ones (1.6 bits
each), 4 of 4 levels, 2 of 15 or 16, or 1 of 255 or 256. The last word is filled up with digits 0.
"""

import math

import torch
from torch import Tensor

from dqtrain.errors import CheckpointError
from dqtrain.quant.grid import Levels


def layout(levels: int) -> tuple[int, int]:
    """(bytes in a word, codes in a word)."""
    num_bytes = 3 if 5 <= levels <= 8 else 1
    return num_bytes, max(k for k in range(1, 9) if levels**k <= 256**num_bytes)


def packed_bytes(numel: int, levels: Levels) -> int:
    """Bytes that hold `numel` codes."""
    num_bytes, num_codes = layout(levels.count)
    return math.ceil(numel / num_codes) * num_bytes


def pack(codes: Tensor, levels: Levels) -> Tensor:
    """Codes, int8 of any shape, within levels.low..high -> bytes, uint8 [packed_bytes(numel)]."""
    num_bytes, num_codes = layout(levels.count)
    assert codes.dtype == torch.int8 and (codes.numel() == 0 or (codes.amin() >= levels.low and codes.amax() <= levels.high)), "codes come from a quantizer"
    dtype = torch.uint8 if num_bytes == 1 else torch.int32
    digits = codes.new_zeros(math.ceil(codes.numel() / num_codes) * num_codes, dtype=dtype)
    torch.sub(codes.flatten().to(torch.int16), levels.low, out=digits[: codes.numel()])
    word, *rest = reversed(digits.view(-1, num_codes).unbind(1))
    for digit in rest:
        word = word * levels.count + digit
    return word if num_bytes == 1 else torch.stack([word >> (8 * i) & 255 for i in range(num_bytes)], 1).to(torch.uint8).flatten()


def unpack(packed: Tensor, shape: tuple[int, ...], levels: Levels) -> Tensor:
    """Bytes -> codes, int8 of `shape`. Raises CheckpointError when there are too few or too many, or one that `pack` never writes."""
    num_bytes, num_codes = layout(levels.count)
    numel = math.prod(shape)
    if packed.numel() != packed_bytes(numel, levels):
        raise CheckpointError(
            f"{numel} codes of {levels.count} levels are packed in {packed.numel()} bytes, but need {packed_bytes(numel, levels)}; export the artifact again."
        )
    word = packed.flatten()
    if num_bytes > 1:
        word = sum(part.int() << (8 * i) for i, part in enumerate(word.view(-1, num_bytes).unbind(1)))  # type: ignore[assignment]
    largest = int(word.max()) if word.numel() else 0
    if largest >= levels.count**num_codes:
        raise CheckpointError(f"a packed word is {largest}, but codes of {levels.count} levels make words up to {levels.count**num_codes - 1}; export again.")
    if num_bytes > 1:
        digits = torch.stack([word // levels.count**k % levels.count for k in range(num_codes)], 1)
        return (digits + levels.low).to(torch.int8).flatten()[:numel].reshape(shape)
    byte = torch.arange(levels.count**num_codes, device=packed.device)
    table = torch.stack([byte // levels.count**k % levels.count + levels.low for k in range(num_codes)], 1).to(torch.int8)  # [bytes, codes per byte]
    return table.index_select(0, word.int()).flatten()[:numel].reshape(shape)
