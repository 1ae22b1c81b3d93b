"""Checkpoints of real engines: bit-identical on any stage and world size, complete or absent, and refused when damaged."""

import json
import os
import random
import re
import resource
import shutil
import time

import pytest
import torch
from engine_worker import float_model, start_ranks, student_model
from safetensors import safe_open
from safetensors.torch import load_file

from dqtrain import checkpoint
from dqtrain.errors import CheckpointError
from dqtrain.quant.modules import is_learned_scale

STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of what 2 ranks saved at each stage, loaded at each stage, trained on; see the jobs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = [("save_at", {"name": f"stage-{stage}", "stage": stage}) for stage in STAGES]
    jobs += [("load_at", {"source": f"stage-{a}", "name": f"{a}-to-{b}", "stage": b, "then": [2] if a == b else []}) for a in STAGES for b in STAGES]
    jobs += [("load_at", {"source": f"stage-{stage}", "name": f"{stage}-from-0", "stage": stage, "step": 0, "then": [0, 1]}) for stage in STAGES]
    jobs += [("load_at", {"source": "stage-3", "name": "3-to-persistent", "stage": 3, "threshold": 10**6, "then": [2]})]
    jobs += [("load_at", {"source": "3-to-persistent", "name": "persistent-to-3", "stage": 3, "then": [2]})]
    start_ranks(folder, 2, [*jobs, ("retain", {}), ("fill_disk", {})])
    return folder


@pytest.fixture(scope="module", params=[1, 3])
def resized(saved, request):
    """(folder of 2 ranks, world size, {(from, to)}): its checkpoints of step 2 loaded and saved again by another number of ranks."""
    pairs = {1: [(1, 1), (2, 3), (3, 2)], 3: [(1, 3), (2, 2), (3, 3), (3, 1)]}[request.param]
    jobs = [("load_at", {"source": f"stage-{a}", "name": f"{a}-to-{b}-on-{request.param}", "stage": b}) for a, b in pairs]
    start_ranks(saved, request.param, jobs)
    return saved, request.param, pairs


def whole(folder):
    """Everything in a checkpoint by name, put together from its files alone; every element must be there once."""
    pieces, steps = {}, set()
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            steps.add(meta["optimizer_step_count"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                name = key.rpartition("|")[0]
                pieces.setdefault(key, []).append((meta["pieces"][name], file.get_tensor(key)))
    tensors = load_file(folder / "buffers.safetensors") | {"steps": torch.tensor(max(steps))}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0]["start"])
        position = 0
        for piece, tensor in parts:
            assert piece["start"] == position and tensor.shape == (piece["numel"],)
            position += piece["numel"]
        assert position == parts[0][0]["total"]
        tensors[key] = torch.cat([tensor for _, tensor in parts]).view(parts[0][0]["shape"])
    return tensors


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


def step(folder, number):
    return folder / f"step-{number:09d}"


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


def test_loading_restores_every_bit_on_another_world_size(resized):
    folder, size, pairs = resized
    for a, b in pairs:
        again = step(folder / f"{a}-to-{b}-on-{size}", 2)
        assert len(list(again.glob("rank-*.safetensors"))) == size
        assert_same(whole(again), whole(step(folder / f"stage-{a}", 2)))
        for rank in range(size):
            assert_same(outputs(folder, f"{a}-to-{b}-on-{size}", rank), outputs(folder, f"stage-{a}"))


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_bit_for_bit(saved, stage):
    run = saved / f"stage-{stage}"
    assert_same(whole(step(saved / f"{stage}-to-{stage}", 3)), whole(step(run, 3)))
    before, after = whole(step(run, 2)), whole(step(run, 3))
    assert not any(torch.equal(before[key], after[key]) for key in before if key.endswith("|fp32"))


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


# --- without a process group


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


def test_fill_refuses_another_model(saved):
    folder = step(saved / "stage-3", 2)
    with pytest.raises(CheckpointError, match=r"lacks 1[46] of the model's tensors, such as transformer\.h\.2"):
        checkpoint.fill(student_model(n_layer=3), folder)
    with pytest.raises(CheckpointError, match=r"wte.weight has shape \(97, 32\), the model's is \(97, 16\)"):
        checkpoint.fill(student_model(n_embd=16), folder)


