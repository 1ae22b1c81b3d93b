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
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dqtrain.config import Block, RunConfig, check_ranks
from dqtrain.errors import ConfigError
from dqtrain.files import temporary_beside, write_text
from dqtrain.plan import cheapest, plan
from dqtrain.rundir import RunDir
from launch import slurm
from launch.site import Site

ROOT = Path(__file__).resolve().parent.parent
"""Where this code is: the packages, and slurm/ beside them."""

SCRIPT = Path("slurm/train.sbatch")
"""The batch script, from ROOT."""

KEPT_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TZ", "USER", "XDG_CACHE_HOME")
"""Of the shell's environment, what a job takes over, with the site's `keep_environment`."""


class Launch(Block):
    """How a run is started as a job, each time; `launch.json` in the run."""

    site: Site
    """The site file, as it was at submission."""
    nodes: int = Field(ge=1)
    """Nodes of a job; the most, where it makes do with fewer."""
    min_nodes: int | None = Field(None, ge=1)
    """The fewest nodes that a start makes do with; null: all of them."""
    time: str
    """Time limit of each start, [DAYS-]HOURS:MINUTES:SECONDS."""
    python: Path
    """The interpreter, on all nodes."""
    folder: Path
    """Working directory of the ranks, from where relative paths of the config count: that of the first submission."""
    job: str | None = None
    """Id of the newest job of the run."""
    history: tuple[str, ...] = ()
    """Ids of the jobs before it, oldest first."""

    @property
    def ranks(self) -> int:
        """Ranks on all nodes, of the largest start."""
        return self.nodes * self.site.ranks

    @property
    def fewest_nodes(self) -> int:
        """Nodes of the smallest start."""
        return self.min_nodes or self.nodes

    @property
    def asked_nodes(self) -> str:
        """`4`, or `2-4`, as sbatch takes it."""
        return str(self.nodes) if self.fewest_nodes == self.nodes else f"{self.fewest_nodes}-{self.nodes}"

    @property
    def shape(self) -> str:
        """`2-4 nodes x 8 ranks`."""
        return f"{self.asked_nodes} node{'s' if self.nodes > 1 else ''} x {self.site.ranks} rank{'s' if self.site.ranks > 1 else ''}"

    def followed_by(self, job: str) -> "Launch":
        """The same with a newer job."""
        return self.model_copy(update={"job": job, "history": self.history + ((self.job,) if self.job is not None else ())})


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
    return Launch(site=site, nodes=most, min_nodes=fewest if fewest < most else None, time=limit, python=Path(sys.executable), folder=Path.cwd())


def load_launch(run: RunDir) -> Launch | None:
    """How the run was submitted; None for one that was not. Raises ConfigError when the file is damaged."""
    try:
        return Launch.model_validate_json(run.launch.read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run.launch}: is no launch of this version of dqtrain ({error}). Remove the file and submit the run again.") from None


def save_launch(launch: Launch, run: RunDir) -> None:
    """Write launch.json. Raises OSError."""
    write_text(run.launch, launch.model_dump_json(indent=1) + "\n")


def read_excluded(run: RunDir) -> dict[str, dict[str, str]]:
    """Nodes that the run avoids now: node -> {"until": when it no longer does, ISO 8601 in UTC, "why": text}."""
    if not run.excluded.is_file():
        return {}
    now = datetime.now(UTC)
    return {node: entry for node, entry in json.loads(run.excluded.read_text()).items() if datetime.fromisoformat(entry["until"]) > now}


def batch_flags(launch: Launch, name: str, exclude: Collection[str] = ()) -> dict[str, str | None]:
    """sbatch's flags for a job of that name, all but where its output goes: flag -> value, None for a flag without one."""
    site = launch.site
    if launch.fewest_nodes == launch.nodes:
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
        return f"{shlex.join(['sbatch', *batch_arguments(launch, run, exclude)])}\n\n{(ROOT / SCRIPT).read_text()}"
    refuse_live(run)
    slurm.require("sbatch")
    notes = provide(config, launch, run, new_code)
    job = slurm.sbatch(batch_arguments(launch, run, exclude))
    record(job, run)
    notes += [f"it avoids {node} until {entry['until']}: {entry['why']}" for node, entry in exclude.items()]
    return "\n".join(
        [
            f"submitted job {job}: {launch.shape}, at most {launch.time} each start",
            *notes,
            *(f"  dqtrain {f'{verb} {shlex.quote(str(run.path))}':<{len(str(run.path)) + 12}} {meaning}" for verb, meaning in _NEXT.items()),
        ]
    )


_NEXT = {"status": "what it does", "logs -f": "what it prints", "stop": "save, then end", "resume": "go on"}


def check(config: RunConfig, launch: Launch, run: RunDir) -> RunConfig:
    """The config with the run's own path, if it can run so. Raises ConfigError; nothing is touched, and Slurm is not asked."""
    check_name(run.path)
    check_ranks(config.train, launch.ranks)
    if launch.site.gpu is not None:
        asked = plan(config, launch.fewest_nodes, launch.site.ranks, launch.site.gpu)
        if not asked.fits:
            raise ConfigError(asked.refusal(cheapest(asked)))
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run.path})})
    run.check_claim(config)
    return config


def provide(config: RunConfig, launch: Launch, run: RunDir, new_code: bool = False) -> list[str]:
    """Put all that a start needs into the run. Returns what is worth saying. Raises ConfigError, OSError."""
    run.claim(config)
    notes = _copy_code(run, new_code)
    write_text(run.environment, json.dumps(_environment(launch), indent=1) + "\n")
    earlier = load_launch(run)
    save_launch(launch.model_copy(update={"job": earlier.job, "history": earlier.history}) if earlier is not None else launch, run)
    run.stop.unlink(missing_ok=True)
    return notes


def record(job: str, run: RunDir) -> None:
    """Note a job that was queued for the run."""
    launch = load_launch(run)
    assert launch is not None
    save_launch(launch.followed_by(job), run)
    run.event("submit", job=job, nodes=launch.asked_nodes)


def newest_job(launch: Launch) -> slurm.Job | None:
    """What Slurm knows of the newest job; None where there is none, and for one that it has forgotten. Raises SlurmError when it does not say."""
    return slurm.find_job(launch.job) if launch.job is not None else None


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
        raise ConfigError(f"{run.path} has a job already: {launch.job}, {job.state.lower()}. `dqtrain stop {run.path}` ends it; then submit again.")


def check_name(path: Path) -> None:
    """Raise ConfigError for a path that cannot become part of sbatch's --output and of PYTHONPATH, as a run's does."""
    strange = sorted(set("%\\:\n") & set(str(path)))
    if strange:
        raise ConfigError(f"run.dir: {path} holds {' and '.join(map(repr, strange))}, which Slurm or Python reads as something else. Use another run.dir.")


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
