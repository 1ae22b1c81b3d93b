"""Two DeepSpeed engines, student and teacher; the only file that imports deepspeed.

Users never write DeepSpeed's JSON: it ignores what it does not know. Here typed values become its config, the
defaults that change numbers or what is partitioned are written out, and after the start the engine's own report is compared
with what was asked. All private names of DeepSpeed 0.19 that dqtrain relies on are in this file; those that checkpoints are
read through are looked for at the start.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqtrain.config import Train, Zero
from dqtrain.data.stream import Batch
from dqtrain.disk import Disk
from dqtrain.distill.objective import Objective
from dqtrain.errors import ConfigError
from dqtrain.models.language import Inputs, LanguageModel, Outputs, Taught
from dqtrain.models.weights import Reader
from dqtrain.quant.diagnose import effective_rank, mean_cosine, weight_statistics
from dqtrain.quant.grid import round_to_bf16
from dqtrain.quant.modules import has_unit_of_weights, is_learned_scale, quantized_parameters, read_in_bf16
from dqtrain.quant.pack import pack, unpack
from dqtrain.world import World, gather_objects

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

# Empty, so that no op is probed or built: without it DeepSpeed asks for a compiler and ninja to build one that training never uses.
deepspeed.ops.__compatible_ops__ = {}

PRIVATE_NAMES = {
    3: (
        "grad_position",
        "get_param_id",
        "grad_partitions_flat_buffer",
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat",
        "fp16_partitioned_groups",
        "unflatten",
    ),
    2: ("single_partition_of_fp32_groups", "_link_all_hp_params", "update_lp_params"),
    1: ("single_partition_of_fp32_groups", "_link_all_hp_params", "update_lp_params"),
}
"""ZeRO stage -> attributes of DeepSpeed's optimizer that fragments are read through."""


def start(world: World, timeout_s: int = 1800) -> None:
    """Join the process group: nccl on GPUs, gloo on CPUs. Raises ConfigError when the ranks cannot meet."""
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        # DeepSpeed would look for MPI. Port 0: a store that nobody else joins takes any free port, so that two runs on one machine cannot collide.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # DeepSpeed trains on a group of its own that it creates without a time-out: a frozen peer would hang the run for 30 minutes whatever is asked.
    backend = sys.modules["deepspeed.comm.torch"].TorchBackend
    backend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout=timeout)
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False, timeout=timeout)
    if torch.distributed.get_world_size() != world.world_size:
        raise ConfigError(f"WORLD_SIZE is {world.world_size}, but {torch.distributed.get_world_size()} ranks met; start every rank with the same environment.")


def gather(parameters: Sequence[nn.Parameter], read_only: bool = False) -> AbstractContextManager[Any]:
    """A context in which partitioned parameters are whole on every rank; what rank 0 writes to them lasts. Others are as they are. Collective."""
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None if read_only else 0)


@torch.no_grad()
def materialise(
    model: nn.Module,
    weights: Mapping[str, Reader],
    dtype: torch.dtype = torch.float32,
    partitioned: bool = False,
    device: str | None = None,
    disk: Path | None = None,
) -> None:
    """Give parameters on the meta device memory, in `dtype` (integers in theirs), and values, one at a time, and persistent buffers theirs; tied ones stay tied.

    Partitioned, they are so as under ZeRO-3, on the GPU unless `device` is "cpu", and each rank reads and holds its own slice alone: never more than its partitions and one slice, and
    with a folder as `disk` (fp32, "cpu") no more than one slice. To be called before an engine is made. Raises ConfigError for a tensor that `weights` lacks. Collective when partitioned.
    """
    files = None if disk is None else Disk(disk)
    partition = deepspeed.zero.Init(dtype=dtype, remote_device=device) if partitioned else None
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                read = _reader(weights, f"{prefix}.{key}" if prefix else key)
                kept = dtype if parameter.is_floating_point() else parameter.dtype
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=kept), parameter.requires_grad)
                if partition is None:
                    read(0, made[parameter].view(-1))
                else:
                    _read_partition(made[parameter], read, partition, files)
            module._parameters[key] = made[parameter]
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    for name, buffer in model.state_dict().items():
        if name not in parameters:
            _reader(weights, name)(0, buffer.view(-1))


def _reader(weights: Mapping[str, Reader], name: str) -> Reader:
    if name not in weights:
        raise ConfigError(f"{name}: the model has this tensor, but what it starts from does not. Start from a model of the same kind, saved whole.")
    return weights[name]


