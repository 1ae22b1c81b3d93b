"""One rank of a run, from its environment to its exit code and cause file."""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Literal

from dqtrain.build import build, cache_teacher
from dqtrain.config import RunConfig
from dqtrain.engine import start
from dqtrain.errors import CheckpointError, ConfigError, Stopped, UserError
from dqtrain.files import DISK_ERRORS
from dqtrain.rundir import HEARTBEAT_S, RunDir
from dqtrain.world import init_world


def run_rank(config: RunConfig, job: Literal["train", "cache-teacher"] = "train") -> int:
    """Train, test, export, or store the teacher's words; never returns, but exits with the code. The cause of a failure is on disk before, since launchers hide codes."""
    threading.excepthook = _thread_failed
    world, run = init_world(), RunDir(config.run.dir)
    code, message, trainer = 0, "", None
    owned = False  # before rank 0 owns the run, its directory may be another process's: nothing is written there
    try:
        if world.rank == 0:
            run.acquire()
            owned = True
            run.claim(config)
            threading.Thread(target=_beat, args=(run,), daemon=True).start()
        start(world)
        owned = True  # rank 0 joins only as the owner
        if job == "cache-teacher":
            cache_teacher(config, run, world)
        else:
            trainer = build(config, run, world)
            trainer.train()
            trainer.finish()
    except (UserError, Stopped) as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        code = CheckpointError.exit_code if error.errno in DISK_ERRORS else 1
        message = f"{error.filename or run.path}: {error.strerror}. Free space there, then `dqtrain resume {run.path}`; complete checkpoints are kept."
        if code == 1:
            traceback.print_exc()
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if world.rank == 0 and code > 1:
        print(f"\ndqtrain: {message}", file=sys.stderr, flush=True)
    step = trainer.step if trainer else None
    with suppress(OSError):  # here and below: a full disk must not change the code
        if code and owned:
            run.record_exit(world.rank, code, message, step)
    if world.rank == 0 and owned:
        with suppress(OSError):
            run.event("stopped" if code else "finished", code=code, step=step, message=message)
        with suppress(OSError):
            run.release()
    with suppress(OSError):
        if trainer is not None:
            trainer.metrics.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that ends well has passed a barrier behind its last collective. For the others the closed socket is the
    # fastest signal to their peers, and the destructors of a broken process group could hang or abort.
    os._exit(code)


def _thread_failed(problem: threading.ExceptHookArgs) -> None:
    """A full disk in TensorBoard's thread is no news: the main thread meets it at its next line or checkpoint. The rest is printed."""
    if not (isinstance(problem.exc_value, OSError) and problem.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(problem)


def _beat(run: RunDir) -> None:
    """Renew the owner's heartbeat while the process lives; a run that another process has taken over is left at once."""
    while True:
        time.sleep(HEARTBEAT_S)
        try:
            run.heartbeat()
        except ConfigError as error:
            print(f"dqtrain: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        except OSError:
            continue
