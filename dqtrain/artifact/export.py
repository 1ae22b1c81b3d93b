"""A finished run's checkpoint -> a verified artifact: packed codes for a quantized student, a Hugging Face directory for a float one."""

import json
import shutil
from pathlib import Path
from typing import Any

from dqtrain.artifact import format, parity
from dqtrain.artifact.load import trained_model
from dqtrain.artifact.pretrained import name_in_config
from dqtrain.errors import CheckpointError
from dqtrain.files import sync_path, write_text
from dqtrain.models import by_names
from dqtrain.quant.modules import float_bytes, served_parameters
from dqtrain.rundir import RunDir


def export(run: RunDir, folder: Path) -> dict[str, Any]:
    """Write, verify and only then publish `artifact/packed` or `artifact/hf` from a checkpoint folder; path, sizes and parity.

    Raises CheckpointError when it cannot be written or does not compute what was trained; an older artifact then stays.
    """
    config = run.load_config()
    model = trained_model(run, folder)
    target = "packed" if config.quant is not None else "hf"
    final = run.artifact(target)
    partial, old = final.with_name(f".tmp-{target}"), final.with_name(f".old-{target}")
    try:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in run.student.iterdir():  # config, generation config, tokenizer
            shutil.copy(file, partial)
        if config.quant is not None:
            coverage = json.loads(run.coverage.read_text())
            activations = config.quant.activations.model_dump() if config.quant.activations else None
            about = {"activations": activations, "checkpoint": folder.name, "coverage": coverage}
            format.write(model, partial, about)
            name_in_config(partial)
        else:
            served = dict(served_parameters(model))
            model.save_pretrained(partial, state_dict={name: served.get(names[0], tensor) for names, tensor in by_names(model) for name in names})
        figures = parity.verify(model, partial)
        write_text(partial / "parity.json", json.dumps(figures, indent=1))
        for file in partial.iterdir():
            sync_path(file)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        sync_path(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written ({error}). Free space there, then `dqtrain export {run.path}` or `dqtrain resume {run.path}`."
        ) from None
    size = (final / "model.safetensors").stat().st_size
    return {"path": str(final), "bytes": size, "fp32_bytes": float_bytes(model), "ratio": float_bytes(model) / size, "parity": figures}
