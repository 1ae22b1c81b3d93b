"""vLLM, in an environment of its own, computes what was trained: `make runtimes`. Logits of bf16 arithmetic are compared where it matters, at what is likely."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from families import FAMILIES

from dqtrain.artifact import format, parity
from dqtrain.artifact.compressed.target import CompressedTarget
from dqtrain.artifact.load import load_artifact
from dqtrain.config import Export, Quant
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import quantize_model
from launch.local import free_port

BIN = Path(__file__).parents[2] / ".venv-vllm/bin"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    "PYTHONPATH": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
WORDS, POSITIONS, NEW = 300, 64, 12
SHAPES = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": POSITIONS},
}
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new = json.loads(sys.argv[1])
    model = LLM(model=folder, dtype="bfloat16", max_model_len=64, enforce_eager=True, disable_log_stats=True)
    how = SamplingParams(temperature=0, max_tokens=new, logprobs=1, detokenize=False, ignore_eos=True)
    for said in model.generate([{"prompt_token_ids": prompt} for prompt in prompts], how):
        said = said.outputs[0]
        nats = [step[token].logprob for token, step in zip(said.token_ids, said.logprobs)]
        print("SAID", json.dumps([list(said.token_ids), nats]))
"""


def learn(model, steps):
    """That the word behind x is 3 x + 7, so that what is likely is far from what is not."""
    language_model, optimizer = LanguageModel(model.train()), torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = [torch.randint(WORDS, (16,), generator=generator)]
        for _ in range(24):
            ids.append((3 * ids[-1] + 7) % WORDS)
        ids = torch.stack(ids, 1)
        inputs = Inputs(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool))
        torch.nn.functional.cross_entropy(language_model.logits(inputs), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def exported(family, settings, folder, world):
    """The packed artifact of a student that learned something, and what it is to vLLM."""
    model = FAMILIES[family](**SHAPES[family], vocab_size=WORDS)
    learn(model, 150)
    quant = Quant.model_validate(settings)
    coverage = quantize_model(model, quant)
    ids = torch.arange(24)[None] * 7 % WORDS
    calibrate(model, lambda: LanguageModel(model).logits(Inputs(ids, torch.ones_like(ids, dtype=torch.bool))))
    learn(model, 50)
    packed, made = folder / "packed", folder / "made"
    packed.mkdir()
    made.mkdir()
    model.config.save_pretrained(packed)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (packed / file).write_bytes((world / "teacher" / file).read_bytes())
    activations = quant.activations.model_dump() if quant.activations else None
    format.write(model, packed, {"activations": activations, "coverage": json.loads(coverage.to_json())})
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        target = CompressedTarget(tensors, model.config, Export(compressed_tensors="vllm"))
        assert not target.plan.refused
        target.write(made)
        parity.verify_target(model, packed, made, target, None, False)
    return packed, made


def greedy(packed, prompt):
    """What the student as it was trained writes, and the log-probabilities of that, in fp32."""
    model, ids = load_artifact(packed), torch.tensor([prompt])
    with torch.no_grad():
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        written = ids[0, len(prompt) :]
        nats = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, written[:, None])[:, 0]
    return written.tolist(), nats


def without_amx(folder):
    """An environment for vLLM's processes: its attention of bf16 ends with SIGILL on virtual machines whose processor says that it has AMX and does not run it."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text("import torch\n\ntorch.cpu._is_amx_tile_supported = lambda: False\n")
    return {**ENVIRONMENT, "PYTHONPATH": str(folder / "site")}


def run(made, prompts, new):
    """vLLM on a folder, in a process of its environment."""
    program = made.parent / "program.py"  # its engine is one more process, which reads the program again
    program.write_text(PROGRAM)
    command = [BIN / "python", program, json.dumps([str(made), prompts, new])]
    return subprocess.run(command, capture_output=True, text=True, env=without_amx(made.parent), timeout=600)


def weights(bits, granularity="per_row", **more):
    """Of linears and words alike."""
    both = {"bits": bits, "granularity": granularity, **more}
    words = both if granularity == "per_row" else {"bits": bits, "granularity": "per_row"}
    return {"linears": both, "embeddings": words, "positions": None, "activations": None}


@pytest.mark.parametrize(
    ("family", "settings", "tolerance"),
    [
        ("llama", weights(4), 4e-3),
        ("gpt2", weights(4), 4e-3),
        ("qwen2", weights(4, "per_group", group_size=32, grid="affine"), 4e-3),
        ("llama", {**weights(8), "activations": {"bits": 8}}, 2e-2),
        ("gpt2", {**weights(8), "activations": {"bits": 8, "scale": "learned"}}, 2e-2),
    ],
    ids=["llama W4A16", "gpt2 W4A16", "qwen2 W4A16 affine groups", "llama W8A8 per token", "gpt2 W8A8 learned"],
)
def test_vllm_writes_what_was_trained(family, settings, tolerance, world, tmp_path):
    packed, made = exported(family, settings, tmp_path, world)
    prompts = [[5, 22, 73], [11], [90, 277, 238, 121]]
    done = run(made, prompts, NEW)
    said = [json.loads(line.removeprefix("SAID ")) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert done.returncode == 0 and len(said) == len(prompts), done.stderr[-3000:]
    for prompt, (written, nats) in zip(prompts, said, strict=True):
        expected, expected_nats = greedy(packed, prompt)
        assert written == expected
        assert (torch.tensor(nats) - expected_nats).abs().max() <= tolerance


def test_a_width_that_vllm_has_no_kernel_for_on_cpus_is_its_own_error(world, tmp_path):
    """As the export says; nothing is computed wrongly."""
    _, made = exported("llama", weights(2), tmp_path, world)
    done = run(made, [[5]], 2)
    assert done.returncode != 0 and "SAID" not in done.stdout and "Failed to find a kernel" in done.stderr + done.stdout


def test_dqtrain_serves_it(world, tmp_path):
    packed, made = exported("llama", weights(4), tmp_path, world)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "dqtrain",
        "serve",
        str(made),
        "--port",
        str(port),
        "--",
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "64",
        "--enforce-eager",
    ]
    log = tmp_path / "log"
    environment = without_amx(tmp_path)
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": f"{environment['PYTHONPATH']}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        try:
            asked = json.dumps({"model": str(made), "prompt": [5, 22, 73], "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True})
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked.encode(), {"Content-Type": "application/json"})
            deadline = time.monotonic() + 300
            while True:
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        choice = json.load(answer)["choices"][0]
                    break
                except urllib.error.URLError as error:
                    assert isinstance(error.reason, ConnectionRefusedError) and server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(1)
            assert choice["token_ids"] == greedy(packed, [5, 22, 73])[0]
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
        finally:
            server.kill()
    assert not re.search("Traceback", log.read_text())
