"""What follows from how the ranks ended: the judgement alone, of what a start leaves in the run's directory."""

import signal
from types import SimpleNamespace

import pytest

from dqtrain.rundir import RunDir
from launch.supervisor import Ended, Supervisor

GONE = "srun: error: node2: task 2: Killed"
LEFT = "srun: error: node1: task 1: Exited with exit code 7"
PEER = "srun: error: node1: tasks 0-1: Terminated"
HUNG = (75, "no progress for 20 s", None)


def judged(path, cause=None, newest=0, **ended):
    """The outcome on two nodes of two ranks; `cause`: (code, message, step) that rank 1 left, `newest`: step of the newest checkpoint, where the start found 5."""
    run = RunDir(path)
    (run.checkpoints / f"step-{newest:09d}").mkdir(parents=True)
    made = object.__new__(Supervisor)
    made.run, made.nodes, made.ranks, made._first_step = run, ("node1", "node2"), 4, 5
    made.launch = SimpleNamespace(site=SimpleNamespace(grace_s=60, ranks=2))
    left = None if cause is None else {"rank": 1, "code": cause[0], "message": cause[1], "step": cause[2]}
    found = made._judge(Ended(**{"code": 1, "since_ns": 0, "signal": None, "too_slow": False, "said": (), "stacks": frozenset()} | ended), left)
    return found.code, found.then, dict(found.bad), found.why


@pytest.mark.parametrize(
    ("how", "code", "then", "bad", "why"),
    [
        ({"cause": (2, "a wrong key", None)}, 2, "end", [], "rank 1: a wrong key"),
        ({"cause": (2, "a wrong key", None), "too_slow": True}, 2, "end", [], "rank 1: a wrong key"),
        ({"cause": (75, "stopped", 9), "newest": 9, "signal": signal.SIGUSR1}, 75, "again", [], "saved at step 9 before the time limit"),
        ({"cause": (75, "stopped", 5), "newest": 5, "signal": signal.SIGUSR1}, 75, "again if progress", [], "saved at step 5"),  # it got nowhere
        ({"cause": (75, "stopped", 5), "newest": 5, "signal": signal.SIGTERM}, 75, "again", [], "as Slurm ends the job"),
        ({"signal": signal.SIGUSR1, "newest": 5}, 75, "again if progress", [], "nothing to save before the time limit"),
        ({"cause": (75, "stopped", 9), "too_slow": True}, 1, "again if progress", [], "had not saved 60 s after they were asked to"),
        ({"cause": HUNG, "stacks": frozenset({0, 1, 3})}, 75, "again if progress", ["node2"], "left no stacks: rank 2 on node2"),
        ({"cause": HUNG, "stacks": frozenset({1})}, 75, "again if progress", [], "left no stacks: rank 0 on node1, rank 2 on node2"),  # the disk, then
        ({"cause": HUNG, "stacks": frozenset(range(4))}, 75, "again if progress", [], "no progress for 20 s"),
        ({"cause": (1, "a peer is gone", 3), "said": (PEER, GONE)}, 137, "again if progress", [], "rank 2 on node2: Killed"),
        ({"said": (PEER, LEFT)}, 7, "again if progress", [], "rank 1 on node1: Exited with exit code 7, and left no cause"),
        ({"said": (LEFT.replace("7", "3"),)}, 3, "end", [], "left no cause"),
        ({"cause": (1, "KeyError", 3), "said": (LEFT,)}, 1, "again if progress", [], "rank 1: KeyError"),
        ({"code": 0}, 1, "again if progress", [], "no rank left a cause"),
    ],
)
def test_what_follows_from_an_end(how, code, then, bad, why, tmp_path):
    found = judged(tmp_path, **how)
    assert (found[0], found[1], list(found[2])) == (code, then, bad) and why in found[3], found
