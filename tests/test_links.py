"""Who measures a link with whom."""

import pytest

from dqtrain.bench.links import partner


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 129])
def test_in_each_round_pairs_are_pairs_and_over_all_of_them_each_meets_each(count: int) -> None:
    met: dict[int, list[int]] = {rank: [] for rank in range(count)}
    for number in range(count - 1 + count % 2):
        others = [partner(rank, count, number) for rank in range(count)]
        assert others.count(None) == count % 2
        for rank, other in enumerate(others):
            if other is not None:
                assert other != rank and others[other] == rank
                met[rank].append(other)
    assert all(sorted(others) == [other for other in range(count) if other != rank] for rank, others in met.items())
