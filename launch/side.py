"""Side jobs: `dqtrain prepare`, `cache-teacher`, `eval` and `export` as Slurm jobs, and what becomes of them.

A job is the same command on a node, by the installed code. Of each the folder `side/` of its run holds JOB.json, what was asked; JOB.out, what it prints; and JOB.end.json,
its exit code, which its own process leaves before it ends. So no accounting is needed: a job that Slurm does not list, and that left no exit code, has failed.
"""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal

from dqtrain import hub
from dqtrain.config import RunConfig, differences
from dqtrain.errors import FINAL_CODES, ConfigError, UserError
from dqtrain.files import write_text
from dqtrain.rundir import RunDir
from launch import slurm
from launch.local import start
from launch.site import Site
from launch.submit import ROOT, Launch, batch_flags, check_container, check_name, read_excluded, refuse_live

TAIL_BYTES = 1 << 14
"""What is read of the end of what a job printed."""

Verb = Literal["prepare", "cache-teacher", "eval", "export"]
State = Literal["waits", "runs", "done", "failed"]


@dataclass(frozen=True)
class SideJob:
    """One job of a run, by its files."""

    run: RunDir
    words: tuple[str, ...]
    """What was asked, without the run: `eval --split test`."""
    job: str
    time: str
    """When, ISO 8601 in UTC."""

    @property
    def out(self) -> Path:
        """What it prints."""
        return self.run.side / f"{self.job}.out"

    @property
    def end(self) -> Path:
        """Its exit code, when it has ended by itself."""
        return _end(self.run.side, self.job)

    def state(self) -> tuple[State, str]:
        """What it does, and where it runs or why it waits or failed. Raises SlurmError when Slurm is needed for that and does not say."""
        code = self._code()
        job = None
        if code not in (0, *FINAL_CODES):  # one that was killed may be in the queue again
            job = slurm.find_job(self.job)
            if job is not None and job.is_live:
                return ("waits", job.reason) if job.state == "PENDING" else ("runs", ",".join(job.nodes))
            code = self._code()  # it may have ended meanwhile
        if code == 0 or job is not None and job.state == "COMPLETED":
            return "done", ""
        slurms = "unknown to Slurm by now" if job is None and code is None else job.state.lower() if job is not None and job.state != "FAILED" else ""
        ours = f"exit code {code}" if code is not None else "it left no exit code"
        return "failed", f"{slurms}, {ours}".removeprefix(", ")

    def _code(self) -> int | None:
        try:
            return json.loads(self.end.read_text())["code"]
        except FileNotFoundError:
            return None

    def last_line(self) -> str:
        """The last line with a word in it that it has printed."""
        try:
            with self.out.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return ""
        return next((line.rpartition("\r")[2].strip() for line in reversed(lines) if re.search(r"\w", line)), "")


def side_jobs(run: RunDir) -> list[SideJob]:
    """The newest job of each command, or all parts of the newest, oldest first."""
    records = [json.loads(file.read_text()) for file in run.side.glob("*.json") if not file.name.endswith(".end.json")]
    jobs = [SideJob(run, tuple(record["words"]), record["job"], record["time"]) for record in sorted(records, key=lambda record: record["time"])]
    newest = {_command(job.words): job.job.partition("_")[0] for job in jobs}
    return [job for job in jobs if job.job.partition("_")[0] == newest[_command(job.words)]]


def _command(words: Sequence[str]) -> tuple[str, ...]:
    """What was asked, whichever part of it a job does."""
    return tuple(word for before, word in zip(("", *words), words, strict=False) if "--part" not in (before, word))


def lines(run: RunDir) -> list[str]:
    """What the side jobs of a run do, one line each: for `dqtrain status`."""
    return [_line(job) for job in side_jobs(run)]


def _line(job: SideJob) -> str:
    what = f"{shlex.join(job.words)}: job {job.job}"
    try:
        state, why = job.state()
    except UserError as error:
        return f"{what}, of which Slurm says nothing now: {error}"
    if state == "waits":
        return f"{what} waits{f' ({why})' if why != 'None' else ''}"
    if state == "runs":
        return f"{what} runs on {why}"
    said = job.last_line()
    if state == "done":
        return f"{what} is done{f': {said}' if said else ''}"
    return f"{what} failed ({why}){f': {said}' if said else ''}{f'; it printed {job.out}' if job.out.exists() else ''}"


