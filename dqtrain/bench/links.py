"""How fast nodes reach each other, before a job trains on them: `python -m dqtrain.bench.links`, one process per node of a Slurm step.

Each prints one JSON line, {"node", "gb_s"}. An all-reduce over all nodes would be as slow for each as the slowest makes it. So pairs exchange as many bytes
as an all-reduce between the two would, in up to three rounds with other partners: a node that is slow with all of them is slow itself. Of two nodes, neither can be named.
With GPUs it is NCCL, from the first GPU of each node, else gloo. MASTER_ADDR and MASTER_PORT are set.
"""

import json
import os
import time
from datetime import timedelta

import torch
from torch import distributed

ROUNDS = 3
NUM_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
TIMEOUT = timedelta(seconds=150)


def partner(rank: int, count: int, number: int) -> int | None:
    """Whom a rank meets in a round, 0 to count - 2, in which all meet somebody but one of an odd count (None); over count rounds, each meets each."""
    last = count - 1 + count % 2  # its number is even with the one who is not there
    if rank == last:
        other = number * (last + 1) // 2 % last  # twice that is `number`
    else:
        other = (number - rank) % last
        other = last if other == rank else other
    return other if other < count else None


def exchange(other: int, num_bytes: int, device: torch.device) -> float:
    """GB/s in either direction at once. Both partners call it."""
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    begin = time.perf_counter()
    operations = [distributed.P2POp(distributed.isend, sent, other), distributed.P2POp(distributed.irecv, received, other)]
    for work in distributed.batch_isend_irecv(operations):
        work.wait()
    _ = received[-1].item()  # of a GPU: it is there
    return num_bytes / (time.perf_counter() - begin) / 1e9


def main() -> None:
    """Print the line."""
    rank, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=count, timeout=TIMEOUT)
    speeds = []
    for number in range(min(ROUNDS, count - 1 + count % 2)):
        other = partner(rank, count, number)
        if other is not None:
            exchange(other, 1 << 20, device)  # opens the connection
        distributed.all_reduce(torch.zeros(1, device=device))
        if other is not None:
            speeds.append(exchange(other, NUM_BYTES[device.type], device))
    print(json.dumps({"node": os.environ["SLURMD_NODENAME"], "gb_s": round(max(speeds), 4)}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
