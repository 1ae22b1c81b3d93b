"""Rank, world size and device of this process, read once from the environment; and the few collectives used above the engine.

Whoever starts the ranks (`dqtrain train --ranks`, srun, torchrun, deepspeed) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; without RANK the process is a world of one. The process group itself is joined in `engine.start`. The collectives
are called by every rank, in the same order; in a world of one they need no process group.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dqtrain.errors import ConfigError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of world_size, local_rank on its node, and the device that is its own."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_world() -> World:
    """Read the environment; without RANK it is that of a world of one. Raises ConfigError when it is incomplete, or when GPUs are too few."""
    rank, world_size, local_rank = (_read(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if "RANK" in os.environ else (0, 1, 0)
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; ranks count from 0. Start every rank with the same WORLD_SIZE.")
    if not torch.cuda.is_available():
        return World(rank, world_size, local_rank, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but this process sees {torch.cuda.device_count()} GPU(s) and each rank needs its own. "
            "Start fewer ranks on this node, or let every rank see all GPUs of the node."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)  # NCCL's object collectives use the current device
    return World(rank, world_size, local_rank, device)


def gather_objects(obj: T) -> list[T]:
    """Every rank's (picklable) object, in the order of the ranks, on every rank. Collective."""
    if _alone():
        return [obj]
    objects: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(objects, obj)
    return objects


def nodes_of_ranks() -> list[int]:
    """The node of each rank, counted from 0 in the order of the ranks. Collective."""
    hosts = gather_objects(socket.gethostname())
    return [list(dict.fromkeys(hosts)).index(host) for host in hosts]


def broadcast_object(obj: T) -> T:
    """Rank 0's (picklable) object, on every rank. Collective."""
    if _alone():
        return obj
    objects = [obj]
    distributed.broadcast_object_list(objects, src=0)
    return objects[0]


def first_problem(problem: str | None) -> str | None:
    """What the lowest rank that has a problem says of it, on every rank; None when none has. Collective."""
    return next(filter(None, gather_objects(problem)), None)


def on_rank_0(world: World, read: Callable[[], T]) -> T:
    """What rank 0 reads, on every rank; its UserError too. Collective."""
    found: Any = None
    if world.rank == 0:
        try:
            found = read()
        except UserError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    return found


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor [n, ...], in the order of the ranks, on every rank; n may differ between ranks. Collective."""
    if _alone():
        return [tensor]
    sizes = gather_objects(len(tensor))
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if not _alone():
        distributed.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add the tensors of all ranks in place, on their own device; returns the same tensor. Collective."""
    if not _alone():
        distributed.all_reduce(tensor)
    return tensor


def largest_of_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' numbers, on every rank. Collective."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if not _alone():
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.item()


def _read(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"{name} is `{text}`, but must be a count from 0, as RANK is set. Start ranks with `dqtrain train --ranks`, srun or torchrun, or unset RANK."
        )
    return int(text)


def _alone() -> bool:
    # Where WORLD_SIZE promises peers but the group is not joined yet, torch raises: a local answer would be silently wrong.
    size = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    return size == 1
