"""Checkpoints of real engines: bit-identical on any stage and world size, complete or absent, and refused when damaged."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import hypothesis
import pytest
import torch
from conftest import flip, kill
from engine_worker import DROPOUT, MAPS, float_model, start_ranks, student_model
from families import cut_copy
from hypothesis import strategies
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dqtrain import checkpoint, tensor_file
from dqtrain.bench.checkpoint import owned
from dqtrain.errors import CheckpointError
from dqtrain.quant.modules import is_learned_scale

STAGES = (1, 2, 3)
DROPPED = {f"{p}-{stage}": {"precision": p, "stage": stage, **DROPOUT} for p in ("fp32", "bf16", "bf16_weights") for stage in STAGES}
"""Name -> how: dropout on, and two micro-batches accumulated by each of two ranks."""


def step(folder, number):
    return folder / f"step-{number:09d}"


def truncate(folder):
    os.truncate(folder / "rank-00001.safetensors", 1000)


def exchange(folder):
    (folder / "rank-00000.safetensors").rename(folder / "x")
    (folder / "rank-00001.safetensors").rename(folder / "rank-00000.safetensors")
    (folder / "x").rename(folder / "rank-00001.safetensors")


def add_empty_rank(folder):
    """Damage in a file that no rank reads."""
    save_file({}, folder / "rank-00002.safetensors")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["rank-00002.safetensors"] = [(folder / "rank-00002.safetensors").stat().st_size, "0" * 32]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


DAMAGE = {
    "truncated": truncate,
    "last byte of a moment": lambda folder: flip(folder / "rank-00001.safetensors", -1),
    "byte of the bank": lambda folder: flip(folder / "buffers.safetensors", -100),
    "byte of the state": lambda folder: flip(folder / "state.json", 12),
    "byte of the index": lambda folder: flip(folder / "index.json", 100),
    "removed rank": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "a rank that owned nothing": add_empty_rank,
    "removed index": lambda folder: (folder / "index.json").unlink(),
    "removed bank": lambda folder: (folder / "buffers.safetensors").unlink(),
    "removed manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "empty manifest": lambda folder: (folder / "MANIFEST.json").write_text(""),
    "manifest of another shape": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "exchanged ranks": exchange,
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def damaged_root(saved, name, damage):
    """The name of a copy of a real run's checkpoints of steps 2 and 3, the newer one damaged, or both."""
    copy = saved / name
    shutil.copytree(saved / "stage-3", copy)
    shutil.rmtree(step(copy, 0))
    if damage == "all":
        truncate(step(copy, 2))
        exchange(step(copy, 3))
    elif damage:
        DAMAGE[damage](step(copy, 3))
    return str(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of what 2 ranks saved at each stage, loaded at each stage, trained on; see the jobs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = [("save_at", {"name": f"stage-{stage}", "stage": stage}) for stage in STAGES]
    jobs += [("load_at", {"source": f"stage-{a}", "name": f"{a}-to-{b}", "stage": b, "then": [2] if a == b else []}) for a in STAGES for b in STAGES]
    jobs += [("load_at", {"source": f"stage-{stage}", "name": f"{stage}-from-0", "stage": stage, "step": 0, "then": [0, 1]}) for stage in STAGES]
    jobs += [("load_at", {"source": "stage-3", "name": "3-to-persistent", "stage": 3, "threshold": 10**6, "then": [2]})]
    jobs += [("load_at", {"source": "3-to-persistent", "name": "persistent-to-3", "stage": 3, "then": [2]})]
    for name, how in DROPPED.items():
        jobs += [("save_at", {"name": name, **how}), ("load_at", {"source": name, "name": f"{name}, resumed", "then": [2], **how})]
    jobs += [("train_on", {"stage": stage}) for stage in STAGES]
    jobs += [("save_once", {"name": "bart", "step": 2, "family": "bart"})]
    jobs += [("load_another", {"source": "stage-3", "stage": 3})]
    disk = folder / "small-disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode == 0
    try:
        start_ranks(folder, 2, [*jobs, *[("no_room", {"root": str(disk)})] * mounted, ("retain", {}), ("fill_disk", {}), ("not_shared", {})])
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


RESIZED = {
    1: [("stage-1", 1), ("stage-2", 3), ("stage-3", 2), ("stage-1", 3)],
    3: [("stage-1", 3), ("stage-2", 2), ("stage-3", 3), ("stage-3", 1), ("stage-3", 2)],
    2: [("stage-1-to-3-on-1", 3), ("stage-3-to-2-on-1", 2), ("stage-2-to-3-on-1", 1)],
    5: [("stage-3-to-3-on-3", 3), ("stage-1-to-3-on-3", 3), ("stage-3-to-2-on-3", 2), ("stage-3-to-1-on-3", 3)],
}
"""World size -> (what it loads, stage), in this order: 2 ranks load what 1 rank saved, and 5 what 3 saved."""


@pytest.fixture(scope="module")
def resized(saved):
    """The checkpoints of step 2 loaded and saved again by other numbers of ranks; and the damaged ones that 2 and 3 ranks chose from."""
    for size, pairs in RESIZED.items():
        jobs = [("load_at", {"source": source, "name": f"{source}-to-{stage}-on-{size}", "stage": stage}) for source, stage in pairs]
        if size in (2, 3):
            roots = [damaged_root(saved, f"for-{size}-{number}", damage) for number, damage in enumerate([None, *DAMAGE, "all"])]
            jobs += [("choose", {"name": f"chosen-by-{size}", "roots": roots, "stage": 3})]
        start_ranks(saved, size, jobs)
    return saved


def whole(folder):
    """Everything in a checkpoint by name, put together from its files alone; every element must be there once."""
    index = json.loads((folder / "index.json").read_text())
    files = [load_file(path) for path in sorted(folder.glob("rank-*.safetensors"))]
    tensors = load_file(folder / "buffers.safetensors") | {"steps": torch.tensor(index["optimizer_step_count"])}
    for name, parameter in index["parameters"].items():
        pieces = sorted(parameter["pieces"], key=lambda piece: piece[1])
        assert [start for _, start, _ in pieces] == [0, *itertools.accumulate(numel for _, _, numel in pieces)][:-1]
        assert sum(numel for _, _, numel in pieces) == parameter["total"]
        kinds = {key.rpartition("|")[2] for file in files for key in file if key.rpartition("|")[0] == name}
        for kind in kinds:
            parts = [files[rank].pop(f"{name}|{kind}") for rank, _, _ in pieces]
            assert [part.shape for part in parts] == [(numel,) for _, _, numel in pieces]
            tensors[f"{name}|{kind}"] = torch.cat(parts).view(parameter["shape"])
    assert not any(files)
    return tensors


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


def outputs(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_all_there_is(saved, stage):
    found = whole(step(saved / f"stage-{stage}", 2))
    parameters = dict(student_model().named_parameters())
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        assert {key.rpartition("|")[0] for key in found if key.endswith(f"|{kind}")} == {f"student.model.{name}" for name in parameters}
        assert all(found[f"student.model.{name}|{kind}"].shape == parameter.shape for name, parameter in parameters.items())
        assert all(found[f"student.model.{name}|{kind}"].count_nonzero() for name in parameters)
    assert found["steps"] == 2
    assert found["contrast.touched"].any() and found["contrast.bank"].count_nonzero()
    assert any(parameter.shape == (1,) for parameter in parameters.values())
    assert not any(torch.equal(found[f"student.model.{name}|fp32"], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("a", STAGES)
@pytest.mark.parametrize("b", STAGES)
def test_loading_restores_every_bit_at_any_stage(saved, a, b):
    assert_same(whole(step(saved / f"{a}-to-{b}", 2)), whole(step(saved / f"stage-{a}", 2)))
    for rank in (0, 1):  # the weights that forward uses, not only those that the optimizer keeps
        assert_same(outputs(saved, f"{a}-to-{b}", rank), outputs(saved, f"stage-{a}", rank))


@pytest.mark.parametrize("size", RESIZED)
def test_loading_restores_every_bit_on_another_world_size(resized, size):
    for source, stage in RESIZED[size]:
        again, original = step(resized / f"{source}-to-{stage}-on-{size}", 2), "stage-" + source[6]
        assert len(list(again.glob("rank-*.safetensors"))) == size
        assert_same(whole(again), whole(step(resized / original, 2)))
        for rank in range(size):
            assert_same(outputs(resized, f"{source}-to-{stage}-on-{size}", rank), outputs(resized, original))


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_bit_for_bit(saved, stage):
    run = saved / f"stage-{stage}"
    assert_same(whole(step(saved / f"{stage}-to-{stage}", 3)), whole(step(run, 3)))
    before, after = whole(step(run, 2)), whole(step(run, 3))
    assert not any(torch.equal(before[key], after[key]) for key in before if key.endswith("|fp32"))


@pytest.mark.parametrize("name", DROPPED)
def test_training_with_dropout_goes_on_bit_for_bit_in_every_precision(saved, name):
    assert_same(whole(step(saved / f"{name}, resumed", 3)), whole(step(saved / name, 3)))
    for rank in (0, 1):
        assert_same(outputs(saved, f"{name}, resumed", rank), outputs(saved, name, rank))
    found = whole(step(saved / name, 3))
    for other in ("stage-" + name[-1], *(n for n in DROPPED if n != name and n[-1] == name[-1])):  # neither without dropout, nor in another precision
        assert any(not torch.equal(value, found[key]) for key, value in whole(step(saved / other, 3)).items() if key.endswith("|fp32"))


CHANGES = [(2, 1), (1, 2), (2, 3), (3, 5)]
NUM_CONTROLS = 6
"""Orders of the gradient's sum, on one rank: whether a rounding error turns an activation's code, and when, is chance, so that one alone would show little."""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Folder of the losses of runs whose number of ranks changes at step 5, or only the order in which gradients are added."""
    folder = tmp_path_factory.mktemp("elastic")
    kinds = {"float": {"stage": 2}, "8 bits": {"stage": 2, "activations": True}}
    orders = [random.Random(seed).sample(range(6), 6) for seed in range(NUM_CONTROLS)]
    for size in (1, 2, 3, 5, 1):
        jobs = []
        for kind, how in kinds.items():
            if size != 5 and not (folder / f"{kind}-{size}.json").exists():
                jobs += [("elastic", {"name": f"{kind}-{size}", **how})]
                if kind == "8 bits" and size == 1:
                    jobs += [("elastic", {"name": f"control-{i}", "source": f"{kind}-{size}", "order": order, **how}) for i, order in enumerate(orders)]
            befores = [before for before, after in CHANGES if after == size and (folder / f"{kind}-{before}.json").exists()]
            jobs += [("elastic", {"name": f"{kind}-{before}-to-{size}", "source": f"{kind}-{before}", **how}) for before in befores]
        start_ranks(folder, size, jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_losses_do_not_depend_on_the_number_of_ranks(changed, before, after):
    """20 steps after the change, with dropout. Float activations differ by rounding; 8-bit ones by no more than twice what another order of the gradient's sum makes of it."""

    def deviation(uninterrupted, name):
        ours, theirs = (json.loads((changed / f"{name}.json").read_text()) for name in (name, uninterrupted))
        assert len(ours) == len(theirs) - 5 == 20
        return max(abs(one - other) for one, other in zip(ours, theirs[5:], strict=True))

    exact, rounded = (deviation(f"{kind}-{before}", f"{kind}-{before}-to-{after}") for kind in ("float", "8 bits"))
    control = max(deviation("8 bits-1", f"control-{i}") for i in range(NUM_CONTROLS))
    print(f"{before} to {after}: float {exact:.1e}, 8 bits {rounded:.1e}, control {control:.1e}")
    assert exact <= 5e-6 and rounded <= 2 * control <= 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_from_before_the_first_step_starts_the_same_run(saved, stage):
    start = whole(step(saved / f"stage-{stage}", 0))
    assert start["steps"] == 0 and not start["contrast.touched"].any()
    assert_same(whole(step(saved / f"{stage}-from-0", 2)), whole(step(saved / f"stage-{stage}", 2)))


@pytest.mark.parametrize("name", ["3-to-persistent", "persistent-to-3"])
def test_persistent_parameters_are_restored(saved, name):
    assert_same(whole(step(saved / name, 2)), whole(step(saved / "stage-3", 2)))
    assert_same(whole(step(saved / name, 3)), whole(step(saved / "stage-3", 3)))
    assert_same(outputs(saved, name), outputs(saved, "stage-3"))


@pytest.mark.parametrize(("name", "size"), [("stage-3", 2), ("stage-2-to-3-on-1", 1), ("stage-3-to-3-on-3", 3), ("stage-3-to-3-on-3-to-3-on-5", 5)])
def test_the_simulated_partition_is_that_of_deepspeed(resized, name, size):
    index = json.loads((step(resized / name, 2) / "index.json").read_text())
    shapes = {name: tuple(parameter["shape"]) for name, parameter in index["parameters"].items()}
    assert checkpoint.Index.join(owned(shapes, size), 2).content == index


# --- without a process group


@hypothesis.given(
    strategies.lists(strategies.tuples(strategies.integers(0, 5), strategies.integers(0, 2)), min_size=1, max_size=6),
    strategies.integers(0, 8),
    strategies.data(),
)
def test_an_index_finds_every_element_once(lengths, seed, data):
    """Pieces of some lengths, some of them lost, on ranks in any order; against one element at a time."""
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    starts = list(itertools.accumulate((numel for numel, _ in lengths), initial=0))
    total = starts.pop()
    own = [{} for _ in lengths]
    where = {}
    for rank, (numel, lost), first in zip(order, lengths, starts, strict=True):
        if numel and not lost:
            own[rank]["x"] = (first, numel, total, (total,))
            where |= {first + i: (rank, i) for i in range(numel)}
    index = checkpoint.Index.join(own, 1)
    start = data.draw(strategies.integers(0, total))
    numel = data.draw(strategies.integers(0, total - start))
    found = [
        (part.start + i, (part.rank, part.offset + i))
        for part in checkpoint.Index(json.loads(json.dumps(index.content))).parts("x", start, numel)
        for i in range(part.numel)
    ]
    assert found == [(i - start, where[i]) for i in range(start, start + numel) if i in where]
    assert index.ranks([("x", start, numel), ("y", 0, 9)]) == {rank for _, (rank, _) in found}
    assert index.holders() == {rank for rank, _ in where.values()}


@pytest.mark.parametrize("stage", STAGES)
def test_fill_gives_a_plain_model_the_same_weights(saved, stage):
    folder = step(saved / f"stage-{stage}", 2)
    model = student_model(seed=9)
    left = checkpoint.fill(model, folder)
    assert left == {}
    expected = whole(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"student.model.{name}|fp32"])
    from_float = float_model(9)
    left = checkpoint.fill(from_float, folder)
    assert left.keys() == {name for name, _ in model.named_parameters() if is_learned_scale(name)}
    assert all(torch.equal(value, expected[f"student.model.{name}|fp32"]) for name, value in left.items())
    for name, parameter in from_float.named_parameters():
        assert torch.equal(parameter, expected[f"student.model.{name}|fp32"])


def test_weights_are_read_by_every_name_that_a_model_has_for_them(saved):
    folder, model = step(saved / "stage-3", 2), float_model(9)
    readers, expected = checkpoint.readers(folder, model), whole(folder)
    assert readers.keys() == model.state_dict().keys() | {name for name, _ in student_model().named_parameters()}
    for name, found in readers.items():
        value = expected["student.model." + name.replace("lm_head", "transformer.wte") + "|fp32"].reshape(-1)
        out = torch.empty(max(1, value.numel() // 3))
        found(value.numel() - out.numel(), out)
        assert torch.equal(out, value[value.numel() - out.numel() :])


def test_fill_refuses_another_model(saved):
    folder = step(saved / "stage-3", 2)
    with pytest.raises(CheckpointError, match=r"lacks 1[46] of the model's tensors, such as transformer\.h\.2"):
        checkpoint.fill(student_model(n_layer=3), folder)
    with pytest.raises(CheckpointError, match=r"wte.weight has shape \(97, 32\), the model's is \(97, 16\)"):
        checkpoint.fill(student_model(n_embd=16), folder)


@pytest.fixture
def root(saved, tmp_path):
    """A copy of a real run's checkpoints, of steps 2 and 3."""
    return saved / damaged_root(saved, tmp_path / "run" / "checkpoints", None)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(root, damage):
    assert checkpoint.newest(root) == (step(root, 3), [])
    DAMAGE[damage](step(root, 3))
    found, messages = checkpoint.newest(root)
    assert found == step(root, 2)
    assert len(messages) == 1 and str(step(root, 3)) in messages[0] and "damaged" in messages[0]
    assert checkpoint.at_step(root, 2) == step(root, 2)
    with pytest.raises(CheckpointError, match=re.escape(str(step(root, 3)))):
        checkpoint.at_step(root, 3)


def test_a_disk_that_cannot_be_read_is_no_damage(root):
    manifest = step(root, 3) / "MANIFEST.json"
    manifest.unlink()
    manifest.symlink_to(manifest)  # reading it fails as a disk or its server does: the file is there
    with pytest.raises(OSError, match="MANIFEST.json"):
        checkpoint.newest(root)


def choices(resized, size, number):
    """What each rank said of a root."""
    return [json.loads((resized / f"chosen-by-{size}-{rank}.json").read_text())[f"for-{size}-{number}"] for rank in range(size)]


@pytest.mark.parametrize(("size", "shares"), [(2, [{0}, {1}]), (3, [{0}, {0, 1}, {1}])])
def test_each_rank_hashes_what_it_reads(resized, size, shares):
    for choice, share in zip(choices(resized, size, 0), shares, strict=True):
        assert choice["chosen"] == "step-000000003" and choice["messages"] == []
        expected = {"buffers.safetensors", "index.json", "state.json"} | {f"rank-{rank:05d}.safetensors" for rank in share}
        assert sorted(choice["read"]) == sorted(f"step-000000003/{name}" for name in expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("damage", DAMAGE)
def test_all_ranks_pass_over_what_any_of_them_finds_damaged(resized, size, damage):
    number = 1 + list(DAMAGE).index(damage)
    first, *others = choices(resized, size, number)
    assert first["chosen"] == "step-000000002"
    assert len(first["messages"]) == 1 and "step-000000003 is damaged" in first["messages"][0]
    assert all((other["chosen"], other["messages"]) == (first["chosen"], first["messages"]) for other in others)
    assert sorted(path.name for path in (resized / f"for-{size}-{number}").glob("*step*")) == ["damaged-step-000000003", "step-000000002"]


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_refuse_when_none_is_sound(resized, size):
    for choice in choices(resized, size, 1 + len(DAMAGE)):
        assert "no checkpoint is sound; the newest: " in choice["error"] and "step-000000003 is damaged (rank-00000.safetensors has" in choice["error"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_of_another_model_is_refused_by_all_ranks(saved, rank):
    message = json.loads((saved / f"load_another-{rank}.json").read_text())
    assert re.search(r"has 0 of the \d+ elements of student.model.transformer.h.2.\S+ \(fp32\)", message) and "it was written by another model" in message


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_while_a_save_is_in_flight(saved, stage):
    for rank in (0, 1):
        assert json.loads((saved / f"in-flight-{stage}-{rank}.json").read_text()) == [".tmp-step-000000002", "LATEST", "step-000000001"]
    assert_same(whole(step(saved / f"in-flight-{stage}", 2)), whole(step(saved / f"stage-{stage}", 2)))


def test_a_rank_killed_in_a_save_leaves_the_older_ones(saved):
    root = saved / "killed"
    start_ranks(saved, 2, [("die_saving", {})], expected=[0, -signal.SIGKILL])
    assert sorted(path.name for path in root.iterdir()) == [".tmp-step-000000002", "LATEST", "step-000000001"]
    assert {"done-00000.json", "rank-00000.safetensors", "rank-00001.safetensors"} <= {path.name for path in (root / ".tmp-step-000000002").iterdir()}
    assert checkpoint.newest(root) == (step(root, 1), [])
    start_ranks(saved, 1, [("save_once", {"name": "killed", "step": 2})])
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-000000001", "step-000000002"]
    assert checkpoint.newest(root) == (step(root, 2), [])
    assert_same(whole(step(root, 1)), whole(step(root, 2)))  # the rank's old `done` file was not taken for a new one


def test_no_sound_checkpoint_is_an_error_and_none_at_all_is_a_start(root, tmp_path):
    for number, damage in ((2, truncate), (3, exchange)):
        damage(step(root, number))
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound.*step-000000003.*Start a new run"):
        checkpoint.newest(root)
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])
    (tmp_path / "empty").mkdir()
    assert checkpoint.newest(tmp_path / "empty") == (None, [])


def test_a_flipped_bit_of_any_byte_of_the_manifest_changes_nothing_that_is_loaded(root):
    manifest = step(root, 3) / "MANIFEST.json"
    original = manifest.read_bytes()
    passed_over = 0
    for position in range(len(original)):
        manifest.write_bytes(original)
        flip(manifest, position)
        found, messages = checkpoint.newest(root)  # step 3 where only its world size or its white space differs: its files are sound
        assert found == step(root, 2 if messages else 3)
        passed_over += bool(messages)
    assert passed_over > len(original) // 2


@pytest.mark.parametrize("latest", ["step-000000002\n", "step-000000099\n", "garbage \x00", ""])
def test_latest_is_for_people_alone(root, latest):
    (root / "LATEST").write_text(latest)
    assert checkpoint.newest(root) == (step(root, 3), [])


def test_an_unfinished_checkpoint_is_ignored(root):
    step(root, 3).rename(root / ".tmp-step-000000003")
    assert checkpoint.newest(root) == (step(root, 2), [])
    (root / ".tmp-step-000000003").rename(root / ".old-step-000000003")
    assert checkpoint.newest(root) == (step(root, 2), [])


def test_the_last_ones_and_the_best_are_kept(saved):
    assert sorted(path.name for path in (saved / "retained").iterdir()) == ["LATEST", "step-000000002", "step-000000004", "step-000000005"]
    assert (saved / "retained" / "LATEST").read_text() == "step-000000005\n"
    assert checkpoint.newest(saved / "retained") == (step(saved / "retained", 5), [])
    state = checkpoint.read_state(step(saved / "retained", 5))
    assert state.pop("versions")["torch"] == torch.__version__
    assert state == {"step": 5, "best": {"step": 2, "loss": 1.0}}


def test_every_third_is_kept(saved):
    names = sorted(path.name for path in (saved / "every-third").glob("step-*"))
    assert names == ["step-000000003", "step-000000006", "step-000000007"]


def test_one_rank_that_cannot_write_stops_all_and_leaves_the_older_one(saved):
    for rank in (0, 1):
        left = json.loads((saved / f"fill_disk-{rank}.json").read_text())
        assert "step-000000002: could not be saved (rank 1: " in left["message"] and "File too large" in left["message"]
        assert f"The last complete checkpoint is {saved / 'disk' / 'step-000000001'}; free space in {saved / 'disk'}" in left["message"]
        assert left["names"] == ["LATEST", "step-000000001"]
        assert left["failed"] == (rank == 1)
    assert all(checkpoint.problem_with(step(saved / "disk", number)) is None for number in (1, 3))
    assert_same(whole(step(saved / "disk", 1)), whole(step(saved / "disk", 3)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_not_shared_is_told_from_a_slow_one(saved, rank):
    message = json.loads((saved / f"not_shared-{rank}.json").read_text())
    assert "has no done-00001.json, which that rank has written; run.dir must be on a disk that all ranks share" in message
    assert not list(saved.glob("disk-of-rank-0/*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_without_room_is_refused_before_anything_is_written(saved, rank):
    if not (saved / f"no_room-{rank}.json").exists():
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        pytest.skip("mounting a tmpfs needs root")
    message = json.loads((saved / f"no_room-{rank}.json").read_text())
    needed, free = (int(number.replace(",", "")) for number in re.search(r"it takes ([\d,]+) bytes, but ([\d,]+) are free", message).groups())
    original = step(saved / "stage-3", 0)
    tensors = [tensor for path in original.glob("*.safetensors") for tensor in load_file(path).values()]
    assert needed == sum(tensor.nbytes for tensor in tensors) and 0 < free <= 100 * 1024
    assert "There is no earlier checkpoint; free space in" in message
    assert not list((saved / "small-disk/checkpoints").iterdir())


# --- weights for others


@pytest.fixture
def student(tmp_path):
    """What a run keeps of its student besides weights."""
    folder = tmp_path / "student"
    float_model(9).config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_becomes_a_model_directory(saved, student, tmp_path, dtype, monkeypatch):
    out, folder = tmp_path / "out", step(saved / "stage-3", 2)
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 20_000)
    checkpoint.write_model(folder, student, out, dtype)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == dtype
    expected = whole(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"student.model.{name}|fp32"].to(dtype))
    assert model.lm_head.weight is model.transformer.wte.weight
    files = sorted(out.glob("*.safetensors"))
    written = [load_file(path) for path in files]
    assert len(written) > 2 and all(sum(value.nbytes for value in tensors.values()) <= 20_000 for tensors in written)
    assert sorted(name for tensors in written for name in tensors) == sorted(name for name, _ in float_model(9).named_parameters())  # tied ones once
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors.index.json"} | {path.name for path in files}
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_small_model_is_one_file_and_nothing_is_overwritten(saved, student, tmp_path):
    out, folder = tmp_path / "out", step(saved / "stage-1", 2)
    checkpoint.write_model(folder, student, out, torch.float32)
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).lm_head.weight, whole(folder)["student.model.transformer.wte.weight|fp32"])
    with pytest.raises(CheckpointError, match="out exists, and nothing is overwritten"):
        checkpoint.write_model(folder, student, out, torch.float32)


def test_buffers_become_part_of_the_model_directory(saved, tmp_path):
    student, out, folder = tmp_path / "student", tmp_path / "out", step(saved / "bart", 2)
    cut_copy(float_model(9, "bart"), MAPS).config.save_pretrained(student)
    checkpoint.write_model(folder, student, out, torch.float32)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.final_logits_bias.shape == (1, 97) and "final_logits_bias" in load_file(out / "model.safetensors")
    expected = whole(folder)
    assert all(torch.equal(parameter, expected[f"student.model.{name}|fp32"]) for name, parameter in model.named_parameters())


def test_another_models_directory_is_refused(saved, student, tmp_path):
    folder = step(saved / "stage-3", 2)
    for changes, message in (({"n_layer": 3}, "lacks 12 of"), ({"n_layer": 1}, r"has transformer\.h\.1\."), ({"n_embd": 16}, "has shape")):
        float_model(9, **changes).config.save_pretrained(student)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.write_model(folder, student, tmp_path / "out", torch.float32)
        assert not (tmp_path / "out").exists()


# --- whole runs

TRAIN = "{steps: 60, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"


def visible(run):
    return sorted(run.path.glob("checkpoints/step-*"))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_full_disk_ends_a_run_with_its_own_code(make_run, ranks):
    run = make_run(train=TRAIN, checkpoint="{every_steps: 1}", eval="{}")
    process = run.start("train", str(run.config), "--ranks", str(ranks))
    run.wait_for_step(2, process)
    limit = 300_000 if ranks == 1 else 50_000  # less than a rank's fragments, more than what TensorBoard has, which is on rank 0 alone
    resource.prlimit(run.rank_pids()[ranks - 1], resource.RLIMIT_FSIZE, (limit, limit))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 4, output
    assert "could not be saved" in output and f"free space in {run.path / 'checkpoints'}, then `dqtrain resume {run.path}`" in output
    assert "Traceback" not in output
    assert not list(run.path.glob("checkpoints/.*"))
    exits = [json.loads(path.read_text()) for path in sorted(run.path.glob("exits/*"))]
    assert [(left["code"], left["message"]) for left in exits] == [(4, exits[0]["message"])] * ranks
    assert f"could not be saved (rank {ranks - 1}: " in exits[0]["message"]
    folder, messages = checkpoint.newest(run.path / "checkpoints")
    assert folder == visible(run)[-1] and messages == []
    assert folder.name in output
    assert whole(folder)["steps"] == int(folder.name.removeprefix("step-"))


def test_a_damaged_newest_checkpoint_does_not_cost_the_next_ones(make_run):
    run = make_run(train="{steps: 12, global_batch: 8, micro_batch: 4, lr: 1.0e-3}", checkpoint="{every_steps: 5, keep_last: 1}", eval="{}")
    process = run.start("train", str(run.config))
    run.wait_for_step(6, process)
    process.terminate()
    process.communicate(timeout=60)
    last = visible(run)[-1]
    shutil.copytree(last, run.path / "checkpoints/step-000000011")  # sound files under the name of a later step, then damaged
    (run.path / "checkpoints/step-000000011/state.json").write_text("{}")
    code, output = run.dqtrain("resume", str(run.path))
    assert code == 0 and "step-000000011 is damaged" in output, output
    assert [folder.name for folder in visible(run)] == ["step-000000012"]
    assert (run.path / "checkpoints/damaged-step-000000011").is_dir()


def test_what_cannot_be_deleted_is_said_and_ends_nothing(make_run):
    run = make_run(train="{steps: 12, global_batch: 8, micro_batch: 4, lr: 1.0e-3}", checkpoint="{every_steps: 5, keep_last: 1}", eval="{}")
    process = run.start("train", str(run.config))
    run.wait_for_step(6, process)
    process.terminate()
    process.communicate(timeout=60)
    last = visible(run)[-1]
    last.with_name(f".old-{last.name}").write_text("no folder, so that none can take its name")
    code, output = run.dqtrain("resume", str(run.path))
    assert code == 0, output
    told = [event for event in run_events(run) if event["event"] == "not_deleted"]
    assert told and all(event["checkpoint"] == last.name and "Not a directory" in event["problem"] for event in told)
    assert visible(run) == [last, last.with_name("step-000000012")]


KILLS, SEED = int(os.environ.get("SOAK_KILLS", "6")), int(os.environ.get("SOAK_SEED", "7"))
"""`make soak` asks for hundreds."""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_broken_checkpoint_and_repeats_no_number(make_run):
    train = re.sub(r"steps: \d+", f"steps: {max(60, 4 * KILLS)}", TRAIN, count=1)
    uninterrupted = make_run("uninterrupted", train=train, checkpoint="{every_steps: 1}", eval="{}")
    timeout_s = 300 + 10 * KILLS
    code, output = uninterrupted.dqtrain("train", str(uninterrupted.config), "--ranks", "2", timeout_s=timeout_s)
    assert code == 0, output
    run, draw = make_run(train=train, checkpoint="{every_steps: 1}", eval="{}"), random.Random(SEED)
    command = ("train", str(run.config), "--ranks", "2")
    for number in range(KILLS):
        before = visible(run)[-1:]
        process = run.start(*command)
        while visible(run)[-1:] == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        kill(*run.rank_pids().values())
        output = process.communicate(timeout=120)[0]
        assert process.returncode not in (0, 2, 3, 4, 5, 75), output
        print(f"kill {number + 1} of {KILLS} at {visible(run)[-1].name}", flush=True)
        assert visible(run) and all(checkpoint.problem_with(folder) is None for folder in visible(run))
        command = ("resume", str(run.path))
    code, output = run.dqtrain(*command, timeout_s=timeout_s)
    assert code == 0, output
    assert run.log() == uninterrupted.log()
    resumed_at = [event["step"] for event in run_events(run) if event["event"] == "resume"]
    print(f"seed {SEED}: {KILLS} kills, resumed at steps {resumed_at}")
    assert len(resumed_at) == KILLS and resumed_at == sorted(set(resumed_at))


def run_events(run):
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
