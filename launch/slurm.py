"""The only file that runs Slurm's programs: each with a time-out, its output read as text, its errors as one message.

State comes from scontrol, never from sacct: a cluster without accounting has none of it. A controller that is away for some minutes ends nothing:
whoever can wait says for how long (`patience_s`).
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dqtrain.errors import ConfigError, UserError

TIMEOUT_S = 60.0
"""Seconds that one call may take: without a controller, Slurm's programs try for about 25."""

_RETRY_S = 5.0
_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Unable to establish a Slurm|Communication connection failure", re.I
)
_UNREACHED = re.compile(r"Unable to contact slurm controller", re.I)
"""The request cannot have arrived, so that repeating it repeats nothing."""
_KEY = re.compile(r"(?:^| )([A-Za-z]\w*)=(.*?)(?= [A-Za-z]\w*[=:]|$)")
_OWN_SETTINGS = ("SLURM_CONF", "SLURM_CLUSTERS")


class SlurmError(UserError):
    """Slurm refused, failed or did not answer; the message has what the program said."""

    def __init__(self, message: str, controller_away: bool = False) -> None:
        super().__init__(message)
        self.controller_away = controller_away


@dataclass(frozen=True)
class Job:
    """What slurmctld knows of a job; it forgets jobs that ended some minutes ago (MinJobAge)."""

    id: str
    """As it was asked for: JOB, or JOB_TASK."""
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, FAILED, TIMEOUT, NODE_FAIL, PREEMPTED, ..."""
    reason: str
    """Why it waits or failed, in Slurm's words; `None` when there is no reason."""
    nodes: tuple[str, ...]
    restarts: int
    submitted: datetime | None
    start: datetime | None
    """When it started, or is expected to."""
    end: datetime | None
    """When it ended, or its time limit will end it."""

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs or ends just now; an ended one may be back in the queue a moment later."""
        return (
            self.state in ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "COMPLETING")
            or "REQUEUE" in self.state
        )

    @property
    def time_left_s(self) -> float | None:
        """Seconds until its time limit; None when it does not run or has none."""
        return max(0.0, (self.end - datetime.now(UTC)).total_seconds()) if self.state == "RUNNING" and self.end else None


def require(program: str) -> None:
    """Raise ConfigError where one of Slurm's programs is not installed."""
    if shutil.which(program) is None:
        raise ConfigError(f"{program} is not on this machine's PATH. Submit from a login node of the cluster, or train here with `dqtrain train --ranks N`.")


def sbatch(arguments: Sequence[str], patience_s: float = 0.0) -> str:
    """Submit a job; its id. Raises SlurmError with what sbatch said, ConfigError where there is no sbatch.

    It is tried again for `patience_s` seconds only where the request cannot have arrived, for a second copy of a job is worse than none.
    The job gets the variables that `--export=NAME,...` names, and no others (`handed_on`).
    """
    command, environment = _sbatch(arguments)
    said = _call(command, patience_s, _UNREACHED, environment)
    ids = [line.split(";")[0] for line in said.splitlines() if re.fullmatch(r"\d+(;.*)?", line.strip())]  # some sites print more
    if not ids:
        raise SlurmError(f"sbatch gave no job id, but said: {said.strip() or 'nothing'}. See `squeue --me` for whether the job is there.")
    return ids[-1]


def sbatch_line(arguments: Sequence[str]) -> str:
    """What `sbatch` runs, as a line for this shell: values that it knows already stay names, for there may be secrets among them."""
    command, environment = _sbatch(arguments)
    return " ".join(["env", "-i", *(f'{name}="${name}"' for name in sorted(environment)), shlex.join(command)])


