"""Make generative language models small: joint distillation and quantization-aware training, from a teacher to a packed artifact."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Objective", "load_artifact", "quantize_model"]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line and a login node need no torch.
    if name == "load_artifact":
        from dqtrain.artifact.load import load_artifact

        return load_artifact
    if name == "quantize_model":
        from dqtrain.quant.modules import quantize_model

        return quantize_model
    if name == "Objective":
        from dqtrain.distill.objective import Objective

        return Objective
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
