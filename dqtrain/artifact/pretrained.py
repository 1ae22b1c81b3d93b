"""`from_pretrained` of transformers loads packed artifacts, by transformers' own registration of quantizers.

    import dqtrain
    AutoModelForCausalLM.from_pretrained(DIR)     mode exact; `dqtrain.load_artifact(DIR, mode=...)` is the same, with any mode

`import dqtrain` imports this file when transformers' quantizers are imported, or at once where they are already. Nothing heavier may be imported
here at the top: transformers is then in the middle of its own import.

- exact: the values of the codes in fp32, activations quantized as in training. A model in another dtype would compute something else, so it is refused.
- dense: a plain float model of its own class, in fp32 or any dtype that is asked for. It knows nothing of quantization any more, activations are float,
  and save_pretrained writes an ordinary model directory.
- fast: codes in the layout of torch's integer kernels for the CPU or one GPU, in bf16, with float activations (`fast`).

transformers reads the floats of the file itself, and hands codes to `_Unpack`; tied weights, devices and reading in threads are its own.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dqtrain.quant.grid import WeightQuantizer

METHOD = "dqtrain"
"""Under which transformers knows all of this: `quantization_config.quant_method` of an artifact's config.json."""

DTYPES = {"exact": torch.float32, "dense": None, "fast": torch.bfloat16}
"""Modes, and the one dtype in which each computes; None: any."""


