"""A run that makes do with fewer nodes than it would like: it starts on what there is, takes more when there is more, and trains on the same samples."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, start_cluster, until
from conftest import Run

SITE = "gpus_per_node: 0\ntime: 0:30:00\ninterface: eth0\ngrace_s: 60\n"
# Float weights and activations: rounding would amplify the order of sums.
CHANGES = {
    "train": "{steps: 60, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}",
    "quant": "null",
    "eval": "{every_steps: 30}",
    "checkpoint": "{every_steps: 5}",
    "log": "{every_steps: 1}",
}
SLOW_S = 240


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = start_cluster(tmp_path / "state", "--nodes", 2)
    yield cluster
    cluster.do("stop")


@pytest.mark.slow
def test_a_run_takes_the_nodes_that_there_are(cluster: Cluster, make_run: Callable[..., Run], tmp_path: Path) -> None:
    whole = make_run("whole", **CHANGES)
    code, output = whole.train(ranks=1)
    assert code == 0, output
    run = make_run("run", **CHANGES)
    (tmp_path / "site.yaml").write_text(SITE)

    def dqtrain(*words: object) -> str:
        command = cluster.command("run", sys.executable, "-m", "dqtrain", *words)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def events(*kinds: str) -> list[dict]:
        file = run.path / "events.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        return [event for event in lines if event["event"] in kinds]

    def last_step() -> int:
        log = run.path / "log.jsonl"
        return max((json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")), default=0) if log.exists() else 0

    cluster.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    said = dqtrain("submit", run.config, "--site", tmp_path / "site.yaml", "--nodes", "1-2")
    assert ": 1-2 nodes x 1 rank, at most 0:30:00 each start" in said
    job = json.loads((run.path / "launch.json").read_text())["job"]
    until(lambda: events("job_start"), SLOW_S)
    assert f"job {job} is running on node1; 1 of 1-2 nodes x 1 rank, " in dqtrain("status", run.path)
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    until(lambda: last_step() >= 6, SLOW_S)
    cluster.run("scontrol", "requeue", job)
    until(lambda: len(events("job_start")) == 2, SLOW_S)
    assert f"job {job} is running on node1,node2; 2 of 1-2 nodes x 1 rank, " in dqtrain("status", run.path)
    until(lambda: events("finished"), SLOW_S)
    until(lambda: events("job_end")[-1]["why"] == "finished")
    assert (events("job_end")[-1]["code"], [event["nodes"] for event in events("job_start")]) == (0, [["node1"], ["node1", "node2"]])
    assert [event["ranks"] for event in events("start", "resume")] == [1, 2] and 0 < events("resume")[0]["step"] < 60
    for ours, theirs in zip(run.log(), whole.log(), strict=True):
        assert ours.keys() == theirs.keys() and (ours["step"], ours.get("tokens")) == (theirs["step"], theirs.get("tokens"))
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5 if name != "gradient_norm" else 1e-3), (ours["step"], name)
