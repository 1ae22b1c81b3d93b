"""From a config and a site to a job: everything that can be wrong is refused here, on the login node, before anything is queued.

A submitted run holds all it needs to start again, on any day and by anyone: `run.yaml`, `launch.json`, `environment.json` and its own copy of the code in `code/`.
"""

import filecmp
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from dqtrain import hub
from dqtrain.config import Block, RunConfig, check_ranks
from dqtrain.errors import ConfigError
from dqtrain.files import temporary_beside, write_text
from dqtrain.plan import cheapest, plan
from dqtrain.rundir import RunDir
from dqtrain.signals import withdraw
from launch import slurm
from launch.site import Container, Site

ROOT = Path(__file__).resolve().parent.parent
"""Where this code is: a checkout, or what pip installs into."""

SCRIPT = Path("launch/train.sbatch")
"""The batch script, from ROOT."""

KEPT_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TZ", "USER", "XDG_CACHE_HOME")
"""Of the shell's environment, what a job takes over, with the site's `keep_environment`."""


class Launch(Block):
    """How a run is started as a job, each time; `launch.json` in the run."""

    site: Site
    """The site file, as it was at submission."""
    nodes: int = Field(ge=1)
    """Nodes of a job; the most, where it makes do with fewer."""
    min_nodes: int = Field(ge=1)
    """The fewest nodes that a start makes do with."""
    time: str
    """Time limit of each start, [DAYS-]HOURS:MINUTES:SECONDS."""
    python: Path
    """The interpreter, on all nodes."""
    folder: Path
    """Working directory of the ranks, from where relative paths of the config count: that of the first submission."""
    job: str | None = None
    """Id of the newest job of the run, but for those that wait to take over."""
    history: tuple[str, ...] = ()
    """Ids of the jobs before it, oldest first."""
    successors: tuple[str, ...] = ()
    """Ids of those that wait to take over, in their order (`Site.successors`)."""

    @property
    def ranks(self) -> int:
        """Ranks on all nodes, of the largest start."""
        return self.nodes * self.site.ranks

    @property
    def asked_nodes(self) -> str:
        """`4`, or `2-4`, as sbatch takes it."""
        return str(self.nodes) if self.min_nodes == self.nodes else f"{self.min_nodes}-{self.nodes}"

    @property
    def shape(self) -> str:
        """`2-4 nodes x 8 ranks`."""
        return f"{self.asked_nodes} node{'s' if self.nodes > 1 else ''} x {self.site.ranks} rank{'s' if self.site.ranks > 1 else ''}"

    def python_on_nodes(self, run: RunDir) -> list[str]:
        """What stands between srun's flags and Python's arguments: the interpreter, or what starts that of the site's container."""
        site = self.site
        if site.container is None:
            return [str(self.python)]
        variables = {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", **site.variables}
        return site.container.words(self.folder, [run.path, *([site.scratch] if site.scratch else [])], variables, site.gpus_per_node > 0)

    def followed_by(self, job: str, successors: Sequence[str] = ()) -> "Launch":
        """The same with a newer job."""
        return self.model_copy(update={"job": job, "history": self.history + ((self.job,) if self.job is not None else ()), "successors": tuple(successors)})


def new_launch(site: Site, nodes: tuple[int, int], time: str | None) -> Launch:
    """A launch from here by this interpreter, on so many nodes (the fewest, the most); time None is the site's. Raises ConfigError for a time limit that is missing or cannot be."""
    limit = time or site.time
    if limit is None:
        raise ConfigError("a job needs a time limit. Give --time, such as --time 24:00:00, or set `time` in the site file.")
    try:
        site.check_time(limit)
    except ValueError as error:
        raise ConfigError(f"--time: {error}.") from None
    # Not resolved: the interpreter of a virtual environment is a link, and known by its name.
    fewest, most = nodes
    return Launch(site=site, nodes=most, min_nodes=fewest, time=limit, python=Path(sys.executable), folder=Path.cwd())


def load_launch(run: RunDir) -> Launch | None:
    """How the run was submitted; None for one that was not. Raises ConfigError when the file is damaged."""
    try:
        return Launch.model_validate_json(run.launch.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, IsADirectoryError) as error:
        raise ConfigError(f"{run.launch}: is no launch of this version of dqtrain ({_first(error)}). Remove it and submit the run again.") from None


def save_launch(launch: Launch, run: RunDir) -> None:
    """Write launch.json. Raises OSError."""
    write_text(run.launch, launch.model_dump_json(indent=1) + "\n")


class Excluded(Block):
    """Why a run avoids a node."""

    until: AwareDatetime
    """When it no longer does."""
    why: str
    """What the node did."""

    def __str__(self) -> str:
        return f"until {self.until.isoformat(timespec='seconds')}: {self.why}"


_EXCLUDED = TypeAdapter(dict[str, Excluded])


def read_excluded(run: RunDir) -> dict[str, Excluded]:
    """The nodes that the run avoids now. Raises ConfigError when the file is damaged."""
    try:
        entries = _EXCLUDED.validate_json(run.excluded.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValidationError, IsADirectoryError) as error:
        raise ConfigError(f"{run.excluded}: is no list of nodes to avoid ({_first(error)}). Remove it: then the run avoids none.") from None
    return {node: entry for node, entry in entries.items() if entry.until > datetime.now(UTC)}


def save_excluded(entries: dict[str, Excluded], run: RunDir) -> None:
    """Write excluded.json. Raises OSError."""
    write_text(run.excluded, _EXCLUDED.dump_json(entries, indent=1).decode() + "\n")


def _first(error: ValidationError | OSError) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, OSError):
        return str(error.strerror)
    first = error.errors()[0]
    return ": ".join(text for text in (".".join(map(str, first["loc"])), first["msg"]) if text)


