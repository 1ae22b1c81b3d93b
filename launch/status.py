"""What a run does, where its time went, what it prints, and how to end it: from its own files and, where the run was submitted, from Slurm.

Accounting is not needed. Where Slurm does not answer, what the files say is shown all the same.
"""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dqtrain.errors import ConfigError, UserError
from dqtrain.rundir import RunDir, json_lines
from dqtrain.signals import withdraw
from launch import side, slurm
from launch.submit import Launch, living_owner, load_launch, newest_job, read_excluded

FOLLOWED_BYTES = 1 << 12
"""What `logs -f` shows of what was there before."""

REDRAW_S = 2.0
"""Seconds between two views of what is watched."""

POLL_S = 0.5
"""Seconds between two looks at a log that is followed."""

Now = Literal["runs", "waits", "rests"]


@dataclass
class TimeSpent:
    """Where the seconds since submission went; those in which a run rested, because nobody had asked for more, do not count."""

    queue: float = 0.0
    """No job ran: from submission, or from the end of a start, to the next start."""
    start: float = 0.0
    """From the start of a job to its first step: health checks, loading, preparing."""
    data: float = 0.0
    """Steps waited for their batch, as the log tells; in those that are made again it is rework."""
    save: float = 0.0
    """Training stood still for a checkpoint."""
    rework: float = 0.0
    """Steps that were lost and are made again, and the time until it was noticed: from the newest checkpoint to the end of a start."""
    steps: float = 0.0
    """The rest: steps that count, evaluation and export."""

    @property
    def wall(self) -> float:
        """All of them."""
        return self.queue + self.start + self.data + self.save + self.rework + self.steps

    @property
    def goodput(self) -> float:
        """Share of the steps that count."""
        return self.steps / self.wall if self.wall else 0.0


def time_spent(events: Sequence[dict[str, Any]], now: datetime, what: Now) -> TimeSpent:
    """Add up a run's events, oldest first; `what` it does now.

    A start that ended without a word, as when a node lost power, counts up to its last sign of life, and what follows as queue.
    """
    spent = TimeSpent()
    # What the run does since `mark`; when it trains, the newest checkpoint's steps were made by `made`, and it was complete at `complete`.
    phase = "rests"
    mark = made = complete = last = datetime.fromisoformat(events[0]["time"]) if events else now
    saved_step, stalls, is_job = 0, 0.0, False

    def end(until: datetime, next_phase: str, step: int | None = None) -> None:
        nonlocal phase, mark
        seconds = (until - mark).total_seconds()
        if phase == "waits":
            spent.queue += seconds
        elif phase == "starts":
            spent.start += seconds
        elif phase == "trains":
            # Training waits for the last save only if it ends there; else the steps beside it are lost.
            waited = (complete - made).total_seconds() if step == saved_step else 0.0
            lost = (until - made).total_seconds() - waited
            spent.save += stalls + waited
            spent.rework += lost
            spent.steps += seconds - stalls - waited - lost
        phase, mark = next_phase, until

    for number, event in enumerate(events):
        kind, at = event["event"], datetime.fromisoformat(event["time"])
        if kind == "submit":
            end(_last_sign(events[number:], last) if phase in ("starts", "trains") else at, "rests")
            phase, mark, is_job = "waits", at, True
        elif kind in ("job_start", "launch"):
            is_job = kind == "job_start"
            if phase in ("starts", "trains"):
                end(_last_sign(events[number:], last), "waits" if is_job else "rests")
            elif phase == "rests" and is_job:
                phase = "waits"  # Slurm itself has queued it again
            end(at, "starts")
        elif kind in ("start", "resume"):
            end(at, "trains")
            made, complete, saved_step, stalls = at, at, event["step"], 0.0
        elif kind == "checkpoint" and phase == "trains":
            # The steps in it are older than the file, which was written while training went on.
            made, complete, saved_step = max(mark, at - timedelta(seconds=event["write_s"])), at, event["step"]
            stalls += event["stall_s"]
        elif kind == "finished":
            made = complete = at
            end(at, "rests")
        elif kind in ("stopped", "srun_end", "requeue", "successor") and phase != "rests":
            end(at, "waits" if is_job else "rests", event.get("step"))
        elif kind == "job_end":
            end(at, "rests")
        last = at
    if what == "runs" and phase == "trains":
        made = complete = now  # whether it is lost is not known yet
    elif what == "waits" and phase in ("starts", "trains") or what == "rests":
        end(last, what)
    end(now, "rests")
    return spent


