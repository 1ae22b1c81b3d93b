"""Files that are written a tensor at a time are the library's own, byte for byte."""

import json
import random

import hypothesis
import pytest
import torch
from hypothesis import strategies
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dqtrain import tensor_file
from dqtrain.files import digest
from dqtrain.tensor_file import DTYPES, MappedFiles, file_bytes, model_files, write_model_files, write_tensors

LAYOUTS = strategies.dictionaries(
    strategies.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
    strategies.tuples(strategies.sampled_from(list(DTYPES)), strategies.lists(strategies.integers(0, 4), max_size=3)),
    max_size=6,
)


def drawn(layout):
    return {name: torch.randint(0, 2, shape).mul(3).to(dtype) for name, (dtype, shape) in layout.items()}


@hypothesis.given(LAYOUTS, strategies.randoms())
def test_files_are_those_of_the_library(tmp_path_factory, layout, shuffle):
    folder = tmp_path_factory.mktemp("tensors")
    tensors = drawn(layout)
    save_file(tensors, folder / "theirs", {"format": "pt"})
    size, hash = write_tensors(folder / "ours", layout, tensors.__getitem__)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert size == (folder / "ours").stat().st_size == file_bytes(layout) and hash == digest(folder / "ours")
    names = list(tensors)
    shuffle.shuffle(names)
    assert write_model_files(folder, layout, ((name, tensors[name]) for name in names)) == {"model.safetensors": (size, hash)}
    if tensors:  # an empty file without metadata is one that the library does not read
        save_file(tensors, folder / "bare")
        assert file_bytes(layout, None) == (folder / "bare").stat().st_size


@hypothesis.given(LAYOUTS, strategies.integers(1, 400))
def test_parts_are_small_and_hold_everything_once(layout, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "SHARD_BYTES", limit)
        files = model_files(layout)
    sizes = [[tensor_file.num_bytes(*tensor) for tensor in part.values()] for part in files.values()]
    assert [name for part in files.values() for name in part] == list(layout)
    assert all(sum(part) <= limit or len([size for size in part if size]) == 1 for part in sizes)
    assert len(files) == 1 or all(part for part in files.values())


def test_parts_are_named_as_transformers_does(tmp_path, monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=32))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=40_000)
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 40_000)
    tensors = dict(model.named_parameters())
    model.config.save_pretrained(tmp_path / "ours")
    hashes = write_model_files(tmp_path / "ours", {name: (t.dtype, t.shape) for name, t in tensors.items()}, ((n, t.detach()) for n, t in tensors.items()))
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"config.json", *hashes}
    assert {path.name for path in (tmp_path / "ours").iterdir()} | {"generation_config.json"} == {path.name for path in (tmp_path / "theirs").iterdir()}
    assert all(digest(tmp_path / "ours" / name) == hash for name, (_, hash) in hashes.items())
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and all(torch.equal(found.get_parameter(name), value) for name, value in tensors.items())
    index = json.loads((tmp_path / "ours" / tensor_file.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(name in load_file(tmp_path / "ours" / file) for name, file in index["weight_map"].items())


def test_a_tensor_that_is_missing_or_another_one_is_noticed(tmp_path):
    layout = {"a": (torch.float32, (2,)), "b": (torch.uint8, (3,))}
    with pytest.raises(AssertionError, match="b was not given"):
        write_model_files(tmp_path, layout, [("a", torch.ones(2))])
    with pytest.raises(AssertionError, match="a is no"):
        write_model_files(tmp_path, layout, [("a", torch.ones(2).half())])


def test_mapped_files_are_closed_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAPPED_BYTES", 100)
    tensors = {str(i): torch.randn(5, 3) for i in range(9)}
    for number in range(2):
        save_file(tensors, tmp_path / str(number))
    files, handles = MappedFiles(), set()
    for _ in range(30):
        path, name, start = tmp_path / str(random.randrange(2)), str(random.randrange(9)), random.randrange(5)
        assert torch.equal(files.read(path, name), tensors[name])
        assert torch.equal(files.read_part(path, name, start, start + 2), tensors[name][start : start + 2])
        handles.add(id(files.open(path)))
        assert files._read <= 100 + 60 + 24
