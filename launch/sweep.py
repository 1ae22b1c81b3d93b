"""The same config over a grid: one run per point, all of them one Slurm array, or one after the other here.

Each point is a run like any other: a task of the array does what a job of `dqtrain submit` does, and `status`, `logs`, `stop` and `resume` take its directory.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dqtrain.config import PASSIVE, Block, RunConfig, differences, load_block, load_config
from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir
from launch import slurm
from launch.submit import SCRIPT, Launch, batch_flags, check, living_owner, load_launch, newest_job, provide, read_excluded, record

NAME_BYTES = 200
"""The longest name of a point's directory."""


class Sweep(Block):
    """A grid of runs."""

    config: Path
    """The config of all points."""
    runs: Path
    """Folder of the points' run directories."""
    grid: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]
    """Field of the config, such as train.lr -> the values that it takes; a point for each combination, the last field's values next to each other."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    run: RunDir
    config: RunConfig

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do. Raises ConfigError for one that was finished with another config."""
        if not self.run.result.exists():
            return False
        changes = differences(self.run.load_config(), self.config)
        if changes.keys() - PASSIVE:
            listing = "\n".join(f"  {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changes.items() if key not in PASSIVE)
            raise ConfigError(f"{self.run.path} is a finished run with another config (there -> here):\n{listing}\nUse another folder for `runs`.")
        return True


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises ConfigError that names file, line and key."""
    return load_block(Sweep, "a sweep file, such as configs/sweeps/example.yaml", path)


def points(sweep: Sweep, overrides: Sequence[str]) -> list[Point]:
    """The runs of a sweep in the order of its grid, each with a valid config; `overrides` are for all. Raises ConfigError that names the point."""
    given = {override.partition("=")[0] for override in overrides}
    if "run.dir" in given | sweep.grid.keys():
        raise ConfigError("run.dir is a folder of `runs` for each point, named after its values, and cannot be given. Remove it, and set `runs`.")
    if given & sweep.grid.keys():
        raise ConfigError(f"{', '.join(sorted(given & sweep.grid.keys()))} is in the grid and is given for all points too. Remove one of the two.")
    found: dict[str, Point] = {}
    for values in itertools.product(*sweep.grid.values()):
        chosen = dict(zip(sweep.grid, values, strict=True))
        name = ",".join(f"{key}={_word(value)}" for key, value in chosen.items())
        if name in found:
            raise ConfigError(f"grid: two points would be {sweep.runs / name}, since a directory is named after its values. Remove one, or change its value.")
        if len(name.encode()) > NAME_BYTES:
            raise ConfigError(f"grid: {name} is too long a name for a directory ({NAME_BYTES} bytes at most). Put long values into configs of their own.")
        run = RunDir((sweep.runs / name).absolute())
        here = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (chosen | {"run.dir": str(run.path)}).items())
        try:
            found[name] = Point(run, load_config(sweep.config, [*overrides, *here]))
        except ConfigError as error:
            raise ConfigError(f"point {name}: {error}") from None
    return list(found.values())


def _word(value: Any) -> str:
    """A value as part of a directory's name."""
    return re.sub(r"[^\w.+-]+", "-", value if isinstance(value, str) else json.dumps(value))


def submit_sweep(found: Sequence[Point], launch: Launch, folder: Path, dry_run: bool = False) -> str:
    """Queue the points that are neither finished nor queued nor running as one array, on a node each: what to tell the user.

    A dry run gives the script, and touches nothing. Everything is refused that `submit` refuses, before any point is queued. Raises ConfigError, SlurmError.
    """
    states = [_state(point) for point in found]
    waiting = [point for point, state in zip(found, states, strict=True) if state == "waits"]
    rest = [f"{states.count(state)} {said}" for state, said in _SAID.items() if state in states]
    if not waiting:
        return f"{folder}: nothing to do; {', '.join(rest)}."
    for point in waiting:
        try:
            check(point.config, launch, point.run)
        except ConfigError as error:
            raise ConfigError(f"point {point.run.path.name}: {error}") from None
    exclude = {node for point in waiting for node in read_excluded(point.run)}
    # submitit imports cloudpickle and more, and is needed here alone
    from launch.array import Array

    array = Array(folder.absolute() / ".array", batch_flags(launch, folder.absolute().name, exclude), launch.site.modules, launch.python)
    if dry_run:
        return "\n".join(["one array of these runs:", *(f"  {point.run.path}" for point in waiting), "", array.script(len(waiting))])
    slurm.require("sbatch")
    for point in waiting:
        provide(point.config, launch, point.run)
    jobs = array.submit([["/bin/bash", str(point.run.code / SCRIPT), str(point.run.path), str(launch.python)] for point in waiting])
    for point, (job, log) in zip(waiting, jobs, strict=True):
        record(job, point.run)
        point.run.job_log(job).symlink_to(log)
    count = f"{len(waiting)} run{'s' if len(waiting) > 1 else ''}"
    return "\n".join(
        [
            f"submitted {count} as job {jobs[0][0].partition('_')[0]}: {launch.shape} each, at most {launch.time} each start{''.join(f'; {text}' for text in rest)}",
            *(f"  {job}  {point.run.path}" for point, (job, _) in zip(waiting, jobs, strict=True)),
            f"`dqtrain status {folder}/*` shows what they do; logs, stop and resume take one of them; `dqtrain sweep` again submits those that have failed.",
        ]
    )


State = Literal["waits", "runs", "finished"]
_SAID: dict[State, str] = {"finished": "finished already", "runs": "queued or running already"}


def _state(point: Point) -> State:
    if point.is_finished:
        return "finished"
    launch = load_launch(point.run)
    job = newest_job(launch) if launch is not None else None
    return "runs" if job is not None and job.is_live or living_owner(point.run, launch) is not None else "waits"
