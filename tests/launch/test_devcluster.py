"""The development cluster is a real Slurm, its nodes fail as real ones do, and it leaves nothing behind.

Skipped where it cannot run (no root, no Slurm), unless DQTRAIN_REQUIRE_SLURM is set: then that is a failure.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import DEVCLUSTER, NODES, Cluster, is_gone, namespaces_of, running, start_cluster, until

COUNT_FOREVER = "i=0; while :; do echo $((++i)) >count.new; mv count.new count; sleep 0.05; done"

TALK = """
import os, socket, time
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server(("", 5000)) as server:
        connection, _ = server.accept()
        print(connection.recv(100).decode())
else:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection((os.environ["FIRST"], 5000), timeout=5) as connection:
                connection.sendall(f"{socket.gethostname()} reached {os.environ['FIRST']}".encode())
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(tmp_path_factory.mktemp("devcluster") / "state", "--slurmd-timeout", 10)


@pytest.fixture(scope="module")
def time_limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job that asks for USR1 before its time limit. Slurm looks every 30 seconds, so it is submitted early and looked at late."""
    folder = tmp_path_factory.mktemp("time_limited")
    script = "trap 'echo USR1; exit 0' USR1\nwhile :; do sleep 0.2; done\n"
    return cluster.submit(folder, script, "--nodelist=node1", "--time=1", "--signal=B:USR1@60"), folder


@pytest.fixture
def counter(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A job on node2 that counts. Gives a function that reads the count."""
    job = cluster.submit(tmp_path, COUNT_FOREVER, "--nodelist=node2")
    until((tmp_path / "count").exists)
    yield lambda: int((tmp_path / "count").read_text())
    cluster.run("scancel", job)


def test_four_nodes_are_four_hosts(cluster: Cluster, time_limited: tuple[str, Path]) -> None:
    assert sorted(cluster.run("srun", "--nodes=4", "hostname").split()) == NODES
    assert cluster.run("hostname").strip() == "login"
    assert cluster.is_healthy()


def test_run_passes_on_folder_output_and_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.start_in_background("bash", "-c", "pwd; echo $SLURM_CONF; exit 7", cwd=tmp_path)
    assert (process.communicate(timeout=30)[0], process.returncode) == (f"{tmp_path}\n/etc/slurm/slurm.conf\n", 7)


def test_a_rank_reaches_another_node_by_its_name(cluster: Cluster) -> None:
    script = f'FIRST=$(scontrol show hostnames | head -n 1) exec srun --kill-on-bad-exit=1 {sys.executable} -c "$0"'
    assert (
        cluster.run("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--nodelist=node3,node4", "bash", "-c", script, TALK).strip()
        == "node4 reached node3"
    )


def test_preemption_ends_a_job_of_main_with_sigterm(cluster: Cluster, tmp_path: Path) -> None:
    task = "trap 'echo TERM; exit 75' TERM; touch ready; while :; do sleep 0.1; done"
    job = cluster.submit(tmp_path, f'srun bash -c "{task}" || echo ended $?\n', "--nodes=1", "--nodelist=node4", "--exclusive")
    until((tmp_path / "ready").exists)
    assert cluster.run("srun", "--partition=urgent", "--nodelist=node4", "--exclusive", "hostname").strip() == "node4"
    until(lambda: cluster.job(job, "%T") == "COMPLETED")
    assert {"TERM", "ended 75"} <= set((tmp_path / "out").read_text().splitlines())


def test_freeze_and_thaw(cluster: Cluster, counter: Callable[[], int]) -> None:
    cluster.do("node", "node2", "freeze")
    count = counter()
    time.sleep(0.5)
    assert counter() == count
    assert cluster.is_reachable("node2")  # the kernel answers for a hung node
    status = cluster.devcluster("status")
    assert status.returncode == 1 and "node2   frozen" in status.stdout
    cluster.do("node", "node2", "thaw")
    until(lambda: counter() > count)


def test_cut_and_mend(cluster: Cluster, counter: Callable[[], int]) -> None:
    assert cluster.is_reachable("node2")
    cluster.do("node", "node2", "cut")
    assert not cluster.is_reachable("node2")
    assert "node2   cut" in cluster.devcluster("status").stdout
    count = counter()
    until(lambda: counter() > count)  # it does not notice
    cluster.do("node", "node2", "mend")
    until(lambda: cluster.is_reachable("node2"))


def test_a_job_outlives_a_restart_of_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path, COUNT_FOREVER)
    until((tmp_path / "count").exists)
    count = int((tmp_path / "count").read_text())
    cluster.do("restart-controller")
    assert cluster.job(job, "%T") == "RUNNING"
    until(lambda: int((tmp_path / "count").read_text()) > count)
    cluster.run("scancel", job)
    until(cluster.is_healthy)


