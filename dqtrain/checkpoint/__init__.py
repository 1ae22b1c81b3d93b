"""Checkpoints that are complete or absent, written by a thread as fragments that any world size and ZeRO stage can read.

    checkpoints/step-000000010/   rank-00000.safetensors ...   NAME|fp32, NAME|exp_avg, NAME|exp_avg_sq: the pieces that each rank owned
                                  buffers.safetensors          what every rank holds alike: the contrastive bank
                                  index.json                   which rank's file holds which elements of which parameter
                                  state.json                   step, best validation loss, values not yet logged, config, versions
                                  MANIFEST.json                size and hash of every file above
    checkpoints/LATEST            name of the newest one, for people; loading trusts manifests alone

Everything is written into `.tmp-step-...`, synced, and renamed once all ranks are done: a kill at any moment leaves the
older checkpoints and no broken new one. A loader finds the intervals it needs by parameter name and offset. No pickle.
"""

from dqtrain.checkpoint.index import FORMAT, Index, persistent_buffers, read_state
from dqtrain.checkpoint.reading import fill, load, readers, require_fits, require_same_config, weights, write_model
from dqtrain.checkpoint.saver import Saver
from dqtrain.checkpoint.sound import agree_on_newest, at_step, newest, problem_with

__all__ = [
    "FORMAT",
    "Index",
    "Saver",
    "agree_on_newest",
    "at_step",
    "fill",
    "load",
    "newest",
    "persistent_buffers",
    "problem_with",
    "read_state",
    "readers",
    "require_fits",
    "require_same_config",
    "weights",
    "write_model",
]
