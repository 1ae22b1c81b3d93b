"""A grid becomes runs: their names and configs, what is refused before any is queued, and a real array whose tasks are killed, requeued and submitted again."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from cluster import SLOW_S, Cluster, running, snapshot, until, write_files

from dqtrain.cli import main
from dqtrain.config import load_config
from dqtrain.rundir import RunDir
from launch.site import load_site
from launch.submit import ROOT, load_launch, new_launch, save_launch
from launch.sweep import load_sweep, points


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with config.yaml, train.jsonl, site.yaml and sweep.yaml."""
    write_files(tmp_path, "gpus_per_node: 0\ntime: 0:30:00\ninterface: eth0\ngrace_s: 60\n")
    write_sweep(tmp_path, {"train.lr": [0.001, 3e-5], "run.seed": [1, 2]})
    return tmp_path


def write_sweep(files: Path, grid: dict, **more: object) -> None:
    (files / "sweep.yaml").write_text(yaml.safe_dump({"config": str(files / "config.yaml"), "runs": str(files / "runs"), "grid": grid} | more, sort_keys=False))


def arguments(files: Path, *more: str) -> list[str]:
    return ["sweep", str(files / "sweep.yaml"), "--site", str(files / "site.yaml"), *more]


NAMES = ["train.lr=0.001,run.seed=1", "train.lr=0.001,run.seed=2", "train.lr=3e-05,run.seed=1", "train.lr=3e-05,run.seed=2"]


def test_points_are_the_grid_in_order_and_differ_from_the_config_in_their_values_alone(files: Path) -> None:
    found = points(load_sweep(files / "sweep.yaml"), ["train.steps=7"])
    assert [point.run.path for point in found] == [files / "runs" / name for name in NAMES]
    for point, (lr, seed) in zip(found, itertools.product([0.001, 3e-5], [1, 2]), strict=True):
        settings = [f"train.lr={lr}", f"run.seed={seed}", f"run.dir={point.run.path}", "train.steps=7"]
        assert point.config == load_config(files / "config.yaml", settings)


def test_the_example() -> None:
    sweep = load_sweep(ROOT / "configs/sweeps/example.yaml")
    found = points(sweep.model_copy(update={"config": ROOT / sweep.config}), [])
    assert [(point.config.train.lr, point.config.distill.contrast.weight) for point in found] == [(0.001, 0.0), (0.001, 0.1), (0.002, 0.0), (0.002, 0.1)]
    assert found[0].run.path.name == "train.lr=0.001,distill.contrast.weight=0.0"  # as its comment says


def test_values_of_all_kinds_arrive(files: Path) -> None:
    layers = [None, 1, [0, 2]]
    linears = {"bits": 2, "granularity": "per_tensor"}
    quants = [None, {"linears": linears, "embeddings": None, "positions": None, "activations": None}]
    write_sweep(files, {"student.decoder_layers": layers, "quant": quants, "data.validation": ["é 'x'/y.jsonl"]})
    settings = ["student={init_from: m}", "data.train_tokenizer=null"]
    found = points(load_sweep(files / "sweep.yaml"), settings)
    assert [point.config.student.decoder_layers for point in found] == [None, None, 1, 1, (0, 2), (0, 2)]
    assert [point.config.quant is None for point in found] == [True, False] * 3
    assert {point.config.data.validation for point in found} == {"é 'x'/y.jsonl"} and "/" not in found[0].run.path.name


