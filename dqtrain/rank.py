"""One rank of a run, from its environment to its exit code and cause file."""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress

from dqtrain.build import build
from dqtrain.config import RunConfig
from dqtrain.engine import start
from dqtrain.errors import ConfigError, UserError
from dqtrain.rundir import HEARTBEAT_S, RunDir
from dqtrain.world import init_world


def run_rank(config: RunConfig) -> int:
    """Train, test, export; never returns, but exits with the code. The cause of a failure is on disk before, since launchers hide codes."""
    world, run = init_world(), RunDir(config.run.dir)
    code, message, trainer = 0, "", None
    owned = world.rank != 0  # the run belongs to rank 0; the others come with it
    try:
        if world.rank == 0:
            run.acquire()
            owned = True
            run.claim(config)
            threading.Thread(target=_beat, args=(run,), daemon=True).start()
        start(world)
        trainer = build(config, run, world)
        trainer.train()
        trainer.finish()
    except UserError as error:
        code, message = error.exit_code, str(error)
        if world.rank == 0:
            print(f"\ndqtrain: {error}", file=sys.stderr, flush=True)
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    step = trainer.step if trainer else None
    with suppress(OSError):  # a full disk must not change the code
        if code and owned:
            run.record_exit(world.rank, code, message, step)
        if world.rank == 0 and owned:
            run.event("stopped" if code else "finished", code=code, step=step, message=message)
            run.release()
        if trainer is not None:
            trainer.metrics.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that ends well has passed a barrier behind its last collective. For the others the closed socket is the
    # fastest signal to their peers, and the destructors of a broken process group could hang or abort.
    os._exit(code)


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
