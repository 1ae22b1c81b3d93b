"""A run is a directory: its names, who owns it, what happened in it, and how each of its ranks ended.

Every file appears whole or not at all: written under a temporary name in the same folder, synced, renamed, and the folder synced.
Logs are appended line by line. Needs the config and a POSIX file system that all nodes share; no torch.
"""

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dqtrain import hub
from dqtrain.config import PASSIVE, RunConfig, differences, dump_config, load_config
from dqtrain.errors import FINAL_CODES, CheckpointError, ConfigError
from dqtrain.files import sync_path, write_aside, write_text

HEARTBEAT_S = 10
"""Seconds between two rewrites of the owner's heartbeat."""

OWNER_DEAD_S = 120
"""Seconds without a heartbeat after which an owner on another host is taken for dead."""

LOG_END_BYTES = 1 << 16
"""What is read of a log that may be long."""

ENDED_JOB = "DQTRAIN_ENDED_JOB"
"""Variable with the id of a Slurm job that has ended, as its supervisor's successor was told by Slurm: an owner in it is dead whatever its heartbeat."""

_BEFORE_CONFIG = re.compile(
    r"owner\.json|events\.jsonl|exits|shards|tokenizer|launch\.json|code|environment\.json|excluded\.json|side|rank-\d+\.log|slurm.*|\..*"
)
"""Names that a run may hold before its run.yaml: what an owner, a launcher or `dqtrain prepare` leaves, and temporary files."""


