"""Rows out of mapped files: what is copied, whatever is mapped, let go of and mapped again in between."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.data.rows import Rows

LENGTHS = (1, 5, 7, 4000, 70_000)
"""Tokens of the files; the last ones take several pages."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, draw = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    paths = [folder / str(number) for number in range(len(LENGTHS))]
    for path, length in zip(paths, LENGTHS, strict=True):
        draw.integers(0, 2**16, 2 * length, dtype=np.uint16).tofile(path)  # as many of 4 bytes
    return paths


@settings(max_examples=40, deadline=None)
@given(draw=st.data(), dtype=st.sampled_from([np.dtype("<u2"), np.dtype("<u4")]), width=st.integers(1, 6))
def test_gathers_what_slices_give(files: list[Path], draw: st.DataObject, dtype: np.dtype, width: int) -> None:
    tokens = [np.fromfile(path, dtype)[:length] for path, length in zip(files, LENGTHS, strict=True)]
    rows, mapped = Rows(len(files), dtype, width), set[int]()
    fit = [number for number, length in enumerate(LENGTHS) if length >= width]
    for number in draw.draw(st.lists(st.sampled_from(fit), min_size=1, max_size=12)):
        if number in mapped:
            rows.unmap(number)
        else:
            rows.map(number, np.memmap(files[number], dtype, "r", shape=LENGTHS[number]).data.cast("B"))
        mapped ^= {number}
        assert {other for other in range(len(files)) if other in rows} == mapped
        if mapped:
            asked = np.array(draw.draw(st.lists(st.sampled_from(sorted(mapped)), min_size=1, max_size=6)))
            starts = np.array([draw.draw(st.integers(0, LENGTHS[other] - width)) for other in asked])
            found = rows.gather(asked, starts)
            assert found.dtype == dtype and found.shape == (len(asked), width)
            for row, other, start in zip(found, asked, starts, strict=True):
                np.testing.assert_array_equal(row, tokens[other][start : start + width])
        for other in set(fit) - mapped:
            with pytest.raises(IndexError):
                rows.gather(np.array([other]), np.array([0]))


def test_what_is_handed_out_outlives_the_file(files: list[Path]) -> None:
    rows = Rows(1, np.dtype("<u2"), 3)
    rows.map(0, np.memmap(files[3], "<u2", "r").data.cast("B"))
    found = rows.gather(np.array([0, 0]), np.array([0, 2000]))
    rows.unmap(0)
    np.testing.assert_array_equal(found, [np.fromfile(files[3], "<u2")[start : start + 3] for start in (0, 2000)])