def data_waited(log: Iterable[dict[str, Any]], resumed: Collection[int]) -> float:
    """Seconds that steps waited for data: the sum over log lines of `data_wait`, a share of the time since the line before, or since the start, which `resumed` at a step."""
    return sum(line.get("data_wait", 0.0) * seconds for line, _, seconds in _intervals(log, resumed))


def validation_s(log: Iterable[dict[str, Any]], resumed: Collection[int]) -> float | None:
    """About how long the last validation took: what the steps around it took longer than others usually do. None where the log does not tell."""
    lines, usual, around, validated = list(log), [], None, -1
    spans = {id(line): (steps, seconds) for line, steps, seconds in _intervals(lines, resumed)}
    for line in lines:
        if "validation_loss" in line:
            validated = line["step"]
        elif id(line) in spans:
            steps, seconds = spans[id(line)]
            begin = line["step"] - steps
            if validated > begin or validated == begin and begin not in resumed:
                around = steps, seconds
            else:
                usual.append(seconds / max(steps, 1))
    return max(0.0, around[1] - around[0] * median(usual)) if around is not None and usual else None


def _intervals(log: Iterable[dict[str, Any]], resumed: Collection[int]) -> Iterator[tuple[dict[str, Any], int, float]]:
    """(line, steps, seconds) of each line of steps: since the line before, or since the start, which `resumed` at a step."""
    last = 0
    for line in log:
        if "tokens_per_s" in line:
            steps = line["step"] - max(last, max((step for step in resumed if step < line["step"]), default=0))
            yield line, steps, steps * line["tokens"] / line["step"] / line["tokens_per_s"]  # tokens_per_s is steps per second, times the tokens of a step
            last = line["step"]


def steps_repeated(events: Iterable[dict[str, Any]]) -> int:
    """Steps that were made again: from where each start went on to where the one before had come, as far as it told, or had logged."""
    again = reached = 0
    for event in events:
        if event["event"] in ("start", "resume"):
            again += max(0, reached - event["step"])
            reached = event["step"]
        else:
            reached = max(reached, event.get("logged", 0), (event.get("step") or 0) if event["event"] in ("checkpoint", "stopped", "srun_end") else 0)
    return again


def _last_sign(following: Sequence[dict[str, Any]], last: datetime) -> datetime:
    """When the start before these events, whose last event was at `last`, still lived: the owner that follows has found out."""
    first, *rest = following
    starts = 1 if first["event"] == "submit" else 0
    for event in rest:
        if event["event"] == "takeover":
            return min(datetime.fromisoformat(first["time"]), max(last, datetime.fromisoformat(event["dead"]["heartbeat"])))
        starts -= event["event"] in ("job_start", "launch")
        if starts < 0:
            break
    return last


