"""What the loss of a large vocabulary costs, chunk by chunk and with full logits: seconds, and peak bytes beyond what both must hold.

The loss is task + soft cross-entropy with a teacher, both models with a head of their own, forward and backward in fp32. Peak memory is the
high-water mark of the resident set of a fresh process for each measurement (Linux), less its size before the loss (hidden states, heads) and
less the gradients that the loss leaves behind.
"""

import json
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from dqtrain.bench.resident import resident
from dqtrain.distill import terms
from dqtrain.distill.chunked import CHUNK_BYTES, chunked_loss, plain_loss
from dqtrain.models.language import Head

PATHS = {"plain": plain_loss, "chunked": chunked_loss}


def run(
    width: int = 256,
    vocabulary: int = 128256,
    tokens: tuple[int, ...] = (256, 512, 1024, 2048),
    largest: int = 8192,
    rounds: int = 3,
    chunk_bytes: int = CHUNK_BYTES,
) -> str:
    """A table as text. Times are medians of `rounds` in which the paths alternate; `largest` tokens are for the chunked loss alone."""
    lines = [
        f"vocabulary {vocabulary:,}, width {width}, fp32, {torch.get_num_threads()} threads, chunks of {chunk_bytes / 2**20:.0f} MiB, "
        f"median of {rounds} interleaved rounds; MB beyond hidden states, heads and their gradients",
        f"  {'tokens':>7s}  {'plain s':>9s} {'chunked s':>9s} {'ratio':>6s}  {'plain MB':>9s} {'chunked MB':>10s} {'ratio':>6s}",
    ]
    bytes_of_chunked = []
    for number in (*tokens, largest):
        paths = ["chunked"] if number == largest else list(PATHS)
        case = {"width": width, "vocabulary": vocabulary, "tokens": number, "chunk_bytes": chunk_bytes}
        seconds = _in_a_child({**case, "measure": "seconds", "paths": paths, "rounds": rounds})
        peak = {path: _in_a_child({**case, "measure": "bytes", "paths": [path]})[path] for path in paths}
        bytes_of_chunked.append(peak["chunked"])
        cells = [f"{seconds['chunked']:9.3f}", f"{peak['chunked'] / 1e6:10.1f}"]
        if "plain" in paths:
            time_ratio, bytes_ratio = f"{seconds['chunked'] / seconds['plain']:6.2f}", f"{peak['plain'] / peak['chunked']:6.1f}"
            lines.append(f"  {number:7,d}  {seconds['plain']:9.3f} {cells[0]} {time_ratio}  {peak['plain'] / 1e6:9.1f} {cells[1]} {bytes_ratio}")
        else:
            lines.append(f"  {number:7,d}  {'':9s} {cells[0]} {'':6s}  {'':9s} {cells[1]}")
    low, high = min(bytes_of_chunked), max(bytes_of_chunked)
    lines.append(f"  chunked bytes over all numbers of tokens: {low / 1e6:.1f} to {high / 1e6:.1f} MB, {100 * (high / low - 1):.1f} % apart")
    return "\n".join(lines)


def _in_a_child(case: dict[str, object]) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "dqtrain.bench.head", json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _measure(measure: str, paths: list[str], width: int, vocabulary: int, tokens: int, chunk_bytes: int, rounds: int = 0) -> dict[str, float]:
    torch.manual_seed(0)
    _loss(paths[0], _inputs(8, width, 1000), chunk_bytes)  # threads and buffers of the libraries
    inputs = _inputs(tokens, width, vocabulary)
    if measure == "bytes":
        (path,) = paths
        before = resident("VmRSS", restart=True)
        _loss(path, inputs, chunk_bytes)
        student_hidden, student, *_ = inputs
        gradients = sum(tensor.grad.nbytes for tensor in (student_hidden, student.weight) if tensor.grad is not None)
        return {path: float(resident("VmHWM") - before - gradients)}
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(rounds + 1):  # the first round warms up
        for path, values in seconds.items():
            start = time.perf_counter()
            _loss(path, inputs, chunk_bytes)
            values.append(time.perf_counter() - start)
    return {path: statistics.median(values[1:]) for path, values in seconds.items()}


def _inputs(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Head, Tensor, Head, list[Tensor]]:
    student, teacher = (torch.randn(tokens, width) * width**-0.5 for _ in range(2))
    weight = torch.randn(vocabulary, width).requires_grad_()
    return student.requires_grad_(), Head(weight), teacher, Head(torch.randn(vocabulary, width)), [torch.randint(vocabulary, (tokens,))]


def _loss(path: str, inputs: tuple[Tensor, Head, Tensor, Head, list[Tensor]], chunk_bytes: int) -> None:
    inputs[0].grad = inputs[1].weight.grad = None
    total, _ = PATHS[path](*inputs, _task_and_soft, chunk_bytes)
    (total / len(inputs[0])).backward()


def _task_and_soft(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert teacher_logits is not None
    task, soft = terms.task(student_logits, labels).sum(), terms.cross_entropy(student_logits, teacher_logits).sum()
    return task + soft, {"task": task.detach(), "cross_entropy": soft.detach()}


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
