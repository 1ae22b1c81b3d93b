"""Make generative language models small: joint distillation and quantization-aware training, from a teacher to a packed artifact."""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
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


_QUANTIZERS = "transformers.quantizers.auto"
"""The module that holds transformers' list of quantizers."""


class _WithOurs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads transformers' list of quantizers once, as it would be without this, and puts ours into it: importing transformers here would take seconds."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module("dqtrain.artifact.pretrained")


if _QUANTIZERS in sys.modules:
    importlib.import_module("dqtrain.artifact.pretrained")
else:
    sys.meta_path.insert(0, _WithOurs())