def batch_flags(launch: Launch, name: str, exclude: Collection[str] = ()) -> dict[str, str | None]:
    """sbatch's flags for a job of that name, all but where its output goes: flag -> value, None for a flag without one."""
    site = launch.site
    if launch.min_nodes == launch.nodes:
        tasks: dict[str, object | None] = {"ntasks-per-node": site.ranks, "cpus-per-task": site.cpus_per_rank}
    else:
        tasks = {"mincpus": site.ranks * site.cpus_per_rank}  # given tasks per node, Slurm counts those of the fewest nodes, and never takes more nodes
    flags: dict[str, object | None] = {
        "job-name": f"dqtrain-{name}",
        "chdir": launch.folder,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": launch.asked_nodes,
        **tasks,
        "gpus-per-node": site.gpus_per_node or None,
        "mem": site.memory,
        "time": launch.time,
        "signal": f"B:USR1@{site.signal_s}",
        "export": ",".join((*KEPT_VARIABLES, *site.keep_environment)),
        "exclude": ",".join(sorted(exclude)) or None,
        "mail-user": site.mail and site.mail.address,
        "mail-type": site.mail and ",".join(site.mail.events),
    }
    further = (flag.removeprefix("--").partition("=") for flag in site.flags)
    typed = {flag: str(value) for flag, value in flags.items() if value is not None}
    return {"requeue": None, **typed, **{flag: value if equals else None for flag, equals, value in further}}


def batch_arguments(launch: Launch, run: RunDir, exclude: Collection[str] = (), after: str | None = None) -> list[str]:
    """What follows `sbatch`: flags, the batch script and its arguments. The run's path is absolute; `after` is a job that must have ended before."""
    flags = {"open-mode": "append", "output": str(run.job_log("%j")), **batch_flags(launch, run.path.name, exclude)}
    if after is not None:
        flags["dependency"] = f"afterany:{after}"
    arguments = [f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items()]
    return [*arguments, str(run.code / SCRIPT), str(run.path), str(launch.python), *launch.site.modules]


