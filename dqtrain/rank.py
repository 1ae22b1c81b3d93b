"""One rank of a run, from its environment to its exit code and cause file."""

import os
import signal
import sys
import traceback
from types import FrameType

from dqtrain.build import build
from dqtrain.config import RunConfig
from dqtrain.engine import start
from dqtrain.errors import Stopped, UserError
from dqtrain.rundir import RunDir
from dqtrain.trainer import STOP_SIGNALS
from dqtrain.world import init_world


def _stop_now(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped between steps; nothing was lost. Start it again to continue.")


def run_rank(config: RunConfig) -> int:
    """Train, test, export; the exit code. The cause of a failure is on disk before the process leaves, since launchers hide codes."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_now)
    world, run = init_world(), RunDir(config.run.dir)
    code, message, trainer = 0, "", None
    owned = world.rank != 0  # the run belongs to rank 0; the others come with it
    try:
        if world.rank == 0:
            run.acquire()
            owned = True
            run.claim(config)
        start(world)
        trainer = build(config, run, world)
        trainer.train()
        for number in STOP_SIGNALS:
            signal.signal(number, _stop_now)
        trainer.finish()
    except UserError as error:
        code, message = error.exit_code, str(error)
        if world.rank == 0:
            print(f"\ndqtrain: {error}", file=sys.stderr, flush=True)
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if code and owned:
        run.record_exit(world.rank, code, message, trainer.step if trainer else None)
    if world.rank == 0 and owned:
        run.event("finished" if code == 0 else "stopped", code=code, step=trainer.step if trainer else None, message=message)
        run.release()
    if trainer is not None:
        trainer.metrics.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that ends well has passed a barrier behind its last collective. For the others the closed socket is the
    # fastest signal to their peers, and the destructors of a broken process group could hang or abort.
    os._exit(code)
