"""A run that makes do with fewer nodes than it would like: it starts on what there is, takes more when there is more, and trains on the same samples."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Job, running
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


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from running(tmp_path / "state", "--nodes", 2)


@pytest.mark.slow
def test_a_run_takes_the_nodes_that_there_are(cluster: Cluster, make_run: Callable[..., Run], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    whole = make_run("whole", **CHANGES)
    code, output = whole.train(ranks=1)
    assert code == 0, output
    (tmp_path / "site.yaml").write_text(SITE)
    made = make_run("run", **CHANGES)
    run = Job(made.path, made.config, cluster, tmp_path / "site.yaml")

    cluster.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    code, said = run.login("submit", run.config, "--site", run.site, "--nodes", "1-2")
    assert code == 0 and ": 1-2 nodes x 1 rank, at most 0:30:00 each start" in said
    run.until(lambda: run.events("job_start"))
    assert f"job {run.job} is running on node1; 1 of 1-2 nodes x 1 rank, " in run.login("status", run.path)[1]
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    run.until_step(6)
    cluster.run("scontrol", "requeue", run.job)
    run.until(lambda: len(run.events("job_start")) == 2)
    assert f"job {run.job} is running on node1,node2; 2 of 1-2 nodes x 1 rank, " in run.login("status", run.path)[1]
    run.until(lambda: run.events("finished"))
    end = run.until_ended()
    assert (end["code"], end["why"], [event["nodes"] for event in run.events("job_start")]) == (0, "finished", [["node1"], ["node1", "node2"]])
    run.note_costs(request.node.name)
    assert [event["ranks"] for event in run.events("start", "resume")] == [1, 2] and 0 < run.events("resume")[0]["step"] < 60
    for ours, theirs in zip(run.log(), whole.log(), strict=True):
        assert ours.keys() == theirs.keys() and (ours["step"], ours.get("tokens")) == (theirs["step"], theirs.get("tokens"))
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5 if name != "gradient_norm" else 1e-3), (ours["step"], name)
