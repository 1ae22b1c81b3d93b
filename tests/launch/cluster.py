"""A development cluster for tests: skipped where it cannot run (no root, no Slurm), unless DQTRAIN_REQUIRE_SLURM is set: then that is a failure."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DEVCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "devcluster"
NOT_POSSIBLE_HERE = 2
NODES = ["node1", "node2", "node3", "node4"]


class Cluster:
    """One cluster, through its command."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def command(self, name: str, *arguments: object) -> list[str]:
        return [str(word) for word in (DEVCLUSTER, name, "--state", self.state, *arguments)]

    def devcluster(self, name: str, *arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(name, *arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)

    def do(self, name: str, *arguments: object) -> str:
        done = self.devcluster(name, *arguments)
        assert done.returncode == 0, done
        return done.stdout

    def run(self, *command: object) -> str:
        return self.do("run", *command)

    def start_in_background(self, *command: object, cwd: Path) -> subprocess.Popen:
        return subprocess.Popen(self.command("run", *command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def submit(self, folder: Path, script: str, *flags: str) -> str:
        (folder / "job.sh").write_text(f"#!/bin/bash\n{script}")
        return self.run("sbatch", "--parsable", f"--chdir={folder}", f"--output={folder}/out", "--open-mode=append", *flags, folder / "job.sh").strip()

    def job(self, job: str, fields: str) -> str:
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={fields}").strip()

    def is_healthy(self) -> bool:
        return self.devcluster("status").returncode == 0

    def is_reachable(self, node: str) -> bool:
        """Whether its slurmd's port takes a connection from the login node."""
        return self.devcluster("run", "timeout", "1", "bash", "-c", f"</dev/tcp/{node}/6818").returncode == 0

    def processes(self, name: str = "*") -> dict[int, set[str]]:
        """Every process of the cluster or of one node, with those of its namespaces that the machine's others are not in."""
        firsts = [int(record.read_text().split()[0]) for record in (self.state / "run").glob(name) if record.name == "room" or record.name in NODES]
        inside = set().union(*map(namespaces_of, firsts)) - namespaces_of(os.getpid())
        found = {pid: namespaces_of(pid) & inside for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
        return {pid: namespaces for pid, namespaces in found.items() if namespaces}


def namespaces_of(pid: int) -> set[str]:
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "net", "mnt", "uts", "ipc")}
    except OSError:
        return set()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start_cluster(state: Path, *options: object) -> Cluster:
    cluster = Cluster(state)
    done = cluster.devcluster("start", *options)
    if done.returncode == NOT_POSSIBLE_HERE and not os.environ.get("DQTRAIN_REQUIRE_SLURM"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return cluster