def submit(config: RunConfig, launch: Launch, run: RunDir, dry_run: bool = False, new_code: bool = False) -> str:
    """Queue a run, or queue it again: what to tell the user. A dry run gives the command and the script, and touches nothing.

    The run keeps the code of its first submission unless `new_code`. Raises ConfigError for whatever would end the job later and can be seen now, for a
    finished run, for one that runs or is queued, and where there is no sbatch; SlurmError when Slurm refuses.
    """
    config = check(config, launch, run)
    exclude = read_excluded(run)
    if dry_run:
        run.refuse_if_owned()
        inside = shlex.join([*launch.python_on_nodes(run), "-m", "launch.task", str(run.path)])
        lines = [slurm.sbatch_line(batch_arguments(launch, run, exclude))]
        if launch.site.successors:
            lines += [f"{slurm.sbatch_line(batch_arguments(launch, run, exclude, after='JOB'))}  # {launch.site.successors} times; JOB is the one before"]
        return "\n".join([*lines, "", (ROOT / SCRIPT).read_text(), f"# Each rank: srun ... {inside}"])
    refuse_live(run)
    slurm.require("sbatch")
    notes = provide(config, launch, run, new_code)
    job, *successors = _queue(launch, run, exclude)
    record(job, run, successors)
    notes += [f"it avoids {node} {entry}" for node, entry in exclude.items()]
    return "\n".join(
        [
            f"submitted job {job}: {launch.shape}, at most {launch.time} each start",
            *([f"{', '.join(successors)} wait to go on with it"] if successors else []),
            *notes,
            *(f"  dqtrain {f'{verb} {shlex.quote(str(run.path))}':<{len(str(run.path)) + 12}} {meaning}" for verb, meaning in _NEXT.items()),
        ]
    )


def _queue(launch: Launch, run: RunDir, exclude: Collection[str]) -> list[str]:
    """Submit the job, and those that wait to take over; their ids. All or none."""
    jobs = [slurm.sbatch(batch_arguments(launch, run, exclude))]
    try:
        for _ in range(launch.site.successors):
            jobs.append(slurm.sbatch(batch_arguments(launch, run, exclude, after=jobs[-1])))
    except slurm.SlurmError as error:
        try:
            slurm.cancel(*reversed(jobs))
        except slurm.SlurmError:
            raise slurm.SlurmError(f"{error} {', '.join(jobs)} are queued all the same: end them with `scancel {' '.join(jobs)}`.") from None
        raise
    return jobs


_NEXT = {"status": "what it does", "logs -f": "what it prints", "stop": "save, then end", "resume": "go on"}


def check(config: RunConfig, launch: Launch, run: RunDir) -> RunConfig:
    """The config with the run's own path, if it can run so. Raises ConfigError; nothing is touched, and Slurm is not asked."""
    check_name(run.path)
    if launch.site.container is not None:
        check_container(launch.site.container, (run.path, launch.folder))
    check_ranks(config.train, launch.ranks)
    if launch.site.gpu is not None:
        asked = plan(config, launch.min_nodes, launch.site.ranks, launch.site.gpu)
        if not asked.fits:
            raise ConfigError(asked.refusal(cheapest(asked)))
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run.path})})
    run.check_claim(config)
    return config


def provide(config: RunConfig, launch: Launch, run: RunDir, new_code: bool = False) -> list[str]:
    """Put all that a start needs into the run. Returns what is worth saying. Raises ConfigError, OSError."""
    hub.fetch_models(config)
    hub.fetch_data_sets(config)
    withdraw(run.stop)  # it asked an earlier start
    run.claim(config)
    notes = _copy_code(run, new_code)
    write_text(run.environment, json.dumps(_environment(launch), indent=1) + "\n")
    earlier = load_launch(run)
    save_launch(launch.model_copy(update={"job": earlier.job, "history": earlier.history}) if earlier is not None else launch, run)
    return notes


def record(job: str, run: RunDir, successors: Sequence[str] = ()) -> None:
    """Note a job that was queued for the run, and those that wait to take over."""
    launch = load_launch(run)
    assert launch is not None
    save_launch(launch.followed_by(job, successors), run)
    run.event("submit", job=job, nodes=launch.asked_nodes, **({"successors": successors} if successors else {}))


