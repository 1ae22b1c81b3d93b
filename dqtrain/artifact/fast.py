"""A packed artifact on torch's own integer kernels, in bf16: weights stay codes, activations are float.

Linear layers keep codes as `aten::_weight_int4pack_mm_for_cpu`, on GPUs `aten::_weight_int4pack_mm` (half a byte each), or `aten::_weight_int8pack_mm` (one) read
them; word embeddings are gathered out of the artifact's own bytes, so that a tied table is there twice, as codes both times; tables of positions, which are small,
and what training left float are bf16. A GPU's kernels have to show, when an artifact is loaded, that they compute what its codes say. Codes and scales are those of training: what differs from `exact` is that activations are not quantized and that arithmetic is in bf16.

With w = (code - zero_point + offset) * scale the kernels compute ((u - 8) * s + z) x, u in 0..15, and (c * s) x, c in -128..127, with s and z in bf16.

| grid | kernel | how |
|---|---|---|
| 1 to 4 bits, ternary | int4 | u = code + 8, z = offset * scale: exact, since a portable scale has 8 bits |
| 2 and 3 bits, affine | int4 | u = code - zero_point + 8 |
| 4 bits, affine | int4 | u = code + 8, z = -zero_point * scale rounded to bf16, and what that lost times the sums of x, which is added |
| 8 bits per tensor or row | int8 | c = code |
| at most 4 bits per tensor or row, inputs not divisible by 32 | int8 | c = 2 (code - zero_point + offset), s = scale / 2 |

Refused by name: fp32 scales, 8-bit affine codes and 8-bit codes in groups, groups that 32 does not divide, rows for the int8 kernel that 16 does not divide, and experts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from dqtrain.artifact.format import PackedTensors
from dqtrain.errors import ConfigError
from dqtrain.quant.grid import WeightQuantizer
from dqtrain.quant.pack import layout, unpack

ROWS = 16
"""Outputs come in multiples of this many in the kernels; others are filled up with rows of 0."""

GROUPS = (256, 128, 64, 32)
"""Inputs that may share a scale in the int4 kernel."""

INT8_INPUTS = 16
"""Inputs come in multiples of this many in the int8 kernel, which reads beyond its memory otherwise (measured in torch 2.13)."""

TILE = 16
"""Inputs that tensor cores of a GPU take at a time; its int4 kernel lays out 2, 4 or 8 such tiles together."""

BLOCK = 64
"""Outputs that the int4 kernel lays out together on processors with AVX-512."""

MANY = 64
"""Rows from which on making a matrix whole in bf16 pays: a prompt of 64 tokens is read in 0.85 of the time, 8 of 32 in 0.4 (measured with AMX)."""

CHUNK_ROWS = 320
"""A multiple of the 64 rows that the int4 kernel lays out together, and of the codes that any grid packs into a word."""

CHUNK_ELEMENTS = 2**21
"""Codes that are repacked at a time, four bytes each."""

_STAND_IN = torch.empty(0, dtype=torch.int8)  # int8: T5 casts its activations to the dtype of any other weight
_STAND_IN._is_hf_initialized = True  # type: ignore[attr-defined] # transformers initialises what is not


class FastLinear(nn.Module):
    """x [..., in_features] in bf16 -> [..., out_features]; filled by `fill`."""

    weight = _STAND_IN  # what families ask the dtype of
    codes: Tensor  # uint8 [rows, in_features / 2] in the int4 kernel's layout, on GPUs int32 [rows / 8, ...] in theirs, or int8 [rows, in_features]
    scales: Tensor  # bf16: [in_features / group, rows, (s, z)], or [rows]
    lost: Tensor | None  # bf16 [rows, groups that were trained]
    values: Tensor | None  # int32 [256]: of the two codes in a byte, each bf16, for products of many rows

    def __init__(self, name: str, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.bias = bias
        self.group = 0  # inputs that share a scale in the int4 kernel; 0: the int8 kernel

    def forward(self, x: Tensor) -> Tensor:
        """The product, and the bias."""
        return product(x, *self.operands)

    @property
    def operands(self) -> tuple[Any, ...]:
        """What `product` takes behind x."""
        return self.codes, self.scales, self.lost, self.values, self.bias, self.group, self.out_features


def product(x: Tensor, codes: Tensor, scales: Tensor, lost: Tensor | None, values: Tensor | None, bias: Tensor | None, group: int, outputs: int) -> Tensor:
    """What a FastLinear gives."""
    shape = x.shape
    rows = x.reshape(-1, shape[-1]).contiguous()
    if values is not None and rows.shape[0] >= MANY:
        out = _many_rows(rows, codes, values).mul_(scales[0, :, 0])
    elif group:
        kernel = torch._weight_int4pack_mm_for_cpu if rows.is_cpu else torch._weight_int4pack_mm
        out = kernel(rows, codes, group, scales)
    else:
        out = torch._weight_int8pack_mm(rows, codes, scales)
    if lost is not None:
        out.add_(rows.view(rows.shape[0], lost.shape[1], -1).sum(-1) @ lost.T)
    if out.shape[1] > outputs:
        out = out[:, :outputs]
    if bias is not None:
        out.add_(bias)
    return out.view(*shape[:-1], outputs)


def _many_rows(rows: Tensor, codes: Tensor, values: Tensor) -> Tensor:
    """The product with the codes alone, by the matrix units of a processor: in the time of a few rows the matrix is made whole, in bf16, which holds codes exactly."""
    inputs, blocks = rows.shape[1], codes.shape[0] // BLOCK
    whole = values.index_select(0, codes.view(-1).int()).view(torch.bfloat16).view(blocks, inputs, BLOCK)
    out = rows @ whole.transpose(0, 1).reshape(inputs, -1)
    return out.view(-1, blocks, BLOCK // 2, 2).transpose(2, 3).reshape(len(rows), -1)  # in a byte are rows j and j + 32 of a block


def _values(codes: Tensor, first: Tensor, offset: float) -> Tensor | None:
    """`FastLinear.values`, where the kernel's layout on this processor is the one that `_many_rows` reads: `first` are the first codes, + 8, [BLOCK, inputs]."""
    if codes.shape[0] % BLOCK:
        return None
    block = codes[:BLOCK].view(-1, BLOCK // 2)
    if not torch.equal(torch.cat([block & 15, block >> 4], 1).T, first[:BLOCK]):
        return None
    byte = torch.arange(256)
    return (torch.stack([byte & 15, byte >> 4], 1) - 8 + offset).to(torch.bfloat16).view(torch.int32).view(-1)


class FastEmbedding(nn.Embedding):
    """ids -> their rows, unpacked. Comes below a family's own class, whose forward may do more (BART multiplies, OPT counts positions from 2)."""

    weight: Any = _STAND_IN
    name: str
    quantizer: WeightQuantizer
    bytes_: Tensor  # uint8, as in the file
    powers: Tensor  # int32: of the number of levels
    scale: Tensor  # flat, as in the file
    zero_point: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim] in bf16."""
        levels = self.quantizer.levels
        num_bytes, num_codes = layout(levels.count)
        element = ids.reshape(-1, 1) * self.embedding_dim + torch.arange(self.embedding_dim, device=ids.device)
        place = element // num_codes
        word = self.bytes_[place * num_bytes].int()
        for i in range(1, num_bytes):
            word |= self.bytes_[place * num_bytes + i].int() << (8 * i)
        code = word // self.powers[element.sub_(place, alpha=num_codes)] % levels.count + levels.low
        scale = self._of(self.scale, ids)
        level = code.float().unflatten(-1, (scale.shape[-1], -1))
        level = level + levels.offset if self.zero_point is None else level - self._of(self.zero_point, ids).unsqueeze(-1)
        return (level * scale.unsqueeze(-1)).to(torch.bfloat16).view(*ids.shape, self.embedding_dim)

    def _of(self, values: Tensor, ids: Tensor) -> Tensor:
        """Scales or zero points of the rows of ids, [ids, groups], or [1, 1] where there is but one."""
        return values.float().view(1, 1) if values.numel() == 1 else values.view(self.num_embeddings, -1)[ids.reshape(-1)].float()


def make_room(model: PreTrainedModel, packed: PackedTensors, names: Mapping[str, str]) -> dict[str, str]:
    """Replace the linear layers and word embeddings of a model on the meta device by empty ones for codes, in place.

    `names`: what is in codes, by each name in the model. Returns those that remain to be made dense: positions. Raises ConfigError for what no kernel takes.
    """
    for path in [path for path, module in model.named_modules() if isinstance(module, NewGELUActivation)]:
        model.set_submodule(path, GELUTanh())  # the same function in one pass, where that one takes eight
    kinds = {row.name: row.kind for row in packed.coverage.rows}
    tied: dict[str, str] = model.all_tied_weights_keys
    left = {}
    for name, stored in names.items():
        if kinds[stored] == "positions":
            left[name] = stored
            continue
        path, _, key = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            cls = type(module)
            module.__class__ = FastEmbedding if cls is nn.Embedding else type(f"Fast{cls.__name__}", (cls, FastEmbedding), {})
            module.name = stored  # type: ignore[assignment] # it is a FastEmbedding now
            del module._parameters["weight"]
        elif isinstance(module, nn.Linear | Conv1D):
            quantizer, shape = packed.quantized[stored], packed.shape(stored)
            inputs, outputs = (shape[1], shape[0]) if quantizer.row_axis == 0 else shape
            kernel_group(stored, quantizer, inputs)
            model.set_submodule(path, FastLinear(stored, inputs, outputs, module.bias))
        else:
            raise _refusal(stored, f"{type(module).__name__}.{key} is no weight of a linear layer or an embedding")
        tied.pop(name, None)
    return left


def kernel_group(name: str, quantizer: WeightQuantizer, inputs: int) -> int:
    """Inputs that share a scale in the int4 kernel, or 0 for the int8 kernel. Raises ConfigError, with the weight's name, for what neither takes."""
    if not quantizer.portable:
        raise _refusal(name, "its scales are fp32 (quant.scale_dtype), which bf16 does not hold")
    size = quantizer.group_size or inputs
    group = next((group for group in GROUPS if size % group == 0), 0)
    wide = quantizer.levels.count > 16
    if wide and (quantizer.group_size or quantizer.has_zero_points):
        raise _refusal(name, f"8-bit codes {'in groups' if quantizer.group_size else 'with zero points'} fit no kernel")
    if group and not wide:
        return group
    if quantizer.group_size:
        raise _refusal(name, f"the kernel takes groups of 32 inputs and multiples of that, not of {quantizer.group_size}")
    if inputs % INT8_INPUTS:
        raise _refusal(name, f"the kernels take multiples of {INT8_INPUTS} inputs, not {inputs}")
    return 0


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"mode fast cannot hold {name}: {why}. Load the artifact with mode exact, or with mode dense and dtype bfloat16.")


