import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import BITS_OF_GRID
from dqtrain.errors import CheckpointError
from dqtrain.quant.grid import GRIDS, Levels
from dqtrain.quant.pack import pack, packed_bytes, unpack

EVERY = sorted({GRIDS[grid].levels(bits) for grid, widths in BITS_OF_GRID.items() for bits in widths}, key=lambda levels: (levels.count, levels.low))
WORDS = {2: (1, 8), 3: (1, 5), 4: (1, 4), 7: (3, 8), 8: (3, 8), 15: (1, 2), 16: (1, 2), 255: (1, 1), 256: (1, 1)}  # levels -> bytes, codes

of_levels = pytest.mark.parametrize("levels", EVERY, ids=lambda levels: f"{levels.low}..{levels.high}")


def random_codes(shape, levels, seed):
    return torch.randint(levels.low, levels.high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def written_out(codes, levels):
    """The bytes of the docstring in Python's integers."""
    num_bytes, num_codes = WORDS[levels.count]
    digits = [code - levels.low for code in codes.flatten().tolist()]
    words = [digits[i : i + num_codes] for i in range(0, len(digits), num_codes)]
    return [byte for word in words for byte in sum(digit * levels.count**k for k, digit in enumerate(word)).to_bytes(num_bytes, "little")]


def test_every_number_of_levels_has_its_word():
    assert {levels.count for levels in EVERY} == WORDS.keys()
    for count, (num_bytes, num_codes) in WORDS.items():
        assert count**num_codes <= 256**num_bytes


@of_levels
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 11), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_unpack_gives_back_what_was_packed(levels, shape, seed):
    codes = random_codes(shape, levels, seed)
    packed = pack(codes, levels)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(codes.numel(), levels),)
    assert packed.tolist() == written_out(codes, levels)
    again = unpack(packed, tuple(shape), levels)
    assert again.dtype == torch.int8 and torch.equal(again, codes)


@of_levels
def test_every_length_round_trips(levels):
    codes = random_codes((70,), levels, 0)
    for length in range(71):
        assert torch.equal(unpack(pack(codes[:length], levels), (length,), levels), codes[:length])


@of_levels
def test_extreme_codes_round_trip(levels):
    for code in (levels.low, levels.high):
        codes = torch.full((24,), code, dtype=torch.int8)
        assert torch.equal(unpack(pack(codes, levels), (4, 6), levels), codes.view(4, 6))


@of_levels
def test_codes_are_packed_in_the_order_of_the_weight(levels):
    codes = random_codes((6, 5), levels, 1)
    assert torch.equal(pack(codes.T, levels), pack(codes.T.contiguous(), levels))  # a view that is not contiguous


@of_levels
def test_sizes(levels):
    num_bytes, num_codes = WORDS[levels.count]
    assert packed_bytes(38_597_376, levels) == math.ceil(38_597_376 / num_codes) * num_bytes
    assert [packed_bytes(n, levels) for n in (0, 1, num_codes, num_codes + 1)] == [0, num_bytes, num_bytes, 2 * num_bytes]


def test_bytes_are_as_documented():
    def packed(codes, levels):
        return pack(torch.tensor(codes, dtype=torch.int8), levels).tolist()

    assert packed([-1, 0, 1, 1, -1, 1], Levels(-1, 1)) == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2]  # filled up with digits 0
    assert packed([0, -1, -1, 0, 0, 0, 0, 0, 0], Levels(-1, 0, 0.5)) == [0b11111001, 1]
    assert packed([-2, -1, 0, 1, 1], Levels(-2, 1, 0.5)) == [0b11100100, 3]
    assert packed([-7, 7, 1], Levels(-7, 7)) == [0 + 14 * 15, 8]
    assert packed([-8, 7], Levels(-8, 7)) == [0xF0]
    assert packed([-127, 127], Levels(-127, 127)) == [0, 254] and packed([-128, 127], Levels(-128, 127)) == [0, 255]
    assert packed([-3, 3], Levels(-3, 3)) == [0 + 6 * 7, 0, 0]
    assert packed([-4] * 7 + [3], Levels(-4, 3)) == [0, 0, 0b11100000]  # the lowest byte first


@pytest.mark.parametrize("extra", [-1, 1])
@of_levels
def test_wrong_number_of_bytes_is_refused(levels, extra):
    need = packed_bytes(30, levels)
    with pytest.raises(CheckpointError, match=f"30 codes of {levels.count} levels are packed in {need + extra} bytes, but need {need}"):
        unpack(torch.zeros(need + extra, dtype=torch.uint8), (3, 10), levels)


@of_levels
def test_word_that_no_codes_make_is_refused(levels):
    num_bytes, num_codes = WORDS[levels.count]
    largest = levels.count**num_codes - 1

    def words(*values):
        return torch.tensor([byte for value in values for byte in value.to_bytes(num_bytes, "little")], dtype=torch.uint8)

    assert (unpack(words(0, largest), (2 * num_codes,), levels) == torch.tensor([levels.low, levels.high]).repeat_interleave(num_codes)).all()
    for impossible in {largest + 1, 256**num_bytes - 1} if largest + 1 < 256**num_bytes else ():
        with pytest.raises(CheckpointError, match=f"a packed word is {impossible}, .* up to {largest}"):
            unpack(words(0, impossible), (2 * num_codes,), levels)


@of_levels
def test_codes_outside_the_levels_are_not_packed(levels):
    outside = [torch.tensor([code], dtype=torch.int8) for code in (levels.low - 1, levels.high + 1) if -128 <= code <= 127]
    for codes in (*outside, torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(AssertionError, match="codes come from a quantizer"):
            pack(codes, levels)