@pytest.fixture
def root(saved, tmp_path):
    """A copy of a real run's checkpoints, of steps 2 and 3."""
    copy = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "stage-3", copy)
    shutil.rmtree(step(copy, 0))
    return copy


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(folder):
    os.truncate(folder / "rank-00001.safetensors", 1000)


def exchange(folder):
    (folder / "rank-00000.safetensors").rename(folder / "x")
    (folder / "rank-00001.safetensors").rename(folder / "rank-00000.safetensors")
    (folder / "x").rename(folder / "rank-00001.safetensors")


DAMAGE = {
    "truncated": truncate,
    "last byte of a moment": lambda folder: flip(folder / "rank-00001.safetensors", -1),
    "byte of the bank": lambda folder: flip(folder / "buffers.safetensors", -100),
    "byte of the state": lambda folder: flip(folder / "state.json", 12),
    "removed rank": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "removed bank": lambda folder: (folder / "buffers.safetensors").unlink(),
    "removed manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "empty manifest": lambda folder: (folder / "MANIFEST.json").write_text(""),
    "manifest of another shape": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "exchanged ranks": exchange,
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


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
    assert checkpoint.read_state(step(saved / "retained", 5)) == {"step": 5, "best": {"step": 2, "loss": 1.0}}


def test_one_rank_that_cannot_write_stops_all_and_leaves_the_older_one(saved):
    for rank in (0, 1):
        left = json.loads((saved / f"fill_disk-{rank}.json").read_text())
        assert "step-000000002: could not be saved (rank 1: " in left["message"] and "File too large" in left["message"]
        assert f"The last complete checkpoint is {saved / 'disk' / 'step-000000001'}; free space in {saved / 'disk'}" in left["message"]
        assert left["names"] == ["LATEST", "step-000000001"]
    assert all(checkpoint.problem_with(step(saved / "disk", number)) is None for number in (1, 3))
    assert_same(whole(step(saved / "disk", 1)), whole(step(saved / "disk", 3)))


# --- whole runs

TRAIN = "{steps: 60, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}"


def visible(run):
    return sorted(run.path.glob("checkpoints/step-*"))


def test_a_full_disk_ends_a_run_with_its_own_code(make_run):
    run = make_run(train=TRAIN, checkpoint="{every_steps: 1}", eval="{}")
    process = run.start("train", str(run.config), "--ranks", "1")
    run.wait_for_step(2, process)
    (pid,) = run.rank_pids().values()
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, 300_000))  # less than a checkpoint's fragments, more than what TensorBoard has
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 4, output
    assert "could not be saved" in output and f"free space in {run.path / 'checkpoints'}, then `dqtrain resume {run.path}`" in output
    assert "Traceback" not in output
    assert not list(run.path.glob("checkpoints/.*"))
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


KILLS, SEED = int(os.environ.get("SOAK_KILLS", "6")), int(os.environ.get("SOAK_SEED", "7"))
"""`make soak` asks for hundreds."""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_broken_checkpoint_and_repeats_no_number(make_run):
    train = re.sub(r"steps: \d+", f"steps: {max(60, 4 * KILLS)}", TRAIN, count=1)
    uninterrupted = make_run("uninterrupted", train=train, checkpoint="{every_steps: 1}", eval="{}")
    code, output = uninterrupted.train()
    assert code == 0, output
    run, draw = make_run(train=train, checkpoint="{every_steps: 1}", eval="{}"), random.Random(SEED)
    command = ("train", str(run.config), "--ranks", "2")
    for _ in range(KILLS):
        before = visible(run)[-1:]
        process = run.start(*command)
        while visible(run)[-1:] == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        for pid in run.rank_pids().values():
            os.kill(pid, 9)
        output = process.communicate(timeout=120)[0]
        assert process.returncode not in (0, 2, 3, 4, 5, 75), output
        assert visible(run) and all(checkpoint.problem_with(folder) is None for folder in visible(run))
        command = ("resume", str(run.path))
    code, output = run.dqtrain(*command)
    assert code == 0, output
    assert run.log() == uninterrupted.log()
    resumed_at = [event["step"] for event in run_events(run) if event["event"] == "resume"]
    print(f"seed {SEED}: {KILLS} kills, resumed at steps {resumed_at}")
    assert len(resumed_at) == KILLS and resumed_at == sorted(set(resumed_at))


def run_events(run):
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
