"""What a step is made with, as pure functions of its place in the run: then there is no state to save."""

import math

import torch
import xxhash

from dqtrain.config import Train


def learning_rate_factor(step: int, train: Train) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the decay. A pure function, so that nothing need be saved."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[train.decay]


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Seed dropout and sampled negatives by position in the run, never by rank: then no random state need be saved."""
    torch.manual_seed(xxhash.xxh64_intdigest(f"{seed}/{step}/{index}".encode()) >> 1)