def _read_partition(parameter: Any, read: Reader, partition: Any, files: Disk | None) -> None:
    """Make a parameter a partitioned one, and fill this rank's slice: what it held is never touched, so that it never took memory."""
    partition._convert_to_deepspeed_param(parameter)
    parameter.partition()
    slice_ = parameter.ds_tensor
    if files is not None:
        slice_.data = files.zeros(slice_.numel())
    start = min(torch.distributed.get_rank() * slice_.numel(), parameter.ds_numel)
    own = min(slice_.numel(), parameter.ds_numel - start)
    if own:
        read(start, slice_[:own])
    slice_[own:].zero_()  # padding
    if files is not None:
        files.release()


LIVE_ELEMENTS = 10**9
"""Elements of a student that stay gathered between forward and backward: a small one keeps all of its own, and saves the second gather."""

PIECE_ELEMENTS = 5 * 10**7
"""Elements that are prefetched, reduced or updated (at stage 3) at a time: each takes a buffer, or AdamW's temporaries, of so many fp32 numbers."""

DISK_PIECE_ELEMENTS = 10**7
"""Elements that are updated at a time where they come from a disk: so many fp32 weights, gradients, moments and temporaries are in memory then, or those of one parameter."""


def _deepspeed_config(stage: int, train: Train, zero: Zero, live_elements: int = LIVE_ELEMENTS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    offload = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    # DeepSpeed's own nvme is not asked for: see docs/design.md. Its cpu is, and the memory that it takes is then put on the disk; pinned memory would stay.
    places = {"cpu": {"device": "cpu"}, "nvme": {"device": "cpu", "pin_memory": False}}
    return {
        "bf16": {"enabled": dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the trainer calls step() when the step's micro-batches are done
        "gradient_clipping": train.grad_clip,  # left out, it would be 1.0
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": PIECE_ELEMENTS,
            "sub_group_size": DISK_PIECE_ELEMENTS if zero.offload_optimizer == "nvme" else PIECE_ELEMENTS,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            # The prefetch is no ceiling, this is: without it nearly all of a model was seen live at once (measured).
            "stage3_max_live_parameters": live_elements,
            "stage3_max_reuse_distance": live_elements,
            "stage3_prefetch_bucket_size": min(live_elements // 2, PIECE_ELEMENTS),
            **{key: places[device] for key, device in offload.items() if device != "none"},
        },
    }


def _assert_started_as_asked(engine: Any, asked: dict[str, Any], name: str) -> None:
    """Compare the engine's own report with the request: DeepSpeed accepts misspelt and contradictory settings without a word."""
    report = {
        "zero_optimization.stage": (engine.zero_optimization_stage(), asked["zero_optimization"]["stage"]),
        "gradient_clipping": (engine.gradient_clipping(), asked["gradient_clipping"]),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "train_micro_batch_size_per_gpu": (engine.train_micro_batch_size_per_gpu(), asked["train_micro_batch_size_per_gpu"]),
    }
    if asked["zero_optimization"]["stage"] == 3:
        threshold = asked["zero_optimization"]["stage3_param_persistence_threshold"]
        report["stage3_param_persistence_threshold"] = (engine.zero_param_persistence_threshold(), threshold)
    wrong = [f"{key} is {found}, asked {wanted}" for key, (found, wanted) in report.items() if found != wanted]
    if wrong:
        raise ConfigError(f"the {name}'s DeepSpeed engine did not start as asked: {'; '.join(wrong)}. Use the DeepSpeed version of constraints.txt.")


def _gather_in_bf16(parameters: Iterable[Any]) -> None:
    """Have ZeRO-3 gather these as bf16; they arrive rounded, in fp32. Partitions and the reduction of gradients stay fp32. Raises ConfigError if it would not."""
    dtype_of = getattr(sys.modules["deepspeed.runtime.zero.partition_parameters"], "get_allgather_dtype", None)
    for parameter in parameters:
        # What DeepSpeed's torch_autocast marks its own linears with; gradients would follow it too if that were on.
        parameter.comm_dtype = torch.bfloat16
        if dtype_of is None or dtype_of(parameter, parameter.ds_tensor) != torch.bfloat16:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} has no get_allgather_dtype that reads comm_dtype, so that it would not gather in bf16; "
                "install the version in constraints.txt, or set train.precision to bf16."
            )


