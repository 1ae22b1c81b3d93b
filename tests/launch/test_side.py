"""Side jobs on a real Slurm: what they leave, what is said of those that were killed, and what is refused before anything is queued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import Cluster, container, start_cluster, until
from conftest import config_text, write_corpus

from dqtrain.cli import main
from dqtrain.config import load_config
from dqtrain.rundir import RunDir
from launch.side import SideJob, lines, side_jobs
from launch.submit import ROOT

CONFIG = """\
run: {dir: %s/run, seed: 3}
teacher: null
student: {architecture: {model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 16}}
data: {train: %s/train.jsonl, validation: %s/train.jsonl, tokens_per_sample: 16, train_tokenizer: {vocab_size: 300}}
train: {steps: 2, global_batch: 4, micro_batch: 1, lr: 1.0e-3}
quant: null
distill: {task: 1.0}
checkpoint: {every_steps: 2}
"""
SLOW_S = 240
FORGOTTEN = "unknown to Slurm by now, it left no exit code"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with config.yaml, train.jsonl and site.yaml."""
    write_corpus(tmp_path / "train.jsonl", 50, 0)
    (tmp_path / "config.yaml").write_text(CONFIG % ((tmp_path,) * 3))
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\ntime: 0:30:00\ngrace_s: 60\ninterface: eth0\n")
    return tmp_path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def record(run: RunDir, job: str, *words: str, code: int | None = None, printed: str = "", minute: int = 0) -> None:
    """The files of a side job, as it leaves them."""
    run.side.mkdir(parents=True, exist_ok=True)
    (run.side / f"{job}.json").write_text(json.dumps({"words": words, "job": job, "time": f"2026-11-22T02:{minute:02}:00.000+00:00"}))
    if printed:
        (run.side / f"{job}.out").write_text(printed)
    if code is not None:
        (run.side / f"{job}.end.json").write_text(json.dumps({"code": code}))


