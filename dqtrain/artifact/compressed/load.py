"""A directory in compressed-tensors' format as a transformers model, made dense; and as a runtime, which is what a person gets who calls it."""

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from dqtrain.artifact.description import check_list
from dqtrain.artifact.target import extra
from dqtrain.errors import CheckpointError
from dqtrain.models.making import model_class, read_model_config

DESCRIPTION = "compressed-tensors.json"
"""What lists the other files of a directory that was written here (`description.write_list`); one from elsewhere has none."""


def compressed_tensors_package() -> Any:
    """The package `compressed_tensors`, which is an extra. Raises ConfigError without it."""
    return extra("compressed_tensors.offload", "compressed-tensors")


def is_compressed(folder: Path) -> bool:
    """Whether a model directory is in compressed-tensors' format."""
    if (folder / DESCRIPTION).is_file():  # whatever became of its config.json
        return True
    try:
        return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_compressed(folder: Path) -> PreTrainedModel:
    """The model of such a directory as transformers makes it, in fp32 and eval mode, its weights dense, its activations quantized as the directory says.

    transformers would leave the codes until the first forward of the whole model, which an encoder that is called by itself does not wait for.
    Files that are listed (DESCRIPTION) are looked at first. Raises ConfigError without the package, CheckpointError for a damaged directory, and for one that
    transformers does not load whole, such as one for vLLM.
    """
    package = compressed_tensors_package()
    if (folder / DESCRIPTION).is_file():
        check_list(folder / DESCRIPTION)
    config = read_model_config(folder)
    # A config.json that was cut or edited fails anywhere between two libraries, as does a file.
    errors = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, IndexError, SafetensorError)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars for every phase
            loaded: Any = model_class(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
            model, report = loaded
            if not (wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]) and hasattr(model, "hf_quantizer"):
                model.hf_quantizer.compressor.decompress_model(model)
                # Its own way of moving tensors between devices makes dicts of what BART's generate hands around.
                package.offload.remove_dispatch(model)
    except errors as error:
        raise CheckpointError(f"{folder}: compressed-tensors cannot load it ({error}). Export it again.") from None
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers finds no place, or no value, for {len(wrong)} tensors, such as {wrong[0]}: it is damaged, or was written for vLLM. "
            "Export it again with export.compressed_tensors: transformers."
        )
    return model.eval()


class TransformersRunner:
    """A transformers model as a program (`target.Runner`), one sequence at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @classmethod
    @torch.no_grad()
    def of_values(cls, config: PretrainedConfig, values: Mapping[str, Callable[[], Tensor]]) -> "TransformersRunner":
        """A float model of a config with values by the names of its parameters; a head that has one of its own is tied no more."""
        model: Any = model_class(config).from_config(config, dtype=torch.float32)
        head = model.get_output_embeddings()
        name_of_head = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
        if name_of_head in values:
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        state = model.state_dict(keep_vars=True)
        for name, value in values.items():
            state[name].copy_(value())
        return cls(model)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], source: Sequence[int] | None = None, one_by_one: bool = False) -> Tensor:
        """Logits behind each token of a decoder, fp32 [tokens, vocabulary], in one pass or token `one_by_one`; `source` is what the encoder reads first."""
        model: Any = self.model
        pieces = [[token] for token in ids] if one_by_one else [list(ids)]
        given: dict[str, Any] = {}
        if source is not None:
            given["encoder_outputs"] = model.get_encoder()(input_ids=torch.tensor([list(source)]))
        # transformers would size T5's cache by its encoder, which may have fewer layers than the decoder.
        cache = DynamicCache() if source is None else EncoderDecoderCache(DynamicCache(), DynamicCache())
        key = "input_ids" if source is None else "decoder_input_ids"
        said = [model(**{key: torch.tensor([piece])}, **given, past_key_values=cache, use_cache=True).logits[0].float() for piece in pieces]
        return torch.cat(said)
