"""One rank of a run, from its environment to its exit code and cause file."""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Literal, NoReturn

from dqtrain.build import build, cache_teacher
from dqtrain.config import RunConfig
from dqtrain.engine import start
from dqtrain.errors import CheckpointError, ConfigError, Stopped, UserError
from dqtrain.files import DISK_ERRORS
from dqtrain.rundir import HEARTBEAT_S, OWNER_DEAD_S, RunDir
from dqtrain.trainer import Trainer
from dqtrain.watchdog import Watchdog
from dqtrain.world import World, init_world

ALONE_S = 6 * 3600
"""Seconds that rank 0 may work alone while the others wait in a collective: preparing data, exporting."""


def run_rank(config: RunConfig, job: Literal["train", "cache-teacher"] = "train") -> int:
    """Train, test, export, or store the teacher's words; never returns, but exits with the code. The cause of a failure is on disk before, since launchers hide codes."""
    threading.excepthook = _thread_failed
    world, run = init_world(), RunDir(config.run.dir)
    rank = _Rank(config, world, run)
    code, message = 0, ""
    try:
        if world.rank == 0:
            run.acquire()
            rank.owned = True
            run.claim(config)
            threading.Thread(target=_beat, args=(run,), daemon=True).start()
        # The watchdog is the first to notice that a peer hangs in training.
        start(world, timeout_s=max(ALONE_S, 2 * config.run.watchdog_s))
        rank.owned = True  # rank 0 joins only as the owner
        if job == "cache-teacher":
            cache_teacher(config, run, world)
        else:
            rank.trainer = trainer = build(config, run, world)
            watchdog = Watchdog(config.run.watchdog_s, run.stacks(world.rank), rank.hung)
            # Every forward is a sign of life: of training, of evaluation, and of each word that is generated.
            for module in (trainer.student.model, trainer.student.model.model):
                module.register_forward_hook(watchdog.beat)
            trainer.train()
            folder, tested = trainer.test()
            watchdog.stop()  # rank 0 alone exports, while the others wait
            trainer.finish(folder, tested)
    except (UserError, Stopped) as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        message = f"{error.filename or run.path}: {error.strerror}"
        if error.errno in DISK_ERRORS:
            code, message = CheckpointError.exit_code, f"{message}. Free space there, then `dqtrain resume {run.path}`; complete checkpoints are kept."
        else:
            code = 1
            traceback.print_exc()
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    rank.leave(code, message)


class _Rank:
    """How a rank ends, whichever of its threads ends it."""

    def __init__(self, config: RunConfig, world: World, run: RunDir) -> None:
        self.config, self.world, self.run = config, world, run
        self.owned = False  # before rank 0 owns the run, its directory may be another process's: nothing is written there
        self.trainer: Trainer | None = None
        self._leaving = threading.Lock()

    def leave(self, code: int, message: str, linger_s: float = 0.0) -> NoReturn:
        """End the process, with its cause on record; a second thread that comes here waits for the end that the first one made."""
        self._leaving.acquire()
        try:
            self._say(code, message, linger_s)
        finally:
            # A rank that ends well has passed a barrier behind its last collective. For the others the closed socket is the
            # fastest signal to their peers, and the destructors of a broken process group could hang or abort.
            os._exit(code)

    def _say(self, code: int, message: str, linger_s: float) -> None:
        rank, run = self.world.rank, self.run
        if rank == 0 and code > 1:
            print(f"\ndqtrain: {message}", file=sys.stderr, flush=True)
        step = self.trainer.step if self.trainer else None
        with suppress(OSError):  # here and below: a full disk must not change the code
            if code and self.owned:
                run.record_exit(rank, code, message, step)
        time.sleep(linger_s)
        if rank == 0 and self.owned:
            with suppress(OSError):
                run.event("stopped" if code else "finished", code=code, step=step, message=message)
            with suppress(OSError):
                run.release()
        with suppress(OSError):
            if self.trainer is not None:
                self.trainer.metrics.close()
        sys.stdout.flush()
        sys.stderr.flush()

    def hung(self) -> NoReturn:
        """End a rank that waits in vain, when the others that do have had time to write their stacks: closed sockets, or srun, would end them without."""
        assert self.trainer is not None
        limit_s, step = self.config.run.watchdog_s, self.trainer.step
        message = (
            f"no progress for {limit_s} s after step {step} (run.watchdog_s), so that another rank or a disk probably hangs; where the threads of each rank "
            f"were is in {self.run.exits}/stacks-rank-*.txt. A rank without a new such file is the one that hangs. `dqtrain resume {self.run.path}` continues."
        )
        self.leave(Stopped.exit_code, message, linger_s=min(60.0, max(2.0, limit_s / 10)))


def _thread_failed(problem: threading.ExceptHookArgs) -> None:
    """A full disk in TensorBoard's thread is no news: the main thread meets it at its next line or checkpoint. The rest is printed."""
    if not (isinstance(problem.exc_value, OSError) and problem.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(problem)


def _beat(run: RunDir) -> None:
    """Renew the owner's heartbeat while the process lives; a run that another process has taken over is left at once."""
    is_late = False
    while True:
        time.sleep(HEARTBEAT_S)
        try:
            run.heartbeat()
            is_late = False
        except ConfigError as error:
            print(f"dqtrain: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        except OSError as error:
            if not is_late:
                print(
                    f"dqtrain: the run's heartbeat cannot be written ({error}); after {OWNER_DEAD_S} s another process may take it over.",
                    file=sys.stderr,
                    flush=True,
                )
            is_late = True