class TeacherEngine:
    """A frozen model without optimizer; whole, or under ZeRO-3 gathered `live_layers` at a time."""

    def __init__(self, module: LanguageModel, train: Train, zero: Zero, world: World, live_layers: int = 2) -> None:
        module.requires_grad_(False).eval().to(world.device)  # buffers too: DeepSpeed moves nothing of a model that is partitioned already
        self.module, self.device = module, world.device
        self.live_elements = 0  # most elements of layers that were whole at a time, in the forwards that are watched
        if zero.teacher == 0:
            self._forward: Any = module
            return
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        alone = zero.model_copy(update={"offload_optimizer": "none", "offload_parameters": "none", "nvme": None})
        asked = _deepspeed_config(zero.teacher, train, alone, live_layers * _largest_layer(module), dtype)
        self._forward, *_ = deepspeed.initialize(model=module, config=asked)
        _assert_started_as_asked(self._forward, asked, "teacher")
        self._forward.eval()
        self._watch_live_elements()

    def _watch_live_elements(self) -> None:
        """Count what is whole at a time in the first forwards, since DeepSpeed's settings are no promise: in the first one it only learns the order."""
        parameters, forwards = list(self.module.parameters()), 0

        def count(module: nn.Module, inputs: Any) -> None:
            self.live_elements = max(self.live_elements, sum(p.numel() for p in parameters))

        def end(module: nn.Module, inputs: Any, outputs: Any) -> None:
            nonlocal forwards
            forwards += 1
            if forwards == WATCHED_FORWARDS:
                for hook in hooks:
                    hook.remove()

        hooks = [module.register_forward_pre_hook(count) for module in self.module.modules()]
        hooks.append(self.module.register_forward_hook(end))

    @torch.no_grad()
    def __call__(self, inputs: Inputs, layers: bool = True) -> Outputs:
        """Run the module without gradient. Collective under ZeRO-3."""
        return self._forward(inputs, layers)

    @contextmanager
    def teaching(self, batch: Batch, inputs: Inputs, layers: bool = True) -> Iterator[Taught]:
        """What the teacher says about a micro-batch; its head is whole on every rank within the context. Collective under ZeRO-3."""
        said = self(inputs, layers)
        with gather(self.module.head_parameters(), read_only=True):
            yield Taught(said, self.module.plain_head())

    def destroy(self) -> None:
        """Give the memory of the weights back; the module can be used no more."""
        _free(self.module.parameters())

    def figures(self) -> dict[str, float]:
        """How alike the word embeddings are, and the most elements that were whole at a time; known to rank 0, the others have none. Collective."""
        words = _words(self.module.model)
        return {**words, "live_elements": float(self.live_elements)} if words and self.live_elements else words


WATCHED_FORWARDS = 3


