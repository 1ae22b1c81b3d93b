"""One step of a run through the command line against plain torch on the whole batch at once."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


def test_a_step_on_two_ranks_is_that_of_plain_torch_on_the_whole_batch(world, make_run, tmp_path):
    """Documents of unlike length, in micro-batches of which each rank has two: only the global number of target tokens makes this come out."""
    texts = [" ".join("abcdefgh"[(i * j) % 8] for j in range(1, 2 + 2 * i)) for i in range(1, 9)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    model.save_pretrained(tmp_path / "start")
    run = make_run(
        teacher="null",
        student=f"{{init_from: {tmp_path}/start}}",
        data=f"{{train: {tmp_path}/few.jsonl, validation: {tmp_path}/few.jsonl, tokenizer: {world}/tokenizer, samples: documents, tokens_per_sample: 64}}",
        train="{steps: 1, global_batch: 8, micro_batch: 2, lr: 1.0e-3}",
        quant="null",
        distill="{task: 1.0}",
        eval="{}",
        log="{every_steps: 1}",
        export="{targets: [hf]}",
    )
    code, output = run.dqtrain("train", str(run.config), "--ranks", "2")
    assert code == 0, output
    step = next(line for line in run.log() if "loss" in line)

    loss, count = torch.tensor(0.0), 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
        loss = loss + torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
        count += len(ids) - 1
    (loss / count).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert step["loss"] == pytest.approx(loss.item() / count, rel=1e-4) and step["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