def fill(model: PreTrainedModel, packed: PackedTensors, device: torch.device) -> None:
    """Give the layers that `make_room` made their codes and scales; layers of one kind that read one weight share them. Raises ConfigError for a GPU that miscomputes."""
    made: dict[tuple[str, bool], dict[str, Tensor | None]] = {}
    for module in model.modules():
        if isinstance(module, FastLinear | FastEmbedding):
            quantizer, key = packed.quantized[module.name], (module.name, isinstance(module, FastLinear))
            if isinstance(module, FastLinear):
                module.group = kernel_group(module.name, quantizer, module.in_features)
            else:
                module.quantizer = quantizer
            if key not in made:
                of_layer = _of_linear(module, packed, quantizer, device) if isinstance(module, FastLinear) else _of_embedding(module, packed, quantizer)
                made[key] = {name: None if tensor is None else tensor.to(device) for name, tensor in of_layer.items()}
            for name, tensor in made[key].items():
                module.register_buffer(name, tensor, persistent=False)
    if device.type != "cpu":
        kinds: dict[int, FastLinear] = {}  # the smallest layer of each kernel and group
        for module in model.modules():
            if isinstance(module, FastLinear):
                kinds[module.group] = min(kinds.get(module.group, module), module, key=lambda layer: layer.in_features * layer.out_features)
        for layer in kinds.values():
            check_kernel(layer, packed, device)


