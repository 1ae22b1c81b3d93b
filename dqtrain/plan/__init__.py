"""Memory, traffic and time of a run by arithmetic, from config.json and the headers of safetensors files: no torch, no GPU.

Two models and two ZeRO engines (`engine.py`), P the student's parameters, n the ranks. Bytes of a rank between two steps, all weights of the student in fp32:

    student at stage 1, 2   weights 4 P, master copy 4 P / n, moments 8 P / n
    student at stage 3      weights 4 P / n, moments 8 P / n, gradients 4 P / n, and DeepSpeed's bucket for reductions
    teacher                 its dtype's 4, 2 or (matrices of layers in int8) 1 bytes per parameter, / n at stage 3

and on top of them in a step, of which the largest moment counts: what forward keeps for backward (by layer: inputs of norms and products, queries,
keys and values, what activation functions save; or the layers' inputs alone under activation checkpointing), weights that are gathered, the two heads with
the chunks of the loss (`distill/chunked.py`), gradients on their way, AdamW's temporaries. `dqtrain bench memory` holds the sums against real engines.

Time is a roofline: products against the peak of the GPU, what passes over weights and activations against its memory, gathers and reductions against
NVLink and the network, each at the share of the peak that is attained in practice (`ATTAINED`), added up as if nothing overlapped.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from dqtrain.config import RunConfig
from dqtrain.errors import ConfigError
from dqtrain.plan.cost import Cost, cost_of
from dqtrain.plan.gpu import GB, GPUS
from dqtrain.plan.memory import Memory, memory_of, total_of
from dqtrain.plan.model import Models, read_models

RESERVE = 0.94
"""Share of a GPU's memory that tensors may take; the rest is lost between the blocks of torch's allocator."""

DISK_BYTES_PER_S = 1e9
"""What one node is taken to write to shared storage."""


@dataclass(frozen=True)
class Plan:
    """A config on so many GPUs."""

    config: RunConfig
    gpu: str
    nodes: int
    gpus: int  # of a node
    memory: Memory
    cost: Cost
    models: Models

    @property
    def fits(self) -> bool:
        """Whether the peak fits into a GPU."""
        return self.memory.bytes <= RESERVE * GPUS[self.gpu].memory

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus

    @property
    def checkpoint_bytes(self) -> float:
        """fp32 weights and two moments, and the contrast bank."""
        return 12.0 * (self.models.student.elements + self.models.scales) + self.memory.moments["rest"].get("contrast bank", 0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """What a plan may choose, as it is written in a config."""
        config = self.config
        found: dict[str, Any] = {"zero.student": config.zero.student}
        found |= {"zero.teacher": config.zero.teacher} if self.models.teacher is not None else {}
        return found | {"train.micro_batch": config.train.micro_batch, "train.activation_checkpointing": config.train.activation_checkpointing}

    def as_dict(self) -> dict[str, Any]:
        """All figures; bytes and seconds."""
        config, step = self.config, self.cost.step
        micro_batches = config.train.global_batch // config.train.micro_batch
        tokens = config.train.global_batch * config.data.longest(self.models.student.is_encoder_decoder)
        return {
            "fits": self.fits,
            "gpu": self.gpu,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "settings": self.settings | {"micro_batches_per_gpu_and_step": math.ceil(micro_batches / self.world_size)},
            "parameters": {"student": self.models.student.elements, "teacher": self.models.teacher.elements if self.models.teacher else 0},
            "memory": {
                "gpu_bytes": GPUS[self.gpu].memory,
                "usable_bytes": RESERVE * GPUS[self.gpu].memory,
                "peak_bytes": self.memory.bytes,
                "peak_moment": next(moment for moment, parts in self.memory.moments.items() if parts is self.memory.peak),
                "moments": self.memory.moments,
            },
            "host_bytes_per_node": {name: value * self.gpus for name, value in self.memory.host_per_rank.items()},
            "disk_bytes_per_node": self.memory.disk_per_rank * self.gpus,
            "step": {"seconds": step, "bound_by": max(self.cost.seconds, key=lambda name: self.cost.seconds[name]), "parts": self.cost.seconds},
            "traffic_bytes_per_gpu_and_step": self.cost.traffic,
            "tokens_per_step": tokens,
            "tokens_per_day": tokens / step * 86400,
            "run_seconds": step * config.train.steps,
            "checkpoint": {"bytes": self.checkpoint_bytes, "save_seconds": self.checkpoint_bytes / self.nodes / DISK_BYTES_PER_S},
        }

    def table(self, best: "Plan | None") -> str:
        """One screen of text; `best` is the fastest of the same GPUs."""
        told, memory = self.as_dict(), self.memory
        verdict = "fits" if self.fits else "DOES NOT FIT"
        where = f"{self.world_size} {self.gpu} ({self.nodes} node{'s' if self.nodes > 1 else ''} of {self.gpus})"
        usable, moment = told["memory"]["usable_bytes"], told["memory"]["peak_moment"]
        student, teacher = told["parameters"].values()
        lines = [
            f"{verdict}: {memory.bytes / GB:.1f} GB of {usable / GB:.1f} usable on each of {where}, at the peak of the {moment if moment != 'rest' else 'pause'}",
            f"a step of {told['tokens_per_step']:,} tokens takes {_duration(self.cost.step)}, bound by {told['step']['bound_by']}; "
            f"{self.config.train.steps:,} steps {_duration(told['run_seconds'])}; {told['tokens_per_day'] / 1e6:,.0f} M tokens/day",
            f"student {student / 1e6:,.0f} M parameters{f', teacher {teacher / 1e6:,.0f} M' if teacher else ''}; "
            + ", ".join(f"{name}={_yaml(value)}" for name, value in self.settings.items())
            + f", {told['settings']['micro_batches_per_gpu_and_step']} micro-batches per GPU and step",
            "",
            f"{'GB per GPU':26s}" + "".join(f"{name:>10s}" for name in memory.moments),
        ]
        names = dict.fromkeys(name for parts in memory.moments.values() for name in parts)
        for name in names:
            lines.append(f"  {name:24s}" + "".join(f"{parts[name] / GB:10.2f}" if name in parts else f"{'':10s}" for parts in memory.moments.values()))
        lines.append(f"  {'total':24s}" + "".join(f"{total_of(parts) / GB:10.2f}" for parts in memory.moments.values()))
        lines += ["", f"{'step':26s}{'s':>10s}{'share':>10s}"]
        lines += [f"  {name:24s}{value:10.3f}{value / self.cost.step:10.0%}" for name, value in self.cost.seconds.items()]
        lines += ["", "traffic per GPU and step: " + ", ".join(f"{name} {value / GB:.2f} GB" for name, value in self.cost.traffic.items())]
        lines += ["host memory per node: " + ", ".join(f"{name} {value / GB:.1f} GB" for name, value in told["host_bytes_per_node"].items())]
        if self.memory.disk_per_rank:
            lines += [f"local disk per node (zero.nvme): {told['disk_bytes_per_node'] / GB:.1f} GB"]
        lines += [
            f"checkpoint: {self.checkpoint_bytes / GB:.1f} GB, {_duration(told['checkpoint']['save_seconds'])} to write at {DISK_BYTES_PER_S / GB:.0f} GB/s per node"
        ]
        if best is not None and best.settings != self.settings:
            changes = " ".join(f"{name}={_yaml(value)}" for name, value in best.settings.items() if self.settings.get(name) != value)
            lines += [f"faster on these GPUs: {changes}: {_duration(best.cost.step)} per step, {best.memory.bytes / GB:.1f} GB"]
        elif best is not None:
            lines += ["no other ZeRO stage, micro-batch or checkpointing is faster on these GPUs"]
        return "\n".join(lines)

    def refusal(self, cheapest: "Plan | None") -> str:
        """What to say of a plan that does not fit: its largest parts, and the cheapest that does."""
        parts = sorted(self.memory.peak.items(), key=lambda part: -part[1])[:3]
        usable = RESERVE * GPUS[self.gpu].memory
        text = f"this does not fit: {self.memory.bytes / GB:.1f} GB per GPU, but {usable / GB:.1f} of a {self.gpu}'s {GPUS[self.gpu].memory / GB:.0f} GB are usable; "
        text += "the largest parts are " + ", ".join(f"{name} {value / GB:.1f}" for name, value in parts) + " GB. "
        if cheapest is None:
            limit = f"Nothing up to {MOST_NODES} nodes fits, and {self.config.train.global_batch} samples per step are work for as many GPUs at most; "
            return text + limit + "take a GPU with more memory, a larger train.global_batch, shorter samples, or a smaller student."
        settings = " ".join(f"{name}={_yaml(value)}" for name, value in cheapest.settings.items())
        return (
            text
            + f"The cheapest that does: --nodes {cheapest.nodes} --gpus {cheapest.gpus} {settings} ({cheapest.memory.bytes / GB:.1f} GB, {_duration(cheapest.cost.step)} per step)."
        )


MOST_NODES = 128
"""Where the search for a plan that fits ends."""


def plan(config: RunConfig, nodes: int, gpus: int, gpu: str, models: Models | None = None) -> Plan:
    """What a config takes on `nodes` of `gpus` GPUs each. Raises ConfigError for an unknown GPU and for models that cannot be read."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu is {gpu}, which is none of {', '.join(GPUS)}. Take the one that is nearest.")
    models = models or read_models(config)
    return Plan(config, gpu, nodes, gpus, memory_of(config, nodes * gpus, models=models), cost_of(config, nodes, gpus, GPUS[gpu], models), models)


