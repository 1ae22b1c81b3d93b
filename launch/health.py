"""Whether a node can train, in a second: `python -m launch.health RUN` on each node prints one JSON line, {"node", "time", "problems"}.

Disks are written and read back, GPUs counted and asked for memory errors. How fast nodes reach each other is dqtrain/bench/links.py's business.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from dqtrain.files import write_whole
from dqtrain.rundir import RunDir
from launch.site import Site
from launch.submit import load_launch

FREE_BYTES = 1 << 30
"""Least free space of the run directory's disk and of scratch."""

SHARED_MEMORY_BYTES = 16 << 20
"""Least free /dev/shm for each rank of the node, through which ranks of one node talk."""

_QUESTION = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]


def problems(run: RunDir, site: Site) -> list[str]:
    """What is wrong with this node, a few words each."""
    places = [run.path, *([site.scratch] if site.scratch else [])]
    found = [problem for place in places if (problem := _disk(place))]
    free = shutil.disk_usage("/dev/shm").free
    if free < site.ranks * SHARED_MEMORY_BYTES:
        found.append(f"/dev/shm has {free >> 20} MiB free, and {site.ranks} ranks need {site.ranks * SHARED_MEMORY_BYTES >> 20}")
    return found + (_gpus(site.gpus_per_node) if site.gpus_per_node else [])


def _disk(place: Path) -> str | None:
    content = os.urandom(1 << 16)
    probe = place / f".health-{socket.gethostname()}"
    try:
        free = shutil.disk_usage(place).free
        if free < FREE_BYTES:
            return f"{place} has {free >> 20} MiB free, and {FREE_BYTES >> 20} are needed"
        write_whole(probe, [content])
        try:
            return None if probe.read_bytes() == content else f"{place} does not give back what was written"
        finally:
            probe.unlink()
    except OSError as error:
        return f"{place} cannot be written: {error.strerror}"


def _gpus(asked: int) -> list[str]:
    try:
        done = subprocess.run(_QUESTION, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi: {'no answer within 30 s' if isinstance(error, subprocess.TimeoutExpired) else error.strerror}"]
    if done.returncode:
        return [f"nvidia-smi: {(done.stdout or done.stderr).strip() or f'exit code {done.returncode}'}"]
    lines = [line.partition(",") for line in done.stdout.splitlines()]
    found = [f"GPU {index} has {errors.strip()} uncorrected memory errors" for index, _, errors in lines if errors.strip().isdecimal() and int(errors)]
    return found + ([f"{len(lines)} GPUs of {asked}"] if len(lines) < asked else [])


def main(path: Path) -> None:
    """Print the line."""
    run = RunDir(path)
    launch = load_launch(run)
    assert launch is not None
    print(json.dumps({"node": os.environ["SLURMD_NODENAME"], "time": time.time(), "problems": problems(run, launch.site)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