@pytest.mark.parametrize(
    "words, code, message",
    [
        ("prepare config.yaml train.stpes=3 --site site.yaml", 2, "train.stpes: unknown key"),
        ("prepare config.yaml data.test=no.jsonl --site site.yaml", 2, "data: no.jsonl is not a file."),
        ("prepare config.yaml --site no.yaml", 2, "no.yaml: cannot be read"),
        ("prepare config.yaml --time 1:00:00", 2, "--time is for jobs."),
        ("prepare config.yaml --tasks 2", 2, "--tasks is for jobs."),
        ("prepare config.yaml --part 0/2 --site site.yaml", 2, "--part is for this machine;"),
        ("prepare config.yaml --site site.yaml --time 0:00:30", 2, "--time: time is 0:00:30, 30 s"),
        ("prepare config.yaml --site site.yaml run.dir=a%b", 2, "holds '%', which Slurm or Python reads as something else"),
        ("prepare config.yaml --site site.yaml run.dir=finished", 2, "is a finished run"),
        ("prepare config.yaml --site site.yaml", 2, "sbatch is not on this machine's PATH."),
        ("cache-teacher config.yaml --site site.yaml", 2, "teacher is null, so that there is nothing to store."),
        ("cache-teacher teacher.yaml --ranks 2 --site site.yaml", 2, "--ranks is for this machine"),
        ("eval nowhere --site site.yaml", 2, "nowhere is no run, in whose directory a job could leave its output."),
        ("eval finished unfinished --site site.yaml", 4, "unfinished is unfinished (no checkpoint yet of 2 steps)"),
        ("eval finished --split test --site site.yaml", 2, "a run whose config has data.test."),
        ("eval finished --data no.jsonl --site site.yaml", 2, "data: no.jsonl is not a file."),
        ("eval finished gone --site site.yaml", 2, "data: gone.jsonl is not a file."),
        ("eval finished --time 1:00:00", 2, "--time is for jobs."),
        ("eval finished --site site.yaml", 2, "sbatch is not on this machine's PATH."),
        ("export unfinished --site site.yaml", 4, "is unfinished"),
        ("export finished --site site.yaml", 2, "sbatch is not on this machine's PATH."),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_touched(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, code: int, message: str
) -> None:
    monkeypatch.setenv("PATH", str(files))
    monkeypatch.chdir(files)
    for name, validation in {"finished": f"{files}/train.jsonl", "unfinished": f"{files}/train.jsonl", "gone": "gone.jsonl"}.items():
        (files / name).mkdir()
        (files / name / "run.yaml").write_text((files / "config.yaml").read_text().replace(f"validation: {files}/train.jsonl", f"validation: {validation}"))
    for name in ("finished", "gone"):
        (files / name / "result.json").write_text("{}")
    config = (files / "config.yaml").read_text().replace(", train_tokenizer: {vocab_size: 300}", "").replace("student:", "#")
    (files / "teacher.yaml").write_text(config.replace("teacher: null", "teacher: {path: t, source: hidden}").replace("task: 1.0", "logits: {weight: 1.0}"))
    before = snapshot(files)
    assert main(words.split()) == code
    said = capsys.readouterr()
    assert message in said.err and not said.out
    assert snapshot(files) == before


def test_what_is_said_of_ended_jobs_comes_from_their_files_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(files))
    run = RunDir(files / "run")
    assert lines(run) == []
    record(run, "7", "prepare", code=3, printed="counting\n\ndqtrain: empty.jsonl: holds no text.\n")
    record(run, "9_1", "eval", "--split", "test", code=0, printed='submitit INFO\n{"loss": 1.5}\n', minute=2)
    record(run, "10", "export", code=0, minute=3, printed='1%\r100% written\n{\n "ratio": 4.0\n}\n')
    record(run, "8", "eval", "--split", "test", code=3, printed="an older one\n", minute=1)
    record(run, "11", "eval", minute=4)
    assert lines(run) == [
        f"prepare: job 7 failed (exit code 3): dqtrain: empty.jsonl: holds no text.; it printed {run.side}/7.out",
        'eval --split test: job 9_1 is done: {"loss": 1.5}',
        'export: job 10 is done: "ratio": 4.0',
        "eval: job 11, of which Slurm says nothing now: scontrol is not on this machine's PATH. Submit from a login node of the cluster, or train here with "
        "`dqtrain train --ranks N`.",
    ]


def test_a_side_job_may_be_before_the_run(files: Path) -> None:
    run = RunDir(files / "run")
    record(run, "7", "prepare", code=0)
    assert run.check_claim(load_config(files / "config.yaml")) == "start"


# ---- on a real Slurm


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = start_cluster(tmp_path / "state", "--nodes", 2)
    yield cluster
    cluster.do("stop")


@pytest.fixture
def dqtrain(cluster: Cluster, files: Path) -> Callable[..., str]:
    """The command line on the login node."""

    def run(*words: object, code: int = 0) -> str:
        done = cluster.devcluster("run", "env", f"PYTHONPATH={ROOT}", f"XDG_CACHE_HOME={files}/cache", "LEFT_BEHIND=1", sys.executable, "-m", "dqtrain", *words)
        assert done.returncode == code, done
        return done.stdout + done.stderr

    return run


def only_job(run: RunDir) -> SideJob:
    [job] = side_jobs(run)
    return job


def said_of(dqtrain: Callable[..., str], run: RunDir) -> list[str]:
    return [line.removeprefix("  side       ") for line in dqtrain("status", run.path).splitlines() if line.startswith("  side ")]


def until_said(dqtrain: Callable[..., str], run: RunDir, text: str, timeout_s: float = 60) -> str:
    """What the status of a run says of its newest side job, when that begins with or holds a text."""
    deadline = time.monotonic() + timeout_s
    while text not in (said := said_of(dqtrain, run)[-1]):
        assert time.monotonic() < deadline, f"{text}: not in: {said}"
        time.sleep(0.2)
    return said


def processes_of(run: RunDir, *words: str) -> list[int]:
    """Processes that have the run and these words in their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_text().split("\0")
            if any(str(run.path) in word for word in command) and set(words) <= set(command):
                found.append(int(folder.name))
    return found


def kill(module: str, run: RunDir) -> None:
    """SIGKILL to a process of a side job, which has taken over from the shell what it should and no more."""
    [process] = processes_of(run, "-m", module)
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    assert {f"XDG_CACHE_HOME={run.path.parent}/cache", "HF_HUB_OFFLINE=1", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1"} <= set(variables)
    assert "LEFT_BEHIND=1" not in variables
    os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_side_job_in_a_container(cluster: Cluster, dqtrain: Callable[..., str], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = json.dumps(container(files, monkeypatch))
    (files / "site.yaml").write_text((files / "site.yaml").read_text() + f"container: {inside}\n")
    run = RunDir(files / "run")
    dqtrain("prepare", files / "config.yaml", "--site", files / "site.yaml")
    until_said(dqtrain, run, "is done: ", SLOW_S)
    assert f"\nin {files}/image.sif\n" in only_job(run).out.read_text()


@pytest.mark.slow
def test_a_side_job_that_was_killed_has_failed_within_a_minute(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    site = ["--site", files / "site.yaml"]
    (files / "later.yaml").write_text((files / "site.yaml").read_text() + "flags: [--begin=now+1days]\n")
    runs = [RunDir(files / name) for name in ("cancelled", "command", "process", "waiting")]
    for run in runs[:3]:
        dqtrain("prepare", files / "config.yaml", "data.train=builtin:python-stdlib", "data.train_tokenizer.vocab_size=40000", f"run.dir={run.path}", *site)
    said = dqtrain("prepare", files / "config.yaml", f"run.dir={runs[3].path}", "--site", files / "later.yaml")
    jobs = [only_job(run) for run in runs]
    assert said.splitlines() == [
        f"submitted prepare as job {jobs[3].job}: 1 node, at most 0:30:00",
        f"  {runs[3].side}/{jobs[3].job}.out",
        f"`dqtrain status {runs[3].path}` shows what becomes of it; `scancel {jobs[3].job}` ends it.",
    ]
    assert said_of(dqtrain, runs[3])[0].startswith(f"prepare: job {jobs[3].job} waits")
    again = dqtrain("prepare", files / "config.yaml", f"run.dir={runs[3].path}", *site, code=2)
    assert f"`prepare` waits already as job {jobs[3].job}. `scancel {jobs[3].job}` ends it." in again
    for run, job in zip(runs[:3], jobs, strict=False):
        until_said(dqtrain, run, f"prepare: job {job.job} runs on node")
    until(lambda: "training a tokenizer" in jobs[2].out.read_text())
    cluster.run("scancel", jobs[0].job)
    kill("dqtrain", runs[1])
    kill("launch.side", runs[2])
    cluster.run("scancel", jobs[3].job)
    killed = time.monotonic()
    for run, job, why in zip(runs, jobs, ("cancelled", "exit code 137)", "it left no exit code)", "cancelled"), strict=True):
        until_said(dqtrain, run, f"prepare: job {job.job} failed ({why}")
    assert time.monotonic() - killed < 60
    until(lambda: not processes_of(runs[2]))  # its children, too
    assert jobs[2].end.exists() is False and json.loads(jobs[1].end.read_text()) == {"code": 137}
    assert "training a tokenizer of 40,000 entries" in said_of(dqtrain, runs[2])[0]
    record(runs[3], "4242", "eval", "--split", "test")  # as one that Slurm has forgotten
    assert said_of(dqtrain, runs[3])[0].startswith(f"eval --split test: job 4242 failed ({FORGOTTEN})")
    assert "submitted prepare as job " in dqtrain("prepare", files / "config.yaml", f"run.dir={runs[3].path}", *site)
    until_said(dqtrain, runs[3], "is done: ", SLOW_S)


def test_a_mistake_that_shows_only_in_the_job_ends_it(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    (files / "empty.jsonl").write_text("")
    run = RunDir(files / "run")
    dqtrain("prepare", files / "config.yaml", f"data.train={files}/empty.jsonl", "--site", files / "site.yaml")
    said = until_said(dqtrain, run, "failed", SLOW_S)
    assert said.startswith(f"prepare: job {only_job(run).job} failed (exit code 3): dqtrain: ") and "empty.jsonl" in said
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", only_job(run).job)


@pytest.mark.slow
def test_prepare_then_eval_and_export_of_two_runs(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    site = ["--site", files / "site.yaml", "--time", "0:20:00"]
    runs = [RunDir(files / name) for name in ("one", "two")]
    said = dqtrain("prepare", files / "config.yaml", f"run.dir={runs[0].path}", f"data.shards={files}/shards", "--tasks", 2, *site)
    assert said.startswith("submitted prepare in 2 parts as job ")
    until(lambda: [line.partition(": ")[0] for line in said_of(dqtrain, runs[0]) if "is done" in line] == ["prepare --part 0/2", "prepare --part 1/2"], SLOW_S)
    shards = snapshot(files / "shards")
    assert len(list((files / "shards").iterdir())) == 2
    for seed, run in enumerate(runs):
        subprocess.run(
            [sys.executable, "-m", "dqtrain", "train", files / "config.yaml", f"run.dir={run.path}", f"data.shards={files}/shards", f"run.seed={seed}"],
            check=True, capture_output=True, timeout=SLOW_S, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert snapshot(files / "shards") == shards

    said = dqtrain("eval", *(run.path for run in runs), *site)
    assert said.startswith("submitted eval of 2 runs as job ") and ": 1 node each, at most 0:20:00\n" in said
    dqtrain("export", runs[0].path, *site)
    for run, verb in zip(runs, ("export", "eval --split validation"), strict=True):
        assert until_said(dqtrain, run, "is done: ", SLOW_S).startswith(f"{verb}: job ")
    until(lambda: "is done: " in said_of(dqtrain, runs[0])[-2], SLOW_S)
    figures = [json.loads(next(job for job in side_jobs(run) if job.words[0] == "eval").last_line()) for run in runs]
    here = dqtrain("eval", *(run.path for run in runs)).splitlines()
    assert [json.loads(line) for line in here] == [{"model": str(run.path), **found} for run, found in zip(runs, figures, strict=True)]
    assert figures[0] != figures[1] and (runs[0].artifact("hf") / "parity.json").is_file()


@pytest.mark.slow
def test_cache_teacher_on_all_ranks_of_a_node(cluster: Cluster, dqtrain: Callable[..., str], files: Path, world: Path) -> None:
    changes = {"teacher": f"{{path: {world}/teacher, source: top_k, draws: 4}}", "distill": "{logits: {weight: 1.0}}", "eval": "{}"}
    (files / "cached.yaml").write_text(config_text(world, files / "run", **changes).replace(f"{world}/shards", f"{files}/shards"))
    (files / "site.yaml").write_text("gpus_per_node: 0\nranks_per_node: 2\ntime: 0:30:00\ngrace_s: 60\ninterface: eth0\n")
    run = RunDir(files / "run")
    dqtrain("cache-teacher", files / "cached.yaml", "--site", files / "site.yaml")
    said = until_said(dqtrain, run, "is done: ", SLOW_S)
    assert said.startswith("cache-teacher --ranks 2: job ") and "target tokens" in said
    assert run.rank_log(1).exists()


@pytest.mark.slow
def test_jobs_find_a_model_of_the_hub_in_its_cache(cluster: Cluster, dqtrain: Callable[..., str], files: Path, world: Path) -> None:
    """The nodes reach no hub; the cache is made by hand, as huggingface_hub and dqtrain leave it."""
    commit = 40 * "a"
    repository = files / "cache/huggingface/hub/models--someone--teacher"
    snapshot = shutil.copytree(world / "teacher", repository / "snapshots" / commit)
    (repository / "dqtrain").mkdir()
    (repository / f"dqtrain/{commit}.json").write_text(json.dumps({path.name: "checked" for path in snapshot.iterdir()}))
    changes = {"teacher": f"{{path: hf:someone/teacher@{commit}}}", "train": "{steps: 2, global_batch: 4, micro_batch: 2, lr: 1.0e-3}", "eval": "{}"}
    (files / "config.yaml").write_text(config_text(world, files / "run", **changes).replace(f"{world}/shards", f"{files}/shards"))
    run = RunDir(files / "run")
    dqtrain("prepare", files / "config.yaml", "--site", files / "site.yaml")
    until_said(dqtrain, run, "is done: ", SLOW_S)
    dqtrain("submit", files / "config.yaml", "--site", files / "site.yaml")
    until(run.result.exists, SLOW_S)
    assert f"path: hf:someone/teacher@{commit}\n" in run.config.read_text()
