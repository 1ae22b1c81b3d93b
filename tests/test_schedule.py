"""Learning rate and seeds are functions of the place in the run alone."""

import pytest
import torch

from dqtrain.config import Train
from dqtrain.schedule import learning_rate_factor, seed_micro_batch


@pytest.mark.parametrize(
    ("decay", "after"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]), ("constant", [1.0] * 4)],
)
def test_the_rate_rises_in_even_steps_and_then_decays(decay, after):
    train = Train(steps=8, global_batch=1, micro_batch=1, lr=1.0, warmup_steps=4, decay=decay)
    assert [learning_rate_factor(step, train) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1.0, *after])
    assert learning_rate_factor(0, train.model_copy(update={"warmup_steps": 0})) == 1.0


def test_each_micro_batch_of_each_step_of_each_seed_draws_its_own_numbers_and_the_same_again():
    def drawn(*place):
        seed_micro_batch(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, index) for seed in (0, 1) for step in (0, 1, 11) for index in (0, 1, 11)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)