def fastest(asked: Plan) -> Plan | None:
    """The fastest plan on the same GPUs that fits, of all ZeRO stages, micro-batches, and with or without activation checkpointing; None: none fits."""
    config, best = asked.config, None
    for micro_batch in (d for d in range(1, config.train.global_batch + 1) if config.train.global_batch % d == 0):
        if config.train.global_batch // micro_batch < asked.world_size:
            break  # config.check_ranks
        for checkpointing in (False, True):
            train = config.train.model_copy(update={"micro_batch": micro_batch, "activation_checkpointing": checkpointing})
            for student in (1, 2, 3):
                for teacher in (0, 3) if asked.models.teacher is not None else (config.zero.teacher,):
                    zero = config.zero.model_copy(update={"student": student, "teacher": teacher})
                    tried = plan(config.model_copy(update={"train": train, "zero": zero}), asked.nodes, asked.gpus, asked.gpu, asked.models)
                    if tried.fits and (best is None or tried.cost.step < best.cost.step):
                        best = tried
    return best


def cheapest(asked: Plan) -> Plan | None:
    """The plan that fits on the fewest GPUs of the kind, and of those the fastest; None where none up to MOST_NODES does."""
    in_a_node = [(1, gpus) for gpus in range(1, asked.gpus + 1) if asked.gpus % gpus == 0]
    for nodes, gpus in [*in_a_node, *((nodes, asked.gpus) for nodes in range(2, MOST_NODES + 1))]:
        found = fastest(replace(asked, nodes=nodes, gpus=gpus))
        if found is not None:
            return found
    return None


def _yaml(value: Any) -> str:
    return str(value).lower()


def _duration(seconds: float) -> str:
    for limit, unit, size in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.1f} days"
