"""A whole run whose shards are at an address, one of them damaged."""

import json
import shutil

import pytest
from conftest import prepare_one


@pytest.mark.slow
def test_a_run_reads_shards_at_an_address_and_leaves_a_damaged_one_out(world, make_run, tmp_path):
    folder = prepare_one(str(world / "train.jsonl"), "train", world / "tokenizer", tmp_path / "here", tokens_per_shard=1000)
    store = shutil.copytree(folder, tmp_path / "store")
    shards = sorted(store.glob("*.bin"))
    assert len(shards) >= 8
    for extra in shards[8:]:
        extra.unlink()
    index = json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:8]}))
    content = bytearray(shards[2].read_bytes())
    content[-50] ^= 1
    shards[2].write_bytes(content)
    keys = f"tokens_per_sample: 16, attention: within, parts: 2, quarantine: true, cache: {{folder: {tmp_path}/copies, gib: 0.001}}"
    data = f"{{train: {{path: 'file://{store}', format: shards}}, tokenizer: {world}/tokenizer, {keys}}}"
    run = make_run(
        teacher="null",
        student=f"{{init_from: {world}/teacher}}",
        data=data,
        quant="null",
        distill="{task: 1.0}",
        eval="{}",
        train="{steps: 40, global_batch: 8, micro_batch: 2, lr: 1.0e-3}",
        log="{every_steps: 10}",
    )
    code, output = run.train("zero.student=1", ranks=1)
    assert code == 0, output
    lines = run.log()
    assert 0 < sum(line["left_out_samples"] for line in lines) / len(lines) < 4
    events = [event for event in map(json.loads, (run.path / "events.jsonl").read_text().splitlines()) if event["event"] == "quarantined"]
    assert len(events) == 1 and f"file://{store}/{shards[2].name} cannot be read, tried 5 times" in events[0]["why"] and events[0]["rank"] == 0
    code, output = run.train("zero.student=1", "data.quarantine=false", f"run.dir={tmp_path}/strict", ranks=1)
    assert code == 3 and f"{shards[2].name} cannot be read, tried 5 times" in output
