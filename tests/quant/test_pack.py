import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.errors import CheckpointError
from dqtrain.quant.grid import largest_code
from dqtrain.quant.pack import pack, packed_bytes, unpack


@settings(max_examples=80, deadline=None)
@given(shape=st.lists(st.integers(0, 11), min_size=1, max_size=3), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 999))
def test_unpack_gives_back_what_was_packed(shape, bits, seed):
    qmax = largest_code(bits)
    codes = torch.randint(-qmax, qmax + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(codes.numel(), bits),)
    again = unpack(packed, tuple(shape), bits)
    assert again.dtype == torch.int8 and torch.equal(again, codes)


def test_sizes():
    assert [packed_bytes(38_597_376, bits) for bits in (2, 4, 8)] == [7_719_476, 19_298_688, 38_597_376]
    assert [packed_bytes(numel, 2) for numel in (0, 1, 5, 6)] == [0, 1, 1, 2]


def test_bytes_are_as_documented():
    assert pack(torch.tensor([-1, 0, 1, 1, -1, 1], dtype=torch.int8), 2).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2 + 3 + 9 + 27 + 81]
    assert pack(torch.tensor([-7, 7, 1], dtype=torch.int8), 4).tolist() == [0 + 14 * 15, 8 + 7 * 15]
    assert pack(torch.tensor([[-127], [127]], dtype=torch.int8), 8).tolist() == [0, 254]
    assert pack(torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8).T, 2).tolist() == pack(torch.tensor([1, -1, 0, 1], dtype=torch.int8), 2).tolist()


@pytest.mark.parametrize(("bits", "byte"), [(2, 243), (4, 225), (8, 255)])
def test_byte_that_no_code_makes_is_refused(bits, byte):
    assert unpack(torch.tensor([byte - 1], dtype=torch.uint8), (1,), bits).numel() == 1
    with pytest.raises(CheckpointError, match=f"a packed byte is {byte}"):
        unpack(torch.tensor([byte], dtype=torch.uint8), (1,), bits)


@pytest.mark.parametrize("num_bytes", [1, 3])
def test_wrong_number_of_bytes_is_refused(num_bytes):
    with pytest.raises(CheckpointError, match=f"packed in {num_bytes} bytes, but need 2"):
        unpack(torch.zeros(num_bytes, dtype=torch.uint8), (3, 2), 2)


@pytest.mark.parametrize("codes", [torch.tensor([2], dtype=torch.int8), torch.tensor([-128], dtype=torch.int8), torch.tensor([1])])
def test_codes_outside_the_grid_are_not_packed(codes):
    with pytest.raises(AssertionError, match="grid.quantize"):
        pack(codes, 2)
