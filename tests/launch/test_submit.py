"""What is submitted is what was checked: the command to the letter, every refusal before anything is touched, and a real Slurm that takes the job."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, start_cluster
from conftest import write_corpus

from dqtrain.cli import main
from dqtrain.rundir import RunDir
from launch.submit import ROOT, SCRIPT, Launch, load_launch

CONFIG = """\
run: {dir: %s/run, seed: 3}
teacher: null
student: {architecture: {model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 16}}
data: {train: %s/train.jsonl, tokens_per_sample: 16, train_tokenizer: {vocab_size: 300}}
train: {steps: 4, global_batch: 8, micro_batch: 1, lr: 3e-5}
quant: null
distill: {task: 1.0}
checkpoint: {every_steps: 2}
"""

KEPT = "HF_HOME,HF_HUB_CACHE,HOME,LANG,LC_ALL,LOGNAME,PATH,SHELL,TZ,USER,XDG_CACHE_HOME"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with config.yaml, train.jsonl and site.yaml."""
    write_corpus(tmp_path / "train.jsonl", 20, 0)
    (tmp_path / "config.yaml").write_text(CONFIG % (tmp_path, tmp_path))
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\ntime: 1:00:00\n")
    return tmp_path


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH without any of Slurm's programs, but with git."""
    (tmp_path / "bin").mkdir()
    git = shutil.which("git")
    if git:
        (tmp_path / "bin/git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def arguments(files: Path, *more: str) -> list[str]:
    return ["submit", str(files / "config.yaml"), "--site", str(files / "site.yaml"), *more]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


SITE = """\
gpus_per_node: 8
ranks_per_node: 4
cpus_per_rank: 6
memory: 200G
partition: gpu
account: a1
qos: high
modules: [cuda/12.8, gcc]
keep_environment: [HF_HOME]
grace_s: 100
flags: [--constraint=a100, --comment=two words]
"""


def test_a_dry_run_prints_the_command_and_touches_nothing(files: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "site.yaml").write_text(SITE)
    before = snapshot(files)
    assert main(arguments(files, "--nodes", "2", "--time", "1-02:00:00", "--dry-run")) == 0
    assert snapshot(files) == before
    command, script = capsys.readouterr().out.split("\n\n", 1)
    run = files / "run"
    assert shlex.split(command) == [
        "sbatch", "--open-mode=append", f"--output={run}/slurm-%j.out", "--requeue", "--job-name=dqtrain-run", f"--chdir={Path.cwd()}", "--partition=gpu", "--account=a1", "--qos=high", "--nodes=2", "--ntasks-per-node=4",
        "--cpus-per-task=6", "--gpus-per-node=8", "--mem=200G", "--time=1-02:00:00", "--signal=B:USR1@160",
        f"--export={KEPT},HF_HOME", "--constraint=a100", "--comment=two words", f"{run}/code/slurm/train.sbatch", str(run), sys.executable, "cuda/12.8", "gcc",
    ]  # fmt: skip
    assert script == (ROOT / SCRIPT).read_text() + "\n"


def test_what_is_left_out_of_a_site_is_left_to_slurm(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(files, "--dry-run")) == 0
    assert [word for word in shlex.split(capsys.readouterr().out.split("\n\n")[0]) if not word.startswith(("--chdir", "--output"))] == [
        "sbatch", "--open-mode=append", "--requeue", "--job-name=dqtrain-run", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=1:00:00",
        "--signal=B:USR1@180", f"--export={KEPT}", f"{files}/run/code/slurm/train.sbatch", str(files / "run"), sys.executable,
    ]  # fmt: skip


def test_nodes_that_failed_are_avoided_until_they_are_not(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "run").mkdir()
    entries = {"node3": {"until": "2999-01-01T00:00:00+00:00", "why": "a"}, "node2": {"until": "2020-01-01T00:00:00+00:00", "why": "b"}}
    entries |= {"node1": {"until": "2999-01-01T00:00:00+00:00", "why": "c"}}
    (files / "run/excluded.json").write_text(json.dumps(entries))
    assert main(arguments(files, "--dry-run")) == 0
    assert "--exclude=node1,node3" in shlex.split(capsys.readouterr().out)


def test_it_takes_less_than_a_second_and_no_torch(files: Path) -> None:
    body = f"import sys; from dqtrain.cli import main; code = main({arguments(files, '--dry-run')!r}); print(sorted({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules))); sys.exit(code)"
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.splitlines()[-1] == "[]"
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 1


BIG = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    "change, more, message",
    [
        ("", ["train.stpes=3"], "command line: train.stpes: unknown key. Did you mean `steps`?"),
        ("", ["train.steps=none"], 'command line: train.steps: is "none"'),
        ("", ["data.train=nowhere.jsonl"], "data: nowhere.jsonl is not a file."),
        (
            "",
            ["student={{}}", "data={{train: {files}/train.jsonl, tokens_per_sample: 16}}", "teacher.path={files}"],
            "no config.json there. Give a Hugging Face",
        ),
        ("", ["train.micro_batch=8", "--nodes", "2"], "a step has 1 micro-batches (train.global_batch 8 / train.micro_batch 8), which 2 ranks cannot share"),
        ("ranks_per_node: 9", [], "which 9 ranks cannot share"),
        ("colour: red", [], "site.yaml:3: colour: unknown key."),
        ("", ["train.micro_batch=8", "--nodes", "1-2"], "which 2 ranks cannot share"),
        ("", ["--time", "soon"], "--time: time is `soon`, but must be [DAYS-]HOURS:MINUTES:SECONDS"),
        ("", ["--time", "0:03:00"], "--time: time is 0:03:00, 180 s, of which the last 180 are for saving"),
        ("", ["run.dir={files}/a%b"], "a%b holds '%', which Slurm or Python reads as something else."),
        ("", ["run.dir={files}/a:b"], "a:b holds ':', which Slurm or Python reads as something else."),
        ("", ["run.dir={files}/train.jsonl"], "train.jsonl cannot be made"),
        ("", ["run.dir={files}"], "is not a run directory: it has no run.yaml, but holds bin, config.yaml"),
        ("", [], "sbatch is not on this machine's PATH. Submit from a login node of the cluster, or train here with `dqtrain train --ranks N`."),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_touched(
    files: Path, no_slurm: None, capsys: pytest.CaptureFixture[str], change: str, more: list[str], message: str
) -> None:
    with (files / "site.yaml").open("a") as site:
        site.write(change)
    before = snapshot(files)
    assert main(arguments(files, *(word.format(files=files) for word in more))) == 2
    assert message in capsys.readouterr().err
    assert snapshot(files) == before


def test_a_run_that_does_not_fit_is_refused_with_one_that_does(files: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "site.yaml").write_text("gpus_per_node: 8\ngpu: a10\ntime: 1:00:00\n")
    more = [f"student.architecture={json.dumps(BIG)}", "--dry-run"]
    assert main(arguments(files, *more)) == 2
    assert "this does not fit: " in capsys.readouterr().err
    assert main(arguments(files, "--dry-run")) == 0


def test_an_elastic_run_must_fit_into_its_fewest_nodes(files: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "site.yaml").write_text("gpus_per_node: 8\ngpu: a100-80\ntime: 1:00:00\n")
    more = [f"student.architecture={json.dumps(BIG)}", "train.global_batch=64", "--dry-run"]
    assert main(arguments(files, *more, "--nodes", "8")) == 0
    assert "--nodes=8" in capsys.readouterr().out
    assert main(arguments(files, *more, "--nodes", "1-8")) == 2
    assert "this does not fit: " in capsys.readouterr().err


@pytest.mark.parametrize("text, asked", [("3", "3"), ("2-4", "2-4"), ("4-4", "4")])
def test_numbers_of_nodes(files: Path, capsys: pytest.CaptureFixture[str], text: str, asked: str) -> None:
    (files / "site.yaml").write_text("gpus_per_node: 8\nranks_per_node: 2\ncpus_per_rank: 3\ntime: 1:00:00\n")
    assert main(arguments(files, "--nodes", text, "--dry-run")) == 0
    flags = shlex.split(capsys.readouterr().out.split("\n\n")[0])
    assert f"--nodes={asked}" in flags
    assert ("--mincpus=6" in flags, "--ntasks-per-node=2" in flags, "--cpus-per-task=3" in flags) == (("-" in asked), ("-" not in asked), ("-" not in asked))


@pytest.mark.parametrize(
    "text, message", [("0", "0 is not a count"), ("2-", " is not a count"), ("4-2", "4-2: the fewest nodes come first, as in 2-4"), ("a", "a is not")]
)
def test_what_is_no_number_of_nodes(files: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    with pytest.raises(SystemExit):
        main(arguments(files, "--nodes", text, "--dry-run"))
    assert message in capsys.readouterr().err


def test_no_time_limit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "site.yaml").write_text("gpus_per_node: 0\n")
    assert main(arguments(files)) == 2
    assert "a job needs a time limit. Give --time, such as --time 24:00:00, or set `time` in the site file." in capsys.readouterr().err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_that_is_finished_owned_or_another_is_refused(files: Path, no_slurm: None, capsys: pytest.CaptureFixture[str], dry: list[str]) -> None:
    def refusal(*more: str) -> str:
        before = snapshot(files)
        assert main(arguments(files, *more, *dry)) == 2
        assert snapshot(files) == before
        return capsys.readouterr().err

    run = RunDir(files / "run")
    run.acquire()
    assert f"is being run by process {os.getpid()}" in refusal()
    run.release()
    from dqtrain.config import load_config

    run.claim(load_config(files / "config.yaml"))
    (run.checkpoints / "step-000000002").mkdir(parents=True)
    assert "holds a run with another config (there -> here):\n  train.lr: 3e-05 -> 0.1" in refusal("train.lr=0.1")
    run.result.write_text("{}")
    assert "is a finished run" in refusal()


class Job:
    """The batch script as Slurm starts it, but with a supervisor that says how it was called."""

    SUPERVISOR = "import json, os, sys\nprint(json.dumps({'argv': sys.argv[1:], 'path': sys.path, 'file': __file__, 'env': dict(os.environ)}))\n"

    def __init__(self, folder: Path) -> None:
        self.run, self.cwd = folder / "a run", folder / "checkout"
        for place, text in ((self.run / "code", self.SUPERVISOR), (self.cwd, "raise SystemExit('the wrong supervisor')")):
            (place / "launch").mkdir(parents=True)
            (place / "launch/__init__.py").touch()
            (place / "launch/supervisor.py").write_text(text)

    def start(self, *modules: str, module: str | None = None) -> subprocess.CompletedProcess:
        function = {"BASH_FUNC_module%%": f"() {{ {module}\n}}"} if module else {}
        return subprocess.run(
            ["bash", ROOT / SCRIPT, self.run, sys.executable, *modules],
            cwd=self.cwd, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], **function},
        )  # fmt: skip


