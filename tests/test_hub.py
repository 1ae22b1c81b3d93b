"""Models and data sets by hub ids, through the command line and the real huggingface_hub, from a small server that speaks what it needs of the hub's protocol."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import config_text, write_corpus

from launch.submit import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/teacher"
ID = f"hf:{NAME}@{COMMIT}"
DATA = "someone/texts"


class Hub(ThreadingHTTPServer):
    """A repository of a model and one of a data set, of one commit each, on the branch main: https://huggingface.co/docs/hub/api."""

    daemon_threads = True

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.data, self.requests, self.damage = folder, data, [], b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found[1] not in (NAME, DATA, "someone/gated"):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if found[1] == "someone/gated":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        self.folder = self.server.data if found[1] == DATA else self.server.folder
        revision = (api[3] if api else file[2]) or "main"  # type: ignore[index]
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if file is not None:
            content, (key, value) = self.read(file[3]), next(iter(self.hashes(file[3]).items()))
            damaged = self.server.damage if key == "lfs" else b""
            return self.send(200, damaged + content[len(damaged) :], {"X-Repo-Commit": COMMIT, "ETag": f'"{value}"'})
        if api is not None and api[2] == "tree":
            folders = [{"type": "directory", "path": "onnx", "oid": 40 * "a"}, {"type": "file", "path": "onnx/config.json", "size": 3, "oid": 40 * "c"}]
            return self.send(200, json.dumps(self.entries() + folders * (found[1] == NAME)).encode())
        listed = [{"rfilename": entry.pop("path"), "blobId": entry.pop("oid"), **entry} for entry in self.entries()]
        listed = [{**entry, "lfs": {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 100}} if "lfs" in entry else entry for entry in listed]
        listed += [{"rfilename": "onnx/config.json", "blobId": 40 * "c", "size": 3}] * (found[1] == NAME)
        self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": listed}).encode())

    def entries(self) -> list[dict]:
        return [self.entry(path.name) for path in sorted(self.folder.iterdir())]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def hashes(self, name: str) -> dict[str, str]:
        content = self.read(name)
        if name.endswith((".safetensors", ".bin")):
            return {"lfs": hashlib.sha256(content).hexdigest()}
        return {"git": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    def entry(self, name: str) -> dict:
        size, hashes = len(self.read(name)), self.hashes(name)
        if "git" in hashes:
            return {"type": "file", "path": name, "size": size, "oid": hashes["git"]}
        return {"type": "file", "path": name, "size": size, "oid": 40 * "b", "lfs": {"oid": hashes["lfs"], "size": size, "pointerSize": 100}}

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(world: Path, tmp_path: Path) -> Iterator[Hub]:
    """The teacher of `world` on a hub, with files beside it that nobody needs."""
    folder = shutil.copytree(world / "teacher", tmp_path / "repository")
    for name in ("pytorch_model.bin", "model.onnx"):
        (folder / name).write_text("not this")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "texts").mkdir()
    write_corpus(tmp_path / "texts/train.jsonl", 40, 0)
    (tmp_path / "texts/README.md").write_text("Forty sentences.")
    with Hub(folder, tmp_path / "texts") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def dqtrain(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """The command line of a user whose hub is that one."""

    def run(*words: object, code: int = 0, **variables: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RANK"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | variables
        command = [sys.executable, "-m", "dqtrain", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
        assert done.returncode == code, done
        return done.stderr if code else done.stdout

    return run


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    """A config whose teacher, and so whose student and tokenizer, are on the hub."""
    blocks = {"teacher": f"{{path: {ID}}}", "train": "{steps: 2, global_batch: 4, micro_batch: 2, lr: 1.0e-3}", "eval": "{}", "checkpoint": "{every_steps: 1}"}
    text = config_text(world, tmp_path / "run", **blocks).replace(f"{world}/shards", f"{tmp_path}/shards")
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


def dry_run(config: Path) -> list[str]:
    """The quickest command that looks at the models of a config; it needs no weights, and fetches none."""
    (config.parent / "site.yaml").write_text("gpus_per_node: 0\ntime: 0:30:00\n")
    return ["submit", str(config), "--site", str(config.parent / "site.yaml"), "--dry-run"]


def fetch_data_sets(hub: Hub, config: Path) -> subprocess.CompletedProcess[str]:
    """What a submission does once everything else was checked."""
    body = "import sys; from pathlib import Path; from dqtrain import config, hub; hub.fetch_data_sets(config.load_config(Path(sys.argv[1])))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(config.parent / "hub")}
    return subprocess.run([sys.executable, "-c", body, config], capture_output=True, text=True, timeout=60, env=environment)


def files_of(tmp_path: Path) -> set[str]:
    [snapshot] = (tmp_path / "hub/hub").glob("models--*/snapshots/*")
    return {path.name for path in snapshot.iterdir()}


@pytest.mark.slow
def test_a_run_from_the_hub_goes_on_without_it(hub: Hub, dqtrain: Callable[..., str], config: Path, tmp_path: Path) -> None:
    small = {path.name for path in hub.folder.iterdir() if path.suffix in (".json", ".md")}
    assert "config.json" in small and "tokenizer.json" in small
    assert "Traceback" not in dqtrain("plan", config, "--gpus", 1)
    assert files_of(tmp_path) == small
    dqtrain("train", config)
    assert files_of(tmp_path) == small | {"model.safetensors"}
    assert f"path: {ID}\n" in (tmp_path / "run/run.yaml").read_text()
    assert f"license: mit\nbase_model: {NAME}\n" in (tmp_path / "run/artifact/packed/README.md").read_text()
    # Once it is there, the hub is not asked.
    hub.requests.clear()
    for arguments in (
        ["plan", config, "--gpus", 1],
        ["inspect", ID, "--quant", "2-2-8"],
        ["eval", tmp_path / "run"],
        ["eval", ID, "--data", tmp_path / "config.yaml"],
    ):
        dqtrain(*arguments)
    assert hub.requests == []
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/artifact")
    assert "continuing" in dqtrain("resume", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert (tmp_path / "run/result.json").exists()


def test_a_cache_that_is_gone_is_fetched_again_or_named(hub: Hub, dqtrain: Callable[..., str], config: Path, tmp_path: Path) -> None:
    for _ in range(2):
        dqtrain(*dry_run(config))
        assert "GET /api/models" in " ".join(hub.requests)
        hub.requests.clear()
        dqtrain(*dry_run(config))
        assert hub.requests == []
        shutil.rmtree(tmp_path / "hub")
    said = dqtrain(*dry_run(config), code=2, HF_HUB_OFFLINE="1")
    assert said.splitlines()[-1].startswith(f"dqtrain: {ID}: cannot be fetched from {hub.url} (OfflineModeIsEnabled: ")
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    said = dqtrain("train", config, code=2, **rank)
    assert f"{ID}: is not in this machine's cache of the hub (HF_HOME)." in said and "Traceback" not in said


def test_a_job_reads_the_data_set_that_was_fetched_for_it(hub: Hub, dqtrain: Callable[..., str], config: Path, tmp_path: Path) -> None:
    path = f"hf:{DATA}@{COMMIT}"
    config.write_text(re.sub(r"train: \S+train\.jsonl", f'train: "{path}"', config.read_text(), count=1))
    assert path in config.read_text()
    dqtrain(*dry_run(config))
    assert not [request for request in hub.requests if DATA in request or "safetensors" in request]
    fetched = fetch_data_sets(hub, config)
    assert fetched.returncode == 0 and [request for request in hub.requests if "resolve" in request and DATA in request], fetched
    dqtrain("prepare", config)
    shutil.rmtree(tmp_path / "shards")
    hub.requests.clear()
    dqtrain("prepare", config, HF_HUB_OFFLINE="1")
    [index] = (tmp_path / "shards").glob("train-*/index.json")
    assert json.loads(index.read_text())["num_documents"] == 40 and not hub.requests
    assert fetch_data_sets(hub, config).returncode == 0 and not hub.requests
    (config.parent / "branch.yaml").write_text(config.read_text().replace(path, f"hf:{DATA}@main"))
    assert f"Now it is {COMMIT}: write hf:{DATA}@{COMMIT}." in fetch_data_sets(hub, config.parent / "branch.yaml").stderr


@pytest.mark.parametrize(
    "path, message",
    [
        (f"hf:{NAME}", f"names no revision, but a run needs a commit. Now it is {COMMIT}: write {ID}."),
        (f"hf:{NAME}@main", f"names the branch or tag main, which may move, but a run needs a commit. Now it is {COMMIT}: write {ID}."),
        (f"hf:{NAME}@v9", "has someone/teacher, but no revision v9 of it."),
        (f"hf:{NAME}@{40 * 'e'}", f"has someone/teacher, but no revision {40 * 'e'} of it."),
        (f"hf:someone/else@{COMMIT}", "has no someone/else, or keeps it from you."),
        ("hf:someone/else", "has no someone/else, or keeps it from you."),
        (f"hf:someone/gated@{COMMIT}", "gives someone/gated to those alone who accepted its terms."),
        (f"hf:a/b/c@{COMMIT}", "Repo id must be in the form"),
        ("hf:a/b/c", "Repo id must be in the form"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(dqtrain: Callable[..., str], config: Path, tmp_path: Path, path: str, message: str) -> None:
    said = dqtrain(*dry_run(config), f"teacher.path={path}", code=2)
    lines = [line for line in said.splitlines() if not line.startswith("fetching ")]
    assert len(lines) == 1 and lines[0].startswith(f"dqtrain: {path}: ") and message in lines[0]
    assert not (tmp_path / "run").exists()


def test_no_network(dqtrain: Callable[..., str], config: Path) -> None:
    nobody = "http://127.0.0.1:9"
    for path, message in ((ID, f"cannot be fetched from {nobody} (ConnectError: "), (f"hf:{NAME}", f"a run needs a commit. Write hf:{NAME}@COMMIT")):
        *before, last = dqtrain(*dry_run(config), f"teacher.path={path}", code=2, HF_ENDPOINT=nobody).splitlines()
        assert before in ([], [f"fetching {ID}"])
        assert last.startswith(f"dqtrain: {path}: ") and message in last


def test_damage_on_the_way_is_seen_and_mended(hub: Hub, dqtrain: Callable[..., str], config: Path, tmp_path: Path) -> None:
    hub.damage = b"!"
    *_, last = dqtrain("inspect", ID, "--quant", "2-2-8", code=2).splitlines()
    assert last.startswith(f"dqtrain: {ID}: model.safetensors is not what the hub has of it (")
    hub.damage = b""
    dqtrain("inspect", ID, "--quant", "2-2-8")
    assert files_of(tmp_path) >= {"model.safetensors", "config.json"}


def test_a_repository_without_weights(hub: Hub, dqtrain: Callable[..., str], config: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "pytorch_model.bin").unlink()
    assert "holds neither model*.safetensors nor pytorch_model*.bin" in dqtrain("inspect", ID, "--quant", "2-2-8", code=2)


def test_without_an_id_the_hub_is_not_even_imported(world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text(world, tmp_path / "run"))
    body = f"import sys; from dqtrain.cli import main; assert main({dry_run(tmp_path / 'config.yaml')}) == 0; print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
