"""What a cluster asks of every job: one YAML file per site, each field a typed value that becomes a flag or a variable.

Read on the login node and copied into each run's `launch.json`, so that a run keeps the site it was submitted with.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from dqtrain.config import Block, load_block
from dqtrain.plan import GPUS

SLACK_S = 60
"""Beside the grace: a step is finished first, and Slurm looks at time limits every 30 s, so that a signal comes up to as much early."""

RESERVED = frozenset(
    "job-name nodes ntasks ntasks-per-node cpus-per-task mincpus gpus gpus-per-node mem partition account qos time requeue no-requeue open-mode output error signal chdir "
    "export exclude dependency array wrap parsable wait test-only mail-user mail-type".split()
)
"""Flags of sbatch that dqtrain sets from typed values, or that a supervised job cannot have."""

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)")
Word = Annotated[str, StringConstraints(pattern=r"^\S+$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Mount = Annotated[str, StringConstraints(pattern=r"^/[^\s,:]*(:/[^\s,:]*(:ro|:rw)?)?$")]

_DOCKER = "docker://"


class Container(Block):
    """What ranks and the health check run in. The batch script and the supervisor run outside, where Slurm's programs are."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: flags of srun, where the cluster has that plugin; apptainer: `apptainer exec`, which is on the nodes' PATH."""
    image: Word
    """A file or folder on a disk that all nodes share; for pyxis also docker://[REGISTRY#]NAME[:TAG]."""
    mounts: tuple[Mount, ...] = ()
    """Places of the node that are seen inside, each SOURCE or SOURCE:PLACE[:ro]; the run, its working directory and scratch are there anyway."""
    python: Word = "python3"
    """The interpreter inside, which finds torch, deepspeed and what else dqtrain needs; dqtrain itself is the run's copy of the code."""

    @property
    def file(self) -> Path | None:
        """The image, where it is a file or folder."""
        return None if self.image.startswith(_DOCKER) else Path(self.image)

    @model_validator(mode="after")
    def _check(self) -> "Container":
        if self.file is None and self.kind == "apptainer":
            raise ValueError(
                f"image is {self.image}, which each rank would convert anew; make a file of it, `apptainer pull IMAGE.sif {self.image}`, and name that"
            )
        if self.file is not None and not self.file.is_absolute():
            raise ValueError(f"image is {self.image}, but must be an absolute path{f', or {_DOCKER}...' if self.kind == 'pyxis' else ''}")
        return self

    def words(self, folder: Path, places: Sequence[Path], variables: Mapping[str, str], has_gpus: bool) -> list[str]:
        """What stands between srun's flags and Python's own arguments, to run in `folder` with `places` mounted; an image's variables do not win over these."""
        whole = [f"{place}:{place}" for place in (folder, *places)] + [mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts]
        mounts = ",".join(dict.fromkeys(whole))
        inside = ["env", *(f"{name}={value}" for name, value in variables.items()), self.python]
        if self.kind == "pyxis":
            return [f"--container-image={self.image}", f"--container-mounts={mounts}", f"--container-workdir={folder}", *inside]
        return ["apptainer", "exec", *(["--nv"] if has_gpus else []), f"--bind={mounts}", self.image, *inside]


class Mail(Block):
    """What Slurm writes to somebody."""

    address: Word
    """To whom."""
    events: Annotated[tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "ALL"], ...], Field(min_length=1)] = ("END", "FAIL")
    """On what, in sbatch's words; a run that goes on after its time limit is a REQUEUE."""


