"""What each term adds to a training step: forward and backward of a quantized GPT-2-shaped student against its teacher, with one more term."""

import statistics
import time
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dqtrain.config import ActivationQuant, Attention, Contrast, Distill, Hidden, Logits, Quant, WeightQuant
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.models.language import Inputs, LanguageModel, Taught
from dqtrain.models.layers import all_layers
from dqtrain.quant.modules import quantize_model

TERMS = {
    "logits": Distill(logits=Logits()),
    "+ task": Distill(task=1.0, logits=Logits()),
    "+ tsld weights": Distill(logits=Logits(tokens="tsld")),
    "+ contrast": Distill(logits=Logits(), contrast=Contrast()),
    "+ hidden": Distill(logits=Logits(), hidden=Hidden()),
    "+ attention": Distill(logits=Logits(), attention=Attention()),
}


def run(layers: int = 12, width: int = 768, vocabulary: int = 50257, samples: int = 4, tokens: int = 256, rounds: int = 5) -> str:
    """A table as text; medians of times, and of shares within each of `rounds` in which the objectives alternate, the teacher's forward included, the optimizer not."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (samples, tokens))
    inputs, labels = Inputs(ids, torch.ones_like(ids, dtype=torch.bool)), ids.roll(-1, 1)
    ternary = WeightQuant(bits=2, granularity="per_row")
    quant = Quant(linears=ternary, embeddings=ternary, positions=None, activations=ActivationQuant(bits=8))

    seconds: dict[str, list[float]] = {name: [] for name in TERMS}
    pairs: dict[str, tuple[Objective, Any]] = {}
    for name, distill in TERMS.items():
        student, teacher = (GPT2LMHeadModel(config) for _ in range(2))
        quantize_model(student, quant)
        wanted = needed_outputs(distill)
        objective = Objective(LanguageModel(student, "fp32", **wanted), distill, all_layers(config), tokens)
        pairs[name] = objective, LanguageModel(teacher, "fp32", **wanted).eval().requires_grad_(False)
    for _ in range(rounds + 1):  # the first round warms up
        for name, (objective, teacher) in pairs.items():
            start = time.perf_counter()
            with torch.no_grad():
                taught = Taught(teacher(inputs), teacher.plain_head())
            (objective(inputs, labels, taught).total / ids.numel()).backward()
            objective.end_step()
            seconds[name].append(time.perf_counter() - start)
            objective.zero_grad()
    shares = {name: [value / alone for value, alone in zip(values, seconds["logits"], strict=True)] for name, values in seconds.items()}
    lines = [
        f"GPT-2 of {layers} layers, width {width}, vocabulary {vocabulary:,}, 2-2-8, {samples} samples of {tokens} tokens, fp32, {torch.get_num_threads()} threads, "
        f"median of {rounds} interleaved rounds",
        f"  {'term':<16s} {'s':>7s} {'of logits alone':>16s}",
    ]
    median = statistics.median
    return "\n".join([*lines, *(f"  {name:<16s} {median(seconds[name][1:]):7.3f} {median(shares[name][1:]):16.3f}" for name in TERMS)])
