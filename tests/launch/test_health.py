"""The check of a node: real disks, and an nvidia-smi that says what a test wants."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dqtrain.rundir import RunDir
from launch import health
from launch.site import Site
from launch.submit import Launch, save_launch


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def _nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_a_sound_node_says_so_and_leaves_nothing_behind(run: RunDir, tmp_path: Path) -> None:
    site = Site(gpus_per_node=0, scratch=tmp_path)
    save_launch(Launch(site=site, nodes=1, min_nodes=1, time="1:00:00", python=Path(sys.executable), folder=tmp_path), run)
    before = time.time()
    command = [sys.executable, "-m", "launch.health", str(run.path)]
    said = subprocess.run(command, env={**os.environ, "SLURMD_NODENAME": "node7"}, capture_output=True, text=True, check=True).stdout
    line = json.loads(said)
    assert (line["node"], line["problems"]) == ("node7", []) and before <= line["time"] <= time.time()
    assert os.listdir(run.path) == ["launch.json"] and os.listdir(tmp_path) == ["run"]


def test_disks(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Site(gpus_per_node=0, scratch=tmp_path / "missing")
    assert health.problems(run, missing) == [f"{tmp_path}/missing cannot be written: No such file or directory"]
    (tmp_path / "file").touch()
    assert health.problems(run, Site(gpus_per_node=0, scratch=tmp_path / "file")) == [f"{tmp_path}/file cannot be written: Not a directory"]
    monkeypatch.setattr(health, "FREE_BYTES", 1 << 60)
    (problem,) = health.problems(run, Site(gpus_per_node=0))
    assert problem.startswith(f"{run.path} has ") and problem.endswith(f" MiB free, and {1 << 40} are needed")
    monkeypatch.setattr(health, "FREE_BYTES", 0)
    monkeypatch.setattr(health, "SHARED_MEMORY_BYTES", 1 << 60)
    (problem,) = health.problems(run, Site(gpus_per_node=0, ranks_per_node=2))
    assert problem.startswith("/dev/shm has ") and problem.endswith(f"2 ranks need {2 << 40}")


@pytest.mark.parametrize(
    ("script", "problems"),
    [
        ("printf '0, 0\\n1, 0\\n'", []),
        ("printf '0, [N/A]\\n1, [N/A]\\n2, [N/A]\\n'", []),
        ("printf '0, 0\\n'", ["1 GPUs of 2"]),
        ("printf '0, 0\\n1, 3\\n'", ["GPU 1 has 3 uncorrected memory errors"]),
        (
            "echo 'Unable to determine the device handle for GPU 0000:1B:00.0'; exit 15",
            ["nvidia-smi: Unable to determine the device handle for GPU 0000:1B:00.0"],
        ),
        ("exit 9", ["nvidia-smi: exit code 9"]),
    ],
)
def test_gpus(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problems: list[str]) -> None:
    _nvidia_smi(tmp_path, monkeypatch, script)
    assert health.problems(run, Site(gpus_per_node=2)) == problems


def test_no_driver(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert health.problems(run, Site(gpus_per_node=1)) == ["nvidia-smi: No such file or directory"]
