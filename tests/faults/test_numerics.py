"""Steps whose gradient is not finite: skipped up to a limit, then the run stops with what it had and what did it."""

import json

from safetensors.numpy import load_file

from dqtrain import checkpoint

# The first step throws the weights so far out that no later gradient is finite.
TRAIN = "{steps: 8, global_batch: 4, micro_batch: 2, lr: 1.0e+30, scale_lr: 1.0e-3, max_skipped_steps: 2}"


def test_steps_that_are_not_finite(make_run):
    run = make_run(train=TRAIN, checkpoint="{every_steps: 5}", log="{every_steps: 1}", eval="{}")
    code, output = run.train(ranks=2)
    assert code == 5, output
    for number in (1, 2):
        assert f"step {number + 1}: the gradient norm is inf; skipped, as {number} of at most 2 steps" in output
    message = f"step 4: the gradient norm is inf, so it was not made; the state before it is saved, the batch is in {run.path}/exits."
    assert output.count(message) == 1 and "Raise train.max_skipped_steps" in output
    log = run.log()
    assert [(line["step"], "loss" in line) for line in log] == [(1, True), (2, False), (3, False)]
    exits = [json.loads((run.path / f"exits/rank-000{rank}.json").read_text()) for rank in (0, 1)]
    assert [(left["code"], left["step"]) for left in exits] == [(5, 3)] * 2 and all(message in left["message"] for left in exits)
    batches = [load_file(run.path / f"exits/step-000000004-rank-0000{rank}.safetensors") for rank in (0, 1)]
    for rank, batch in enumerate(batches):  # its micro-batch, two samples of 16 tokens
        assert {name.partition(".")[0] for name in batch} == {str(rank)}
        assert batch[f"{rank}.labels"].shape == (2, 16)
    (saved,) = run.path.glob("checkpoints/step-*")
    assert saved.name == "step-000000003" and checkpoint.problem_with(saved) is None

    # What was skipped is part of the state: started again, on any number of ranks, the run stops at the same batch.
    code, output = run.dqtrain("resume", str(run.path), "--ranks", "1")
    assert code == 5 and output.count(message) == 1 and "; skipped, as" not in output
    assert run.log() == log
    again, both = load_file(run.path / "exits/step-000000004-rank-00000.safetensors"), batches[0] | batches[1]
    assert again.keys() == both.keys() and all((again[name] == both[name]).all() for name in both)
    assert [path.name for path in run.path.glob("checkpoints/step-*")] == ["step-000000003"]
