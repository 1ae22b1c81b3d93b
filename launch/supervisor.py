"""What a job of a run does, as its batch script: `python -m launch.supervisor RUN`.

It looks at the nodes, starts the ranks, passes on the signal that comes before the time limit, and when the ranks have ended it decides from the cause
that they left what follows: the end, a requeue of this job, or, where a node is to be avoided, a successor. In Python, since bash loses signals.
Slurm itself requeues a job only whose node failed, or that it had to kill for another.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from dqtrain.errors import FINAL_CODES, ConfigError, Stopped, UserError
from dqtrain.rundir import ENDED_JOB, RunDir
from dqtrain.signals import withdraw
from launch import slurm
from launch.submit import Excluded, Launch, batch_arguments, load_launch, read_excluded, save_excluded, save_launch

HEALTH_S = 180.0
"""Seconds that a node has to answer the health check."""

CLOCK_S = 5.0
"""Seconds by which a node's clock may be off: what ended first is told by the clocks of the nodes."""

PATIENCE_S = 900.0
"""Seconds for which an absent controller is waited for when the job has to be requeued."""

_POLL_S = 0.2
_SILENT = "no answer"
_KILL_S = 30.0
_PORTS = range(20000, 32768)  # below those that the system gives to outgoing connections
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)")
_OCCASION: dict[int | None, str] = {
    signal.SIGUSR1: "before the time limit",
    signal.SIGTERM: "as Slurm ends the job",
    None: "on a signal to the ranks, as at a preemption",
}
_BY_LAUNCHER = ("Terminated", "Exited with exit code 143")  # how the peers of a failed rank end


@dataclass(frozen=True)
class Outcome:
    """How a start ended and what follows: nothing; another start; another start as long as such starts make progress."""

    code: int
    why: str
    then: Literal["end", "again", "again if progress"]
    bad: Mapping[str, str] = field(default_factory=dict)
    """Node to be avoided from now on -> why."""


@dataclass(frozen=True)
class Ended:
    """What is known of a step when it is over."""

    code: int
    since_ns: int
    signal: int | None
    """What this process was asked to end it with: USR1 before the time limit, TERM when Slurm ends the job."""
    too_slow: bool
    """It was killed, since it had not ended a grace after that."""
    said: tuple[str, ...]
    """srun's own lines."""
    stacks: frozenset[int]
    """Ranks that left their stacks."""