def _sbatch(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    (export,) = (argument for argument in arguments if argument.startswith("--export="))
    others = ("--export=ALL" if argument == export else argument for argument in arguments)
    return ["sbatch", "--parsable", *others], handed_on(export.removeprefix("--export="))


def handed_on(export: str) -> dict[str, str]:
    """Of this process's variables those that a job gets, by their names NAME,NAME,..., and sbatch's own settings: the environment for an sbatch --export=ALL.

    They are picked out here: asked to do so, sbatch makes the node start a login shell besides, and while that takes its time, slurmctld may take
    the job for lost.
    """
    names = export.split(",")
    return {name: value for name, value in os.environ.items() if name in names or name in _OWN_SETTINGS or name.startswith("SBATCH_")}


def requeue(job: str, patience_s: float = 0.0) -> None:
    """Put a running or ended batch job back into the queue; it ends the job's processes at once. Raises SlurmError.

    The id of one task of an array is JOB_TASK (`this_job`): the plain id that its environment has may stand for the whole array.
    """
    try:
        _call(["scontrol", "requeue", job], patience_s)
    except SlurmError as error:
        if "pending" not in str(error):  # somebody, such as slurmctld after a node failed, has done so already
            raise


def cancel(*jobs: str) -> None:
    """End jobs, in this order. Raises SlurmError."""
    _call(["scancel", *jobs])


def expand(nodelist: str) -> tuple[str, ...]:
    """The names in a list such as node[1-3,7], in its order. Raises SlurmError."""
    return tuple(_call(["scontrol", "show", "hostnames", nodelist]).split())


def find_job(job: str, patience_s: float = 0.0) -> Job | None:
    """What slurmctld knows of a job; None for one that it never knew, or has forgotten. Raises SlurmError when it does not answer."""
    try:
        said = _call(["scontrol", "show", "job", "--oneliner", job], patience_s)
    except SlurmError as error:
        if "Invalid job id" in str(error) or f"Job {job} not found" in str(error):  # the latter of a task of an array that was cancelled before it began
            return None
        raise
    fields: dict[str, str] = {}
    lines = said.splitlines()
    # The number of an array is that of its last task too: then all of them are listed.
    own = next((line for line in lines if line.startswith(f"JobId={job} ")), lines[0])
    for key, value in _KEY.findall(own):
        fields.setdefault(key, value)  # what follows the first may be a user's text
    nodes = fields.get("NodeList", "")
    return Job(
        id=job,
        name=fields["JobName"],
        state=fields["JobState"].split()[0],
        reason=fields["Reason"],
        nodes=expand(nodes) if nodes and nodes != "(null)" else (),
        restarts=int(fields["Restarts"]),
        submitted=_time(fields["SubmitTime"]),
        start=_time(fields["StartTime"]),
        end=_time(fields["EndTime"]),
    )


def is_live(job: str, patience_s: float = 0.0) -> bool:
    """Whether a job waits, runs or ends just now. Raises SlurmError when Slurm does not answer."""
    found = find_job(job, patience_s)
    return found is not None and found.is_live


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """Name -> state of nodes, in sinfo's words (idle, mixed, down, ...), with a * behind that of one that does not answer. Raises SlurmError."""
    said = _call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T"])
    return {name: state for name, state in (line.split() for line in said.splitlines())}


def this_job() -> str:
    """The job that this process belongs to, as scontrol wants it, from the environment; KeyError outside of jobs."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def srun(arguments: Sequence[str], environment: Mapping[str, str], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a step of this process's job; its stderr, with srun's own messages among that of the tasks, is a pipe. Raises ConfigError where there is no srun."""
    require("srun")
    return subprocess.Popen(["srun", *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)


def _call(command: Sequence[str], patience_s: float = 0.0, again: re.Pattern[str] = _AWAY, environment: Mapping[str, str] | None = None) -> str:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _call_once(command, environment)
        except SlurmError as error:
            if time.monotonic() >= deadline or not again.search(str(error)):
                raise
        time.sleep(_RETRY_S)


def _call_once(command: Sequence[str], environment: Mapping[str, str] | None) -> str:
    require(command[0])
    shown = " ".join(command[:3])
    plain = {**os.environ, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"} if environment is None else environment
    try:
        done = subprocess.run(command, env=plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{shown}`: Socket timed out: no answer within {TIMEOUT_S:.0f} s. Is the controller up (`scontrol ping`)? Try again later.", True
        ) from None
    if done.returncode:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines()[-3:]) or f"exit code {done.returncode}"
        away = bool(_AWAY.search(said))
        hint = " The controller is away; jobs run on. Try again in some minutes." if away else ""
        raise SlurmError(f"`{shown}` failed: {said}.{hint}", away)
    return done.stdout


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:  # Unknown, N/A, None
        return None
