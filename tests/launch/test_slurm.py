"""Runs on a real Slurm whose nodes and ranks are hurt: they go on by themselves, and their logs are those of an uninterrupted run, bit for bit.

Ranks are held by SIGSTOP while Slurm takes its time (it looks at time limits every 30 s), so that no test depends on how fast a machine trains.
Where nothing else is said, jobs have two nodes of one rank.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import SLOW_S, Cluster, Job, container, running, until
from conftest import Run, config_text, kill

SITE = {"gpus_per_node": 0, "time": "0:30:00", "interface": "eth0", "grace_s": 60, "exclude_hours": 1, "max_restarts": 2}
LONG = "{steps: 30, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"
CHECKPOINT_STEPS = 5
CHANGES = {"train": LONG, "eval": "{every_steps: 15}", "checkpoint": f"{{every_steps: {CHECKPOINT_STEPS}}}", "log": "{every_steps: 1}"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(tmp_path_factory.mktemp("slurm") / "state", "--slurmd-timeout", 10)


@pytest.fixture
def all_nodes(cluster: Cluster) -> Iterator[None]:
    """For tests that hurt nodes: they are whole again afterwards."""
    yield
    for node in ("node1", "node2", "node3", "node4"):
        cluster.devcluster("node", node, "off")
        cluster.do("node", node, "on")
    until(cluster.is_healthy, 120)
    # Slurm believes in them before each reaches the others again: a job that started now might find one silent.
    until(lambda: cluster.devcluster("run", "srun", "--nodes=4", "true").returncode == 0, 120)


@pytest.fixture
def make_job(cluster: Cluster, world: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Write a config and a site file, and give their Job; jobs that a failed test leaves are cancelled."""
    made: list[Job] = []

    def make(name: str = "run", site: dict[str, object] | None = None, **changes: str) -> Job:
        config, place = tmp_path / f"{name}.yaml", tmp_path / f"{name}-site.yaml"
        config.write_text(config_text(world, tmp_path / name, **(CHANGES | changes)))
        place.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (SITE | (site or {})).items()))
        made.append(Job(tmp_path / name, config, cluster, place))
        return made[-1]

    yield make
    for job in made:
        job.note_costs(request.node.name)
        print(job.story())  # pytest shows it when the test failed
        for event in job.events("submit", "successor"):
            cluster.devcluster("run", "scancel", event["job"])
            until(lambda job=job, event=event: job.state(event["job"]) not in ("PENDING", "RUNNING", "COMPLETING"), 120)


