"""A run goes on with the training data that it started with, or not at all."""

import json
import shutil
import struct

import numpy as np
import pytest
from conftest import prepare_one
from families import ALONE

from dqtrain.build import _check_same_data
from dqtrain.data.folder import open_folder
from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir


def test_a_run_whose_corpus_grew_is_not_resumed(world, make_run, tmp_path):
    corpus = shutil.copy(world / "train.jsonl", tmp_path / "corpus.jsonl")
    run = make_run(
        teacher="null",
        student=f"{{init_from: {world}/teacher}}",
        data=f"{{train: {corpus}, tokenizer: {world}/tokenizer, tokens_per_sample: 16}}",
        quant="null",
        distill="{task: 1.0}",
        eval="{}",
        zero="{student: 1}",
        train="{steps: 1000000, global_batch: 8, micro_batch: 2, lr: 1.0e-3}",
    )
    process = run.start("train", str(run.config))
    run.wait_for_step(4, process)
    run.path.joinpath("stop").touch()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    with open(corpus, "a") as file:
        file.write('{"text": "one more"}\n')
    code, output = run.dqtrain("resume", str(run.path))
    (before,) = json.loads((run.path / "data.json").read_text())
    assert code == 2 and f"data.train: {corpus} changed since {run.path} started ({before['tokens']:,} tokens in {before['shards']} shards then, " in output


def test_what_changed_is_named_and_only_behind_a_checkpoint(world, tmp_path):
    prepared = prepare_one(str(world / "train.jsonl"), "train", world / "tokenizer", tmp_path / "here", tokens_per_shard=1000)
    foreign = tmp_path / "b.ds"

    def write(*ends):
        foreign.write_bytes(np.arange(ends[-1], dtype="<u2").tobytes())
        (tmp_path / "b.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))

    run = RunDir(tmp_path / "run")

    def start():
        _check_same_data(["a", "b"], [open_folder(prepared), open_folder(foreign)], run, ALONE)

    write(3, 9)
    run.checkpoints.mkdir(parents=True)
    start()
    write(3, 10)
    start()
    (run.checkpoints / "step-000000001").mkdir()
    start()
    for ends in ((3, 9), (4, 10), (10,)):
        write(*ends)
        with pytest.raises(
            ConfigError, match=rf"data.train: b changed since {run.path} started \(10 tokens in 1 shards then, {ends[-1]} tokens .* another run.dir"
        ):
            start()
    write(3, 10)
    start()
    index = json.loads((prepared / "index.json").read_text())
    (prepared / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:-1]}))
    with pytest.raises(ConfigError, match="data.train: a changed"):
        start()