@pytest.mark.slow
def test_a_job_is_requeued_when_its_node_loses_power(cluster: Cluster, tmp_path: Path) -> None:
    script = """
    echo ${SLURM_RESTART_COUNT:-0} $(scontrol show hostnames)
    [[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 1000
    """
    job = cluster.submit(tmp_path, script, "--nodes=2", "--requeue", "--exclude=node1")
    until(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text().endswith("\n"))
    victim = (tmp_path / "out").read_text().split()[-1]
    processes = cluster.processes(victim)
    assert len(processes) >= 2  # its first one and slurmd
    cluster.do("node", victim, "off")
    assert all(map(is_gone, processes))
    until(lambda: cluster.job(job, "%T") == "COMPLETED", timeout_s=80)
    first, *_, last = (tmp_path / "out").read_text().splitlines()  # between them slurmstepd says why
    assert (first[0], last[0]) == ("0", "1")
    assert len(last.split()) == 3 and victim not in last
    assert f"{victim}   off     down*" in cluster.devcluster("status").stdout
    cluster.do("node", victim, "on")
    assert cluster.is_healthy()


@pytest.mark.slow
def test_usr1_reaches_the_batch_script_before_the_time_limit(cluster: Cluster, time_limited: tuple[str, Path]) -> None:
    job, folder = time_limited
    until(lambda: cluster.job(job, "%T") == "COMPLETED")
    assert (folder / "out").read_text() == "USR1\n"


def test_a_second_start_is_refused(cluster: Cluster) -> None:
    done = cluster.devcluster("start")
    assert done.returncode == 1
    assert done.stderr.startswith(f"devcluster: a cluster runs already in {cluster.state}. Stop it: ")
    assert cluster.is_healthy()


def test_stop_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    def machine() -> tuple[str, list[str], list[str]]:
        return Path("/proc/self/mountinfo").read_text(), os.listdir("/sys/class/net"), os.listdir("/etc/slurm")

    before = machine()
    second = start_cluster(tmp_path / "state", "--nodes", 2)  # beside the first
    srun = second.start_in_background("srun", "--nodes=2", "sleep", 1000, cwd=tmp_path)
    second.submit(tmp_path, "sleep 1000 & disown; sleep 1000")
    second.do("node", "node2", "freeze")
    processes = second.processes()
    assert len(processes) > 10
    assert second.do("stop") == "stopped.\n"
    srun.communicate(timeout=10)
    namespaces = set().union(*processes.values())
    assert all(map(is_gone, processes))
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if namespaces_of(pid) & namespaces]
    assert machine() == before
    assert not second.state.exists()
    assert second.do("stop") == f"no cluster in {second.state}.\n"
    assert cluster.is_healthy()


def test_what_a_crash_leaves_is_cleaned_up(cluster: Cluster, tmp_path: Path) -> None:
    second = start_cluster(tmp_path / "state", "--nodes", 1)
    processes = second.processes()
    os.kill(int((second.state / "run/room").read_text().split()[0]), 9)
    until(lambda: all(map(is_gone, processes)))
    assert second.devcluster("status").returncode == 1
    start_cluster(tmp_path / "state", "--nodes", 1)
    processes = second.processes()
    subprocess.run(["rm", "-r", second.state], check=True)  # what a user may do
    until(lambda: all(map(is_gone, processes)))


def test_messages(cluster: Cluster, tmp_path: Path) -> None:
    def refusal(code: int, *command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == code, done
        return done.stderr

    none = Cluster(tmp_path / "none")
    assert refusal(1, *none.command("run", "sinfo")) == f"devcluster: no cluster runs in {none.state}. Start one: {DEVCLUSTER} start\n"
    assert refusal(2, *cluster.command("node", "node5", "off")) == "devcluster: there is no node node5; the nodes are node1 to node4.\n"
    assert refusal(2, *cluster.command("node", "node1", "shake")) == "devcluster: a node can be off, on, freeze, thaw, cut or mend, not shake.\n"
    assert refusal(2, *none.command("start", "--nodes", "0")) == "devcluster: --nodes is 0, but must be 1 to 200.\n"
    assert refusal(2, DEVCLUSTER, "strat") == f"devcluster: there is no command strat. See: {DEVCLUSTER} help\n"
    assert refusal(2, "unshare", "--user", *none.command("start")) == f"devcluster: must be run as root; try: sudo {DEVCLUSTER} start\n"
    without_slurm = 'mount -t tmpfs none /usr/sbin && exec "$@"'
    assert "munged slurmctld slurmd. Install with: apt-get install -y --no-install-recommends slurm-wlm munge" in refusal(
        2, "unshare", "--mount", "bash", "-c", without_slurm, "bash", *none.command("start")
    )
    error = refusal(1, *none.command("start", "--set", "Colour=red"))
    assert error.startswith("devcluster: slurmctld does not answer; is a --set line wrong?\n") and "unrecognized key: Colour" in error
    assert not none.state.exists()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/thesis").touch()
    for name in ("start", "stop"):
        assert refusal(1, *none.command(name)).startswith(f"devcluster: {none.state} holds files of something else")
    assert (tmp_path / "none/thesis").exists()