def _uninterrupted(world: Path, folder: Path, ranks: int) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(config_text(world, folder / "run", **CHANGES))
    run = Run(folder / "run", folder / "run.yaml")
    code, output = run.train(ranks=ranks)
    assert code == 0, output
    return run


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of two ranks that nothing interrupts, without Slurm."""
    return _uninterrupted(world, tmp_path_factory.mktemp("whole"), 2)


# ---- what ends for good


def test_a_config_that_cannot_run_never_queues(make_job, cluster: Cluster) -> None:
    run = make_job()
    for overrides, nodes, message in (
        (["train.stepss=3"], 2, "Did you mean `steps`?"),
        (["data.train=missing.jsonl"], 2, "missing.jsonl is not a file"),
        ([], 9, "micro-batches"),
    ):
        code, output = run.login("submit", run.config, "--site", run.site, "--nodes", nodes, *overrides)
        assert code == 2 and message in output
    assert not run.path.exists()
    assert cluster.run("squeue", "--noheader", "--states=all", "--name=dqtrain-run") == ""


def test_a_mistake_that_only_rank_0_sees_is_never_requeued_and_a_sick_node_is_avoided(make_job, cluster: Cluster, tmp_path: Path) -> None:
    scratch = f"/dev/shm/{tmp_path.name}"
    cluster.run("srun", "--nodes=4", "mkdir", scratch)
    cluster.run("srun", "--nodes=1", "--nodelist=node2", "rmdir", scratch)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a cat sees the dog"}\nno JSON\n')
    run = make_job(site={"scratch": scratch}, data=f"{{train: {tmp_path}/corpus.jsonl, tokens_per_sample: 16}}", eval="{}")
    first = run.submit()
    run.until(lambda: run.events("job_end"))
    second = run.until_ended()
    assert [event["job"] for event in run.events("job_start")] == [first, run.job]
    assert run.events("job_start")[0]["nodes"] == ["node1", "node2"] and "node2" not in run.nodes()
    why = f"{scratch} cannot be written: No such file or directory"
    assert [event["bad"] for event in run.events("node_check")] == [{"node2": why}, {}]
    assert [(event["node"], event["why"]) for event in run.events("exclude")] == [("node2", why)]
    assert [(event["job"], event["exclude"]) for event in run.events("successor")] == [(run.job, ["node2"])] and run.job != first
    assert second["code"] == 3 and f"{tmp_path}/corpus.jsonl" in second["why"]
    assert (run.state(first), run.state(run.job)) == ("FAILED", "FAILED")
    assert not run.events("requeue")
    said = (run.path / f"slurm-{run.job}.out").read_text()
    assert said.strip().splitlines()[-1] == f"dqtrain: {second['why']}"
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_node_with_a_slow_link_is_avoided(make_job, cluster: Cluster) -> None:
    on_node2 = ("srun", "--nodelist=node2", "tc", "qdisc")
    cluster.run(*on_node2, "add", "dev", "eth0", "root", "tbf", "rate", "60mbit", "burst", "64kb", "latency", "400ms")
    try:
        run = make_job(site={"least_link_gb_s": 0.02})
        first = run.submit(nodes=3)
        run.until(lambda: len(run.events("node_check")) == 2)
    finally:
        cluster.run(*on_node2, "del", "dev", "eth0", "root")
    one, two = run.events("node_check")
    assert sorted(one["links"]) == ["node1", "node2", "node3"]
    assert one["links"]["node2"] < 0.0075 * 1.2 and min(one["links"]["node1"], one["links"]["node3"]) > 0.02
    assert one["bad"] == {"node2": f"reaches other nodes with at most {one['links']['node2']} GB/s (least_link_gb_s 0.02)"}
    assert run.job != first and [event["node"] for event in run.events("exclude")] == ["node2"]
    assert two["bad"] == {} and run.nodes() == ["node1", "node3", "node4"]
    run.until(lambda: run.events("start"))


# ---- what is announced: nothing is made twice


def test_stop_then_resume(make_job, whole: Run) -> None:
    run = make_job()
    first = run.submit()
    run.until_step(3)
    code, output = run.login("stop", run.path)
    assert code == 0, output
    end = run.until_ended()
    assert (end["code"], run.state(first)) == (75, "COMPLETED")
    stopped_at = run.events("stopped")[-1]["step"]
    assert stopped_at < 30 and not (run.path / "stop").exists()
    code, output = run.login("resume", run.path)
    assert code == 0 and run.job != first, output
    run.until(lambda: len(run.events("job_end")) == 2)
    run.finish(whole, announced=1)
    assert run.events("resume")[0]["step"] == stopped_at
    assert not run.events("requeue", "successor")


@pytest.mark.slow
def test_a_plain_job_of_four_nodes(make_job, world: Path, tmp_path: Path, cluster: Cluster) -> None:
    run = make_job()
    job = run.submit(nodes=4)
    run.until_step(2)
    # Only what was named is passed on; no login shell was started, which may take long enough for slurmctld to give the job up.
    names = {item.split("=")[0] for item in Path(f"/proc/{run.pids()[3]}/environ").read_text().split("\0")}
    assert {"HOME", "OMP_NUM_THREADS", "MASTER_PORT"} <= names and not names & {"PYTEST_CURRENT_TEST", "SLURM_GET_USER_ENV"}
    (run.path / "save").touch()
    run.until(lambda: not (run.path / "save").exists())
    (saved,) = run.events("save_requested")
    assert (run.path / f"checkpoints/step-{saved['step']:09d}/MANIFEST.json").exists()
    run.finish(_uninterrupted(world, tmp_path / "whole", 4))
    assert run.state(job) == "COMPLETED"
    (start,) = run.events("job_start")
    assert (start["job"], start["restart"], start["nodes"], start["ranks"]) == (job, 0, ["node1", "node2", "node3", "node4"], 4)
    assert run.events("srun_end")[0]["code"] == 0
    assert [(run.path / f"rank-{rank:04d}.log").read_text().count("Traceback") for rank in (1, 2, 3)] == [0, 0, 0]
    assert run.login("resume", run.path)[0] == 2
    cluster.run("sbatch", f"--output={run.path}/by-hand.out", run.path / "code/launch/train.sbatch", run.path, sys.executable)
    run.until(lambda: len(run.events("job_end")) == 2)
    assert run.events("job_end")[1]["why"] == "the run is finished already"


@pytest.mark.slow
def test_time_limit(make_job, whole: Run, cluster: Cluster) -> None:
    run = make_job()
    job = run.submit()
    run.until_step(6)
    run.signal(signal.SIGSTOP)
    # Slurm sends USR1 60 + 60 s before the limit, and looks every 30 s.
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+110")
    time.sleep(35)
    run.signal(signal.SIGCONT)
    run.until(lambda: run.events("requeue"))
    assert run.events("requeue")[0]["why"] == f"saved at step {run.events('stopped')[0]['step']} before the time limit"
    run.until(lambda: run.state() == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    run.finish(whole, announced=1)
    stopped, resumed = run.events("stopped")[0], run.events("resume")[0]
    assert stopped["step"] == resumed["step"] < 30
    assert [(event["job"], event["restart"]) for event in run.events("job_start")] == [(job, 0), (job, 1)]


@pytest.mark.slow
def test_preemption(make_job, whole: Run, cluster: Cluster, tmp_path: Path) -> None:
    run = make_job()
    job = run.submit()
    run.until_step(6)
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=sleep 3").strip()
    run.until(lambda: run.events("requeue"))
    assert run.events("requeue")[0]["why"].endswith("on a signal to the ranks, as at a preemption")
    run.until(lambda: run.state(urgent) == "COMPLETED")
    run.finish(whole, announced=1)
    stopped, resumed = run.events("stopped")[0], run.events("resume")[0]
    assert stopped["step"] == resumed["step"] < 30
    assert [(event["job"], event["restart"]) for event in run.events("job_start")] == [(job, 0), (job, 1)]


@pytest.mark.slow
def test_ranks_in_a_container(make_job, whole: Run, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_job(site={"container": container(tmp_path, monkeypatch)})
    job = run.submit()
    run.until_step(3)
    entry = f"APPTAINER_CONTAINER={tmp_path}/image.sif"
    inside = {pid: entry in Path(f"/proc/{pid}/environ").read_text() for pid in (*run.pids().values(), *run.processes("launch.supervisor"))}
    assert list(inside.values()) == [True, True, False]
    assert run.events("node_check")[0]["bad"] == {}
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    run.until(lambda: run.events("requeue"))
    run.finish(whole, announced=1)
    assert run.events("stopped")[0]["step"] == run.events("resume")[0]["step"]


# ---- where nodes may not submit jobs


SBATCH = '#!/bin/sh\n[ -z "$SLURM_JOB_ID" ] || { echo \'Access denied\' >&2; exit 1; }\nexec %s "$@"\n'


@pytest.fixture
def only_login_submits(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch and `scontrol requeue` are refused within jobs."""
    (tmp_path / "bin").mkdir()
    for program in ("sbatch", "scontrol"):
        real = cluster.run("which", program).strip()
        text = SBATCH % real if program == "sbatch" else SBATCH.replace('[ -z "$SLURM_JOB_ID" ]', '[ "$1" != requeue ]') % real
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