def append_line(path: Path, line: str) -> None:
    """Append one synced line in a single write. Raises OSError, such as on a full disk, and then leaves the file as it was."""
    content = f"{line}\n".encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        written = os.write(handle, content)
        if written < len(content):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, without what is none."""
    for line in text.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


class RunDir:
    """The directory of one run. Making one touches no file; only the owner writes, but for `event` and `record_exit`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._beating = threading.Lock()
        self._last_beat = float("inf")  # until the run is ours

    @property
    def config(self) -> Path:
        """The resolved config, as YAML."""
        return self.path / "run.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a complete checkpoint was ever written here; a damaged one counts."""
        return bool(self.checkpoint_steps())

    @property
    def log(self) -> Path:
        """Metrics, one JSON line per log step."""
        return self.path / "log.jsonl"

    @property
    def events(self) -> Path:
        """Starts, stops, requeues, takeovers and failures, one JSON line each."""
        return self.path / "events.jsonl"

    @property
    def exits(self) -> Path:
        """Folder of the causes, one file per rank, that ranks leave behind."""
        return self.path / "exits"

    @property
    def owner(self) -> Path:
        """The process that runs this run."""
        return self.path / "owner.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer, where the run trains its own."""
        return self.path / "tokenizer"

    @property
    def result(self) -> Path:
        """The last numbers; there is one if and only if the run is finished."""
        return self.path / "result.json"

    @property
    def predictions(self) -> Path:
        """What the student wrote for the sources of the test split, one JSON line each."""
        return self.path / "predictions.jsonl"

    @property
    def student(self) -> Path:
        """Folder of all that makes the student's model but its weights: config, generation config, tokenizer."""
        return self.path / "student"

    @property
    def coverage(self) -> Path:
        """Which of the student's parameters are quantized and how."""
        return self.path / "coverage.json"

    @property
    def launch(self) -> Path:
        """How the run was submitted to Slurm; absent for a run that never was."""
        return self.path / "launch.json"

    @property
    def code(self) -> Path:
        """The copy of the code that every start of a submitted run runs from."""
        return self.path / "code"

    @property
    def environment(self) -> Path:
        """The installed packages and the variables that a submitted run was made with."""
        return self.path / "environment.json"

    @property
    def excluded(self) -> Path:
        """Nodes that failed the run: {node: {"until": UTC, "why": text}}."""
        return self.path / "excluded.json"

    @property
    def side(self) -> Path:
        """Folder of the side jobs: what was asked, what they printed, how they ended."""
        return self.path / "side"

    @property
    def stop(self) -> Path:
        """An empty file by which anyone who may write here asks the run to save and end; the run removes it."""
        return self.path / "stop"

    @property
    def save(self) -> Path:
        """An empty file that asks for a checkpoint now; the run removes it when it has one."""
        return self.path / "save"

    def stacks(self, rank: int) -> Path:
        """Where the threads of a rank were when it took another one for hung."""
        return self.exits / f"stacks-rank-{rank:05d}.txt"

    def job_log(self, job: str) -> Path:
        """What the batch script and rank 0 print as a Slurm job."""
        return self.path / f"slurm-{job}.out"

    def artifact(self, target: str) -> Path:
        """Folder of the exported model: `packed`, `gguf`, ..."""
        return self.path / "artifact" / target

    def rank_log(self, rank: int) -> Path:
        """What a rank other than 0 prints."""
        return self.path / f"rank-{rank:04d}.log"

    def rank_exit(self, rank: int) -> Path:
        """Why a rank ended; absent while it runs."""
        return self.exits / f"rank-{rank:04d}.json"

    def check_claim(self, config: RunConfig) -> Literal["start", "continue"]:
        """What `claim` would do or raise, with nothing touched."""
        self._check_place()
        if self.result.exists():
            places = ", ".join(str(place) for place in sorted((self.path / "artifact").glob("*"))) or "none yet: `dqtrain export` makes one"
            raise ConfigError(f"{self.path} is a finished run (artifact: {places}), and a finished run does not train. Use another run.dir.")
        if not self.config.exists():
            strange = sorted(entry.name for entry in self.path.iterdir() if not _BEFORE_CONFIG.fullmatch(entry.name)) if self.path.exists() else []
            if strange:
                raise ConfigError(
                    f"{self.path} is not a run directory: it has no run.yaml, but holds {', '.join(strange[:5])}"
                    f"{', ...' if len(strange) > 5 else ''}. A new run needs an empty or absent directory; use another run.dir."
                )
            return "start"
        changes = differences(self.load_config(), config)
        if changes.keys() - PASSIVE and self.has_checkpoint:
            listing = "\n".join(f"  {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changes.items())
            raise ConfigError(
                f"{self.path} holds a run with another config (there -> here):\n{listing}\n"
                f"Use another run.dir for a new run, or continue the old one with `dqtrain resume {self.path}`."
            )
        return "continue"

    def claim(self, config: RunConfig) -> Literal["start", "continue"]:
        """Start a run in an empty or absent directory, or continue an unfinished one. The caller is the owner (`acquire`).

        Changes in passive fields are taken and recorded as an event; before the first checkpoint, all are. Raises ConfigError for another config, a finished run,
        a directory that is no run, a file in the way, and a place that is not writable.
        """
        self._make()
        found = self.check_claim(config)
        if found == "start":
            write_text(self.config, dump_config(config))
        elif changes := differences(self.load_config(), config):
            write_text(self.config, dump_config(config))
            self.event("config", changes=changes)
        return found

    def load_config(self) -> RunConfig:
        """The config of the run that is here. Raises ConfigError where there is none."""
        if not self.config.is_file():
            raise ConfigError(f"{self.path} is not a run directory: it has no run.yaml. Name the directory of a run, the run.dir of its config.")
        return load_config(self.config)

    def load_result(self) -> dict[str, Any]:
        """What result.json holds. Raises CheckpointError for an unfinished run."""
        config = self.load_config()
        try:
            return json.loads(self.result.read_text())
        except FileNotFoundError:
            last = (self.checkpoints / "LATEST").read_text().strip() if (self.checkpoints / "LATEST").is_file() else "no checkpoint yet"
            raise CheckpointError(
                f"{self.path} is unfinished ({last} of {config.train.steps} steps), but must be finished to be used. Do so with `dqtrain resume {self.path}`."
            ) from None

    def read_events(self) -> list[dict[str, Any]]:
        """All events, oldest first; a line that writers on two nodes of some file systems have mangled is left out."""
        return list(json_lines(self.events.read_text(errors="replace"))) if self.events.is_file() else []

    def checkpoint_steps(self) -> list[int]:
        """Steps of the committed checkpoints, by their names, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))

    def log_end(self) -> list[dict[str, Any]]:
        """The last lines of the log, LOG_END_BYTES of them, oldest first."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_END_BYTES))
                return list(json_lines(file.read().decode(errors="replace")))
        except FileNotFoundError:
            return []

    def logged_step(self) -> int:
        """The last step in the log; 0 where there is none."""
        return max((line.get("step", 0) for line in self.log_end()), default=0)

    def newest_step(self) -> int:
        """Step of the newest committed checkpoint; 0 where there is none."""
        return max(self.checkpoint_steps(), default=0)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: time (UTC), event, and the fields. Raises OSError."""
        append_line(self.events, json.dumps({"time": _now(), "event": kind, **fields}))

    def live_owner(self) -> dict[str, Any] | None:
        """The process that runs this run now (host, pid, process_start, job, restart, time, heartbeat), or None."""
        owner = _read_owner(self.owner)
        return owner if owner is not None and _is_live(owner) else None

    def refuse_if_owned(self) -> None:
        """Raise ConfigError that names the live owner, if there is one: before ranks are started, the first of which will `acquire`."""
        owner = self.live_owner()
        if owner is not None:
            raise self._owned_by(owner)

    def acquire(self) -> None:
        """Become the one live owner, taking over from a dead one; a second call is harmless. Raises ConfigError that names the live owner.

        Whatever is won is won by making a hard link, which fails if the name exists: of any number of processes, on any nodes, one wins.
        """
        self._make()
        now = _now()
        fresh = write_aside(self.owner, [json.dumps({**_identity(), "time": now, "heartbeat": now}).encode()])
        try:
            while not self._succeed(fresh):
                pass
        finally:
            fresh.unlink(missing_ok=True)
        self._last_beat = time.monotonic()

    def heartbeat(self) -> None:
        """Say that the owner lives; cheap to call often, and needed every OWNER_DEAD_S. Raises ConfigError when another process has taken over."""
        with self._beating:  # else one in flight would bring back the file that `release` removes
            if time.monotonic() - self._last_beat < HEARTBEAT_S:
                return
            owner = _read_owner(self.owner)
            if owner is not None and _is_mine(owner):
                write_text(self.owner, json.dumps({**owner, "heartbeat": _now()}))
                self._last_beat = time.monotonic()
            else:
                self.acquire()

    def release(self) -> None:
        """Give the run up, if it is ours; a heartbeat does nothing from here on."""
        with self._beating:
            owner = _read_owner(self.owner)
            if owner is not None and _is_mine(owner):
                self.owner.unlink(missing_ok=True)
                self._last_beat = float("inf")

    def bad_batches(self, step: int, rank: int) -> Path:
        """Where a rank leaves the micro-batches of a step that is not finite."""
        return self.exits / f"step-{step:09d}-rank-{rank:05d}.safetensors"

    def record_exit(self, rank: int, code: int, message: str, step: int | None) -> None:
        """Leave a rank's cause behind, synced, before it ends; step is the last one it finished, where known. Raises OSError."""
        self.exits.mkdir(exist_ok=True)
        record = {"time_ns": time.time_ns(), "rank": rank, "code": code, "message": message, "step": step}
        write_text(self.rank_exit(rank), json.dumps(record))

    def first_exit(self, since_ns: int) -> dict[str, Any] | None:
        """What the ranks that ended since a moment followed from (time_ns, rank, code, message, step); None when no rank left a cause.

        The earliest mistake (codes 2 to 5); without one the earliest killed rank, since its peers' broken connections may be on record
        before it is; then the earliest crash or stop: a rank that was frozen may wake to find that the others have left it.
        """
        records = [json.loads(path.read_text()) for path in self.exits.glob("rank-*.json")]

        def order(record: dict[str, Any]) -> tuple[int, int]:
            code = record["code"]
            kind = 0 if code in FINAL_CODES else 1 if code > 128 else 2
            return kind, record["time_ns"]

        return min((record for record in records if record["time_ns"] >= since_ns), key=order, default=None)

    def _succeed(self, fresh: Path) -> bool:
        """One attempt to make `fresh` the owner; False if the owner changed meanwhile. Raises ConfigError that names a live owner.

        A dead owner's file is never removed, which would let a third process in, but replaced, by the one process that won the right to
        be its heir; an heir that died before it could do so has an heir of its own.
        """
        places, dead = [self.owner], []
        while not _link(fresh, places[-1]):
            holder = _read_owner(places[-1])
            if holder is None:
                return False
            if _is_mine(holder):
                return True
            if _is_live(holder):
                raise self._owned_by(holder)
            dead.append(holder)
            places.append(self.path / ".heir-of-{host}-{pid}-{process_start}-{time}".format(**holder))
        if not dead:
            sync_path(self.path)
            return True
        try:
            if _read_owner(self.owner) != dead[0]:
                return False
            os.replace(fresh, self.owner)
            sync_path(self.path)
        finally:
            places.pop().unlink()
        for place in places[1:]:
            place.unlink(missing_ok=True)
        self.event("takeover", dead=dead[0])
        return True

    def _owned_by(self, owner: dict[str, Any]) -> ConfigError:
        job = f", Slurm job {owner['job']}" if owner["job"] else ""
        return ConfigError(
            f"{self.path} is being run by process {owner['pid']} on {owner['host']}{job}, since {owner['time']} (heartbeat {owner['heartbeat']}). "
            "A run has one owner; stop that process first, or use another run.dir. "
            f"If its host has died, start again {OWNER_DEAD_S} s after the heartbeat."
        )

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_be_made(error) from None
        self._check_place()

    def _check_place(self) -> None:
        """Raise ConfigError unless the directory is there, or can be made, and can be written."""
        place = self.path
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise self._cannot_be_made(OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place)))
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"{place} is not writable. A run writes its directory; change the permissions or use another run.dir.")

    def _cannot_be_made(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path} cannot be made ({error}). run.dir must be a directory, or a place for one; use another run.dir.")


