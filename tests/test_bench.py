"""What the tables of docs/benchmarks come from runs, on sizes that measure nothing."""

import pytest

from dqtrain.bench import head, quantizers, terms

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("bench", "rows"),
    [
        (lambda: quantizers.run(rows=8, columns=8, rounds=1), ("bare copy", "forward and backward", "seq", "affine")),
        (lambda: head.run(width=16, vocabulary=512, tokens=(8,), largest=32, rounds=1), ("8", "32")),
        (lambda: terms.run(layers=1, width=64, vocabulary=128, samples=1, tokens=16, rounds=1), ("logits", "contrast")),
    ],
    ids=["quantizers", "head", "terms"],
)
def test_a_bench_prints_its_table(bench, rows):
    said = bench()
    assert all(row in said for row in rows), said