def status(path: Path) -> str:
    """A few lines on one run. Raises ConfigError where there is none."""
    run, now = RunDir(path), datetime.now(UTC)
    config, events, launch = run.load_config(), run.read_events(), load_launch(run)
    job, problem = _job(launch)
    what, headline = _now(run, launch, job, problem)
    lines = [("", f"{run.path}: {headline}")]
    logged = run.log_end()
    trained = next((line for line in reversed(logged) if "tokens_per_s" in line), None)
    if trained is not None:
        scores: dict[str, Any] = next((line for line in reversed(logged) if "validation_loss" in line), {})
        done = trained["step"] / config.train.steps
        text = f"{trained['step']} of {config.train.steps} ({done:.0%}), loss {trained['loss']:.4g}"
        text += f", validation loss {scores['validation_loss']:.4g}" if scores else ""
        lines.append(("step", text + f", {trained['tokens_per_s']:,.0f} tokens/s" + (f", {clock(trained['eta_s'])} to go" if not run.result.exists() else "")))
    saves = [event for event in events if event["event"] == "checkpoint"]
    if saves:
        lines.append(("checkpoint", f"step {saves[-1]['step']}, {clock(_age(saves[-1], now))} ago, took {saves[-1]['stall_s'] + saves[-1]['write_s']:.1f} s"))
        # Before a time limit or a preemption, a step and a save must fit into the grace.
        if launch is not None and saves[-1]["stall_s"] + saves[-1]["write_s"] > launch.site.grace_s:
            lines.append((" ", f"a save takes longer than grace_s, {launch.site.grace_s} s; raise it in the site file and submit again, or steps will be lost"))
    resumed = {event["step"] for event in events if event["event"] == "resume"}
    validating = validation_s(logged, resumed)
    if launch is not None and validating is not None and validating > launch.site.grace_s:
        lines.append(
            (
                " ",
                f"a validation takes about {clock(validating)}, longer than grace_s, {launch.site.grace_s} s: a time limit that comes in one costs the steps before it",
            )
        )
    restarts = _restarts(events)
    if restarts:
        lines.append(("restarts", f"{len(restarts)}: {'...; ' * (len(restarts) > 3)}{'; '.join(restarts[-3:])}"))
    if events:
        spent = time_spent(events, now, what)
        knows_data = "data_wait" in (trained or {})
        if knows_data:
            with run.log.open(errors="replace") as file:
                spent.data = min(spent.steps, data_waited((line for text in file for line in json_lines(text)), resumed))
            spent.steps -= spent.data
        parts = {name: getattr(spent, name) for name in ("queue", "start", "data", "save", "rework") if name != "data" or knows_data}
        if spent.wall:
            shares = ", ".join(f"{name} {clock(value)} ({value / spent.wall:.0%})" for name, value in parts.items())
            again = steps_repeated(events)
            shares += f", {again} step{'' if again == 1 else 's'} made again" if again else ""
            lines.append(("time", f"{clock(spent.wall)}, of which {spent.goodput:.0%} goodput, {shares}"))
    lines += [("side", text) for text in side.lines(run)]
    if run.result.exists():
        return _text(lines)
    lines += [("avoids", f"{node} {entry}") for node, entry in read_excluded(run).items()]
    if what != "runs":
        ends = [event for event in events if event["event"] in ("job_end", "stopped", "srun_end") and (event.get("why") or event.get("message"))]
        lines += [("last end", ends[-1].get("why") or ends[-1]["message"])] if ends else []
    return _text(lines)


def watch(paths: Sequence[Path]) -> None:
    """Show what `status` says of some runs, drawn anew every REDRAW_S, until Ctrl-C. Raises ConfigError for a path that is no run."""
    from rich.live import Live  # it takes longer to import than all else here
    from rich.text import Text

    def draw() -> Text:
        return Text("\n".join(status(path) for path in paths))

    try:
        # Drawn from here, not from a thread of rich's: a screen that is too small shows the beginning.
        with Live(draw(), auto_refresh=False) as live:
            while True:
                time.sleep(REDRAW_S)
                live.update(draw(), refresh=True)
    except KeyboardInterrupt:
        return


def _text(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<11}{text}" if name else text for name, text in lines)


def _job(launch: Launch | None) -> tuple[slurm.Job | None, str | None]:
    """The run's newest job, and what went wrong in asking for it."""
    try:
        return newest_job(launch) if launch is not None else None, None
    except UserError as error:
        return None, str(error)


def _now(run: RunDir, launch: Launch | None, job: slurm.Job | None, problem: str | None) -> tuple[Now, str]:
    """What a run does, and how that is said."""
    if run.result.exists():
        return "rests", "finished"
    owner = run.live_owner() if launch is None or problem is not None else living_owner(run, launch)
    if owner is not None and (job is None or not job.is_live):
        return "runs", f"running as process {owner['pid']} on {owner['host']}"
    if launch is not None and problem is not None:
        return "waits", f"job {launch.job}, of which Slurm says nothing now: {problem}"
    if job is None or not job.is_live:
        said = (
            f"; job {launch.job} {'is not known to Slurm any more' if job is None else f'is {job.state.lower()}'}" if launch is not None and launch.job else ""
        )
        return "rests", f"not running{said}; `dqtrain resume {run.path}` goes on"
    assert launch is not None
    if job.state == "PENDING":
        reason = f" ({job.reason})" if job.reason != "None" else ""  # the scheduler has not looked at it yet
        expected = f", expected to start at {job.start.isoformat(timespec='minutes')}" if job.start is not None else ""
        return "waits", f"job {job.id} is queued{reason}{expected}; {launch.shape}{_behind(launch, job)}"
    where = ",".join(job.nodes[:8]) + (",..." if len(job.nodes) > 8 else "")
    left = f", {clock(job.time_left_s)} left of this start" if job.time_left_s is not None else ""
    given = f"{len(job.nodes)} of " if launch.min_nodes < launch.nodes else ""
    return "runs", f"job {job.id} is {job.state.lower()} on {where}; {given}{launch.shape}{left}{_behind(launch, job)}"