def _link(source: Path, name: Path) -> bool:
    try:
        os.link(source, name)
    except FileExistsError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _process_start(pid: int) -> int | None:
    """Clock tick at which a process of this host started (proc(5), field 22 of stat); None if it is gone or a zombie."""
    try:
        # The second field, the name in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _is_mine(owner: dict[str, Any]) -> bool:
    me = _identity()
    return all(owner[key] == me[key] for key in ("host", "pid", "process_start"))


def _is_live(owner: dict[str, Any]) -> bool:
    me = _identity()
    if owner["host"] == me["host"]:
        return _process_start(owner["pid"]) == owner["process_start"]
    if owner["job"] is not None and owner["job"] == me["job"] and owner["restart"] != me["restart"]:
        return False  # the same job, requeued: Slurm has ended its earlier start
    if owner["job"] is not None and owner["job"] == os.environ.get(ENDED_JOB):
        return False
    return (datetime.now(UTC) - datetime.fromisoformat(owner["heartbeat"])).total_seconds() <= OWNER_DEAD_S


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}), so the owner is unknown. Remove it if no process runs this run.") from None


def model_directory(path: Path) -> Path:
    """A Hugging Face directory as it is, or that of a hub id; for a float run, the one it exported. Raises CheckpointError for an unfinished run, ConfigError for a quantized one.

    A quantized run's directory of floats, where there is one, computes without activation quantizers, so not what was trained: it is a model for those who name it.
    """
    path = hub.directory(path)
    run = RunDir(path)
    if not run.config.is_file():
        return path
    run.load_result()
    folder = run.artifact("hf")
    if run.load_config().quant is not None:
        raise ConfigError(
            f"{path} is a quantized run, which is no float model. Name an unquantized run, or a Hugging Face directory: {folder}, by `dqtrain export {path} --to hf`, "
            "holds the values of its codes, with float activations."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there, which the run exported when it ended. Make it again with `dqtrain export {path}`.")
    return folder


def start_directory(path: Path) -> Path:
    """Where config and tokenizer of `student.init_from` are: a Hugging Face directory itself; for a finished run, quantized or not, its student's.

    Raises CheckpointError for an unfinished run, ConfigError for a hub id that was not fetched.
    """
    path = hub.directory(path)
    run = RunDir(path)
    if not run.config.is_file():
        return path
    run.load_result()
    return run.student
