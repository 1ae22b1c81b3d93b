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
from cluster import Cluster, running, snapshot, write_files

from dqtrain.cli import main
from dqtrain.rundir import RunDir
from launch.site import Site, load_site
from launch.submit import ROOT, SCRIPT, Launch, load_launch, read_excluded, save_launch

KEPT = "HF_HOME,HF_HUB_CACHE,HOME,LANG,LC_ALL,LOGNAME,PATH,SHELL,TZ,USER,XDG_CACHE_HOME"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folder with config.yaml, train.jsonl and site.yaml."""
    return write_files(tmp_path, "gpus_per_node: 0\ntime: 1:00:00\n")


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
    assert shlex.split(command[command.index(" sbatch ") :]) == [
        "sbatch", "--parsable", "--open-mode=append", f"--output={run}/slurm-%j.out", "--requeue", "--job-name=dqtrain-run", f"--chdir={Path.cwd()}", "--partition=gpu", "--account=a1", "--qos=high", "--nodes=2", "--ntasks-per-node=4",
        "--cpus-per-task=6", "--gpus-per-node=8", "--mem=200G", "--time=1-02:00:00", "--signal=B:USR1@160",
        "--export=ALL", "--constraint=a100", "--comment=two words", f"{run}/code/launch/train.sbatch", str(run), sys.executable, "cuda/12.8", "gcc",
    ]  # fmt: skip
    assert script == f"{(ROOT / SCRIPT).read_text()}\n# Each rank: srun ... {sys.executable} -m launch.task {run}\n"


def test_what_is_left_out_of_a_site_is_left_to_slurm(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(files, "--dry-run")) == 0
    command = capsys.readouterr().out.split("\n\n")[0]
    assert [word for word in shlex.split(command[command.index(" sbatch ") :]) if not word.startswith(("--chdir", "--output"))] == [
        "sbatch", "--parsable", "--open-mode=append", "--requeue", "--job-name=dqtrain-run", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=1:00:00",
        "--signal=B:USR1@180", "--export=ALL", f"{files}/run/code/launch/train.sbatch", str(files / "run"), sys.executable,
    ]  # fmt: skip


SBATCH = """\
#!/bin/sh
{ printf '%s\\0' "$@"; echo; tr '\\0' '\\n' < /proc/$$/environ | sort; } > {folder}/called
echo 42
"""


def test_the_printed_command_does_what_submit_does(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "bin").mkdir()
    (files / "bin/sbatch").write_text(SBATCH.replace("{folder}", str(files)))
    (files / "bin/sbatch").chmod(0o755)
    (files / "site.yaml").write_text(f"{SITE}time: 1:00:00\n")
    for name, value in {
        "PATH": f"{files}/bin:{os.environ['PATH']}",
        "HF_HOME": 'it\'s "$x" here',
        "SLURM_CONF": "/a/conf",
        "SECRET": "1",
        "SBATCH_DEBUG": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(files, "--dry-run")) == 0
    printed = capsys.readouterr().out.split("\n\n")[0]
    assert not (files / "called").exists() and "here" not in printed
    assert main(arguments(files)) == 0
    called = (files / "called").read_text()
    assert '\nHF_HOME=it\'s "$x" here\n' in called and "\nSLURM_CONF=/a/conf\n" in called and "\nSBATCH_DEBUG=2\n" in called and "SECRET" not in called
    (files / "called").unlink()
    assert subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True).stdout == "42\n"
    assert (files / "called").read_text() == called


def test_a_job_whose_successors_are_refused_is_taken_back(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "bin").mkdir()
    (files / "bin/sbatch").write_text(
        f"#!/bin/sh\necho x >> {files}/calls; n=$(wc -l < {files}/calls); [ $n -lt 3 ] || {{ echo 'too many jobs' >&2; exit 1; }}; echo 4$n\n"
    )
    (files / "bin/scancel").write_text(f'#!/bin/sh\necho "$@" > {files}/cancelled\n')
    for program in ("sbatch", "scancel"):
        (files / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{files}/bin:{os.environ['PATH']}")
    (files / "site.yaml").write_text("gpus_per_node: 0\ntime: 1:00:00\nsuccessors: 3\n")
    assert main(arguments(files)) == 1
    assert "too many jobs" in capsys.readouterr().err and (files / "cancelled").read_text() == "42 41\n"
    launch = load_launch(RunDir(files / "run"))
    assert launch is not None and (launch.job, launch.successors) == (None, ())


CONTAINER = "{kind: %s, image: %s, mounts: [/data, '/a:/b:ro'], python: /opt/python}"


@pytest.mark.parametrize(
    "kind, image, gpus, words",
    [
        ("pyxis", "docker://nvcr.io#nvidia/pytorch:26.01-py3", 0, ["--container-image={image}", "--container-mounts={mounts}", "--container-workdir={folder}"]),
        ("pyxis", "{files}/image", 8, ["--container-image={image}", "--container-mounts={mounts}", "--container-workdir={folder}"]),
        ("apptainer", "{files}/image", 8, ["apptainer", "exec", "--nv", "--bind={mounts}", "{image}"]),
        ("apptainer", "{files}/image", 0, ["apptainer", "exec", "--bind={mounts}", "{image}"]),
    ],
)
def test_ranks_in_a_container(files: Path, capsys: pytest.CaptureFixture[str], kind: str, image: str, gpus: int, words: list[str]) -> None:
    (files / "image").touch()
    image = image.format(files=files)
    site = f"gpus_per_node: {gpus}\nranks_per_node: 1\ntime: 1:00:00\nscratch: /scratch\ninterface: ib0\nenvironment: {{A: b c}}\nmail: {{address: me@x.org}}\n"
    (files / "site.yaml").write_text(f"{site}container: {CONTAINER % (kind, image)}\n")
    assert main(arguments(files, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert {"--mail-user=me@x.org", "--mail-type=END,FAIL"} <= set(shlex.split(said.split("\n\n")[0]))
    run, folder = files / "run", Path.cwd()
    names = {"image": image, "folder": folder, "mounts": f"{folder}:{folder},{run}:{run},/scratch:/scratch,/data:/data,/a:/b:ro"}
    variables = [f"PYTHONPATH={run}/code", "PYTHONSAFEPATH=1", "OMP_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0", "A=b c"]
    expected = [word.format(**names) for word in words] + ["env", *variables, "/opt/python", "-m", "launch.task", str(run)]
    assert shlex.split(said.partition("# Each rank: srun ... ")[2]) == expected


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
        ("container: {{kind: pyxis, image: {files}/none}}", [], "container.image: {files}/none is not there."),
        ("container: {{kind: pyxis, image: docker://a}}", ["run.dir={files}/a,b"], "{files}/a,b cannot be mounted in a container"),
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
        site.write(change.format(files=files))
    before = snapshot(files)
    assert main(arguments(files, *(word.format(files=files) for word in more))) == 2
    assert message.format(files=files) in capsys.readouterr().err
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


def test_the_script_is_clean() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "CI must have shellcheck"
        pytest.skip("no shellcheck")
    assert subprocess.run(["shellcheck", ROOT / SCRIPT], capture_output=True, text=True).stdout == ""


@pytest.mark.slow
def test_an_installed_wheel_can_submit(files: Path, no_slurm: None) -> None:
    for name in ("dqtrain", "launch"):
        shutil.copytree(ROOT / name, files / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, files / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", files, files / "source"], check=True, capture_output=True)
    (wheel,) = files.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", files / "installed", wheel], check=True, capture_output=True)
    shutil.rmtree(files / "source")
    environment = {**os.environ, "PYTHONPATH": str(files / "installed")}
    command = [sys.executable, "-m", "dqtrain", *arguments(files, "--dry-run")]
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True, check=True)
    assert f"\n\n{(ROOT / SCRIPT).read_text()}\n# Each rank" in done.stdout
    copy = "import sys; from pathlib import Path; from dqtrain.rundir import RunDir; from launch.submit import _copy_code; _copy_code(RunDir(Path(sys.argv[1])), False)"
    (files / "run").mkdir()
    subprocess.run([sys.executable, "-c", copy, files / "run"], cwd=files, env=environment, check=True)
    copied = {str(file.relative_to(files / "run/code")) for file in (files / "run/code").rglob("*") if file.is_file()}
    assert copied == {str(file.relative_to(ROOT)) for package in ("dqtrain", "launch") for file in (ROOT / package).rglob("*.py")} | {str(SCRIPT)}


# ---- a real Slurm, whose jobs wait for another day


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(tmp_path_factory.mktemp("submit") / "state", "--nodes", 2)


@pytest.fixture
def dqtrain(cluster: Cluster, files: Path) -> Callable[..., str]:
    """The command line on the login node, for a site whose jobs wait."""
    (files / "site.yaml").write_text("gpus_per_node: 0\ntime: 1:00:00\nflags: [--begin=now+1days]\nenvironment: {COLOUR: red}\n")
    return cluster.dqtrain


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


def test_successors_wait_are_counted_and_leave_the_queue_together(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    run = RunDir(files / "run")
    with (files / "site.yaml").open("a") as site:
        site.write("successors: 2\n")
    first, second = dqtrain(*arguments(files, "--dry-run")).splitlines()[:2]
    assert second == first.replace(f"{run.code / SCRIPT}", f"--dependency=afterany:JOB {run.code / SCRIPT}") + "  # 2 times; JOB is the one before"
    said = dqtrain(*arguments(files)).splitlines()
    launch = load_launch(run)
    assert launch is not None and launch.job is not None
    jobs = [launch.job, *launch.successors]
    assert said[0].startswith(f"submitted job {jobs[0]}: ") and said[1] == f"{jobs[1]}, {jobs[2]} wait to go on with it"
    assert [facts(cluster, job)["Dependency"] for job in jobs] == ["(null)", *(f"afterany:{job}(unfulfilled)" for job in jobs[:2])]
    assert run.read_events()[0]["successors"] == jobs[1:]
    assert dqtrain("status", run.path).splitlines()[0].endswith("; 2 successors of 2 left")
    cluster.run("scancel", jobs[0])
    assert dqtrain("status", run.path).splitlines()[0].endswith("; 1 successor of 2 left")
    assert f"has a job already: {jobs[1]}, pending." in dqtrain(*arguments(files), code=2)
    assert dqtrain("stop", run.path) == f"job {jobs[1]} has left the queue. `dqtrain resume {run.path}` goes on.\n"
    assert [facts(cluster, job)["JobState"] for job in jobs] == ["CANCELLED"] * 3


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


def damage(file: Path, text: str) -> None:
    """A directory instead of the file where the text is `/`."""
    file.parent.mkdir()
    file.mkdir() if text == "/" else file.write_text(text)


@pytest.mark.parametrize(
    "text, what",
    [
        ('{"nodes": "2"}', "site: Field required"),
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("\0", "Invalid JSON: "),
        ("/", "Is a directory"),
    ],
)
def test_launch_json_that_is_damaged(files: Path, capsys: pytest.CaptureFixture[str], text: str, what: str) -> None:
    run = RunDir(files / "run")
    damage(run.launch, text)
    run.config.write_text((files / "config.yaml").read_text())
    for command in ("resume", "status"):
        assert main([command, str(run.path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"dqtrain: {run.launch}: is no launch of this version of dqtrain ({what}")
        assert said.endswith("). Remove it and submit the run again.\n") and said.count("\n") == 1


LISTS = [
    ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
    ("[]", "Input should be an object"),
    ('{"a": {"until": "2999-01-01T00:00:00", "why": "b"}}', "a.until: Input should have timezone info"),
    ('{"a": {"until": "2999-01-01T00:00:00Z"}}', "a.why: Field required"),
    ("/", "Is a directory"),
]


@pytest.mark.parametrize("text, what", LISTS)
def test_excluded_json_that_is_damaged(files: Path, capsys: pytest.CaptureFixture[str], text: str, what: str) -> None:
    run = RunDir(files / "run")
    damage(run.excluded, text)
    run.config.write_text((files / "config.yaml").read_text())
    for command in (["status", str(run.path)], arguments(files, "--dry-run")):
        assert main(command) == 2
        assert capsys.readouterr().err == f"dqtrain: {run.excluded}: is no list of nodes to avoid ({what}). Remove it: then the run avoids none.\n"


EXCLUDE = """\
import os, sys
from dqtrain.rundir import RunDir
from launch.submit import load_launch
from launch.supervisor import Supervisor
os.environ |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
run = RunDir(sys.argv[1])
Supervisor(run, load_launch(run)).exclude({"node2": "hung"})
"""


def test_a_damaged_list_does_not_end_a_supervisor(cluster: Cluster, files: Path) -> None:
    run = RunDir(files / "run")
    run.path.mkdir()
    site = Site.model_validate_json('{"gpus_per_node": 0}')
    save_launch(Launch(site=site, nodes=2, min_nodes=2, time="1:00:00", python=Path(sys.executable), folder=files), run)
    command = ["run", "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", EXCLUDE, run.path]
    run.excluded.write_text("{")
    done = cluster.devcluster(*command)
    assert (
        done.returncode == 0 and done.stderr.startswith(f"dqtrain: {run.excluded}: is no list of nodes to avoid (Invalid JSON") and done.stderr.count("\n") == 1
    )
    assert [(node, entry.why) for node, entry in read_excluded(run).items()] == [("node2", "hung")]
    assert [(event["event"], event["node"]) for event in run.read_events()] == [("exclude", "node2")]
    run.excluded.unlink()
    run.excluded.mkdir()
    done = cluster.devcluster(*command)
    assert done.returncode == 0 and "Traceback" not in done.stderr and f"dqtrain: {run.excluded} cannot be written: Is a directory" in done.stderr


def test_a_stop_file_that_is_a_directory(cluster: Cluster, dqtrain: Callable[..., str], files: Path) -> None:
    run = RunDir(files / "run")
    run.stop.mkdir(parents=True)
    run.config.write_text((files / "config.yaml").read_text())
    message = f"dqtrain: {run.stop} is a directory, but an empty file of that name asks a run to stop. Remove it, then `dqtrain resume {run.path}`.\n"
    assert dqtrain(*arguments(files), code=2) == message
    assert dqtrain("train", files / "config.yaml", code=2) == message
    run.stop.rmdir()
    dqtrain(*arguments(files))
    run.stop.mkdir()
    assert dqtrain("stop", run.path, code=2) == message
    launch = load_launch(run)
    assert launch is not None and launch.job is not None and facts(cluster, launch.job)["JobState"] == "CANCELLED"


def test_launch_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    run = RunDir(tmp_path)
    launch = Launch(
        site=load_site(tmp_path / "site.yaml"), nodes=3, min_nodes=2, time="1:00:00", python=Path("/a b/python"), folder=tmp_path, job="7", history=("5", "6")
    )
    save_launch(launch, run)
    assert load_launch(run) == launch and launch.ranks == 12 and launch.shape == "2-3 nodes x 4 ranks"