@pytest.mark.slow
def test_successors_that_were_queued_beforehand_go_on(make_job, whole: Run, cluster: Cluster, only_login_submits: None) -> None:
    run = make_job(site={"successors": 3})
    code, said = run.login("submit", run.config, "--site", run.site, "--nodes", 2)
    first, after = run.job, run.launch["successors"]
    assert code == 0 and len(after) == 3 and said.splitlines()[1] == f"{', '.join(after)} wait to go on with it"
    run.until_step(3)
    assert [run.state(job) for job in (first, *after)] == ["RUNNING", "PENDING", "PENDING", "PENDING"]
    assert run.login("status", run.path)[1].splitlines()[0].endswith("; 3 successors of 3 left")
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    run.until(lambda: run.events("successor"))
    run.until(lambda: len(run.events("job_start")) == 2)
    run.until_step(run.events("stopped")[0]["step"] + 2)
    assert run.job == after[0] and run.login("status", run.path)[1].splitlines()[0].endswith("; 2 successors of 3 left")
    run.signal(signal.SIGKILL, 1)
    run.finish(whole, announced=1, broken=1)
    # The last has nothing to do.
    run.until(lambda: run.state(after[2]) == "COMPLETED")
    assert (run.path / f"slurm-{after[2]}.out").read_text() == "dqtrain: nothing to go on with: finished\n"
    assert [event["job"] for event in run.events("job_start")] == [first, *after[:2]] and len(run.events("job_end")) == 1
    assert run.login("status", run.path)[1].startswith(f"{run.path}: finished\n") and not run.events("requeue")