@torch.no_grad()
def _words(model: Any) -> dict[str, float]:
    """Mean cosine and effective rank of a model's word embeddings, quantized ones if they are; known to rank 0, the others have none. Collective."""
    module = model.get_input_embeddings()
    weight = module._parameters["weight"]
    quantized = next((parameter for parameter in quantized_parameters(model) if parameter.weight is weight), None)
    with gather((weight, *(quantized.learned if quantized else ())), read_only=True):
        if torch.distributed.get_rank() != 0:
            return {}
        plain = round_to_bf16(weight) if "weight" in module.__dict__.get("rounded", ()) else weight
        table = quantized.quantizer.value(weight, quantized.scales()) if quantized else plain
        return {"word_cosine": mean_cosine(table), "word_rank": effective_rank(table)}


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks, or the whole model if it has none."""
    return [block for parent in module.modules() if isinstance(parent, nn.ModuleList) for block in parent] or [module]


def _largest_layer(module: nn.Module) -> int:
    """Elements of the largest repeated block."""
    return max(sum(_shape(p).numel() for p in block.parameters()) for block in _blocks(module))


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@dataclass(frozen=True)
class Fragment:
    """A rank's piece of one trained parameter, as views into the optimizer's flat buffers."""

    name: str
    start: int  # first element, in the flattened parameter
    numel: int
    total: int  # elements of the whole parameter
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]  # "fp32" and the optimizer's moments, each [numel]


class StudentEngine:
    """The trained module under ZeRO 1, 2 or 3 with AdamW: fp32 weights, moments and scales."""

    def __init__(self, module: Objective, train: Train, zero: Zero, world: World) -> None:
        self.module, self.stage = module, zero.student
        self._train = train
        self._codes: dict[str, Tensor] = {}  # packed, of the weights that this rank looked at last
        self._shapes = {name: tuple(_shape(p)) for name, p in module.named_parameters()}
        self._groups = _parameter_groups(module, train)
        optimizer = torch.optim.AdamW(self._groups, betas=train.adam_betas, eps=train.adam_eps)
        live_elements = zero.live_layers * _largest_layer(module.student) if zero.live_layers else LIVE_ELEMENTS
        asked = _deepspeed_config(zero.student, train, zero, live_elements)
        module.to(world.device)
        self._weights_on_disk = Disk(zero.nvme) if zero.nvme is not None and zero.offload_parameters == "nvme" else None
        self._states_on_disk = Disk(zero.nvme) if zero.nvme is not None and zero.offload_optimizer == "nvme" else None
        self._moments_on_disk = Disk(zero.nvme) if zero.nvme is not None and zero.offload_optimizer == "nvme" else None
        with _memory_from(self._weights_on_disk, self._states_on_disk):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=asked)
        _assert_started_as_asked(self._engine, asked, "student")
        self._optimizer = self._engine.optimizer
        missing = [name for name in PRIVATE_NAMES[self.stage] if not hasattr(self._optimizer, name)]
        if missing:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which checkpoints are read through; install the version in constraints.txt."
            )

        if self.stage == 3:
            for gathered, updated in zip(self._optimizer.fp16_partitioned_groups_flat, self._optimizer.fp32_partitioned_groups_flat, strict=True):
                if _are_one(gathered, updated):
                    updated.data = gathered.data
            _gather_in_bf16(parameter for parameter in read_in_bf16(module) if len(_shape(parameter)) >= 2)
        if self._weights_on_disk is not None or self._states_on_disk is not None:
            self._go_on_from_disk(optimizer)

    def _go_on_from_disk(self, optimizer: torch.optim.Optimizer) -> None:
        """Moments in files from the start, gradients held once instead of twice, and pages released as soon as each piece has been read or updated."""
        stage3 = self._optimizer
        weights, states = self._weights_on_disk, self._states_on_disk
        lost = weights is not None and not all(map(weights.holds, stage3.fp16_partitioned_groups_flat))
        for gathered, updated in zip(stage3.fp16_partitioned_groups_flat, stage3.fp32_partitioned_groups_flat, strict=True):
            lost = lost or (states is not None and updated.data_ptr() != gathered.data_ptr() and not states.holds(updated))
        if lost:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} keeps in memory what zero.nvme is for; install the version in constraints.txt, or offload to cpu."
            )
        if states is not None:
            self.prepare_moments(0)
            offset = 0
            for flat in stage3.fp32_partitioned_groups_flat:
                flat.grad = stage3.grad_partitions_flat_buffer.narrow(0, offset, flat.numel())
                offset += flat.numel()
        optimizer.register_step_post_hook(lambda *_: self.release())
        if weights is not None:
            for block in _blocks(self.module.student):
                block.register_forward_hook(lambda *_: weights.release())
            for parameter in self.module.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: weights.release())

    @property
    def on_disk(self) -> bool:
        """Whether fragments are files on a local disk: too much to be copied into memory."""
        return self._states_on_disk is not None

    def release(self) -> None:
        """Take what is on a local disk, and was read or written, out of memory. No collective."""
        for disk in (self._weights_on_disk, self._states_on_disk, self._moments_on_disk):
            if disk is not None:
                disk.release()

    def __call__(self, *inputs: Any) -> Any:
        """Run the module. Collective under ZeRO-3."""
        return self._engine(*inputs)

    @property
    def model(self) -> LanguageModel:
        """The student without its loss, to be called by all ranks together."""
        return self.module.student

    def mode(self, training: bool) -> None:
        """Dropout and the like on or off."""
        self._engine.train(training)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; over ranks they are *averaged*, so the caller multiplies its share of the loss by the world size. Collective."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: float) -> float:
        """Clip, update with learning rates `factor` x peak, clear gradients, move the bank; the global gradient norm before clipping. Collective.

        Where that is not finite, nothing but the gradients changes: DeepSpeed makes no step then, on any rank.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        self.module.end_step(math.isfinite(norm))
        return norm

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate of each parameter group, as lr_GROUP."""
        return {f"lr_{group['name']}": group["lr"] for group in self._optimizer.param_groups}

    @torch.no_grad()
    def quantization(self) -> dict[str, dict[str, Any]]:
        """What quantization does to each weight now: name -> figure -> number or tensor, on every rank. Collective.

        One weight is gathered at a time, and looked at by one rank, which keeps its packed codes: `codes_changed` is the share that
        is not what it was at the last call.
        """
        found = {}
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for index, parameter in enumerate(quantized_parameters(self.module.student.model)):
            name, quantizer = parameter.name, parameter.quantizer
            with gather((parameter.weight, *parameter.learned), read_only=True):
                if index % world_size != rank:
                    continue
                before = unpack(self._codes[name], parameter.weight.shape, quantizer.levels) if name in self._codes else None
                scales = parameter.scales()
                statistics = weight_statistics(parameter.weight.detach(), quantizer, scales, before)
                self._codes[name] = pack(statistics.codes, quantizer.levels)
                found[name] = {
                    "scale": scales.scale.cpu(),
                    **{kind: learned.detach().cpu().clone() for kind, learned in zip(quantizer.learned, parameter.learned, strict=True)},
                    "quantization_error": statistics.relative_error,
                    "clip_fraction": statistics.clip_fraction,
                    "codes_changed": statistics.changed_fraction,
                    "codes": (quantizer.levels.low, statistics.histogram.cpu()),
                }
        return {name: figures for part in gather_objects(found) for name, figures in part.items()}

    def words(self) -> dict[str, float]:
        """How alike the word embeddings are, as forward reads them. Collective."""
        return _words(self.module.student.model)

    def fragments(self) -> Iterator[Fragment]:
        """The pieces of trained parameters that this rank owns. No collective."""
        optimizer, rank, base = self._optimizer, torch.distributed.get_rank(), self._optimizer.optimizer
        for parameter, name in self._engine.param_names.items():
            if self.stage == 3:
                group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat, total = optimizer.fp32_partitioned_groups_flat[group], parameter.ds_numel
                # A partition is padded at the end, and a persistent parameter's too; only real elements are ours to keep.
                start = rank * numel
                numel = max(0, min(numel, total - start))
            else:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                flat, total = optimizer.single_partition_of_fp32_groups[mapping.param_group_index], parameter.numel()
                start, numel, offset = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, mapping.hp_fragment_address.start
            if numel > 0:
                moments = {key: value for key, value in base.state.get(flat, {}).items() if torch.is_tensor(value) and value.shape == flat.shape}
                tensors = {key: value.detach().narrow(0, offset, numel) for key, value in {"fp32": flat, **moments}.items()}
                yield Fragment(name, start, numel, total, self._shapes[name], tensors)

    def optimizer_step_count(self) -> int:
        """Updates that the optimizer has made: the exponent of AdamW's bias correction."""
        return max((int(state["step"]) for state in self._optimizer.optimizer.state.values() if "step" in state), default=0)

    def prepare_moments(self, step_count: int) -> None:
        """Give every flat buffer moments and a step count of its own, padding-only ones too, so that fragments can be written into."""
        state = self._optimizer.optimizer.state
        flats = self._optimizer.fp32_partitioned_groups_flat if self.stage == 3 else self._optimizer.single_partition_of_fp32_groups
        moments: Iterable[tuple[Tensor, ...]] = ((torch.zeros_like(flat), torch.zeros_like(flat)) for flat in flats)
        if self._moments_on_disk is not None:
            self._moments_on_disk.close()
            sizes = [flat.numel() for flat in flats]
            moments = zip(*(self._moments_on_disk.zeros(sum(sizes)).split(sizes) for _ in range(2)), strict=True)
        for flat, (mean, square) in zip(flats, moments, strict=True):
            state[flat] = {"step": torch.tensor(float(step_count)), "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 fragments into the weights that forward uses, after they were written from outside. Collective."""
        optimizer = self._optimizer
        if self.stage != 3:
            optimizer._link_all_hp_params()
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            low = optimizer.fp16_partitioned_groups_flat[index]
            if low.data_ptr() != flat.data_ptr():
                low.data.copy_(flat.data)
                self.release()
            for part, view in zip(optimizer.fp16_partitioned_groups[index], optimizer.unflatten(low, optimizer.fp16_partitioned_groups[index]), strict=True):
                part.data = view.data
        optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def overwrite(self, values: Mapping[str, Tensor]) -> None:
        """Replace trained parameters, by their names here. Collective."""
        for fragment in self.fragments():
            if fragment.name in values:
                fragment.tensors["fp32"].copy_(values[fragment.name].reshape(-1)[fragment.start : fragment.start + fragment.numel])
        self.publish()

    def destroy(self) -> None:
        """Give the memory of weights, moments and gradients back; the module can be used no more."""
        held = [tensor for fragment in self.fragments() for tensor in fragment.tensors.values()]
        if self.stage == 3:
            held.append(self._optimizer.grad_partitions_flat_buffer)
        self._engine.destroy()
        _free([*held, *self.module.parameters()])
        for disk in (self._weights_on_disk, self._states_on_disk, self._moments_on_disk):
            if disk is not None:
                disk.close()


def _are_one(gathered: Tensor, updated: Tensor) -> bool:
    """DeepSpeed updates one copy of the partitions and gathers from another. In fp32 in one place they are equal, bit for bit: one is enough."""
    return (gathered.dtype, gathered.device) == (updated.dtype, updated.device)


@contextmanager
def _memory_from(weights: Disk | None, states: Disk | None) -> Iterator[None]:
    """Within it, DeepSpeed's stage 3 makes its partitions of weights and their masters in files, each sub-group as soon as it is there: never all in memory."""
    stage3 = sys.modules["deepspeed.runtime.zero.stage3"].DeepSpeedZeroOptimizer_Stage3
    names = ("_create_param_groups_fp16_flat_cpu_memory", "_create_momentum_buffer", "_move_to_flat_buffer")
    usual: dict[str, Any] = {name: getattr(stage3, name, None) for name in names}
    masters: list[Tensor] = []

    def make_weights(self: Any) -> None:
        assert weights is not None
        for group in self.trainable_param_groups:
            self.param_groups_fp16_flat_cpu_memory.append(weights.zeros(sum(p.partition_numel() for p in group["params"])))

    def fill_and_release(self: Any, *arguments: Any, **more: Any) -> None:
        usual["_move_to_flat_buffer"](self, *arguments, **more)
        assert weights is not None
        weights.release()

    def move_masters(self: Any, numel: int, index: int, name: str) -> None:
        """What DeepSpeed calls, for an optimizer that dqtrain has not, when the masters of a sub-group are made."""
        gathered, updated = self.fp16_partitioned_groups_flat[index], self.fp32_partitioned_groups_flat[index]
        if _are_one(gathered, updated):
            updated.data = gathered.data
        elif states is not None:
            if not masters:
                masters.extend(states.zeros(sum(self.fp16_partitioned_groups_flat_numel)).split(self.fp16_partitioned_groups_flat_numel))
            updated.data = masters[index].copy_(updated)
        for disk in (weights, states):
            if disk is not None:
                disk.release()

    if weights is not None:
        setattr(stage3, names[0], make_weights)
        setattr(stage3, names[2], fill_and_release)
    if weights is not None or states is not None:
        setattr(stage3, names[1], move_masters)
    try:
        yield
    finally:
        for name, method in usual.items():
            if method is not None:
                setattr(stage3, name, method)


def bytes_on_disk(module: nn.Module, zero: Zero, world_size: int) -> int:
    """Bytes that a rank needs at a time in `zero.nvme`, for a trained module that is not partitioned yet."""
    partitions = sum(-(-p.numel() // world_size) for p in module.parameters())
    # Masters and moments; partitions as they are read and as they are kept, of which one is gone before there are moments.
    return 4 * partitions * (3 if zero.offload_optimizer == "nvme" else 2 if zero.offload_parameters == "nvme" else 0)


def _free(tensors: Iterable[Tensor]) -> None:
    """Take the memory of tensors and of partitions: DeepSpeed's hooks outlive a stage-3 engine, and what they hold would stay for ever (measured)."""
    for tensor in tensors:
        for part in (tensor, getattr(tensor, "ds_tensor", None)):
            if part is not None and part.untyped_storage().resizable():  # pinned memory, of what is offloaded, is not
                part.untyped_storage().resize_(0)


def _parameter_groups(module: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Matrices (decayed), vectors (not), learned scales (own learning rates, not decayed); empty groups left out."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "vectors": [], "scales": [], "clips": []}
    for name, parameter in module.named_parameters():
        if is_learned_scale(name):
            kind = "clips" if has_unit_of_weights(name) else "scales"
        else:
            kind = "weights" if len(_shape(parameter)) >= 2 else "vectors"
        groups[kind].append(parameter)
    # A clip or a step moves with the weights it is measured in; a gamma or a zero point has a unit of its own.
    lrs = {"weights": train.lr, "vectors": train.lr, "scales": train.scale_lr or 1e-3, "clips": train.scale_lr or train.lr}
    decays = {"weights": train.weight_decay, "vectors": 0.0, "scales": 0.0, "clips": 0.0}
    return [{"params": params, "name": kind, "lr": lrs[kind], "peak_lr": lrs[kind], "weight_decay": decays[kind]} for kind, params in groups.items() if params]
