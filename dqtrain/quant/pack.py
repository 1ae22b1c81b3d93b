"""Integer codes <-> bytes: as many codes to a byte as fit, in base L = 2 * qmax + 1.

A byte holds k = floor(log 256 / log L) codes, the first one as its lowest digit, each stored as code + qmax: five ternary
codes (1.6 bits each), two of 4 bits or one of 8. The last byte is filled up with codes 0.
"""

import math

import torch
from torch import Tensor

from dqtrain.errors import CheckpointError
from dqtrain.quant.grid import largest_code


def _layout(bits: int) -> tuple[int, int, int]:
    """(qmax, levels, codes per byte)."""
    qmax = largest_code(bits)
    levels = 2 * qmax + 1
    return qmax, levels, max(k for k in range(1, 9) if levels**k <= 256)


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that hold `numel` codes."""
    return math.ceil(numel / _layout(bits)[2])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, int8 of any shape, within +-qmax -> bytes, uint8 [packed_bytes(numel)]."""
    qmax, levels, codes_per_byte = _layout(bits)
    assert codes.dtype == torch.int8 and (codes.numel() == 0 or (codes.amin() >= -qmax and codes.amax() <= qmax)), "codes come from grid.quantize"
    digits = codes.new_full((packed_bytes(codes.numel(), bits) * codes_per_byte,), qmax, dtype=torch.uint8)
    digits[: codes.numel()] = codes.flatten().view(torch.uint8) + qmax  # modulo 256, so two's complement comes out right
    packed, *rest = reversed(digits.view(-1, codes_per_byte).unbind(1))
    for digit in rest:
        packed = packed * levels + digit
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Bytes -> codes, int8 of `shape`. Raises CheckpointError when there are too few or too many, or one that `pack` never writes."""
    qmax, levels, codes_per_byte = _layout(bits)
    numel = math.prod(shape)
    if packed.numel() != packed_bytes(numel, bits):
        raise CheckpointError(
            f"{numel} codes of {bits} bits are packed in {packed.numel()} bytes, but need {packed_bytes(numel, bits)}; export the artifact again."
        )
    largest = int(packed.max()) if packed.numel() else 0
    if largest >= levels**codes_per_byte:
        raise CheckpointError(f"a packed byte is {largest}, but {bits}-bit codes make bytes up to {levels**codes_per_byte - 1}; export the artifact again.")
    byte = torch.arange(levels**codes_per_byte, device=packed.device)
    table = torch.stack([byte // levels**k % levels - qmax for k in range(codes_per_byte)], 1).to(torch.int8)  # [bytes, codes per byte]
    return table.index_select(0, packed.flatten().int()).flatten()[:numel].reshape(shape)