class Supervisor:
    """One start of one job of a run."""

    def __init__(self, run: RunDir, launch: Launch) -> None:
        self._signal: int | None = None
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signum, self._note)
        self.run, self.launch = run, launch
        self.job, self.restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = slurm.expand(os.environ["SLURM_JOB_NODELIST"])
        self.ranks = len(self.nodes) * launch.site.ranks
        self.python = launch.python_on_nodes(run)
        self._ended_job: str | None = None
        self._first_step = 0  # of the newest checkpoint when this start began

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum

    def supervise(self) -> int:
        """The whole of it; the exit code of the job."""
        if why := self.ended_for_good():
            print(f"dqtrain: nothing to go on with: {why}", file=sys.stderr, flush=True)
            return 0
        if self.run.result.exists():
            return self.end(0, "the run is finished already")
        if self.run.stop.exists():
            return self.stopped()
        try:
            self.wait_for_owner()
        except ConfigError as error:  # of the other job's run, this is no end
            self.run.event("refused", job=self.job, why=str(error))
            print(f"dqtrain: {error}", file=sys.stderr, flush=True)
            return error.exit_code
        self.take_over()
        lost = self.nodes_lost_before()
        self._first_step = self.run.newest_step()
        where = {"step": self._first_step, "logged": self.run.logged_step()}
        self.run.event("job_start", job=self.job, restart=self.restart, nodes=self.nodes, ranks=self.ranks, **where)
        self.exclude(lost)
        bad = self.check_nodes()
        if self._signal is not None:  # which ends the check too: a node that did not answer may be sound
            then: Literal["again", "again if progress"] = "again if progress" if self._signal == signal.SIGUSR1 else "again"
            outcome = Outcome(Stopped.exit_code, f"no rank was started {_OCCASION[self._signal]}", then)
        elif bad:
            outcome = self.judge_nodes(bad)
        else:
            outcome = self.judge(self.run_ranks())
        return self.follow(outcome)

    # ---- before the ranks

    def wait_for_owner(self) -> None:
        """Return when nobody runs the run. Raises ConfigError while another job, or a process on another machine, does."""
        while owner := self.run.live_owner():
            job = slurm.find_job(owner["job"], PATIENCE_S) if owner["job"] is not None else None
            # A job that Slurm does not know is one of this run's that it has forgotten, or another cluster's.
            is_over = job.state == "PENDING" or not job.is_live if job is not None else owner["job"] in (self.launch.job, *self.launch.history)
            if is_over and owner["job"] is not None:
                self._ended_job = owner["job"]  # it left without a word, and Slurm knows sooner than the heartbeat tells
                return
            if job is None or job.state != "COMPLETING":
                self.run.refuse_if_owned()
            time.sleep(_POLL_S)

    def ended_for_good(self) -> str | None:
        """Why there is nothing to do for a job that waited for another one, with which the run ended."""
        if "SLURM_JOB_DEPENDENCY" not in os.environ or self.restart:
            return None
        kinds = ("submit", "job_start", "job_end", "requeue", "successor")
        last = next((event for event in reversed(self.run.read_events()) if event["event"] in kinds), None)
        return last["why"] if last is not None and last["event"] == "job_end" else None

    def take_over(self) -> None:
        """Be the run's newest job, if this is one that was queued beforehand."""
        launch = load_launch(self.run) or self.launch
        if self.job in launch.successors:
            save_launch(launch.followed_by(self.job, launch.successors[launch.successors.index(self.job) + 1 :]), self.run)

    def nodes_lost_before(self) -> dict[str, str]:
        """Node that is down now and was one of the last start's, if that left no word -> why it is to be avoided.

        When a node fails, Slurm ends all of the job at once, this process too, and requeues it.
        """
        events = self.run.read_events()
        start = max((index for index, event in enumerate(events) if event["event"] == "job_start"), default=None)
        if start is None or any(event["event"] in ("srun_end", "job_end", "requeue", "successor") for event in events[start:]):
            return {}
        try:
            return self._down(events[start]["nodes"])
        except UserError as error:
            print(f"dqtrain: {error}", file=sys.stderr, flush=True)
            return {}

    @staticmethod
    def _down(nodes: list[str]) -> dict[str, str]:
        states = slurm.node_states(nodes)
        return {node: f"Slurm says {state}" for node, state in states.items() if state.endswith("*") or state.startswith(("down", "fail", "drain", "error"))}

    def check_nodes(self) -> dict[str, str]:
        """Node that cannot train -> why: by launch/health.py on each, and where all is well and the site asks for it, by how fast they reach each other."""
        begin = time.time()
        answers = self.ask_nodes("launch.health", str(self.run.path))
        end = time.time()
        bad = {}
        for node in self.nodes:
            found = list(answers[node]["problems"]) if node in answers else [f"{_SILENT} within {end - begin:.0f} s"]
            if node in answers and not begin - CLOCK_S <= answers[node]["time"] <= end + CLOCK_S:
                found.append(f"its clock is off by {answers[node]['time'] - end:.0f} s")
            if found:
                bad[node] = "; ".join(found)
        least, links = self.launch.site.least_link_gb_s, {}
        if least is not None and len(self.nodes) > 1 and not bad:
            links = {node: answer["gb_s"] for node, answer in self.ask_nodes("dqtrain.bench.links").items()}
            slow = {node: f"reaches other nodes with at most {links[node]} GB/s (least_link_gb_s {least})" for node in links if links[node] < least}
            bad = slow | {node: f"{_SILENT} when links were measured" for node in self.nodes if node not in links}
        self.run.event("node_check", bad=bad, seconds=round(time.time() - begin, 1), **({"links": links} if links else {}))
        return bad

    def ask_nodes(self, *module: str) -> dict[str, dict[str, Any]]:
        """Node -> the JSON line that a module prints there, in one process for each node; of one that does not do so within HEALTH_S, nothing."""
        count = f"--nodes={len(self.nodes)}", f"--ntasks={len(self.nodes)}", "--ntasks-per-node=1", "--cpus-per-task=1"
        environment = self._variables()
        for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"):  # srun refuses two that differ
            environment.pop(name, None)
        process = slurm.srun([*count, *_STEP, "--overlap", *self.python, "-m", *module], environment, subprocess.PIPE)
        try:
            output, said = process.communicate(timeout=HEALTH_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                output, said = process.communicate(timeout=_KILL_S)
            except subprocess.TimeoutExpired:  # a task that no signal reaches: srun waits for it
                process.kill()
                output, said = process.communicate()
        sys.stderr.buffer.write(said)
        sys.stderr.flush()
        return {line["node"]: line for line in map(json.loads, re.findall(rb"^{.*}$", output, re.MULTILINE))}

    def judge_nodes(self, bad: Mapping[str, str]) -> Outcome:
        """What follows from a failed health check."""
        listing = "; ".join(f"{node}: {why}" for node, why in bad.items())
        if len(bad) == len(self.nodes) and (len(bad) > 1 or _SILENT in listing or str(self.run.path) in listing):
            # No fault of a node, then, but of what they share, or of Slurm; and were they all avoided, there might be nowhere to go.
            return Outcome(1, f"no node passes the check: {listing}", "again if progress")
        return Outcome(1, f"a node does not pass the check: {listing}", "again if progress", bad)

    # ---- the ranks

    def run_ranks(self) -> Ended:
        """Start the ranks, pass a signal on, and wait until they have ended."""
        before = self._stacks()
        since_ns = time.time_ns()
        shape = f"--nodes={len(self.nodes)}", f"--ntasks={self.ranks}", f"--ntasks-per-node={self.launch.site.ranks}", "--distribution=block"
        process = slurm.srun([*shape, *_STEP, "--kill-on-bad-exit=1", *self.python, "-m", "launch.task", str(self.run.path)], self._variables())
        said: list[str] = []
        reader = threading.Thread(target=_pass_on, args=(process, said), daemon=True)
        reader.start()
        asked_at = killed_at = float("inf")
        while process.poll() is None:
            now = time.monotonic()
            if self._signal is not None and asked_at > now:
                asked_at = now
                process.send_signal(signal.SIGUSR1)  # srun gives it to all ranks
            if now - asked_at > self.launch.site.grace_s and killed_at > now:
                killed_at = now
                process.terminate()
            if now - killed_at > _KILL_S:
                process.kill()
            time.sleep(_POLL_S)
        reader.join(_KILL_S)
        return Ended(
            code=process.returncode if process.returncode >= 0 else 128 - process.returncode,
            since_ns=since_ns,
            signal=self._signal,
            too_slow=killed_at < float("inf"),
            said=tuple(said),
            stacks=frozenset(rank for rank, when in self._stacks().items() if before.get(rank) != when),
        )

    def _stacks(self) -> dict[int, int]:
        """Rank -> when it last left its stacks, by the disk's clock."""
        files = {rank: self.run.stacks(rank) for rank in range(self.ranks)}
        return {rank: file.stat().st_mtime_ns for rank, file in files.items() if file.exists()}

    def _variables(self) -> dict[str, str]:
        site = self.launch.site
        found = {**os.environ, **site.variables, "SRUN_CPUS_PER_TASK": str(site.cpus_per_rank), "LOCAL_WORLD_SIZE": str(site.ranks)}
        # Job and restart choose the port, so that jobs which share a node, and the late packets of an earlier start, do not meet.
        first = (int(self.job) * 16 + self.restart) % len(_PORTS)
        found |= {"MASTER_ADDR": self.nodes[0], "MASTER_PORT": str(_free_port(first))}
        if self._ended_job is not None:
            found[ENDED_JOB] = self._ended_job
        return found

    def judge(self, ended: Ended) -> Outcome:
        """What follows from how the ranks ended."""
        cause = self.run.first_exit(ended.since_ns)
        outcome = self._judge(ended, cause)
        step = cause["step"] if cause is not None else None
        self.run.event("srun_end", code=ended.code, cause=outcome.code, message=outcome.why, step=step)
        return outcome

    def _judge(self, ended: Ended, cause: dict[str, Any] | None) -> Outcome:
        if self.run.result.exists():
            return Outcome(0, "finished", "end")
        code, why = (cause["code"], f"rank {cause['rank']}: {cause['message']}") if cause is not None else (ended.code, "no rank left a cause")
        if code in FINAL_CODES:
            return Outcome(code, why, "end")
        if ended.too_slow:
            why = f"the ranks had not saved {self.launch.site.grace_s} s after they were asked to (grace_s)"
            return Outcome(1, why, "again if progress")
        if code == Stopped.exit_code and ended.stacks:
            silent = sorted(set(range(self.ranks)) - ended.stacks)
            nodes = {self._node(rank): f"rank {rank} hung, and left no stacks" for rank in silent}
            if 2 * len(nodes) > len(self.nodes) > 1:
                nodes = {}  # most of them: what hangs is the disk that they write to
            who = f"; left no stacks: {', '.join(f'rank {rank} on {self._node(rank)}' for rank in silent)}" if silent else ""
            return Outcome(code, f"{why}{who}", "again if progress", nodes)
        if code == Stopped.exit_code or cause is None and ended.signal is not None:
            # A signal that comes while a rank's Python starts kills it, and there is nothing to save.
            what = "nothing to save" if cause is None or cause["step"] is None else f"saved at step {cause['step']}"
            # Starts that meet their time limit before there is anything to save would follow each other for ever.
            got_nowhere = ended.signal == signal.SIGUSR1 and self.run.newest_step() == self._first_step
            return Outcome(Stopped.exit_code, f"{what} {_OCCASION[ended.signal]}", "again if progress" if got_nowhere else "again")
        if task := next((match for match in map(_TASK_ENDED.match, ended.said) if match and match[3] not in _BY_LAUNCHER), None):
            node, rank, how = task.groups()
            exited = re.fullmatch(r"Exited with exit code (\d+)", how)
            if exited is None:  # a signal killed it; what its peers say is that it is gone
                code, why = 137, f"rank {rank} on {node}: {how}"
            elif cause is None:
                code, why = int(exited[1]), f"rank {rank} on {node}: {how}, and left no cause"
                if code in FINAL_CODES:
                    return Outcome(code, why, "end")
        return Outcome(code or 1, why, "again if progress")

    def _node(self, rank: int) -> str:
        return self.nodes[rank // self.launch.site.ranks]

    # ---- after the ranks

    def follow(self, outcome: Outcome) -> int:
        """Do what follows; the exit code. Where the job is requeued, that ends this process."""
        self.exclude(outcome.bad)
        if outcome.then == "end":
            return self.end(outcome.code, outcome.why)
        if self.stop_was_asked_for():
            return self.stopped()
        if outcome.then == "again if progress" and (starts := self.starts_without_progress()) > self.launch.site.max_restarts:
            what = f"{starts} starts in a row made no newer checkpoint (max_restarts {self.launch.site.max_restarts})"
            return self.end(outcome.code, f"{what}; the last: {outcome.why.rstrip('.')}. Mend that, then `dqtrain resume {self.run.path}`.")
        try:
            job = slurm.find_job(slurm.this_job(), PATIENCE_S)
            if job is not None and job.state != "RUNNING" and job.reason != "TimeLimit":  # cancelled, and that is respected
                return self.end(outcome.code, f"{outcome.why.rstrip('.')}; Slurm ends the job ({job.state}). `dqtrain resume {self.run.path}` goes on.")
            announced = outcome.then == "again"
            if self.launch.site.successors:
                return self.leave_to_successor(outcome, announced)
            if not (outcome.bad and self.submit_successor(outcome, announced)):
                with suppress(OSError):  # here and below: a disk that fails must not cost the requeue
                    self.run.event("requeue", job=self.job, why=outcome.why, announced=announced)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                slurm.requeue(slurm.this_job(), PATIENCE_S)
                time.sleep(2 * _KILL_S)  # the requeue ends this process
        except UserError as error:
            return self.end(outcome.code, f"{outcome.why.rstrip('.')}; it could not be requeued: {error} `dqtrain resume {self.run.path}` goes on.")
        return outcome.code

    def leave_to_successor(self, outcome: Outcome, announced: bool) -> int:
        """End, so that the next of the jobs that were queued beforehand goes on; the exit code. It cannot be told to avoid a node."""
        left = [job for job in (load_launch(self.run) or self.launch).successors if slurm.is_live(job, PATIENCE_S)]
        if not left:
            return self.end(outcome.code, f"{outcome.why.rstrip('.')}; no successor is left (successors). `dqtrain resume {self.run.path}` queues new ones.")
        with suppress(OSError):
            self.run.event("successor", job=left[0], why=outcome.why, exclude=[], announced=announced)
        print(f"dqtrain: {outcome.why.rstrip('.')}; job {left[0]} goes on", file=sys.stderr, flush=True)
        return outcome.code

    def submit_successor(self, outcome: Outcome, announced: bool) -> bool:
        """Queue a job that takes over when this one has ended; whether Slurm took it. A running job's own list of nodes to avoid cannot be changed."""
        exclude = sorted({*self.excluded(), *outcome.bad})
        try:
            job = slurm.sbatch(batch_arguments(self.launch, self.run, exclude, after=slurm.this_job()), PATIENCE_S)
        except UserError as error:
            print(f"dqtrain: no successor that avoids {', '.join(exclude)}: {error} This job is requeued instead.", file=sys.stderr, flush=True)
            return False
        with suppress(OSError):
            save_launch((load_launch(self.run) or self.launch).followed_by(job), self.run)  # read again: it was saved after this job was queued
            self.run.event("successor", job=job, why=outcome.why, exclude=exclude, announced=announced)
        return True

    def starts_without_progress(self) -> int:
        """Starts in a row, this one included, that were broken off and made no newer checkpoint, since a person last submitted the run."""
        newest, starts = self.run.newest_step(), 0
        for event in self.run.read_events():
            if event["event"] == "submit" or event["event"] == "job_start" and event["step"] < newest:
                starts = 0
            elif event["event"] == "job_start":
                starts += 1
            elif event["event"] in ("requeue", "successor") and event["announced"]:
                starts = max(0, starts - 1)
        return starts

    def stop_was_asked_for(self) -> bool:
        """Whether somebody asked this start to stop by the file; rank 0 has removed it if it saw it in time."""
        events = [event["event"] for event in self.run.read_events()]
        last = len(events) - 1 - events[::-1].index("job_start")
        return self.run.stop.exists() or "stop_requested" in events[last:]

    def stopped(self) -> int:
        """End as asked."""
        withdraw(self.run.stop)
        self.end(Stopped.exit_code, f"stopped as asked; `dqtrain resume {self.run.path}` goes on")
        return 0

    def end(self, code: int, why: str) -> int:
        """The last word of a job that nothing follows."""
        self.run.event("job_end", job=self.job, code=code, why=why)
        print(f"dqtrain: {why}", file=sys.stderr, flush=True)
        return code

    def exclude(self, bad: Mapping[str, str]) -> None:
        """Have later jobs of the run avoid nodes for the site's `exclude_hours`."""
        if not bad:
            return
        until = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=self.launch.site.exclude_hours)
        try:
            save_excluded(self.excluded() | {node: Excluded(until=until, why=why) for node, why in bad.items()}, self.run)
            for node, why in bad.items():
                self.run.event("exclude", node=node, why=why, until=until.isoformat())
        except OSError as error:  # the run goes on, and may meet the node again
            print(f"dqtrain: {self.run.excluded} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def excluded(self) -> dict[str, Excluded]:
        """The nodes that the run avoids; none, and a word on it, where the list is damaged: that is no reason to end."""
        try:
            return read_excluded(self.run)
        except ConfigError as error:
            print(f"dqtrain: {error}", file=sys.stderr, flush=True)
            return {}


_STEP = ("--export=ALL", "--mpi=none", "--input=none")


def _pass_on(process: subprocess.Popen[bytes], said: list[str]) -> None:
    """Copy a step's stderr to ours, and keep what srun itself says."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(b"srun: "):
            said.append(line.decode(errors="replace").strip())
        with suppress(OSError):  # a full disk
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def _free_port(first: int) -> int:
    """A port of this machine, the first one's node, that nobody listens on; `first` counts within _PORTS."""
    for number in range(len(_PORTS)):
        port = _PORTS[(first + number) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError(f"{socket.gethostname()} has no free port from {_PORTS.start} to {_PORTS.stop - 1}, and rank 0 needs one. End what holds them.")


def main(path: Path) -> int:
    """Supervise one start of the run's job; the exit code of the batch script."""
    run = RunDir(path)
    try:
        launch = load_launch(run)
        if launch is None:
            raise ConfigError(f"{run.launch} is missing, without which the run cannot be started as a job. Submit it again with `dqtrain submit`.")
        return Supervisor(run, launch).supervise()
    except UserError as error:
        print(f"dqtrain: {error}", file=sys.stderr, flush=True)
        with suppress(OSError):
            run.event("job_end", job=os.environ.get("SLURM_JOB_ID"), code=error.exit_code, why=str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
