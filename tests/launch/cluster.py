"""A development cluster for tests: skipped where it cannot run (no root, no Slurm), unless DQTRAIN_REQUIRE_SLURM is set: then that is a failure.

And what is submitted to it: a run as a job; the files of one that is small and has no teacher.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, write_corpus

from launch.status import steps_repeated
from launch.submit import ROOT

DEVCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "devcluster"
NOT_POSSIBLE_HERE = 2
NODES = ["node1", "node2", "node3", "node4"]
SLOW_S = 240
"""More than anything here takes on a machine that others use too."""


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

    def dqtrain(self, *words: object, code: int = 0, **variables: str) -> str:
        """The command line on the login node: what it prints when it ends with that code."""
        done = self.devcluster(
            "run", "env", f"PYTHONPATH={ROOT}", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "dqtrain", *words
        )
        assert done.returncode == code, done
        return done.stdout + done.stderr

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


def running(state: Path, *options: object) -> Iterator[Cluster]:
    """The body of a fixture."""
    cluster = start_cluster(state, *options)
    yield cluster
    cluster.do("stop")


class Job(Run):
    """A run as a Slurm job."""

    def __init__(self, path: Path, config: Path, cluster: Cluster, site: Path) -> None:
        super().__init__(path, config)
        self.cluster, self.site = cluster, site

    def login(self, *arguments: object) -> tuple[int, str]:
        """`dqtrain` on the login node: exit code and output."""
        done = subprocess.run(
            self.cluster.command("run", sys.executable, "-m", "dqtrain", *arguments),
            cwd=self.path.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout

    def submit(self, *overrides: str, nodes: int = 2) -> str:
        """The job's id."""
        code, output = self.login("submit", self.config, "--site", self.site, "--nodes", nodes, *overrides)
        assert code == 0, output
        return self.job

    @property
    def launch(self) -> dict[str, Any]:
        return json.loads((self.path / "launch.json").read_text())

    @property
    def job(self) -> str:
        """Id of the newest job."""
        return self.launch["job"]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Those of some kinds, oldest first."""
        file = self.path / "events.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        return [event for event in lines if event["event"] in kinds]

    def until(self, condition: Callable[[], object]) -> None:
        until(condition, SLOW_S)

    def story(self) -> str:
        """Everything that it wrote."""
        files = [*self.path.glob("events.jsonl"), *self.path.glob("slurm-*.out"), *self.path.glob("rank-*.log")]
        return "\n".join(f"--- {file.name}\n{file.read_text()[-4000:]}" for file in files)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.last_step() >= step)

    def last_step(self) -> int:
        log = self.path / "log.jsonl"
        return max((json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")), default=0) if log.exists() else 0

    def until_ended(self) -> dict[str, Any]:
        """The job_end event, when the job has left the cluster."""
        self.until(lambda: self.events("job_end"))
        self.until(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.events("job_end")[-1]

    def state(self, job: str | None = None) -> str:
        return self.cluster.job(job or self.job, "%T")

    def nodes(self) -> list[str]:
        """Of the newest start."""
        return self.events("job_start")[-1]["nodes"]

    def processes(self, module: str) -> list[int]:
        """pids of the live ones that run it for this run."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if f"-m\0{module}\0{self.path}\0" in file.read_text():
                    found.append(int(file.parent.name))
        return found

    def pids(self) -> dict[int, int]:
        """rank -> pid of the live ranks."""
        environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in self.processes("launch.task")}
        return {int(dict(item.split("=", 1) for item in items if item)["SLURM_PROCID"]): pid for pid, items in environments.items()}

    def signal(self, signum: int, *ranks: int) -> None:
        pids = self.pids()
        for rank in ranks or pids:
            os.kill(pids[rank], signum)

    def note_costs(self, test: str) -> None:
        """Add a row to the table of docs/benchmarks/slurm.md, in the file that DQTRAIN_COSTS names, if it names one: made of the run's events alone."""
        name = os.environ.get("DQTRAIN_COSTS")
        if not name or not self.events("start"):
            return
        every = self.events("submit", "job_start", "start", "resume", "checkpoint", "stopped", "srun_end", "requeue", "successor", "job_end")
        until_start, until_training = [], []
        for before, event in pairwise(every):
            seconds = (datetime.fromisoformat(event["time"]) - datetime.fromisoformat(before["time"])).total_seconds()
            if event["event"] == "job_start" and before is not every[0]:
                until_start.append(f"{seconds:.0f}" if before["event"] != "checkpoint" else f"{seconds:.0f} from the last checkpoint")
            elif event["event"] in ("start", "resume"):
                until_training.append(f"{seconds:.0f}")
        row = [test.removeprefix("test_").replace("_", " "), str(steps_repeated(every)), ", ".join(until_start) or "-", ", ".join(until_training)]
        with Path(name).open("a") as table:
            if table.tell() == 0:
                table.write("| test | steps made again | seconds to the next start | from a start to training |\n|---|---|---|---|\n")
            table.write(f"| {' | '.join(row)} |\n")

    def finish(self, whole: Run, announced: int = 0, broken: int = 0) -> None:
        """Wait for the end, and compare with an uninterrupted run; the restarts so far were of these kinds."""
        end = self.until_ended()
        assert (end["code"], end["why"]) == (0, "finished")
        assert self.log() == whole.log()
        assert json.loads((self.path / "result.json").read_text())["test"] == json.loads((whole.path / "result.json").read_text())["test"]
        begins = self.events("start", "resume")
        assert len(begins) == 1 + announced + broken
        assert not (self.path / "owner.json").exists()
        assert not list((self.path / "checkpoints").glob(".*"))


CONFIG = """\
run: {dir: %s/run, seed: 3}
teacher: null
student: {architecture: {model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 16}}
data: {train: %s/train.jsonl, tokens_per_sample: 16, train_tokenizer: {vocab_size: 300}}
train: {steps: 4, global_batch: 8, micro_batch: 1, lr: 3e-5}
quant: null
distill: {task: 1.0}
checkpoint: {every_steps: 2}
log: {every_steps: 1}
"""


def write_files(folder: Path, site: str) -> Path:
    """Make config.yaml, train.jsonl and site.yaml there."""
    write_corpus(folder / "train.jsonl", 100, 0)
    (folder / "config.yaml").write_text(CONFIG % (folder, folder))
    (folder / "site.yaml").write_text(site)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """What a command that touches nothing leaves equal."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


APPTAINER = """\
#!/bin/bash
# What `apptainer exec --bind=SOURCE:PLACE,... IMAGE COMMAND...` must be given, and no more: the command sees this machine.
[[ $1 == exec && $2 == --bind=* && -f $3 ]] || exit 99
IFS=, read -ra mounts <<<"${2#--bind=}"
for mount in "${mounts[@]}"; do [[ -e ${mount%%:*} ]] || exit 98; done
export APPTAINER_CONTAINER=$3 PYTHONPATH=/an/image/may/set/this
echo "in $3" >&2
shift 3
exec "$@"
"""


def container(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A site's container, with a stand-in for apptainer on the nodes' PATH."""
    (folder / "bin").mkdir()
    (folder / "bin/apptainer").write_text(APPTAINER)
    (folder / "bin/apptainer").chmod(0o755)
    (folder / "image.sif").touch()
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    return {"kind": "apptainer", "image": f"{folder}/image.sif", "python": sys.executable}
