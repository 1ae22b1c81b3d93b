"""Does the file compute what was trained? Bit for bit on weights, and on logits."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dqtrain.artifact.load import load_any
from dqtrain.errors import CheckpointError
from dqtrain.models import Inputs, LanguageModel
from dqtrain.quant.modules import served_parameters

LOGITS_TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit: the same values through the same kernels, but perhaps at other addresses."""


@torch.no_grad()
def verify(trained: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Compare a trained (fake-quantized or float) model with what its exported folder loads as; the figures.

    Raises CheckpointError that names the first tensor which is not bit-identical to the trained grid, or the difference of the logits.
    """
    loaded = load_any(folder)
    found = dict(loaded.named_parameters())
    num_tensors = 0
    for name, tensor in served_parameters(trained):
        num_tensors += 1
        if name not in found or not torch.equal(found[name], tensor):
            difference = (found[name] - tensor).abs().max().item() if name in found else float("nan")
            raise CheckpointError(
                f"{folder}: {name} is not what was trained (largest difference {difference}); do not use this artifact, and report this as a bug."
            )
    vocab_size = trained.config.vocab_size
    tokens = min(32, getattr(trained.config, "max_position_embeddings", 32))
    ids = torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    here = torch.ones_like(ids, dtype=torch.bool)
    inputs = Inputs(ids, here, ids.flip(1), here) if trained.config.is_encoder_decoder else Inputs(ids, here)
    trained.eval()
    ours, theirs = LanguageModel(trained).logits(inputs), LanguageModel(loaded).logits(inputs)
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= LOGITS_TOLERANCE:
        raise CheckpointError(
            f"{folder}: its logits differ from the trained model's by {difference:.1e} of the largest, more than {LOGITS_TOLERANCE:.0e}. Report this as a bug."
        )
    return {
        "tensors_bit_identical": num_tensors,
        "relative_logit_difference": difference,
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