class Site(Block):
    """A cluster, or a part of one."""

    gpus_per_node: int = Field(ge=0)
    """GPUs that a job takes of each node; 0: ranks on CPUs."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Ranks on each node; null: one per GPU, or one where there is none."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPUs of each rank, and its OpenMP threads."""
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Memory of each node as sbatch's --mem takes it, such as 480G; 0: all of it; null: what the cluster gives by default."""
    gpu: str | None = None
    """The GPUs' kind, one that `dqtrain plan` knows: a run that does not fit is then refused at submission; null: no plan is made."""
    partition: Word | None = None
    """Partition; null: the cluster's default."""
    account: Word | None = None
    """Account that pays; null: the user's default."""
    qos: Word | None = None
    """Quality of service; null: the default."""
    time: str | None = None
    """Time limit of each start, [DAYS-]HOURS:MINUTES:SECONDS, where --time gives none."""
    modules: tuple[Word, ...] = ()
    """Environment modules that are loaded before Python starts."""
    interface: Word | None = None
    """Network interface that gloo and NCCL open their sockets on; null: they choose."""
    scratch: Path | None = None
    """A directory of each node whose free space is looked at before training; null: none."""
    least_link_gb_s: float | None = Field(None, ge=0)
    """GB/s that a node must reach with one of three others before training; 0: noted, not judged; null: not measured, which saves a start of torch."""
    environment: dict[Variable, str] = {}
    """Variables of all ranks."""
    keep_environment: tuple[Variable, ...] = ()
    """Names of further variables that a job takes over from the shell it was submitted from."""
    grace_s: int = Field(120, ge=1, le=36000)
    """Seconds before the time limit that a run needs to save; at a preemption the cluster's own grace time counts."""
    successors: int = Field(0, ge=0, le=100)
    """Jobs that are queued with a run to take over one after the other, where nodes may not submit or requeue jobs; 0: nodes may, and a run needs none."""
    max_restarts: int = Field(3, ge=0)
    """How often in a row a run that breaks is started again without a newer checkpoint."""
    exclude_hours: float = Field(24.0, gt=0)
    """Hours for which the run avoids a node that failed it."""
    container: Container | None = None
    """What ranks run in; null: nothing."""
    mail: Mail | None = None
    """What Slurm writes to somebody; null: what the cluster does by default."""
    flags: tuple[str, ...] = ()
    """Further flags of sbatch, such as --constraint=a100, each --NAME or --NAME=VALUE."""

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def signal_s(self) -> int:
        """Seconds before the time limit at which Slurm is asked to send USR1."""
        return self.grace_s + SLACK_S

    @property
    def variables(self) -> dict[str, str]:
        """What every rank finds in its environment, `environment` last."""
        found = {"OMP_NUM_THREADS": str(self.cpus_per_rank)}
        if self.interface is not None:
            found |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return found | self.environment

    @model_validator(mode="after")
    def _check(self) -> "Site":
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ValueError(f"ranks_per_node is {self.ranks}, but there are {self.gpus_per_node} GPUs per node; give each rank a GPU")
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(f"gpu is {self.gpu}, but `dqtrain plan` knows {', '.join(GPUS)}; take the one that is nearest, or null")
        if self.gpu is not None and not self.gpus_per_node:
            raise ValueError(f"gpu is {self.gpu}, but gpus_per_node is 0; set gpus_per_node, or gpu to null")
        for flag in self.flags:
            name = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", flag)
            if name is None:
                raise ValueError(f"flags holds `{flag}`, but each must be --NAME or --NAME=VALUE, such as --constraint=a100")
            if name[1] in RESERVED:
                raise ValueError(
                    f"flags holds `{flag}`, but --{name[1]} is a flag that dqtrain sets itself; remove it, and use the site's fields and dqtrain's options"
                )
        if self.time is not None:
            self.check_time(self.time)
        return self

    def check_time(self, limit: str) -> None:
        """Raise ValueError for a time limit that is none, or that leaves no time to train before USR1."""
        found = _TIME.fullmatch(limit)
        if found is None:
            raise ValueError(f"time is `{limit}`, but must be [DAYS-]HOURS:MINUTES:SECONDS, such as 24:00:00")
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        limit_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if limit_s < self.signal_s + SLACK_S:
            raise ValueError(
                f"time is {limit}, {limit_s} s, of which the last {self.signal_s} are for saving (grace_s {self.grace_s} and {SLACK_S} of slack); "
                f"give {self.signal_s + SLACK_S} s or more, or lower grace_s"
            )


def load_site(path: Path) -> Site:
    """Read a site file. Raises ConfigError that names file, line and key."""
    return load_block(Site, "a site file, such as slurm/sites/example.yaml", path)
