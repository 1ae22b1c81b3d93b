"""The whole of dqtrain on text that every machine already has: train a small teacher, compress it to 2-2-8, show what it cost.

Two of them: a causal model on the Python standard library, and an encoder-decoder that says what the functions of the installed packages do.
Each phase is a run or a file of its own, complete or absent, so that an interrupted quickstart goes on where it stopped.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dqtrain.config import BITS_OF_GRID, PASSIVE, Quant, RunConfig, differences, load_config
from dqtrain.data.docstrings import docstrings_summary
from dqtrain.data.stdlib import stdlib_summary
from dqtrain.errors import ConfigError, Stopped
from dqtrain.files import write_text
from dqtrain.rundir import RunDir

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CAUSAL, SEQ2SEQ = "quickstart", "seq2seq-quickstart"
PROMPTS = {CAUSAL: "    if not isinstance(", SEQ2SEQ: "def load_config(path):\n    with open(path) as file:\n        return json.load(file)\n"}
SCALES: dict[str, Any] = {"minmax": "minmax", "mean_abs": "mean43", "mse": "dynamic"}
"""Rules of the scales that weights get when they are rounded without training."""
AGAIN = "The same command goes on from here."
TASK_ONLY = ("distill.task=1.0", *(f"distill.{term}=null" for term in ("logits", "hidden", "attention", "contrast")))


def _configs(name: str, seed: int) -> dict[str, RunConfig]:
    """The teacher's, the student's and the ablation's config."""
    if not (CONFIGS / f"{name}.yaml").is_file():
        raise ConfigError(f"{CONFIGS} has no {name}.yaml; run the quickstart from a clone of the repository.")
    suffix = "" if seed == 1 else f"-seed{seed}"
    common = [f"run.seed={seed}"]
    teacher = f"runs/{name}-teacher{suffix}"
    student = [*common, f"teacher.path={teacher}", f"data.shards={teacher}/shards"]
    return {
        "teacher": load_config(CONFIGS / f"{name}-teacher.yaml", [*common, f"run.dir={teacher}"]),
        "student": load_config(CONFIGS / f"{name}.yaml", [*student, f"run.dir=runs/{name}{suffix}"]),
        "task only": load_config(CONFIGS / f"{name}.yaml", [*student, *TASK_ONLY, f"run.dir=runs/{name}-task{suffix}"]),
    }


def quickstart(train: Callable[[RunConfig, int], int], seed: int, ablate: bool, seq2seq: bool) -> int:
    """Run or continue every phase and print the table; the exit code. `train(config, ranks)` starts or continues a run."""
    import torch

    started = time.monotonic()
    ranks = min(2, torch.cuda.device_count() or 2)
    kind = SEQ2SEQ if seq2seq else CAUSAL
    configs = _configs(kind, seed)
    if not ablate:
        del configs["task only"]
    print(f"corpus: {'functions of the packages' if seq2seq else 'the Python standard library'} of this machine")
    for split, facts in (docstrings_summary if seq2seq else stdlib_summary)().items():
        count = "pairs" if seq2seq else "files"
        print(f"  {split:<10} {facts[count]:>6,} {count} {facts['bytes']:>10,} bytes  sha256 {str(facts['sha256'])[:16]}")
    for number, (name, config) in enumerate(configs.items(), 1):
        run = RunDir(config.run.dir)
        if run.result.exists():
            changed = differences(run.load_config(), config).keys() - PASSIVE
            if changed:
                raise ConfigError(f"{run.path} is a finished run of another config ({', '.join(sorted(changed))} differ); move it away, or restore configs/.")
            print(f"{number}. {name}: {run.path} is finished")
            continue
        print(f"{number}. {name}: {config.train.steps} steps on {ranks} ranks under ZeRO-{config.zero.student}, in {run.path}", flush=True)
        code = train(config, ranks)
        if code != 0:
            if code == Stopped.exit_code:
                print(AGAIN)
            return code
    runs = {name: RunDir(config.run.dir) for name, config in configs.items()}
    try:
        _print_table(runs, _baselines(configs["student"], runs["student"]))
        _print_completion(runs["student"], PROMPTS[kind])
    except KeyboardInterrupt:
        print(f"\ninterrupted; both runs are finished. {AGAIN}")
        return Stopped.exit_code
    print(f"\nthis start took {(time.monotonic() - started) / 60:.1f} minutes; the run is in {runs['student'].path}")
    return 0