def test_the_script_starts_the_runs_own_code(tmp_path: Path) -> None:
    job = Job(tmp_path)
    done = job.start()
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["argv"], said["file"]) == ([str(job.run)], f"{job.run}/code/launch/supervisor.py")
    assert said["path"][0] == f"{job.run}/code" and str(job.cwd) not in said["path"] and said["env"]["SLURM_EXPORT_ENV"] == "ALL"


def test_the_script_loads_modules(tmp_path: Path) -> None:
    done = Job(tmp_path).start("cuda/12.8", "a b", module='export LOADED="$#: $*"')
    assert json.loads(done.stdout)["env"]["LOADED"] == "3: load cuda/12.8 a b"
    failed = Job(tmp_path / "other").start("cuda/99", module="return 1")
    assert failed.returncode == 2 and "dqtrain: the modules cuda/99 cannot be loaded on " in failed.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_the_script_is_clean() -> None:
    assert subprocess.run(["shellcheck", ROOT / SCRIPT], capture_output=True, text=True).stdout == ""


# ---- a real Slurm, whose jobs wait for another day


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = start_cluster(tmp_path_factory.mktemp("submit") / "state", "--nodes", 2)
    yield cluster
    cluster.do("stop")


@pytest.fixture
def dqtrain(cluster: Cluster, files: Path) -> Callable[..., tuple[int, str]]:
    """The command line on the login node, for a site whose jobs wait."""
    (files / "site.yaml").write_text("gpus_per_node: 0\ntime: 1:00:00\nflags: [--begin=now+1days]\nenvironment: {COLOUR: red}\n")

    def run(*words: object, code: int = 0) -> str:
        done = cluster.devcluster("run", "env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "dqtrain", *words)
        assert done.returncode == code, done
        return done.stdout + done.stderr

    return run


def facts(cluster: Cluster, job: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in cluster.run("scontrol", "show", "job", "--oneliner", job).split() if "=" in word)


def test_a_job_waits_is_seen_stopped_and_submitted_again(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    run = RunDir(files / "run")
    said = dqtrain(*arguments(files, "--nodes", "2"))
    launch = load_launch(run)
    assert launch is not None and launch.job is not None
    assert said.startswith(f"submitted job {launch.job}: 2 nodes x 1 rank, at most 1:00:00 each start\n  dqtrain status {run.path}")
    job = facts(cluster, launch.job)
    assert (job["JobState"], job["JobName"], job["NumNodes"], job["NumTasks"]) == ("PENDING", "dqtrain-run", "2-2", "2")
    assert (job["TimeLimit"], job["Requeue"], job["Command"].split()[0]) == ("01:00:00", "1", str(run.code / SCRIPT))
    assert job["StdOut"] == str(run.job_log(launch.job)) and job["WorkDir"] == str(Path.cwd())
    assert [event["event"] for event in run.read_events()] == ["submit"] and run.read_events()[0]["job"] == launch.job

    # All that a start needs is in the run.
    code = {str(file.relative_to(ROOT)): file.read_bytes() for package in ("dqtrain", "launch") for file in (ROOT / package).rglob("*.py")}
    code[str(SCRIPT)] = (ROOT / SCRIPT).read_bytes()
    assert {str(file.relative_to(run.code)): file.read_bytes() for file in run.code.rglob("*") if file.is_file()} == code
    environment = json.loads(run.environment.read_text())
    assert environment["variables"]["COLOUR"] == "red" and environment["variables"]["PATH"] and "SLURM_CONF" not in environment["variables"]
    assert any(package.startswith("pydantic==") for package in environment["packages"])
    assert run.load_config().run.dir == run.path

    assert f"has a job already: {launch.job}, pending. `dqtrain stop {run.path}` ends it; then submit again." in dqtrain(*arguments(files), code=2)
    assert f"has a job already: {launch.job}" in dqtrain("resume", run.path, "--here", code=2)
    shown = dqtrain("status", run.path)
    assert re.match(rf"{run.path}: job {launch.job} is queued( \(BeginTime\))?, expected to start at .*; 2 nodes x 1 rank\n", shown)
    assert "100%)" in shown and "goodput" in shown  # all of it in the queue

    assert dqtrain("stop", run.path) == f"job {launch.job} has left the queue. `dqtrain resume {run.path}` goes on.\n"
    assert facts(cluster, launch.job)["JobState"] == "CANCELLED" and not run.stop.exists()
    assert f"not running; job {launch.job} is cancelled; `dqtrain resume {run.path}` goes on" in dqtrain("status", run.path)
    assert "There is nothing to stop." in dqtrain("stop", run.path, code=2)

    # The killed owner of that job is known to be dead before its heartbeat is old.
    run.acquire()
    run.owner.write_text(json.dumps({**json.loads(run.owner.read_text()), "host": "node9", "job": "1"}))
    assert "is being run by process" in dqtrain("resume", run.path, code=2)
    run.owner.write_text(json.dumps({**json.loads(run.owner.read_text()), "job": launch.job}))

    assert "--ranks is for this machine" in dqtrain("resume", run.path, "--ranks", 1, code=2)
    assert dqtrain("resume", run.path).startswith("submitted job ")
    again = load_launch(run)
    assert again is not None and again.job != launch.job
    assert again == launch.followed_by(str(again.job)) and again.history == (launch.job,)
    dqtrain("stop", run.path)


def test_a_run_keeps_its_code_until_it_is_told_otherwise(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    run = RunDir(files / "run")
    dqtrain(*arguments(files))
    dqtrain("stop", run.path)
    newer = ROOT / SCRIPT
    (run.code / SCRIPT).write_text("#!/bin/bash\n# older\n")
    (run.code / "dqtrain/gone.py").touch()
    said = dqtrain("resume", run.path)
    assert f"the run keeps the code of its first submission, {run.code}, which is not that of {ROOT}; `dqtrain resume --new-code` takes the latter" in said
    assert (run.code / SCRIPT).read_text() == "#!/bin/bash\n# older\n"
    dqtrain("stop", run.path)
    assert "the run keeps" not in dqtrain("resume", run.path, "--new-code")
    assert (run.code / SCRIPT).read_bytes() == newer.read_bytes() and not (run.code / "dqtrain/gone.py").exists()
    assert [event["source"] for event in run.read_events() if event["event"] == "new_code"] == [str(ROOT)]
    assert not list(run.path.glob(".code*"))
    dqtrain("stop", run.path)


def test_what_slurm_refuses_is_said_and_can_be_mended(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    run = RunDir(files / "run")
    with (files / "site.yaml").open("a") as site:
        site.write("partition: nowhere\n")
    assert "invalid partition specified: nowhere" in dqtrain(*arguments(files), code=1)
    launch = load_launch(run)
    assert launch is not None and launch.job is None and not run.read_events()
    (files / "site.yaml").write_text((files / "site.yaml").read_text().replace("nowhere", "urgent"))
    dqtrain(*arguments(files))
    dqtrain("stop", run.path)


def test_without_slurm_the_files_still_speak(
    dqtrain: Callable[..., str], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(files / "run")
    dqtrain(*arguments(files))
    launch = load_launch(run)
    assert launch is not None
    with monkeypatch.context() as without:
        without.setenv("PATH", str(files))
        assert main(["status", str(run.path)]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{run.path}: job {launch.job}, of which Slurm says nothing now: scontrol is not on this machine's PATH.") and "queue" in shown
        assert main(["stop", str(run.path)]) == 0  # for whenever the job runs
        assert run.stop.exists() and "scontrol is not on" in capsys.readouterr().out
    dqtrain("stop", run.path)
    assert not run.stop.exists()


def test_launch_json_that_is_damaged(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(files / "run")
    run.path.mkdir()
    run.launch.write_text('{"nodes": 2}')
    (run.path / "run.yaml").write_text((files / "config.yaml").read_text())
    assert main(["resume", str(run.path)]) == 2
    assert f"{run.launch}: is no launch of this version of dqtrain" in capsys.readouterr().err


def test_launch_survives_its_file(tmp_path: Path) -> None:
    from launch.submit import save_launch

    (tmp_path / "site.yaml").write_text(SITE)
    from launch.site import load_site

    run = RunDir(tmp_path)
    launch = Launch(
        site=load_site(tmp_path / "site.yaml"), nodes=3, min_nodes=2, time="1:00:00", python=Path("/a b/python"), folder=tmp_path, job="7", history=("5", "6")
    )
    save_launch(launch, run)
    assert load_launch(run) == launch and launch.ranks == 12 and launch.shape == "2-3 nodes x 4 ranks"
