"""The codes of a packed artifact in the format of compressed-tensors, laid out for transformers or for vLLM.

    model.safetensors   X.weight_packed      int32, codes of 1 to 8 bits side by side (`pack-quantized`); X.weight_shape beside it
                        X.weight             int8 codes (`int-quantized`: 8-bit weights with 8-bit activations)
                        X.weight_scale       fp32, one for each output, or each group of its inputs; X.weight_zero_point on affine grids
                        X.input_scale        of learned activation scales; X.input_zero_point
                        NAME                 what is float there: bf16 where that holds it exactly, else fp32
    config.json         its quantization_config says which modules have which scheme
    over 5 GB of tensors in parts and with an index, as transformers names them
    tokenizer and generation config, as they were
    compressed-tensors.json     sizes and hashes of the files above (`description`)
    parity.json         what `parity.verify_target` found before the files were published

Floats are never quantized here: codes and scales are those of training, half-step grids at twice the code and half the scale. What holds each weight is
said by `compressed.plan`, what reads the files by `compressed.load`.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from dqtrain.artifact.compressed.load import DESCRIPTION, TransformersRunner, compressed_tensors_package, load_compressed
from dqtrain.artifact.compressed.plan import TYPES_OF_FLOATS, Placement, plan, stored_inputs
from dqtrain.artifact.description import write_list
from dqtrain.artifact.format import PackedTensors
from dqtrain.artifact.target import Runner
from dqtrain.config import Export, Quant, Target
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.files import write_text
from dqtrain.quant.activation import ActivationQuantizer
from dqtrain.quant.modules import Coverage, is_learned_scale, quantize_activations
from dqtrain.tensor_file import INDEX, MappedFiles, write_model_files


def lost_settings(quant: Quant, config: PretrainedConfig, asked: Export) -> str | None:
    """What to say of settings that Coverage does not show and that the files would lose; None where there are none."""
    if quant.activations is not None and quant.activations.attention and not asked.allow_inexact:
        return (
            "compressed-tensors has no quantized queries, keys and probabilities, so that quant.activations.attention would be dropped without a word. "
            "Set it to false, leave compressed-tensors out of export.targets, or allow it: --allow-inexact, or export.allow_inexact: true."
        )
    if quant.float_head and config.is_encoder_decoder:
        return "quant.float_head gives this encoder-decoder a head beside its tied tables, which transformers would tie again. Use the target packed, or hf."
    return None


class CompressedTarget:
    """A packed artifact in compressed-tensors' format (`target.RuntimeTarget`), one tensor at a time. Raises ConfigError as `plan`."""

    name: Target = "compressed-tensors"
    has_kernels = False  # transformers multiplies floats
    tolerance = 1e-5  # the same values in the same dtype, but sums in another order
    factors: Mapping[str, float] = {}
    rounded = ()  # scales are fp32

    @classmethod
    def check(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, tokenizer: Path, asked: Export) -> list[str]:
        """What a person should know of the files before training, one line each. Raises ConfigError for what they cannot hold and for what is not installed."""
        compressed_tensors_package()
        lost = lost_settings(quant, config, asked)
        if lost is not None:
            raise ConfigError(lost)
        found = plan(config, coverage, asked)
        if found.refused and not asked.allow_inexact:
            raise ConfigError(found.refusal())
        return [f"compressed-tensors: {line}" for line in found.notes]

    @classmethod
    def describe(cls, quant: Quant, config: PretrainedConfig, coverage: Coverage, float_shapes: Sequence[tuple[int, ...]], asked: Export) -> list[str]:
        """What the files of a student would hold, before there is one. Raises ConfigError as `plan`."""
        found, lost = plan(config, coverage, asked), lost_settings(quant, config, asked)
        groups = ", ".join(f"{scheme.name} for {len(modules)}" for scheme, modules in found.groups.items()) or "floats"
        return [
            f"compressed-tensors: {found.tensor_bytes(float_shapes):,} bytes of tensors; {groups} of {len(found.placements)} quantized weights",
            *(f"compressed-tensors: {line}" for line in found.notes),
            *([found.refusal()] if found.refused else []),
            *([lost] if lost else []),
        ]

    def __init__(self, packed: PackedTensors, config: PretrainedConfig, asked: Export) -> None:
        self.packed, self.config, self.layout = packed, config, asked.compressed_tensors
        self.program = "transformers with compressed-tensors" if self.layout == "transformers" else "transformers with the student's own quantizers"
        self.plan = plan(config, packed.coverage, asked)
        self.placed = {place.row.name: place for place in self.plan.placements}

    @property
    def types(self) -> dict[str, str]:
        """Bits of weights and activations, or of floats."""
        return {name: place.scheme.name if place.scheme else TYPES_OF_FLOATS[place.quantizer.dtype] for name, place in self.placed.items()}

    def encoder_of_text(self, folder: Path, longest: int) -> None:
        """None: the tokenizer is that of transformers."""

    def write(self, folder: Path) -> None:
        """Write all files into a folder. Raises OSError."""
        for file in self.packed.folder.iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name not in ("artifact.json", "parity.json", INDEX):
                shutil.copy(file, folder)
        tensors = dict(self._tensors())
        write_model_files(folder, {name: layout for name, (layout, _) in tensors.items()}, ((name, read()) for name, (_, read) in tensors.items()))
        written = json.loads((folder / "config.json").read_text())
        if f"{self.plan.head}.weight" in self.packed.floats:  # a head that was trained to read a tied table before rounding
            written["tie_word_embeddings"] = False
        ours = {"architectures": [self.plan.architecture], "dtype": "float32", "quantization_config": self._config()}
        write_text(folder / "config.json", json.dumps({**written, **ours}, indent=2) + "\n")
        write_list(folder / DESCRIPTION)

    def _tensors(self) -> Iterator[tuple[str, tuple[tuple[torch.dtype, tuple[int, ...]], Callable[[], Tensor]]]]:
        """(name, ((dtype, shape), what makes it)) of all that the files hold."""
        for place in self.plan.placements:
            for name, layout in place.stored.items():
                yield name, (layout, functools.partial(self._data, place, name.rpartition(".")[2]))
        for name, layout in stored_inputs(self.plan.head, self.plan.head_inputs).items():
            yield name, (layout, functools.partial(self._input, *name.rsplit(".", 1)))
        for name in self.packed.floats:
            if not is_learned_scale(name):
                yield name, ((torch.float32, self.packed.shape(name)), functools.partial(self._float, name))

    def _float(self, name: str) -> Tensor:
        return self.packed.floating(name).float()

    def _data(self, place: Placement, key: str) -> Tensor:
        """One tensor of a quantized weight."""
        if place.scheme is None:
            return self.packed.value(place.row.name).to(place.quantizer.dtype)
        if key.startswith("input"):
            return self._input(place.module, key)
        rows, columns = place.shape
        if key == "weight_shape":
            return torch.tensor((columns, rows) if place.is_transposed else (rows, columns))
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        offset = place.quantizer.levels.offset
        if key == "weight_scale":
            scale = self._in_rows(place, self.packed.stored(place.row.name).scale.float())
            return scale / 2 if offset else scale
        if key == "weight_zero_point":
            zero_point = self.packed.stored(place.row.name).zero_point
            assert zero_point is not None
            packed = pack_to_int32(self._in_rows(place, zero_point), place.scheme.bits, packed_dim=0)
            return packed.clone(memory_format=torch.contiguous_format)  # of one column it is called contiguous whatever its strides
        codes = self.packed.codes(place.row.name).codes
        codes = codes.mul_(2).add_(1) if offset else codes
        codes = (codes if place.is_transposed == bool(place.quantizer.row_axis) else codes.T).contiguous()
        return codes if key == "weight" else pack_to_int32(codes, place.scheme.bits)

    def _in_rows(self, place: Placement, flat: Tensor) -> Tensor:
        """What there is one of for each scale, as the format has scales."""
        quantizer, (rows, _) = place.quantizer, place.shape
        shape = place.stored[f"{place.module}.weight_scale"][1]
        if quantizer.granularity == "per_group" and quantizer.row_axis == 1:
            return flat.view(-1, rows).T.contiguous()
        return flat.view(shape) if quantizer.granularity != "per_tensor" else flat.view(1, 1).expand(shape).contiguous()

    def _input(self, module: str, key: str) -> Tensor:
        """A learned step, or zero point, as `ActivationQuantizer.learned_values` gives them; codes from -128 here."""
        if key == "input_scale":
            return self.packed.floating(f"{module}.input_step").float().clamp_min(torch.finfo(torch.float32).tiny)
        return (self.packed.floating(f"{module}.input_zero_point").round().clamp(0, 255) - 128).to(torch.int8)

    def _config(self) -> dict[str, Any]:
        """The quantization_config of config.json."""
        groups: dict[str, Any] = {}
        for scheme, modules in self.plan.groups.items():
            weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
            weights |= {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
            groups[f"group_{len(groups)}"] = {"targets": modules, "weights": weights, "input_activations": _args(scheme.inputs), "format": scheme.format}
        if self.plan.head_inputs is not None:
            groups["head"] = {"targets": [self.plan.head], "weights": None, "input_activations": _args(self.plan.head_inputs), "format": "dense"}
        formats = {group["format"] for group in groups.values()} - {"dense"}
        return {
            "quant_method": "compressed-tensors",
            "version": compressed_tensors_package().__version__,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": [],
            "layout": self.layout,  # what no reader of the format looks at, but `dqtrain serve`
            **({"dequantize": True} if self.plan.dequantize else {}),
        }

    def values(self, folder: Path) -> dict[str, Callable[[], Tensor]]:
        """Functions that give each parameter by compressed-tensors' own decompression, with the schemes of config.json."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        files = MappedFiles()
        try:
            config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
            paths = files.places(sorted(folder.glob("*.safetensors")))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: holds no files of compressed-tensors that can be read ({error}). Export it again.") from None
        schemes = {target: scheme for scheme in config.config_groups.values() if not isinstance(scheme, list) for target in scheme.targets}

        def read(place: Placement) -> Tensor:
            scheme: Any = schemes[place.module]
            state = {key.rpartition(".")[2]: files.read(paths[key], key) for key in place.stored}
            if "weight" in state and place.is_transposed:
                state["weight"] = state["weight"].T
            decompress = BaseCompressor.get_value_from_registry(scheme.format).decompress
            value = decompress(state, scheme)["weight"]
            is_as_trained = (place.is_transposed and "weight" not in state) == bool(place.quantizer.row_axis)
            return value if is_as_trained else value.T

        found: dict[str, Callable[[], Tensor]] = {}
        for place in self.plan.placements:
            if place.scheme is not None and place.module in schemes and paths.keys() >= place.stored.keys():
                found[place.row.name] = functools.partial(read, place)
        in_codes = {key for place in self.plan.placements if place.scheme is not None for key in place.stored}
        return found | {key: functools.partial(_as_float, files, path, key) for key, path in paths.items() if key not in in_codes}

    @contextmanager
    def with_float_activations(self, folder: Path, longest: int) -> Iterator[Runner]:
        """transformers, the activations of all schemes taken out; or in its float model of the student what is read back, in the layout of vLLM."""
        if self.layout == "vllm":
            yield TransformersRunner.of_values(self.config, self.values(folder))
            return
        runner = TransformersRunner(load_compressed(folder))
        for module in runner.model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is not None:
                scheme.input_activations = None
        yield runner

    @contextmanager
    def as_shipped(self, folder: Path, longest: int) -> Iterator[Runner]:
        """transformers on the folder as it is; in the layout of vLLM, which has an environment of its own, the values with the trained activations of what is in codes."""
        if self.layout == "transformers":
            yield TransformersRunner(load_compressed(folder))
            return
        runner = TransformersRunner.of_values(self.config, self.values(folder))
        rows = [replace(place.row, input_quantizer=place.scheme.inputs) for place in self.plan.placements if place.scheme]
        quantize_activations(runner.model, Coverage(rows), None)
        with torch.no_grad():
            for name, parameter in runner.model.named_parameters():
                if is_learned_scale(name):
                    parameter.copy_(self.packed.floating(name))
        yield runner

    def foretold_bytes(self, float_shapes: Sequence[tuple[int, ...]]) -> int:
        """As `Plan.tensor_bytes`."""
        return self.plan.tensor_bytes(float_shapes)

    def stored_bytes(self, folder: Path) -> dict[str, int]:
        """Bytes of the files, of their tensors, and of headers and index."""
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
        header = sum(path.stat().st_size for path in folder.glob(INDEX))
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                header += 8 + int.from_bytes(file.read(8), "little")
        return {"file": size, "tensors": size - header, "header": header}


def _args(inputs: ActivationQuantizer | None) -> dict[str, Any] | None:
    """Activations in the format's words."""
    if inputs is None:
        return None
    strategy = "token" if inputs.scale == "per_token" else "tensor"
    return {"num_bits": inputs.bits, "type": "int", "symmetric": not inputs.has_zero_point, "strategy": strategy, "dynamic": inputs.scale != "learned"}


def _as_float(files: MappedFiles, path: Path, key: str) -> Tensor:
    return files.read(path, key).float()
