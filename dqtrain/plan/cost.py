"""Seconds and traffic of a step, by a roofline."""

import math
from dataclasses import dataclass

from dqtrain.config import RunConfig
from dqtrain.plan.gpu import Gpu
from dqtrain.plan.memory import activation_bytes, is_eager, lengths, live_elements
from dqtrain.plan.model import Model, Models, read_models

ATTAINED = {"bf16": 0.45, "fp32": 0.75, "bandwidth": 0.75, "nvlink": 0.7, "network": 0.7}
"""Share of the peak that large products, element-wise kernels and NCCL's rings reach; assumed, not measured by dqtrain."""

NVME_BYTES_PER_S = 2e9
"""What one node is taken to read and write on its local disk, by way of mapped files."""

QUANTIZER_BYTES = 150
"""Memory traffic of one quantized weight in a micro-batch, its value made twice and its gradient: read and written by torch's operations, counted on a layer
(57 minmax, 140 lsq, 152 dynamic, 174 affine)."""


@dataclass(frozen=True)
class Cost:
    """What one step of one rank takes."""

    seconds: dict[str, float]
    traffic: dict[str, float]  # bytes that the rank receives

    @property
    def step(self) -> float:
        """Seconds of a step, nothing overlapped."""
        return sum(self.seconds.values())


def cost_of(config: RunConfig, nodes: int, gpus: int, gpu: Gpu, models: Models | None = None) -> Cost:
    """Seconds and bytes of a step on `nodes` of `gpus` each, by the roofline."""
    models = models or read_models(config)
    student, teacher, stage, world_size = models.student, models.teacher, config.zero.student, nodes * gpus
    micro_batches = math.ceil(config.train.global_batch // config.train.micro_batch / world_size)
    passes = 4 if config.train.activation_checkpointing else 3
    samples = micro_batches * config.train.micro_batch
    rows = samples * config.data.longest(student.is_encoder_decoder)
    heads = config.distill.task > 0 or "logits" in config.distill.teacher_terms
    products = passes * _forward_flops(config, student) * samples + (6.0 * student.words * rows if heads else 0.0)
    parameters = student.elements + models.scales
    whole = 4.0 * parameters
    # Stages 1 and 2 reduce buckets by an all-reduce, which brings every element twice; stage 3 scatters.
    traffic = {"reductions": whole * {1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]}
    if stage == 3:
        saved = 2.0 * student.matrices if config.train.rounds_matrices else 0.0
        traffic["student's gathers"] = micro_batches * (whole - saved) * (1 + max(0, parameters - live_elements(config, student)) / parameters)
    else:
        traffic["student's gathers"] = whole
    if teacher is not None and config.teacher is not None:
        products += _forward_flops(config, teacher) * samples + (2.0 * teacher.words * rows if heads else 0.0)
        if config.zero.teacher == 3:
            kept = teacher.kept_in(config.teacher.dtype)
            traffic["teacher's gathers"] = micro_batches * (kept.whole + (kept.words if heads else 0.0))
    traffic = {name: value * (world_size - 1) / world_size for name, value in traffic.items()}

    quantized = 0.0
    if config.quant is not None:
        quantized = sum(stack.matrices for stack in student.stacks) * (config.quant.linears is not None) + 2.0 * student.words * (
            config.quant.embeddings is not None
        )
    # A kept activation is written and read, and so is what leads to it; each logit is passed over some twenty times.
    passed = QUANTIZER_BYTES * quantized * micro_batches + 8.0 * micro_batches * passes / 3 * activation_bytes(config, student, config.train.micro_batch, False)
    passed += 80.0 * student.vocabulary * rows * (1 if teacher is None else 2) if heads else 0.0
    bandwidth = gpu.bandwidth * ATTAINED["bandwidth"]
    total = sum(traffic.values())
    across = total * (nodes - 1) / nodes / gpus if nodes > 1 else 0.0  # what a node lacks comes once, through all of its adapters
    seconds = {
        "products": products / (getattr(gpu, config.train.computes_in) * ATTAINED[config.train.computes_in]),
        "GPU memory": passed / bandwidth,
        "optimizer": 14 * whole / world_size / (bandwidth if config.zero.offload_optimizer == "none" else 30e9),
        "links": max(total / (gpu.nvlink * ATTAINED["nvlink"]), across / (gpu.network * ATTAINED["network"])),
    }
    on_disk = 6 * whole if config.zero.offload_optimizer == "nvme" else 0.0  # masters and moments, read and written
    if config.zero.offload_parameters == "nvme":
        on_disk += whole * (1 + micro_batches * (1 + max(0, parameters - live_elements(config, student)) / parameters))
    if on_disk:
        seconds["local disk"] = on_disk / nodes / NVME_BYTES_PER_S
    return Cost(seconds, traffic)


def _forward_flops(config: RunConfig, model: Model) -> float:
    """Operations of one sample's forward without the head: two per weight and token, and attention, of which a fused causal one does half."""
    tokens, sources = lengths(config, model)
    total = 0.0
    for stack, length in zip(model.stacks, (tokens, sources), strict=False):
        seen = length * (1.0 if is_eager(config) or stack is not model.stacks[0] else 0.5) + (sources if stack.cross else 0)
        total += length * (2.0 * stack.matrices + 4.0 * stack.layers * stack.heads * stack.head_dim * seen)
    return total