def check_kernel(layer: FastLinear, packed: PackedTensors, device: torch.device) -> None:
    """Raise ConfigError where a layer's product on a device is not, to the precision of bf16, that of the values of its codes."""
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = packed.value(layer.name).double()
    expected = x.double() @ (values.T if packed.quantized[layer.name].row_axis == 0 else values)
    codes, scales, lost, _, _, group, outputs = layer.operands
    try:
        found = product(x.to(device), codes, scales, lost, None, None, group, outputs).cpu().double()
        is_right, why = bool((found - expected).norm() <= 2.0**-6 * expected.norm()), "gives another product"
    except RuntimeError as error:  # NotImplementedError is one
        is_right, why = False, str(error).partition("\n")[0]
    if not is_right:
        raise ConfigError(
            f"mode fast on {device}: torch {torch.__version__} does not multiply the codes of {layer.name} there ({why}). "
            "Load the artifact with mode dense and dtype bfloat16, or on the CPU (with CUDA_VISIBLE_DEVICES= before the command)."
        )


def _of_embedding(module: FastEmbedding, packed: PackedTensors, quantizer: WeightQuantizer) -> dict[str, Tensor | None]:
    stored, count = packed.stored(module.name), quantizer.levels.count
    powers = torch.tensor([count**digit for digit in range(layout(count)[1])], dtype=torch.int32)
    return {"bytes_": stored.packed, "powers": powers, "scale": stored.scale, "zero_point": stored.zero_point}