def _baselines(config: RunConfig, run: RunDir) -> dict[str, float]:
    """Test loss of the teacher quantized like the student but without training, by kind of scale; and the unigram entropy of the test split."""
    path = run.path / "baselines.json"
    if path.is_file():
        return json.loads(path.read_text())
    from dqtrain.artifact.load import load_any
    from dqtrain.build import evaluation_stream, student_model, unigram_entropy
    from dqtrain.engine import materialise
    from dqtrain.evaluate import evaluate
    from dqtrain.metrics import Phase
    from dqtrain.models.language import LanguageModel
    from dqtrain.rundir import model_directory
    from dqtrain.world import init_world

    assert config.teacher is not None and config.quant is not None
    world = init_world()
    teacher = load_any(model_directory(config.teacher.path))
    stream = evaluation_stream(run.path, teacher, "test", None, None, config)
    found = {"unigram entropy": unigram_entropy(stream)}
    for kind, grid in SCALES.items():
        model, _, _, weights = student_model(config.model_copy(update={"quant": _with_grid(config.quant, grid)}), 0, 0, world)
        materialise(model, weights)
        found[kind] = evaluate(LanguageModel(model).to(world.device), stream, 16, world, progress=Phase(f"round-to-nearest with {kind} scales")).loss
    write_text(path, json.dumps(found, indent=1))
    return found


def _with_grid(quant: Quant, grid: Any) -> Quant:
    """The settings with another grid, where that exists at a weight's width."""
    weights = {kind: getattr(quant, kind) for kind in ("linears", "embeddings", "positions")}
    exists = {kind: w for kind, w in weights.items() if w is not None and w.bits in BITS_OF_GRID[grid]}
    return quant.model_copy(update={kind: w.model_copy(update={"grid": grid}) for kind, w in exists.items()})


def _tokens_per_s(run: RunDir) -> float:
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)


def _print_table(runs: dict[str, RunDir], baselines: dict[str, float]) -> None:
    results = {name: run.load_result() for name, run in runs.items()}
    distilled = results["student"]
    kind = min(SCALES, key=lambda kind: baselines[kind])
    teacher_bytes, student_bytes = results["teacher"]["export"]["bytes"], distilled["export"]["bytes"]
    teacher_loss = distilled["test"]["teacher_loss"]
    rows: list[tuple[str, float, int, float | None, float | None]] = [("teacher (fp32)", teacher_loss, teacher_bytes, None, _tokens_per_s(runs["teacher"]))]
    rows += [(f"2-2-8 round-to-nearest ({kind})", baselines[kind], student_bytes, None, None)]
    if "task only" in results:
        rows += [
            (
                "2-2-8 trained on the task only",
                results["task only"]["test"]["loss"],
                results["task only"]["export"]["bytes"],
                None,
                _tokens_per_s(runs["task only"]),
            )
        ]
    rows += [("2-2-8 distilled", distilled["test"]["loss"], student_bytes, distilled["test"]["agreement"], _tokens_per_s(runs["student"]))]
    texts = {"teacher (fp32)": results["teacher"], "2-2-8 distilled": distilled} | (
        {"2-2-8 trained on the task only": results["task only"]} if "task only" in results else {}
    )
    texts = {name: result["test"] for name, result in texts.items() if "rougeLsum" in result["test"]}
    print(
        f"\n{'':<34}{'test loss':>10}{'perplexity':>12}{'bytes':>12}{'smaller':>9}{'top-1 as teacher':>18}{'tokens/s':>10}"
        + f"{'ROUGE-Lsum':>12}{'BLEU':>7}" * bool(texts)
    )
    for name, loss, size, agreement, speed in rows:
        written = f"{texts[name]['rougeLsum']:>12.2f}{texts[name]['bleu']:>7.2f}" if name in texts else ""
        agree = f"{agreement:.1%}" if agreement is not None else ""
        print(
            f"{name:<34}{loss:>10.4f}{math.exp(min(loss, 99)):>12.4g}{size:>12,}{teacher_bytes / size:>8.1f}x{agree:>18}{f'{speed:,.0f}' if speed else '':>10}{written}"
        )
    worst = min(baselines[kind], baselines["unigram entropy"])
    closed = (worst - distilled["test"]["loss"]) / (worst - teacher_loss)
    print(f"unigram entropy of the test split: {baselines['unigram entropy']:.4f} nats per token")
    print(f"distillation closed {closed:.1%} of the gap between {worst:.4f} and the teacher; sizes are those of model.safetensors")
    parity = distilled["export"]["parity"]
    print(
        f"artifact: {parity['tensors_bit_identical']} tensors bit-identical to the trained grid, logits differ by {parity['relative_logit_difference']:.0e} of the largest"
    )


def _print_completion(run: RunDir, prompt: str) -> None:
    from dqtrain.artifact.load import complete, load_artifact

    folder = run.artifact("packed")
    print(f"\nthe packed student on {prompt!r} (`dqtrain generate {folder} PROMPT`):")
    print(complete(load_artifact(folder), folder, prompt, 12))