def name_in_config(folder: Path, architecture: str) -> None:
    """Let the config.json of a folder say that its weights are ours, and of which of transformers' classes: servers ask that. Raises OSError."""
    path = folder / "config.json"
    ours = {"architectures": [architecture], "dtype": "float32", "quantization_config": {"quant_method": METHOD}}
    write_text(path, json.dumps(json.loads(path.read_text()) | ours, indent=2) + "\n")


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact's config.json. Raises ConfigError for an unknown mode."""

    def __init__(self, quant_method: str = METHOD, mode: str = "exact") -> None:
        if mode not in DTYPES:
            raise ConfigError(f"mode {mode} of a packed artifact is unknown. Give one of {', '.join(DTYPES)}.")
        self.quant_method = quant_method  # type: ignore[assignment] # transformers' own ones are an enum
        self.mode = mode

    @property
    def dequantize(self) -> bool:
        """Whether the model is a plain float one afterwards; what transformers asks."""
        return self.mode == "dense"


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Fills the model of an artifact's config. Raises CheckpointError for a damaged artifact, ConfigError for what a mode cannot do."""

    requires_calibration = True  # of a float model nothing can be made here
    is_trainable = False
    quantization_config: PackedConfig

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that was asked for. Raises ConfigError for one in which the mode does not compute."""
        mode = self.quantization_config.mode
        if dtype != (DTYPES[mode] or dtype):
            raise ConfigError(f"mode {mode} of a packed artifact computes in {DTYPES[mode]}, not in {dtype}. Give dtype={DTYPES[mode]}, or another mode.")
        return dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """As it was given. Raises ConfigError for the fast mode on several devices, or none."""
        if self.quantization_config.mode == "fast":
            if isinstance(device_map, str):  # auto and such, of which a name is all that is known here
                device_map = {"": "cuda" if torch.cuda.is_available() else "cpu"}
            place, *others = {str(place) for place in (device_map or {"": "cpu"}).values()}
            if others or place in ("disk", "meta"):
                raise ConfigError(
                    f"mode fast of a packed artifact runs on one device, not on {', '.join([place, *others])}. Load it with device_map='cpu' or 'cuda', or with mode dense and dtype bfloat16."
                )
            self.device = torch.device(int(place) if place.isdigit() else place)
        return device_map

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **given: Any) -> "PreTrainedModel":
        from dqtrain.artifact import fast, format

        if not checkpoint_files:
            raise ConfigError("a packed artifact is loaded from its folder alone, not from a state_dict. Give from_pretrained the folder.")
        self.folder = Path(checkpoint_files[0]).parent
        self.about = format.read_description(self.folder)
        self.names: dict[str, str] = {}  # of what is in codes, by a name that the model has
        self.absent: list[str] = []  # buffers that are 0
        tied: dict[str, str] = model.all_tied_weights_keys
        with format.PackedTensors(self.folder, self.about) as packed:
            stored = {*packed.quantized, *packed.floats}
            for target in [target for target, source in tied.items() if target in stored and source in stored]:
                del tied[target]  # a head that was trained to read the table before rounding has a tensor of its own
            buffers = {name for name, _ in model.named_buffers()}
            for name, tensor in model.state_dict().items():
                source = tied.get(name, name)
                same = (name, source, *(target for target, its in tied.items() if its == source))
                found = next((spelling for spelling in same if spelling in stored), None)
                if found is None and name in buffers:
                    self.absent.append(name)
                elif found is None:
                    raise CheckpointError(f"{self.folder}: has no tensor {name}, which {type(model).__name__} needs. Export the run again.")
                elif packed.shape(found) != tuple(tensor.shape):
                    raise CheckpointError(
                        f"{self.folder}: {found} has shape {packed.shape(found)}, the model's {name} is {tuple(tensor.shape)}. Export the run again."
                    )
                elif found in packed.quantized:
                    self.names[name] = found
            self.quantizers, self.shapes = packed.quantized, {name: packed.shape(name) for name in packed.quantized}
            if self.quantization_config.mode == "fast":
                self.names = fast.make_room(model, packed, self.names)
        # What is missing for transformers is tied, 0, or filled in below, and what it does not expect are codes and learned steps: all was looked at above.
        model._keys_to_ignore_on_load_missing = model._keys_to_ignore_on_load_unexpected = {""}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """How transformers makes weights of codes; its own conversions are of other names than the model's, which an artifact has."""
        from dqtrain.artifact.format import keys_of

        conversions = []
        for name in dict.fromkeys(self.names.values()):
            patterns = [f"^{re.escape(key)}$" for key in keys_of(name, self.quantizers[name])]
            conversions.append(WeightConverter(patterns, name, [_Unpack(patterns, self.quantizers[name], self.shapes[name])]))
        return conversions

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **given: Any) -> "PreTrainedModel":
        from dqtrain.artifact import fast, fast_step, format
        from dqtrain.config import ActivationQuant
        from dqtrain.quant.modules import quantize_activations

        model.__dict__["_weight_conversions"] = None  # saving a dense model then uses its family's own, and not ours backwards
        buffers = dict(model.named_buffers())
        for name in self.absent:
            buffers[name].zero_()
        mode = self.quantization_config.mode
        with format.PackedTensors(self.folder, self.about) as packed:
            if mode == "fast":
                fast.fill(model, packed, self.device)
                if self.device.type == "cpu":
                    fast_step.shorten_steps(model)
            if mode == "exact":
                known = {name for name, _ in model.named_parameters()}
                quantize_activations(model, packed.coverage, self.about["activations"] and ActivationQuant(**self.about["activations"]))
                for name, parameter in model.named_parameters():
                    if name not in known:  # a learned step
                        if name not in packed.floats:
                            raise CheckpointError(f"{self.folder}: has no tensor {name}, which artifact.json makes a quantizer of. Export the run again.")
                        parameter.copy_(packed.floating(name))
        return model

    def is_serializable(self) -> bool:
        """Always raises ConfigError: save_pretrained would write codes that nothing describes, or floats in their place."""
        raise ConfigError(
            f"a packed artifact is not saved again: copy {self.folder} as it is. For an ordinary model directory load it with mode dense and save that."
        )


class _Unpack(ConversionOps):
    """Codes, scales and zero points -> values, fp32."""

    hf_quantizer = True  # for transformers: these are no values to be cast to the model's dtype on their way

    def __init__(self, patterns: list[str], quantizer: "WeightQuantizer", shape: tuple[int, ...]) -> None:
        self.patterns, self.quantizer, self.shape = patterns, quantizer, shape

    def convert(self, input_dict: dict[str, list[Tensor]], *arguments: Any, model: Any = None, full_layer_name: str = "", **given: Any) -> dict[str, Any]:
        """Of one weight, in the dtype of the model."""
        from dqtrain.artifact.format import Stored, as_codes

        value = as_codes(Stored(*(input_dict[pattern][0] for pattern in self.patterns)), self.shape, self.quantizer).value()
        return {full_layer_name: value.to(model.get_parameter(full_layer_name).dtype)}
