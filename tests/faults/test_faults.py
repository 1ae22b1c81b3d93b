"""One run that meets every fault in turn, and in the end has the log and the weights of a run that met none, bit for bit.

Two ranks under ZeRO-3, dropout on, a checkpoint at every step. The tests look at what each fault left behind.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Run, config_text, flip, kill, write_corpus

from dqtrain import checkpoint
from dqtrain.cli import main
from dqtrain.data.shard import BLOCK_BYTES
from launch.local import GRACE_S

pytestmark = pytest.mark.slow
TRAIN = "{steps: 60, global_batch: 4, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"
WATCHDOG_S = 5
DRAW = random.Random(6)


@dataclass
class Ended:
    """How a start of the run ended."""

    code: int
    output: str
    at: int  # time_ns
    steps: list[int]  # of its checkpoints
    exits: dict[int, dict]  # by rank


class Chain:
    """The run, and how each of its starts ended."""

    def __init__(self, run: Run) -> None:
        self.run, self.ended = run, {}

    def steps(self) -> list[int]:
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.run.path.glob("checkpoints/step-*"))

    def checkpoint(self, number: int) -> Path:
        """The newest one for -1, the one before it for -2."""
        return self.run.path / "checkpoints" / f"step-{self.steps()[number]:09d}"

    def start(self, name: str, *command: str, during: Callable[[dict[int, int]], object] | None = None) -> None:
        """Start it, and have `during` (rank -> pid) happen two checkpoints later; without one it must end by itself."""
        since, before = time.time_ns(), max(self.steps(), default=0)
        with self.run.start(*(command or ("resume", str(self.run.path)))) as process:
            try:
                if during is not None:
                    deadline = time.monotonic() + 120
                    while max(self.steps(), default=0) < before + 2:
                        assert process.poll() is None and time.monotonic() < deadline, (name, process.communicate()[0])
                        time.sleep(0.002)
                    time.sleep(DRAW.uniform(0, 0.2))
                    during(self.run.rank_pids())
                output, _ = process.communicate(timeout=240)
            finally:
                process.kill()
        lefts = (json.loads(path.read_text()) for path in self.run.path.glob("exits/rank-*.json"))
        exits = {left["rank"]: left for left in lefts if left["time_ns"] >= since}
        self.ended[name] = Ended(process.returncode, output, time.time_ns(), self.steps(), exits)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def faulty(world: Path, folder: Path, name: str) -> Run:
    changes = {
        "teacher": f"{{path: {folder / 'teacher'}}}",
        "data": f"{{train: {folder}/train.jsonl, tokens_per_sample: 16, shards: {folder}/shards}}",
        "train": TRAIN,
        "eval": "{}",
        "checkpoint": "{every_steps: 1, keep_last: 3}",
        "log": "{every_steps: 1, weights_every_steps: 60}",
    }
    (folder / f"{name}.yaml").write_text(config_text(world, folder / name, **changes))
    return Run(folder / name, folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def chain(world, tmp_path_factory):
    """The run after all faults, and the one that met none. What is damaged between two starts is mended after the second."""
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "train.jsonl", 18_000, 3)
    shutil.copytree(world / "teacher", folder / "teacher")
    run = faulty(world, folder, "run")
    chain, start = Chain(run), ("train", str(run.config), "--ranks", "2")

    chain.start("one killed", *start, during=lambda pids: kill(pids[1]))

    def kill_in_a_save(pids: dict[int, int]) -> None:
        while not list(run.path.glob("checkpoints/.tmp-*/rank-*")):
            time.sleep(0.0005)
        kill(*pids.values())

    chain.start("all killed", during=kill_in_a_save)

    # Less than a checkpoint's fragments, more than what TensorBoard has.
    chain.start("full disk", during=lambda pids: resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (100_000, 100_000)))

    os.truncate(chain.checkpoint(-1) / "rank-00000.safetensors", 1000)
    exchange(*(chain.checkpoint(-2) / f"rank-0000{rank}.safetensors" for rank in (0, 1)))

    def freeze(pids: dict[int, int]) -> None:
        os.kill(pids[1], signal.SIGSTOP)
        chain.frozen_at = time.monotonic()
        chain.whole = faulty(world, folder, "whole")
        chain.uninterrupted = chain.whole.start("train", str(chain.whole.config), "--ranks", "2")  # while the others wait

    try:
        chain.start("frozen", *start, f"run.watchdog_s={WATCHDOG_S}", during=freeze)
        chain.frozen_s = time.monotonic() - chain.frozen_at

        (shard,) = folder.glob("shards/train-*/shard-*.bin")
        content = shard.read_bytes()
        assert len(content) > BLOCK_BYTES
        shard.write_bytes(content[:-1])
        chain.start("truncated data", "resume", str(run.path), "--ranks", "1")
        shard.write_bytes(content)
        flip(shard, -1000)
        chain.start("damaged data", *start)
        shard.write_bytes(content)

        flip(folder / "teacher" / "model.safetensors", -1)
        chain.start("another teacher", "resume", str(run.path), "--ranks", "1")
        flip(folder / "teacher" / "model.safetensors", -1)

        def spoil_log(pids: dict[int, int]) -> None:
            os.kill(pids[0], signal.SIGSTOP)
            run.path.joinpath("log.jsonl").rename(run.path / "log.aside")
            run.path.joinpath("log.jsonl").mkdir()
            os.kill(pids[0], signal.SIGCONT)

        chain.start("crash", *start, during=spoil_log)
        run.path.joinpath("log.jsonl").rmdir()
        run.path.joinpath("log.aside").rename(run.path / "log.jsonl")

        chain.start("end", *start)
        output, _ = chain.uninterrupted.communicate(timeout=240)
        assert chain.uninterrupted.returncode == 0, output
    finally:
        with chain.uninterrupted as process:
            process.kill()
    return chain


def test_nothing_is_lost_or_repeated(chain):
    assert chain.ended["end"].code == 0, chain.ended["end"].output
    log = chain.run.log()
    assert [line["step"] for line in log] == list(range(1, 61))
    assert log == chain.whole.log()
    last = [json.loads((run.path / "checkpoints/step-000000060/MANIFEST.json").read_text())["files"] for run in (chain.run, chain.whole)]
    assert last[0].keys() == last[1].keys()
    assert [name for name in last[0] if name.endswith(".safetensors") and last[0][name] != last[1][name]] == []


def test_every_start_goes_on_from_the_newest_sound_checkpoint(chain):
    events = map(json.loads, (chain.run.path / "events.jsonl").read_text().splitlines())
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    steps = {name: ended.steps for name, ended in chain.ended.items()}
    newest = [steps["one killed"][-1], steps["all killed"][-1], steps["full disk"][-3]]  # the damaged ones passed over
    # A damaged block shows when it is first read, and so behind the resume; a truncated shard before.
    newest += [steps["truncated data"][-1], steps["truncated data"][-1], steps["damaged data"][-1], steps["crash"][-1]]
    assert resumed == newest and newest[0] >= 2


def test_a_killed_rank(chain):
    ended = chain.ended["one killed"]
    assert ended.code == 137
    assert "rank 1: was ended by SIGKILL and left no cause" in ended.output and "resume" in ended.output
    assert ended.exits[1]["code"] == 137 and ended.exits[0]["code"] == 1  # the broken connection of its peer is no cause


def test_all_ranks_killed_in_a_save(chain):
    ended = chain.ended["all killed"]
    assert ended.code == 137
    assert {rank: left["code"] for rank, left in ended.exits.items()} == {0: 137, 1: 137}


def test_a_full_disk(chain):
    ended, folder = chain.ended["full disk"], chain.run.path / "checkpoints"
    assert ended.code == 4
    assert "could not be saved (rank 1: " in ended.output and f"free space in {folder}, then `dqtrain resume {chain.run.path}`" in ended.output
    assert {rank: left["code"] for rank, left in ended.exits.items()} == {0: 4, 1: 4}
    assert "Traceback" not in ended.output


def test_damaged_checkpoints_are_passed_over(chain):
    exchanged, truncated = chain.ended["full disk"].steps[-2:]
    folder = re.escape(str(chain.run.path / "checkpoints"))
    for step, what in ((truncated, "rank-00000.safetensors has 1000 bytes"), (exchanged, "rank-0000[01].safetensors (has .* bytes|does not have the hash)")):
        assert re.search(f"{folder}/step-{step:09d} is damaged \\({what}.*the checkpoint before it is used", chain.ended["frozen"].output)


def test_a_frozen_rank(chain):
    ended, run = chain.ended["frozen"], chain.run
    assert ended.code == 75, ended.output
    assert ended.exits.keys() == {0} and ended.exits[0]["code"] == 75
    assert ended.exits[0]["step"] >= ended.steps[-1]
    assert f"dqtrain: no progress for {WATCHDOG_S} s after step {ended.exits[0]['step']}" in ended.output
    assert f"{run.path}/exits/stacks-rank-*.txt" in ended.output and f"`dqtrain resume {run.path}` continues" in ended.output
    assert [path.name for path in run.path.glob("exits/stacks-*")] == ["stacks-rank-00000.txt"]
    stacks = dict(re.findall(r"^thread (.*):\n((?:  .*\n)+)", (run.path / "exits/stacks-rank-00000.txt").read_text(), re.MULTILINE))
    assert {"MainThread", "watchdog"} <= stacks.keys()
    assert "dqtrain/trainer.py" in stacks["MainThread"] and "in train\n" in stacks["MainThread"]
    assert chain.frozen_s < WATCHDOG_S + 2 * GRACE_S + 20  # busy machines tick slowly
    assert (ended.at - ended.exits[0]["time_ns"]) / 1e9 > 2 + 2 * GRACE_S  # time for the stacks of others, and to end by itself


def test_data_that_is_cut_short(chain):
    ended = chain.ended["truncated data"]
    assert ended.code == 3
    assert re.search(r"dqtrain: token shard \S+/shards/train-\w+/shard-00000-00000.bin has \d+ bytes, but its header says \d+; delete it", ended.output)


def test_data_that_is_damaged_where_few_samples_are(chain):
    ended = chain.ended["damaged data"]
    assert ended.code == 3
    assert "shard-00000-00000.bin: block 1 of 2 does not match its checksum" in ended.output
    first = min(ended.exits.values(), key=lambda left: left["time_ns"])
    assert first["code"] == 3 and "block 1 of 2" in first["message"]
    assert (ended.at - first["time_ns"]) / 1e9 < GRACE_S  # its peer ended by itself


def test_a_rank_that_raises(chain):
    ended, log = chain.ended["crash"], chain.run.path / "log.jsonl"
    assert ended.code == 1
    assert "IsADirectoryError" in ended.output and "Traceback" in ended.output
    assert ended.exits[0]["message"] == f"{log}: Is a directory"
    assert ended.exits[1]["code"] == 1 and ended.exits[1]["time_ns"] > ended.exits[0]["time_ns"]
    assert (ended.at - ended.exits[0]["time_ns"]) / 1e9 < GRACE_S


def test_another_teacher(chain):
    ended = chain.ended["another teacher"]
    assert ended.code == 2
    assert re.search(r"dqtrain: \S+/teacher: model.safetensors changed since \S+/run started", ended.output)


def test_more_ranks_than_micro_batches(chain, capfd):
    before = sorted(chain.run.path.rglob("*"))
    assert main(["resume", str(chain.run.path), "--ranks", "3"]) == 2
    assert "a step has 2 micro-batches" in capfd.readouterr().err
    assert sorted(chain.run.path.rglob("*")) == before


def test_all_checkpoints_that_are_left_are_sound(chain):
    for run in (chain.run, chain.whole):
        folders = sorted(run.path.glob("checkpoints/step-*"))
        assert [folder.name for folder in folders] == [f"step-{step:09d}" for step in (58, 59, 60)]
        assert [checkpoint.problem_with(folder) for folder in folders] == [None] * 3


def test_every_living_rank_leaves_its_stacks_and_the_launcher_speaks_for_a_frozen_rank_0(make_run):
    run = make_run(checkpoint="{every_steps: 1}", eval="{}", train="{steps: 500, global_batch: 6, micro_batch: 2, lr: 1.0e-3}")
    with run.start("train", str(run.config), f"run.watchdog_s={WATCHDOG_S}", "--ranks", "3") as process:
        run.wait_for_step(2, process)
        os.kill(run.rank_pids()[0], signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert re.search(f"^rank [12]: no progress for {WATCHDOG_S} s", output, re.MULTILINE)
    assert sorted(path.name for path in run.path.glob("exits/*")) == [
        "rank-0001.json",
        "rank-0002.json",
        "stacks-rank-00001.txt",
        "stacks-rank-00002.txt",
    ]
    assert {json.loads(path.read_text())["code"] for path in run.path.glob("exits/*.json")} == {75}
