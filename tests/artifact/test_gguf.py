"""GGUF files: blocks that ggml reads back to the bit, and models that llama.cpp runs as they were trained."""

import json

import pytest


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run whose config asks for packed codes, a GGUF file and floats."""
    from conftest import Run, config_text

    folder = tmp_path_factory.mktemp("gguf")
    changes = {
        "export": "{targets: [packed, gguf, hf]}",
        "train": "{steps: 30, global_batch: 8, micro_batch: 4, lr: 5.0e-3, scale_lr: 5.0e-3, warmup_steps: 2}",
    }
    (folder / "run.yaml").write_text(config_text(world, folder / "run", zero="{student: 1, teacher: 0}", checkpoint="{every_steps: 30}", **changes))
    run = Run(folder / "run", folder / "run.yaml")
    code, output = run.train(ranks=1)
    assert code == 0, output
    return run, output


def test_a_run_ends_with_every_target_that_it_was_asked_for(finished):
    run, output = finished
    assert "gguf: Q4_0 for " in output and "rows of 32 are no multiple of 256, the block of TQ1_0" in output
    found = json.loads((run.path / "result.json").read_text())["export"]
    assert found["path"].endswith("packed") and found["others"].keys() == {"gguf", "hf"}
    parity = found["others"]["gguf"]["parity"]
    assert parity["weights"]["bit_identical"] == parity["weights"]["tensors"] == 28
    assert parity["as_shipped"]["held_out_text"] and parity["tokenizer"]["texts"] > 0
    assert json.loads((run.path / "artifact/gguf/parity.json").read_text()) == parity


def test_exported_again_it_is_the_same_file(finished):
    run, _ = finished
    before = (run.path / "artifact/gguf/model.gguf").read_bytes()
    code, output = run.dqtrain("export", str(run.path), "--to", "gguf")
    assert code == 0, output
    assert json.loads(output)["path"].endswith("gguf")
    assert (run.path / "artifact/gguf/model.gguf").read_bytes() == before


def test_generate_runs_it(finished):
    run, _ = finished
    texts = {}
    for place in ("gguf", "gguf/model.gguf", "packed"):
        code, texts[place] = run.dqtrain("generate", str(run.path / "artifact" / place), "the cat sees", "--tokens", "8")
        assert code == 0, texts[place]
    assert texts["gguf"] == texts["gguf/model.gguf"] and texts["gguf"].startswith("the cat sees")
    assert texts["gguf"] == texts["packed"]  # the words are far enough apart for 8-bit activations of either kind