def _behind(launch: Launch, job: slurm.Job) -> str:
    """How many jobs wait to take over from one."""
    if not launch.site.successors:
        return ""
    jobs = (launch.job, *launch.successors)
    left = len(jobs) - 1 - jobs.index(job.id)
    return f"; {left or 'no'} successor{'' if left == 1 else 's'} of {launch.site.successors} left"


def _restarts(events: Sequence[dict[str, Any]]) -> list[str]:
    """When and why each start but the first came about."""
    found: list[str] = []
    why = None
    for event in events:
        if event["event"] in ("requeue", "successor"):
            why = event["why"]
        elif event["event"] == "submit":
            why = "submitted again"
        elif event["event"] == "job_start":
            found.append(f"{event['time'][:16].replace('T', ' ')} {why or 'requeued by Slurm, which had lost a node or needed it'}")
            why = None
    return found[1:]


def _age(event: dict[str, Any], now: datetime) -> float:
    return (now - datetime.fromisoformat(event["time"])).total_seconds()


def clock(seconds: float) -> str:
    """3:07:09, or 2-03:07:09 with days."""
    whole = max(0, round(seconds))
    days = f"{whole // 86400}-" if whole >= 86400 else ""
    return f"{days}{whole // 3600 % 24:{'02' if days else ''}}:{whole // 60 % 60:02}:{whole % 60:02}"


def stop(path: Path) -> str:
    """Ask a run to save and end; one that waits in the queue is taken out of it. Returns what was done. Raises ConfigError for a run that neither runs nor waits."""
    run = RunDir(path)
    run.load_config()
    launch = load_launch(run)
    job, problem = _job(launch)
    what, headline = _now(run, launch, job, problem)
    if what == "rests":
        raise ConfigError(f"{run.path}: {headline}. There is nothing to stop.")
    run.stop.touch()  # first: should a job start at this moment, it finds the file
    run.event("stop_requested")
    if launch is not None and job is not None and job.is_live:
        jobs = (launch.job, *launch.successors)
        waiting = [name for name in jobs[jobs.index(job.id) + (what == "runs") :] if name is not None and slurm.is_live(name)]
        if waiting:
            slurm.cancel(*reversed(waiting))  # the last first, so that none is free to begin
    if what == "waits" and job is not None:
        withdraw(run.stop)
        return f"job {job.id} has left the queue. `dqtrain resume {run.path}` goes on."
    return f"asked {run.path} to save and end at its next step; `dqtrain status {run.path}` shows when it has. {f'({problem})' if problem else ''}".rstrip()


def logs(path: Path, rank: int, follow: bool) -> None:
    """Print what a rank printed, over all starts; to follow is to print the end, and what is added until the run is finished. Raises ConfigError where there is nothing."""
    run = RunDir(path)
    run.load_config()
    if follow:
        _follow(run, rank)
        return
    files = [file for file in _log_files(run, rank) if file.is_file()]
    if not files:
        raise ConfigError(
            f"{run.path}: no output of rank {rank} there. Rank 0 of a run that was not submitted prints to its terminal; the others write rank-*.log."
        )
    for file in files:
        _print(file, 0)


def _log_files(run: RunDir, rank: int) -> list[Path]:
    """Where a rank's output is, oldest first; perhaps not yet there."""
    if rank > 0:
        return [run.rank_log(rank)]
    launch = load_launch(run)
    return [run.job_log(job) for job in (*launch.history, launch.job) if job is not None] if launch is not None else []


def _print(file: Path, offset: int) -> int:
    """Print a file from a byte on; how long it is."""
    with file.open("rb") as opened:
        opened.seek(offset)
        text = opened.read()
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        return offset + len(text)


def _follow(run: RunDir, rank: int) -> None:
    """Print the end of a rank's newest log and what is added, to that of a later job too, until the run is finished."""
    shown = {file: max(0, file.stat().st_size - FOLLOWED_BYTES) for file in _log_files(run, rank) if file.is_file()}
    while True:
        is_finished = run.result.exists()  # looked at before the file, so that nothing is missed
        for file in _log_files(run, rank)[-1:]:
            if file.is_file():
                shown[file] = _print(file, shown.get(file, 0))
        if is_finished:
            return
        time.sleep(POLL_S)
