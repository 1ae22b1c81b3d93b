"""One rank of a Slurm job, from srun's variables to `dqtrain train`: `python -m launch.task RUN`."""

import os
import runpy
import sys
from pathlib import Path

from dqtrain.errors import Stopped
from dqtrain.signals import stop_at_once


def main(path: Path) -> None:
    """Become the rank: its variables, its log, then the command line in this process. MASTER_ADDR, MASTER_PORT and LOCAL_WORLD_SIZE are there already."""
    stop_at_once()  # before anything that takes time: a signal would kill
    try:
        from dqtrain.rundir import RunDir

        run, rank = RunDir(path), int(os.environ["SLURM_PROCID"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": os.environ["SLURM_LOCALID"], "WORLD_SIZE": os.environ["SLURM_NTASKS"]}
        os.environ["HF_HUB_OFFLINE"] = "1"  # what a run needs was fetched when it was submitted
        if rank > 0:
            log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.close(log)
        sys.argv = ["dqtrain", "train", str(run.config)]
        runpy.run_module("dqtrain", run_name="__main__", alter_sys=True)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
