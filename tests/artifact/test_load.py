"""A model that does not fit the memory computes from files what it computes in memory."""

import gc
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES

from dqtrain.artifact.load import free_memory, load_any, load_spread
from dqtrain.errors import ConfigError
from dqtrain.models.language import Inputs, LanguageModel


def logits(model):
    ids = torch.arange(10).view(2, 5)
    everything = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return LanguageModel(model).logits(Inputs(ids, everything, *((ids.flip(1), everything) if model.config.is_encoder_decoder else ())))


@pytest.mark.parametrize("share", [None, 0.5, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_spread_over_memory_and_files(name, share, tmp_path):
    FAMILIES[name]().save_pretrained(tmp_path)
    whole = load_any(tmp_path)
    size = 4 * sum(p.numel() for p in whole.parameters())
    spread = load_spread(tmp_path, None if share is None else {"cpu": int(share * size)})
    in_memory = sum(p.numel() for p in spread.parameters() if not p.is_meta) * 4
    assert in_memory == size if share is None else in_memory <= share * size
    torch.testing.assert_close(logits(spread), logits(whole), rtol=1e-5, atol=1e-5)
    assert [names for names in spread.state_dict() if names not in whole.state_dict()] == []


def test_too_little_room_for_files_is_said_before_any_is_written(tmp_path, monkeypatch):
    model = FAMILIES["gpt2"]()
    model.save_pretrained(tmp_path / "model")
    size = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "files"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=size - 1))
    (tmp_path / "files").mkdir()
    with pytest.raises(
        ConfigError, match=rf"{size:,} bytes of it fit no device and would go to files in {tmp_path}/files, which has {size - 1:,} free. Set TMPDIR"
    ):
        load_spread(tmp_path / "model", {"cpu": 0})
    gc.collect()
    assert not any(tmp_path.glob("files/*"))


def test_files_go_with_the_model(tmp_path, monkeypatch):
    FAMILIES["gpt2"]().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "files"))
    (tmp_path / "files").mkdir()
    model = load_spread(tmp_path / "model", {"cpu": 0})
    assert any(tmp_path.glob("files/*/*.dat"))
    del model
    gc.collect()
    assert not any(tmp_path.glob("files/*"))


def test_free_memory_is_what_the_least_limit_leaves(tmp_path):
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    for version, line, folder, limit, used in (
        (2, "0::/job/step\n", groups / "job", "max", "current"),
        (1, "3:cpu,cpuacct:/\n7:memory:/job/step\n", groups / "memory/job", "limit_in_bytes", "usage_in_bytes"),
    ):
        (proc / "self/cgroup").write_text(line)
        assert free_memory(proc, groups) == 8000 * 1024, version
        (folder / "step").mkdir(parents=True)
        (folder / f"step/memory.{limit}").write_text("max\n" if version == 2 else "9223372036854771712\n")
        (folder / f"step/memory.{used}").write_text("10\n")
        (folder / f"memory.{limit}").write_text("5000000\n")
        (folder / f"memory.{used}").write_text("1000000\n")
        assert free_memory(proc, groups) == 4000000, version
        (folder / f"memory.{used}").write_text("5000001\n")
        assert free_memory(proc, groups) == 0, version