def _of_linear(module: FastLinear, packed: PackedTensors, quantizer: WeightQuantizer, device: torch.device) -> dict[str, Tensor | None]:
    levels, inputs = quantizer.levels, module.in_features
    num_rows = math.ceil(module.out_features / ROWS) * ROWS
    stored = packed.stored(module.name)
    scale, zero = (None if t is None else _by_row(t.float(), quantizer, module.out_features, num_rows) for t in (stored.scale, stored.zero_point))
    assert scale is not None  # [num_rows, groups]
    splits = zero is not None and module.group > 0 and levels.count == 16  # code and zero point go different ways
    codes = torch.empty(num_rows, inputs // 2 if module.group else inputs, dtype=torch.uint8 if module.group else torch.int8)
    first = torch.empty(0)
    for start, piece in _rows(stored.packed, packed.shape(module.name), quantizer):
        end = start + len(piece)
        whole = piece.to(torch.int32)
        if zero is not None and not splits:
            whole -= zero[start:end].to(torch.int32).repeat_interleave(inputs // zero.shape[1], 1)
        filled = end if end < module.out_features else num_rows
        if module.group:
            whole = torch.nn.functional.pad(whole.add_(8), (0, 0, 0, filled - end))
            first = whole[:BLOCK].to(torch.uint8) if start == 0 else first
            if device.type == "cpu":
                codes[start:filled] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1).view(filled - start, -1)
            else:
                codes[start:filled] = whole[:, ::2] << 4 | whole[:, 1::2]
        else:
            doubled = whole if levels.count > 16 else whole.mul_(2).add_(int(2 * levels.offset))
            codes[start:filled] = torch.nn.functional.pad(doubled, (0, 0, 0, filled - end))
    if not module.group:
        return {"codes": codes, "scales": (scale[:, 0] if levels.count > 16 else scale[:, 0] / 2).to(torch.bfloat16), "lost": None, "values": None}
    added = -zero * scale if splits and zero is not None else scale * levels.offset
    pairs = torch.stack([scale, added], -1).to(torch.bfloat16)  # [num_rows, groups, 2]
    lost = (added - pairs[..., 1].float()).to(torch.bfloat16)  # exact: at most 3 bits are left
    scales = pairs.repeat_interleave(inputs // module.group // pairs.shape[1], 1).transpose(0, 1).contiguous()
    values = None
    if device.type != "cpu":
        tiles = next(tiles for tiles in (8, 4, 2) if inputs % (tiles * TILE) == 0)
        codes = torch._convert_weight_to_int4pack(codes.to(device), tiles)
    elif pairs.shape[1] == 1 and not splits:  # one scale for all of a row's codes
        values = _values(codes, first, levels.offset)
    return {"codes": codes, "scales": scales, "lost": lost if lost.any() else None, "values": values}


def _by_row(values: Tensor, quantizer: WeightQuantizer, outputs: int, num_rows: int) -> Tensor:
    """Flat scales or zero points of a matrix -> [num_rows, groups], 0 behind the last output."""
    if quantizer.granularity == "per_tensor":
        values = values.expand(outputs)
    by_row = values.view(-1, outputs).T if quantizer.row_axis == 1 else values.view(outputs, -1)
    return torch.nn.functional.pad(by_row, (0, 0, 0, num_rows - outputs))


def _rows(packed: Tensor, shape: tuple[int, ...], quantizer: WeightQuantizer) -> Iterator[tuple[int, Tensor]]:
    """(first output, codes [outputs, inputs]) of a matrix, a bounded number at a time; one whose outputs are columns is unpacked whole, a byte for each."""
    levels = quantizer.levels
    outputs, inputs = shape if quantizer.row_axis == 0 else (shape[1], shape[0])
    step = CHUNK_ROWS * max(1, CHUNK_ELEMENTS // (CHUNK_ROWS * inputs))
    whole = unpack(packed, shape, levels).T if quantizer.row_axis == 1 else None
    num_bytes, num_codes = layout(levels.count)
    for start in range(0, outputs, step):
        end = min(start + step, outputs)
        if whole is not None:
            yield start, whole[start:end]
        else:
            first, last = start * inputs // num_codes * num_bytes, math.ceil(end * inputs / num_codes) * num_bytes
            yield start, unpack(packed[first:last], (end - start, inputs), levels)