def submit_side(verb: Verb, asked: Sequence[tuple[RunDir, Sequence[str]]], launch: Launch, config: RunConfig | None = None) -> str:
    """Queue one job for each run and its options, all as one array: what to tell the user. The paths of the runs are absolute.

    `config` is that of a run which there may not be yet. Raises ConfigError for what would end a job and can be seen now, for a job of the same command that is queued or runs,
    and where there is no sbatch; SlurmError when Slurm refuses.
    """
    runs = list({run.path: run for run, _ in asked}.values())
    for run in runs:
        check_name(run.path)
        if launch.site.container is not None:
            check_container(launch.site.container, (run.path, launch.folder, ROOT))
        if config is not None:
            run.check_claim(config)
            if run.config.is_file() and differences(run.load_config(), config):  # it would be another one that a queued job trains
                refuse_live(run)
    for run, options in asked:
        for job in side_jobs(run):
            if _command(job.words) == _command((verb, *options)) and (state := job.state()[0]) in ("waits", "runs"):
                raise ConfigError(f"{run.path}: `{shlex.join(job.words)}` {state} already as job {job.job}. `scancel {job.job}` ends it.")
    slurm.require("sbatch")
    for run in runs:
        if config is not None:
            hub.fetch_models(config, weights=verb == "cache-teacher")
            hub.fetch_data_sets(config)
            run.claim(config)
        run.side.mkdir(exist_ok=True)
    flags = batch_flags(launch, f"{verb}-{runs[0].path.name}", {node for run in runs for node in read_excluded(run)})
    flags["signal"] = "B:CONT@1"  # there is nothing to save before the time limit; without any, submitit asks for one that ends a step
    # submitit imports cloudpickle and more, and is needed here alone
    from launch.array import Array

    array = Array(runs[0].side / ".array", flags, launch.site.modules, launch.python)
    jobs = array.submit([[*_python(launch, verb, run), "-m", "launch.side", str(run.side), verb, str(_target(verb, run)), *options] for run, options in asked])
    for (run, options), (number, log) in zip(asked, jobs, strict=True):
        queued = SideJob(run, (verb, *options), number, datetime.now(UTC).isoformat(timespec="milliseconds"))
        queued.out.unlink(missing_ok=True)
        queued.out.symlink_to(log)
        write_text(run.side / f"{number}.json", json.dumps({"words": queued.words, "job": number, "time": queued.time}) + "\n")
    ids = jobs[0][0].partition("_")[0]
    count = f" of {len(runs)} runs" if len(runs) > 1 else f" in {len(asked)} parts" if len(asked) > 1 else ""
    return "\n".join(
        [
            f"submitted {verb}{count} as job {ids}: 1 node{' each' if count else ''}, at most {launch.time}",
            *(f"  {run.side / job}.out" for (run, _), (job, _) in zip(asked, jobs, strict=True)),
            f"`dqtrain status {shlex.join(str(run.path) for run in runs)}` shows what becomes of it; `scancel {ids}` ends it.",
        ]
    )


def _target(verb: Verb, run: RunDir) -> Path:
    return run.config if verb in ("prepare", "cache-teacher") else run.path


def _python(launch: Launch, verb: Verb, run: RunDir) -> list[str]:
    """What the batch process of a side job becomes, up to Python's own arguments."""
    container, variables = launch.site.container, _variables(launch.site, verb)
    if container is None:
        return ["/usr/bin/env", *(f"{name}={value}" for name, value in variables.items()), str(launch.python)]
    places = [ROOT, run.path, *([launch.site.scratch] if launch.site.scratch else [])]
    words = container.words(launch.folder, places, variables, launch.site.gpus_per_node > 0)
    if container.kind == "apptainer":
        return ["/usr/bin/env", *words]
    # srun takes no number of CPUs over from sbatch, and refuses another one than the environment's.
    step = ["srun", "--ntasks=1", f"--cpus-per-task={launch.site.ranks * launch.site.cpus_per_rank}", "--mpi=none", "--input=none"]
    return ["/usr/bin/env", "-u", "SLURM_CPUS_PER_TASK", *step, *words]


def _variables(site: Site, verb: Verb) -> dict[str, str]:
    """What the command finds in its environment: a process that is alone has the CPUs of all ranks."""
    alone = {} if verb == "cache-teacher" else {"OMP_NUM_THREADS": str(site.ranks * site.cpus_per_rank)}
    return {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | site.variables | alone | site.environment


def _end(folder: Path, job: str) -> Path:
    return folder / f"{job}.end.json"


def main(folder: Path, command: Sequence[str]) -> int:
    """The batch process of a side job: run `dqtrain` with these words, and leave its exit code behind."""
    end = _end(folder, slurm.this_job())
    end.unlink(missing_ok=True)  # of an earlier start of this job
    child = start([sys.executable, "-m", "dqtrain", *command], os.environ)  # should this process be killed, not every cluster would end its children

    def end_child(signum: int, frame: FrameType | None) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, end_child)
    code = child.wait()
    code = code if code >= 0 else 128 - code  # as a shell reports a signal
    write_text(end, json.dumps({"code": code}) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
