"""Weights, masters and moments in files on a local disk: the same numbers, little memory, and nothing left behind."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import kill
from engine_worker import DROPOUT, start_ranks
from safetensors.torch import load_file

from dqtrain.disk import Disk

HOW = {"stage": 3, **DROPOUT}
PLACES = {"both": {}, "optimizer": {"parameters": "none"}, "parameters": {"optimizer": "none"}, "optimizer, weights in memory": {"parameters": "cpu"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of what two ranks saved with and without a disk, loaded across, and by one rank; on-disk reports where a small disk can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    nvme, small = folder / "nvme", folder / "small"
    nvme.mkdir()
    small.mkdir()
    where = {"nvme": str(nvme), **HOW}
    jobs = [("save_at", {"name": "none", **HOW}), ("save_at", {"name": "cpu", "offload": True, **HOW})]
    jobs += [("save_at", {"name": name, **where, **places}) for name, places in PLACES.items()]
    jobs += [("masters_apart", {"name": "masters apart", **where})]
    jobs += [("load_at", {"source": "both", "name": "resumed", "then": [2], **where})]
    jobs += [("load_at", {"source": "both", "name": "to memory", "then": [2], **HOW})]
    jobs += [("load_at", {"source": "none", "name": "to disk", "then": [2], **where})]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode == 0
    try:
        start_ranks(folder, 2, jobs + [("on_disk", {"nvme": str(small)})] * mounted)
        start_ranks(
            folder, 1, [("load_at", {"source": "both", "name": "alone on disk", **where}), ("load_at", {"source": "both", "name": "alone", "stage": 1})]
        )
        assert list(nvme.iterdir()) == []
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(small)], check=True)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint by name, however many ranks wrote it."""
    index = json.loads((folder / "index.json").read_text())
    files = [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]
    found = load_file(folder / "buffers.safetensors") | {"steps": torch.tensor(index["optimizer_step_count"])}
    for name, parameter in index["parameters"].items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            found[f"{name}|{kind}"] = torch.cat([files[rank][f"{name}|{kind}"] for rank, *_ in sorted(parameter["pieces"], key=lambda piece: piece[1])])
    return found


@pytest.mark.parametrize(
    ("ours", "theirs", "step"),
    [
        *((name, "none" if name == "parameters" else "cpu", step) for name in (*PLACES, "masters apart") for step in (2, 3)),
        ("resumed", "both", 3),
        ("alone on disk", "both", 2),
        ("alone", "both", 2),
    ],
)
def test_a_disk_changes_no_bit(saved, ours, theirs, step):
    found, expected = (whole(saved / name / f"step-{step:09d}") for name in (ours, theirs))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not torch.equal(*(torch.cat([value.flatten() for name, value in whole(saved / theirs / f"step-{n:09d}").items() if "|" in name]) for n in (2, 3)))


@pytest.mark.parametrize(("ours", "theirs"), [("both", "none"), ("to memory", "both"), ("to disk", "none")])
def test_a_step_from_disk_is_that_from_memory_up_to_the_order_of_the_norm(saved, ours, theirs):
    """DeepSpeed sums the squares of gradients in another order where it offloads them, and so clips by another last bit."""
    found, expected = (whole(saved / name / "step-000000003") for name in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].double() - value.double()).norm() <= 1e-4 * value.double().norm(), name


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_on_disk_has_no_name_takes_no_memory_and_is_given_back(saved, rank):
    if not (saved / f"on_disk-{rank}.json").exists():
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        pytest.skip("mounting a tmpfs needs root")
    found = json.loads((saved / f"on_disk-{rank}.json").read_text())
    assert found["names"] == []
    pages = 4096 * 20  # files end within one
    assert 100_000 < found["planned"] <= found["mapped"] <= found["planned"] + pages
    assert 2 * found["planned"] <= found["used"] <= 2 * (found["planned"] + pages)
    assert found["resident"] == 0
    assert found["after"] == found["left"] < pages


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_have_no_room_together_say_so_alike(saved, rank):
    if not (saved / f"on_disk-{rank}.json").exists():
        pytest.skip("mounting a tmpfs needs root")
    found = json.loads((saved / f"on_disk-{rank}.json").read_text())
    assert found["room"] is None
    assert f"zero.nvme: {saved}/small does not take 3,145,728 bytes (No space left on device" in found["no room"]  # one of them could have had it
    assert "none does not take 1 bytes (No such file or directory; no folder)" in found["no folder"]
    assert [found[name] for name in ("no room", "no folder")] == [json.loads((saved / "on_disk-0.json").read_text())[name] for name in ("no room", "no folder")]


def resident_files() -> int:
    """Bytes of files in this process's memory."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))


def test_released_pages_are_out_of_memory_and_come_back(tmp_path):
    disk = Disk(tmp_path)
    vectors = [disk.zeros(n) for n in (5 * 10**6, 1, 0)]
    before = resident_files()
    vectors[0].copy_(torch.arange(len(vectors[0])))
    vectors[1].fill_(7)
    assert disk.holds(vectors[0][3:]) and not disk.holds(torch.zeros(3))
    during = resident_files()
    disk.release()
    after = resident_files()
    assert during - before > 15 * 10**6 and after - before < 10**6
    assert torch.equal(vectors[0], torch.arange(len(vectors[0])).float()) and vectors[1] == 7 and len(vectors[2]) == 0
    disk.close()
    assert not vectors[0].any() and list(tmp_path.iterdir()) == []


TRAIN = "{steps: 8, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_and_goes_on_bit_for_bit(make_run, tmp_path):
    in_memory = make_run("memory", train=TRAIN, zero="{student: 3, teacher: 3, offload_optimizer: cpu, offload_parameters: cpu}")
    assert in_memory.train()[0] == 0
    nvme = tmp_path / "nvme"
    run = make_run("disk", train=TRAIN, zero=f"{{student: 3, teacher: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme: {nvme}}}")
    code, output = run.train()
    assert code == 2 and output.count("zero.nvme") == 1 and "Traceback" not in output and f"{nvme} does not take 1 bytes" in output
    nvme.mkdir()
    process = run.start("train", str(run.config), "--ranks", "2")
    run.wait_for_step(4, process)
    kill(*run.rank_pids().values())
    process.communicate(timeout=120)
    assert list(nvme.iterdir()) == []
    code, output = run.dqtrain("resume", str(run.path))
    assert code == 0, output
    assert list(nvme.iterdir()) == []
    assert run.log() == in_memory.log()
    results = [json.loads((each.path / "result.json").read_text()) for each in (run, in_memory)]
    assert results[0]["test"] == results[1]["test"]
    events = [event for event in map(json.loads, (run.path / "events.jsonl").read_text().splitlines()) if event["event"] == "checkpoint"]
    assert all(event["stall_s"] >= event["write_s"] for event in events) and len(events) >= 3