def newest_job(launch: Launch) -> slurm.Job | None:
    """What Slurm knows of the newest job, or of the first of its successors that lives when it has ended; None where there is none, and for one that it has forgotten.

    Raises SlurmError when it does not say.
    """
    if launch.job is None:
        return None
    job = slurm.find_job(launch.job)
    if job is not None and job.is_live:
        return job
    return next((later for later in map(slurm.find_job, launch.successors) if later is not None and later.is_live), job)


def refuse_live(run: RunDir) -> None:
    """Raise ConfigError when the run's newest job is queued or runs, or somebody else runs it; SlurmError when Slurm does not say."""
    launch = load_launch(run)
    if launch is not None:
        refuse_live_job(launch, run)
    if living_owner(run, launch) is not None:
        run.refuse_if_owned()


def living_owner(run: RunDir, launch: Launch | None) -> dict[str, Any] | None:
    """`RunDir.live_owner`, but None for one whose job has ended, as Slurm knows sooner than its heartbeat tells. Raises SlurmError when Slurm does not say."""
    owner = run.live_owner()
    if owner is None or owner["job"] is None:
        return owner
    job = slurm.find_job(owner["job"])
    # A job that Slurm does not know is one of this run's that it has forgotten, or another cluster's.
    has_ended = not job.is_live if job is not None else launch is not None and owner["job"] in (launch.job, *launch.history)
    return None if has_ended else owner


def refuse_live_job(launch: Launch, run: RunDir) -> None:
    """Raise ConfigError when the newest job of the run is queued or runs; SlurmError when Slurm does not say."""
    job = newest_job(launch)
    if job is not None and job.is_live:
        raise ConfigError(f"{run.path} has a job already: {job.id}, {job.state.lower()}. `dqtrain stop {run.path}` ends it; then submit again.")


def check_name(path: Path) -> None:
    """Raise ConfigError for a path that cannot become part of sbatch's --output and of PYTHONPATH, as a run's does."""
    strange = sorted(set("%\\:\n") & set(str(path)))
    if strange:
        raise ConfigError(f"run.dir: {path} holds {' and '.join(map(repr, strange))}, which Slurm or Python reads as something else. Use another run.dir.")


def check_container(container: Container, places: Sequence[Path]) -> None:
    """Raise ConfigError unless the image is there, and the places are ones that can be mounted."""
    if container.file is not None and not container.file.exists():
        raise ConfigError(f"container.image: {container.file} is not there. Give an image on a disk that this machine and all nodes share.")
    for place in places:
        if set(",:") & set(str(place)):
            raise ConfigError(
                f"{place} cannot be mounted in a container, for its name holds a comma or a colon. Use another run.dir, or submit from another folder."
            )


def _copy_code(run: RunDir, new_code: bool) -> list[str]:
    """Make `code/` if it is not there, or anew. Returns what is worth saying."""
    files = sorted(file.relative_to(ROOT) for package in ("dqtrain", "launch") for file in (ROOT / package).rglob("*.py")) + [SCRIPT]
    is_same = all((run.code / file).is_file() and filecmp.cmp(ROOT / file, run.code / file, shallow=False) for file in files)
    if is_same:
        return []
    if run.code.exists() and not new_code:
        return [f"the run keeps the code of its first submission, {run.code}, which is not that of {ROOT}; `dqtrain resume --new-code` takes the latter"]
    fresh, old = temporary_beside(run.code), temporary_beside(run.code.with_name("code.old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    for file in files:
        (fresh / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, fresh / file)
    if run.code.exists():
        os.replace(run.code, old)
        run.event("new_code", source=str(ROOT), commit=_commit())
    os.replace(fresh, run.code)
    shutil.rmtree(old, ignore_errors=True)
    return []


def _environment(launch: Launch) -> dict[str, Any]:
    """What the run was submitted with, for those who want to repeat it."""
    return {
        "python": platform.python_version(),
        "executable": str(launch.python),
        "platform": platform.platform(),
        "commit": _commit(),
        "packages": sorted({f"{package.name}=={package.version}" for package in importlib.metadata.distributions()}),
        "variables": {name: os.environ[name] for name in (*KEPT_VARIABLES, *launch.site.keep_environment) if name in os.environ} | launch.site.variables,
    }


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` behind it where files were changed; None where this code is no checkout or git is missing."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