@pytest.mark.slow
def test_successors_do_not_go_on_with_a_mistake_or_after_a_stop(make_job, cluster: Cluster, only_login_submits: None, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("no JSON\n")
    run = make_job("mistake", site={"successors": 2}, data=f"{{train: {tmp_path}/corpus.jsonl, tokens_per_sample: 16}}", eval="{}")
    first = run.submit()
    end, after = run.until_ended(), run.launch["successors"]
    run.until(lambda: [run.state(job) for job in after] == ["COMPLETED", "COMPLETED"])
    assert (end["code"], run.job, run.state(first)) == (3, first, "FAILED") and len(run.events("job_end", "job_start")) == 2
    assert f"job {first} is failed" in run.login("status", run.path)[1]

    run = make_job("stopped", site={"successors": 2})
    run.submit()
    run.until_step(2)
    assert run.login("stop", run.path)[0] == 0
    assert run.until_ended()["code"] == 75
    assert [run.state(job) for job in run.launch["successors"]] == ["CANCELLED", "CANCELLED"]


@pytest.mark.slow
def test_the_last_successor_says_that_it_is_the_last(make_job, cluster: Cluster, only_login_submits: None) -> None:
    run = make_job(site={"successors": 1})
    run.submit()
    for start in (1, 2):
        run.until(lambda start=start: len(run.events("start", "resume")) == start)
        run.until_step(start)
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        run.until(lambda start=start: len(run.events("successor", "job_end")) == start)
    end = run.until_ended()
    assert end["code"] == 75 and end["why"].endswith(f"; no successor is left (successors). `dqtrain resume {run.path}` queues new ones.")


# ---- what comes without notice: at most one checkpoint interval is made twice


@pytest.mark.slow
def test_a_rank_is_killed(make_job, whole: Run) -> None:
    run = make_job()
    job = run.submit()
    run.until_step(8)
    reached = run.last_step()
    run.signal(signal.SIGKILL, 1)
    run.until(lambda: run.events("requeue"))
    (end,) = run.events("srun_end")
    assert end["cause"] == 137 and end["message"] == "rank 1 on node2: Killed"
    run.finish(whole, broken=1)
    assert run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS
    assert [(event["job"], event["restart"]) for event in run.events("job_start")] == [(job, 0), (job, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a step", "in a checkpoint"])
def test_a_node_loses_power(make_job, whole: Run, cluster: Cluster, all_nodes: None, moment: str) -> None:
    run = make_job()
    job = run.submit()
    run.until_step(8)
    pids = run.pids().values()
    deadline = time.monotonic() + SLOW_S
    while moment == "in a checkpoint" and not list((run.path / "checkpoints").glob(".tmp-*")):
        assert time.monotonic() < deadline
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    reached, partial = run.last_step(), list((run.path / "checkpoints").glob(".tmp-*"))
    assert bool(partial) == (moment == "in a checkpoint")
    victim = "node2" if moment == "in a step" else "node1"  # that of the batch script and of rank 0
    cluster.do("node", victim, "off")
    run.until(lambda: len(run.events("job_start")) == 2)
    run.finish(whole, broken=1)
    assert reached > run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS
    assert [(event["job"], event["restart"]) for event in run.events("job_start")] == [(job, 0), (job, 1)]
    assert {event["node"] for event in run.events("exclude")} == {victim} and victim not in run.nodes()


@pytest.mark.slow
def test_a_node_freezes_and_thaws_when_the_run_goes_on_elsewhere(make_job, whole: Run, cluster: Cluster, all_nodes: None) -> None:
    run = make_job()
    run.submit()
    run.until_step(8)
    reached = run.last_step()
    cluster.do("node", "node2", "freeze")
    run.until(lambda: len(run.events("resume")) == 1)
    assert "node2" not in run.nodes()
    run.signal(signal.SIGSTOP)
    cluster.do("node", "node2", "thaw")
    time.sleep(5)  # what it has to say about the step of the same name arrives now
    run.signal(signal.SIGCONT)
    run.finish(whole, broken=1)
    assert run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS


@pytest.mark.slow
def test_a_frozen_rank_is_noticed_and_its_node_avoided(make_job, whole: Run) -> None:
    run = make_job()
    first = run.submit("run.watchdog_s=20")
    run.until_step(8)
    reached = run.last_step()
    run.signal(signal.SIGSTOP, 0)  # the one that has the heartbeat
    run.until(lambda: run.events("successor"))
    (end,) = run.events("srun_end")
    assert end["cause"] == 75 and "no progress for 20 s" in end["message"] and end["message"].endswith("left no stacks: rank 0 on node1")
    assert "trainer.py" in (run.path / "exits/stacks-rank-00001.txt").read_text()
    assert [(event["node"], event["why"]) for event in run.events("exclude")] == [("node1", "rank 0 hung, and left no stacks")]
    run.finish(whole, broken=1)
    assert run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS
    assert run.job != first and "node1" not in run.nodes()


@pytest.mark.slow
def test_ranks_that_do_not_save_within_the_grace_are_ended(make_job, whole: Run, cluster: Cluster) -> None:
    run = make_job(site={"grace_s": 5})
    job = run.submit()
    run.until_step(8)
    reached = run.last_step()
    run.signal(signal.SIGSTOP, 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    run.until(lambda: run.events("requeue"))
    assert run.events("requeue")[0]["why"] == "the ranks had not saved 5 s after they were asked to (grace_s)"
    run.finish(whole, broken=1)
    assert run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS


@pytest.mark.slow
def test_a_run_that_makes_no_progress_is_given_up(make_job) -> None:
    run = make_job(site={"max_restarts": 1})
    run.submit()
    for start in (1, 2):
        run.until(lambda start=start: len(run.events("start")) == start)
        run.signal(signal.SIGKILL, 1)
    end = run.until_ended()
    assert end["why"].startswith("2 starts in a row made no newer checkpoint (max_restarts 1); the last: rank 1 on node2: Killed.")
    assert len(run.events("requeue")) == 1


# ---- the controller, and two jobs for one run


@pytest.mark.slow
def test_the_controller_is_away_when_the_job_is_to_be_requeued(make_job, whole: Run, cluster: Cluster) -> None:
    run = make_job()
    run.submit()
    run.until_step(6)
    away = subprocess.Popen(cluster.command("restart-controller", "--down", 45), stdout=subprocess.DEVNULL)
    run.signal(signal.SIGUSR1, 0)
    assert away.wait(timeout=120) == 0
    run.until(lambda: run.events("requeue"))
    run.finish(whole, announced=1)
    assert run.events("stopped")[0]["step"] == run.events("resume")[0]["step"]


@pytest.mark.slow
def test_two_jobs_for_one_run(make_job, whole: Run, cluster: Cluster) -> None:
    run = make_job()
    first = run.submit()
    run.until_step(3)
    code, output = run.login("resume", run.path)
    assert code == 2 and first in output
    again = ["sbatch", "--parsable", "--nodes=2", f"--output={run.path}/slurm-%j.out", run.path / "code/launch/train.sbatch", run.path, sys.executable]
    second = cluster.run(*again).strip()
    run.until(lambda: run.events("refused"))
    (refused,) = run.events("refused")
    assert refused["job"] == second and f"Slurm job {first}" in refused["why"]
    # The first dies without a word, and the next takes over, though its heartbeat is fresh.
    reached = run.last_step()
    kill(*run.processes("launch.supervisor"), *run.processes("launch.task"))
    run.until(lambda: run.state(first) not in ("RUNNING", "COMPLETING"))
    assert (run.path / "owner.json").exists()
    third = cluster.run(*again).strip()
    run.finish(whole, broken=1)
    assert run.events("job_start")[-1]["job"] == third
    assert run.events("resume")[0]["step"] >= reached - CHECKPOINT_STEPS


@pytest.mark.slow
def test_a_cancelled_job_is_not_queued_again(make_job, cluster):
    run = make_job()
    job = run.submit()
    run.until_step(3)
    cluster.run("scancel", job)
    end = run.until_ended()
    assert "; Slurm ends the job (" in end["why"] and run.state(job) == "CANCELLED"
    assert not run.events("requeue", "successor")