@pytest.mark.parametrize(
    "grid, more, message",
    [
        ({"train.lr": [0.001, 0.001]}, [], "two points would be"),
        ({"data.validation": ["a/b", "a-b"]}, [], "two points would be"),
        ({"train.stpes": [1]}, [], "point train.stpes=1: command line: train.stpes: unknown key. Did you mean `steps`?"),
        ({"train.steps": [3, "many"]}, [], 'point train.steps=many: command line: train.steps: is "many"'),
        ({"run.dir": ["a"]}, [], "run.dir is a folder of `runs` for each point"),
        ({"train.lr": [0.1]}, ["train.lr=0.2"], "train.lr is in the grid and is given for all points too"),
        ({"run.seed": [1]}, ["run.dir=a"], "run.dir is a folder of `runs` for each point"),
        ({"train.lr": []}, [], "sweep.yaml:4: grid.train.lr: "),
        ({}, [], "sweep.yaml:3: grid: "),
        ({"data.train": ["builtin:python-stdlib", "nowhere.jsonl"]}, [], "data: nowhere.jsonl is not a file."),
        ({"data.validation": ["x" * 250]}, [], "is too long a name for a directory (200 bytes at most)"),
        ({"train.micro_batch": [1, 8]}, ["ranks_per_node: 2"], "point train.micro_batch=8: a step has 1 micro-batches"),
        ({"run.seed": [1]}, [], "sbatch is not on this machine's PATH."),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_touched(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, grid: dict, more: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(files))
    write_sweep(files, grid)
    for line in (line for line in more if ":" in line):
        with (files / "site.yaml").open("a") as site:
            site.write(line)
    before = snapshot(files)
    assert main(arguments(files, *(word for word in more if "=" in word))) == 2
    assert message in capsys.readouterr().err
    assert snapshot(files) == before


def test_a_finished_point_is_left_alone_unless_it_was_another(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(files, {"run.seed": [1, 2]})
    for point in points(load_sweep(files / "sweep.yaml"), []):
        point.run.claim(point.config)
        point.run.result.write_text("{}")
    assert main(arguments(files)) == 0
    assert capsys.readouterr().out == f"{files}/runs: nothing to do; 2 finished already.\n"
    assert main(arguments(files, "log.every_steps=2", "--dry-run")) == 0  # a passive field
    assert main(arguments(files, "train.lr=0.5")) == 2
    assert "run.seed=1 is a finished run with another config (there -> here):\n  train.lr: 3e-05 -> 0.5\nUse another" in capsys.readouterr().err


SITE = """\
gpus_per_node: 8
cpus_per_rank: 6
memory: 200G
account: a1
modules: [cuda/12.8]
time: 1-02:00:00
flags: [--constraint=a100, --exclusive, --comment=two words]
"""


def test_a_dry_run_prints_the_script_and_touches_nothing(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(files))
    (files / "site.yaml").write_text(SITE)
    before = snapshot(files)
    assert main(arguments(files, "--dry-run")) == 0
    assert snapshot(files) == before
    listing, _, script = capsys.readouterr().out.partition("\n\n")
    assert listing.splitlines() == ["one array of these runs:", *(f"  {files}/runs/{name}" for name in NAMES)]
    flags = {word for line in script.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]}
    assert flags == {
        "--requeue", "--job-name=dqtrain-runs", f"--chdir={Path.cwd()}", "--account=a1", "--nodes=1", "--ntasks-per-node=8", "--cpus-per-task=6", "--gpus-per-node=8",
        "--mem=200G", "--time=1-02:00:00", "--signal=B:USR1@180", "--export=ALL", "--constraint=a100", "--exclusive",
        "--comment=two words", "--array=0-3%4", "--open-mode=append", f"--output={files}/runs/.array/%A_%a_0_log.out",
    }  # fmt: skip
    assert "module load cuda/12.8 || exit 2" in script
    assert script.rstrip().splitlines()[-1] == f"exec {sys.executable} -u -m submitit.core._submit {files}/runs/.array"


def test_a_point_that_somebody_runs_is_left_alone(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = points(load_sweep(files / "sweep.yaml"), [])
    found[1].run.acquire()
    assert main(arguments(files, "--dry-run")) == 0
    assert capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:] == [f"  {files}/runs/{name}" for name in NAMES if name != NAMES[1]]
    # What Slurm alone can tell is not guessed.
    found[0].run.claim(found[0].config)
    save_launch(new_launch(load_site(files / "site.yaml"), (1, 1), None).followed_by("7_0"), found[0].run)
    monkeypatch.setenv("PATH", str(files))
    assert main(arguments(files, "--dry-run")) == 2
    assert "scontrol is not on this machine's PATH" in capsys.readouterr().err


def test_a_dry_run_here(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(files)
    command = ["sweep", str(files / "sweep.yaml"), "--here", "--dry-run"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == ["one after the other:", *(f"  {files}/runs/{name}" for name in NAMES)]
    assert main([*command, "--ranks", "9"]) == 2
    assert "a step has 8 micro-batches" in capsys.readouterr().err
    assert main([*command, "--time", "1:00:00"]) == 2
    assert main(arguments(files, "--ranks", "2")) == 2
    assert snapshot(files) == before


def test_help_is_fast_and_knows_no_submitit() -> None:
    body = "import sys; from dqtrain.cli import main\ntry: main(['sweep', '--help'])\nexcept SystemExit: print(sorted({'torch', 'submitit', 'cloudpickle'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_here(files: Path) -> None:
    write_sweep(files, {"run.seed": [1, 2], "train.steps": [2]})

    def here() -> list[str]:
        command = [sys.executable, "-m", "dqtrain", "sweep", files / "sweep.yaml", "--here"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW_S, env={**os.environ, "XDG_CACHE_HOME": str(files / "cache")})
        assert done.returncode == 0, done
        return done.stdout.splitlines()

    assert here()[-1] == "0 of 2 points were finished before, 2 are now."
    runs = [RunDir(files / f"runs/run.seed={seed},train.steps=2") for seed in (1, 2)]
    assert [run.load_config().run.seed for run in runs if run.result.exists()] == [1, 2]
    first = snapshot(runs[0].path)
    shutil.rmtree(runs[1].path)
    assert here()[-1] == "1 of 2 points were finished before, 1 are now."
    assert snapshot(runs[0].path) == first and runs[1].result.exists()


# ---- a real array


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from running(tmp_path / "state", "--nodes", 2)


@pytest.fixture
def dqtrain(cluster: Cluster) -> Callable[..., str]:
    """The command line on the login node, with a variable that is not for jobs."""
    return partial(cluster.dqtrain, LEFT_BEHIND="1")


def job_of(run: RunDir) -> str:
    launch = load_launch(run)
    assert launch is not None and launch.job is not None
    return launch.job


def test_an_array_waits_and_one_task_leaves_it(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    with (files / "site.yaml").open("a") as site:
        site.write("flags: [--begin=now+1days]\nmodules: []\n")
    script = dqtrain(*arguments(files, "--dry-run")).partition("\n\n")[2].rstrip()
    said = dqtrain(*arguments(files)).splitlines()
    runs = [RunDir(files / "runs" / name) for name in NAMES]
    array = job_of(runs[0]).partition("_")[0]
    assert [job_of(run) for run in runs] == [f"{array}_{task}" for task in range(4)]
    assert said[0] == f"submitted 4 runs as job {array}: 1 node x 1 rank each, at most 0:30:00 each start"
    assert said[1:5] == [f"  {array}_{task}  {run.path}" for task, run in enumerate(runs)]
    assert (files / f"runs/.array/{array}_submission.sh").read_text().rstrip() == script
    assert dqtrain(*arguments(files)) == f"{files}/runs: nothing to do; 4 queued or running already.\n"
    assert dqtrain("stop", runs[2].path) == f"job {array}_2 has left the queue. `dqtrain resume {runs[2].path}` goes on.\n"
    assert f"not running; job {array}_2 is not known to Slurm any more; " in dqtrain("status", runs[2].path)
    shown = dqtrain("status", *(run.path for run in runs))
    assert [f"job {array}_{task} is queued" in shown for task in range(4)] == [True, True, False, True]
    assert "submitted 1 run as job " in dqtrain(*arguments(files)) and job_of(runs[2]).isdecimal()


def test_what_slurm_refuses_is_said_once(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    with (files / "site.yaml").open("a") as site:
        site.write("partition: nowhere\n")
    said = dqtrain(*arguments(files), code=1)
    assert said.startswith("dqtrain: `sbatch` failed: ") and said.count("invalid partition specified: nowhere") == 1


@pytest.mark.slow
def test_a_killed_task_is_seen_and_submitted_again_and_a_requeued_one_goes_on(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    write_sweep(files, {"run.seed": [1, 2], "train.steps": [300], "checkpoint.every_steps": [20]})
    dqtrain(*arguments(files))
    runs = [RunDir(files / f"runs/run.seed={seed},train.steps=300,checkpoint.every_steps=20") for seed in (1, 2)]
    jobs = [job_of(run) for run in runs]
    until(lambda: runs[0].newest_step(), SLOW_S)
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[0])
    until(lambda: runs[1].newest_step(), SLOW_S)
    for module in ("supervisor", "task"):  # the one that could tell first
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"launch.{module}\0{runs[1].path}\0" in (folder / "cmdline").read_text():
                    assert "LEFT_BEHIND" not in (folder / "environ").read_text()
                    os.kill(int(folder.name), signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: f"not running; job {jobs[1]} is failed" in dqtrain("status", runs[1].path), 60)
    assert time.monotonic() - killed < 60 and runs[1].owner.exists()
    assert "submitted 1 run as job " in dqtrain(*arguments(files)) and job_of(runs[1]) != jobs[1]
    for run in runs:
        until(run.result.exists, SLOW_S)
    assert job_of(runs[0]) == jobs[0]
    ends = [[event["event"] for event in run.read_events() if event["event"] in ("requeue", "start", "resume", "finished")] for run in runs]
    assert ends == [["start", "requeue", "resume", "finished"], ["start", "resume", "finished"]]
    assert [[json.loads(line)["step"] for line in run.log.read_text().splitlines()] == list(range(1, 301)) for run in runs] == [True, True]
    assert "300/300" in dqtrain("logs", runs[0].path)
    until(lambda: [": finished" in dqtrain("status", run.path) for run in runs] == [True, True])
