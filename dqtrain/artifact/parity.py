"""Does the file compute what was trained? Bit for bit on weights, and on logits, in the runtime that it is for.

A runtime's weights are those of training to the bit. Its logits are compared twice: with the same values as floats, where nothing but the
order of sums differs, and as shipped, where it quantizes activations in its own way and may be off by no more than twice what
the student's own 8-bit activations are.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain.artifact.compressed.load import TransformersRunner
from dqtrain.artifact.format import read_description
from dqtrain.artifact.load import artifact_in_files, free_memory, load_any, load_artifact
from dqtrain.artifact.size import artifact_bytes, float_part
from dqtrain.artifact.target import Runner, RuntimeTarget
from dqtrain.data.prepare import load_tokenizer
from dqtrain.data.stream import IGNORED, AnyStream
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.quant.activation import ActivationQuantizer
from dqtrain.quant.grid import round_to_bf16
from dqtrain.quant.modules import Coverage, float_bytes, is_learned_scale, quantize_activations, served_parameters, values_of

LOGITS_TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit: the same values through the same kernels, but perhaps at other addresses."""

TIMES_OWN_NOISE = 2.0
"""How far a runtime's own quantization of activations may move logits, in terms of what the student's 8-bit activations do."""

NUM_TOKENS = 512
"""Target tokens of held-out text that a runtime is compared on, or a few more, to the end of a sample; an eighth of the samples one by one."""


WHOLE_BYTES = 2**30
"""What a student may take as floats for its artifact to be loaded whole, as its users do. A larger one is read from its files, a module at a time."""


@torch.no_grad()
def verify(
    trained: PreTrainedModel, folder: Path, packed: Path | None = None, rounded: Collection[str] = (), loaded: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Compare a trained (fake-quantized or float) model with what its exported folder loads as, which may be `loaded` already; the figures.

    Logits are those of the student, or, for a folder whose activations are float, those of its `packed` artifact without activation quantizers. What is `rounded` may
    be the trained values rounded to bf16 once, whose logits are a figure. Raises CheckpointError that names the first other tensor which is not bit-identical to the
    trained grid, or the difference of the logits.
    """
    is_small = float_bytes(trained) <= WHOLE_BYTES
    loaded = loaded or (load_any if is_small else artifact_in_files)(folder)
    found = dict(loaded.named_parameters())
    num_tensors, num_exact, largest = 0, 0, 0.0
    for name, tensor in served_parameters(trained):
        if packed is not None and is_learned_scale(name):
            continue  # of activations, which stay float there
        num_tensors += 1
        value = values_of(found[name]) if name in found else torch.tensor(torch.nan)
        difference = 0.0 if (is_exact := torch.equal(value, tensor)) else (value - tensor).abs().max().item()
        if not is_exact and not (name in rounded and torch.equal(value, round_to_bf16(tensor))):
            raise CheckpointError(
                f"{folder}: {name} is not what was trained (largest difference {difference}); do not use this artifact, and report this as a bug."
            )
        num_exact += is_exact
        largest = max(largest, difference and difference / tensor.abs().max().item())
        del value, tensor  # before the next ones are made
    vocab_size = trained.config.vocab_size
    tokens = min(32, getattr(trained.config, "max_position_embeddings", 32))
    ids = torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    here = torch.ones_like(ids, dtype=torch.bool)
    inputs = Inputs(ids, here, ids.flip(1), here) if trained.config.is_encoder_decoder else Inputs(ids, here)
    reference = trained if packed is None else (load_artifact if is_small else artifact_in_files)(packed, "dense")
    ours, theirs = LanguageModel(reference.eval()).logits(inputs), LanguageModel(loaded).logits(inputs)
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= (math.inf if largest else LOGITS_TOLERANCE):  # NaN is never allowed
        raise CheckpointError(
            f"{folder}: its logits differ from the trained model's by {difference:.1e} of the largest, more than {LOGITS_TOLERANCE:.0e}. Report this as a bug."
        )
    return {
        "tensors_bit_identical": num_exact,
        **({"tensors_rounded_to_bf16": num_tensors - num_exact, "largest_relative_difference": largest} if rounded else {}),
        "relative_logit_difference": difference,
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


@torch.no_grad()
def verify_packed(trained: PreTrainedModel, folder: Path, held_out: AnyStream | None) -> dict[str, Any]:
    """`verify` of a packed artifact, and what it says of held-out text, in one pass and token by token with its cache, in each mode, and its bytes; the figures.

    One that is read from its files reads a single text in one pass, as mode `exact`. Raises CheckpointError as `verify`, for bytes that were not foretold, and for logits
    that the cache moves: with float activations at all, with quantized ones by more than twice what their quantization does.
    """
    is_small = float_bytes(trained) <= WHOLE_BYTES
    loaded = (load_artifact if is_small else artifact_in_files)(folder)
    figures = verify(trained, folder, loaded=loaded) | {"bytes": _verify_packed_size(folder, trained)}
    samples = _samples(held_out, trained.config)[: None if is_small else 1]
    as_trained = _logits(trained, samples)
    about = {"program": "dqtrain", "target_tokens": sum(len(logits) for logits in as_trained), "held_out_text": held_out is not None}
    if not is_small:
        return figures | {"as_shipped": about | _said(_logits(loaded, samples), as_trained, samples)}
    plain, plain_singly = _both_ways(TransformersRunner(load_artifact(folder, "dense")), samples)
    at_once, singly = _both_ways(TransformersRunner(loaded), samples)
    figures["float_activations"] = {"one_by_one": _largest(plain_singly, plain)}
    cached = {"relative_l2_one_by_one": _relative_l2(singly, as_trained)}
    noise = {"own_noise": _relative_l2(as_trained, plain)}
    figures["as_shipped"] = about | noise | _said(at_once, as_trained, samples) | cached
    allowed = max(LOGITS_TOLERANCE, TIMES_OWN_NOISE * noise["own_noise"])
    for mode, most, found in (
        ("dense", LOGITS_TOLERANCE, figures["float_activations"]["one_by_one"]),
        ("exact", allowed, cached["relative_l2_one_by_one"]),
        ("exact", allowed, figures["as_shipped"]["relative_l2_to_trained"]),
    ):
        if not found <= most:
            raise CheckpointError(
                f"{folder}: in mode {mode} it says something else of held-out text (logits differ by {found:.1e}, more than {most:.0e}). Report this as a bug."
            )
    try:
        fast = TransformersRunner(load_artifact(folder, "fast"))
        figures["fast"] = _said([sample.through(fast) for sample in samples], as_trained, samples)
    except ConfigError as error:  # what no kernel has
        figures["fast"] = {"not_measured": str(error)}
    return figures


def _verify_packed_size(folder: Path, trained: PreTrainedModel) -> dict[str, int]:
    """Bytes of all files that hold the model against those that shapes alone foretell."""
    about = read_description(folder)
    sizes = {name: (folder / name).stat().st_size for name in (*about["weights"], "artifact.json")}
    settings = {key: value for key, value in about.items() if key not in ("format", "weights", "sizes", "xxh3_128")}
    foretold = artifact_bytes(Coverage.from_json(json.dumps(about["coverage"])), float_part(trained), settings)
    if (found := sum(sizes.values())) != foretold.total:
        raise CheckpointError(f"{folder}: its files take {found} bytes, but {foretold.total} were foretold. Report this as a bug.")
    return {"file": found, "artifact.json": sizes["artifact.json"]}


class _Sample(NamedTuple):
    """A text that student and runtime read."""

    ids: Tensor  # int64 [tokens], of the decoder
    labels: Tensor  # int64 [tokens], -100 where nothing is said
    source: Tensor | None  # int64 [source tokens]

    @property
    def is_target(self) -> Tensor:
        return self.labels != IGNORED

    def of(self, model: LanguageModel) -> Tensor:
        """Logits of a model at the targets."""
        source = None if self.source is None else self.source[None]
        return model.logits(Inputs(self.ids[None], self.is_target[None], source, None if source is None else torch.ones_like(source, dtype=torch.bool)))

    def through(self, runner: Runner, one_by_one: bool = False) -> Tensor:
        """Those of a program."""
        source = None if self.source is None else self.source.tolist()
        return runner.logits(self.ids.tolist(), source, one_by_one)[self.is_target]


def _samples(held_out: AnyStream | None, config: Any) -> list[_Sample]:
    """The first held-out texts; random words where there are none."""
    if held_out is None:
        tokens = min(64, getattr(config, "max_position_embeddings", None) or 64)
        ids = torch.randint(config.vocab_size, (4, tokens + 1), generator=torch.Generator().manual_seed(0))
        return [_Sample(row[:-1], row[1:], row[1:].flip(0) if config.is_encoder_decoder else None) for row in ids]
    samples, num_targets = [], 0
    for number in range(held_out.num_samples):
        batch = held_out.batch(np.array([number]))
        labels = torch.from_numpy(batch.labels[0])
        targets = (labels != IGNORED).nonzero()[:NUM_TOKENS]
        if not len(targets):  # a part of a chat in which the assistant says nothing
            continue
        end = int(targets.max()) + 1
        source = None if batch.source_ids is None or batch.source_is_real is None else torch.from_numpy(batch.source_ids[0][batch.source_is_real[0]])
        samples.append(_Sample(torch.from_numpy(batch.input_ids[0])[:end], labels[:end], source))
        num_targets += int(samples[-1].is_target.sum())
        if num_targets >= NUM_TOKENS:
            break
    return samples or _samples(None, config)


def _with_8_bit_inputs(load: Callable[[Path, str], PreTrainedModel], packed: Path, about: dict[str, Any]) -> PreTrainedModel:
    """The student with 8-bit activations: its own, or where it has others those that `activations: {bits: 8}` gives."""
    if about["activations"] and about["activations"]["bits"] == 8:
        return load(packed, "exact")
    model = load(packed, "dense")
    rows = Coverage.from_json(json.dumps(about["coverage"])).rows
    inputs = [replace(row, input_quantizer=ActivationQuantizer("input", 8, "per_token")) for row in rows if row.quantizer]
    quantize_activations(model, Coverage(inputs), None)
    return model


@torch.no_grad()
def verify_target(
    trained: PreTrainedModel, packed: Path, folder: Path, target: RuntimeTarget, held_out: AnyStream | None, allow_inexact: bool
) -> dict[str, Any]:
    """Compare a trained model with what a target's folder, made of its packed artifact, is to its program: weights, logits on held-out text, size; the figures.

    Raises CheckpointError for what differs by more than it may. With `allow_inexact`, rounded scales and noisier activations are figures, not errors.
    """
    about = read_description(packed)
    figures: dict[str, Any] = {"weights": verify_weights(trained, folder, target, allow_inexact)}
    samples = _samples(held_out, trained.config)
    longest = max(max(len(sample.ids), 0 if sample.source is None else len(sample.source)) for sample in samples)
    figures["tokenizer"] = {"texts": 0} if held_out is None else _verify_tokenizer(folder, packed, target, samples)
    # The program will load the model whole, too: many texts are read, for each of which the files would be read once.
    load = load_artifact if 2 * float_bytes(trained) <= free_memory() else artifact_in_files
    plain, noisy, as_trained = (  # one model at a time
        _logits(make(), samples) for make in (lambda: load(packed, "dense"), lambda: _with_8_bit_inputs(load, packed, about), lambda: load(packed, "exact"))
    )
    noise = _relative_l2(noisy, plain)
    with target.with_float_activations(folder, longest) as runner:
        at_once, singly = _both_ways(runner, samples)
    figures["float_activations"] = {"relative_logit_difference": _largest(at_once, plain), "one_by_one": _largest(singly, plain)}
    with target.as_shipped(folder, longest) as runner:
        at_once, singly = _both_ways(runner, samples)
    shipped: dict[str, Any] = {
        "program": target.program,
        "target_tokens": sum(len(logits) for logits in plain),
        "held_out_text": held_out is not None,
        "own_8_bit_noise": noise,
        "relative_l2": _relative_l2(at_once, plain),
        "relative_l2_one_by_one": _relative_l2(singly, plain),
        **_said(at_once, as_trained, samples),
    }
    figures["as_shipped"] = shipped
    rounded = figures["weights"]["largest_relative_difference"] > 0  # as was allowed
    tolerance = max(target.tolerance, TIMES_OWN_NOISE * noise) if rounded else target.tolerance
    for name, found in figures["float_activations"].items():
        if not found <= tolerance:
            raise CheckpointError(
                f"{folder}: {target.program} computes other logits of these weights ({name} {found:.1e} of the largest, more than {tolerance:.0e}). "
                f"Leave {target.name} out of export.targets, and report this as a bug."
            )
    for name in ("relative_l2", "relative_l2_one_by_one"):
        if not shipped[name] <= TIMES_OWN_NOISE * noise and not allow_inexact:
            raise CheckpointError(
                f"{folder}: {target.program}'s own 8-bit activations move the logits by {shipped[name]:.1e} ({name}), more than {TIMES_OWN_NOISE:g} times what the "
                f"student's do, {noise:.1e}. Train with activations as it has them (docs/artifacts.md), or allow it: `dqtrain export RUN --allow-inexact`, "
                "or where the run is unfinished `dqtrain train RUN/run.yaml export.allow_inexact=true`."
            )
    figures["bytes"] = _verify_size(folder, target, trained)
    return figures


def _logits(model: PreTrainedModel, samples: list[_Sample]) -> list[Tensor]:
    """A model's logits at the targets of all samples."""
    reads = LanguageModel(model.eval())
    return [sample.of(reads) for sample in samples]


def _said(found: list[Tensor], trained: list[Tensor], samples: list[_Sample]) -> dict[str, float]:
    """What logits at the targets are to those of the student as it was trained."""
    pairs = list(zip(found, trained, strict=True))
    return {
        "relative_l2_to_trained": _relative_l2(found, trained),
        "top1_agreement": _mean([(ours.argmax(-1) == theirs.argmax(-1)).float() for ours, theirs in pairs]),
        "kl_nats": _mean([_kl(theirs, ours) for ours, theirs in pairs]),
        "perplexity": _perplexity(found, samples),
        "perplexity_trained": _perplexity(trained, samples),
    }


def _both_ways(runner: Runner, samples: list[_Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits at the targets of all samples, each in one pass, and of an eighth of them token by token."""
    return [sample.through(runner) for sample in samples], [sample.through(runner, one_by_one=True) for sample in samples[: max(1, len(samples) // 8)]]


def verify_weights(trained: PreTrainedModel, folder: Path, target: RuntimeTarget, allow_inexact: bool = False) -> dict[str, Any]:
    """Every parameter as the target's own dequantizer reads it against what training computed with."""
    values = target.values(folder)
    largest, num_exact, seen = 0.0, 0, 0
    for name, tensor in served_parameters(trained):
        if is_learned_scale(name):
            continue
        seen += 1
        if name not in values:
            raise CheckpointError(f"{folder}: holds no {name}. Report this as a bug.")
        found, expected = values[name](), tensor.float() * target.factors.get(name, 1.0)
        if torch.equal(found, expected):
            num_exact += 1
            continue
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        largest = max(largest, difference)
        if not (allow_inexact and name in target.rounded and difference <= 2**-11):
            raise CheckpointError(
                f"{folder}: {name} is not what was trained (largest difference {difference:.1e} of the largest weight). Report this as a bug."
            )
    types = Counter(target.types.values())
    return {"tensors": seen, "bit_identical": num_exact, "largest_relative_difference": largest, "types": dict(sorted(types.items()))}


def _verify_tokenizer(folder: Path, packed: Path, target: RuntimeTarget, samples: list[_Sample]) -> dict[str, int]:
    """Token ids of the held-out texts, by the target's program and by transformers."""
    own = target.encoder_of_text(folder, longest=8)
    if own is None:
        return {"texts": 0}
    tokenizer = load_tokenizer(packed)
    with own as encode:
        for sample in samples:
            for ids in (sample.ids, sample.source) if sample.source is not None else (sample.ids,):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                ours, theirs = tokenizer.encode(text, add_special_tokens=False), encode(text)
                if ours != theirs:
                    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
                    raise CheckpointError(
                        f"{folder}: {target.program} makes other tokens than the tokenizer of `{tokenizer.decode(ours[max(0, at - 3) : at + 3])}` "
                        f"({theirs[at : at + 3]} for {ours[at : at + 3]}). Leave {target.name} out of the targets, and report this as a bug."
                    )
    return {"texts": len(samples)}


def _verify_size(folder: Path, target: RuntimeTarget, trained: PreTrainedModel) -> dict[str, int]:
    """Bytes of the files against those that shapes alone foretell."""
    expected = target.foretold_bytes(float_part(trained).shapes)
    stored = target.stored_bytes(folder)
    if stored["tensors"] != expected:
        raise CheckpointError(f"{folder}: its tensors take {stored['tensors']} bytes, but {expected} were foretold. Report this as a bug.")
    return stored


def _relative_l2(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=False))
    above = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(above / sum(float(b.double().square().sum()) for _, b in pairs))


def _largest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=False))  # of some samples alone, where it was token by token
    # max() of Python would pass over NaN.
    difference, largest = (torch.stack([part.abs().max() for part in parts]).max() for parts in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return float(difference / largest)


def _kl(logits: Tensor, other: Tensor) -> Tensor:
    ours, theirs = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean())


def _perplexity(logits: list[Tensor], samples: list[_Sample]) -> float:
    nats = [
        torch.nn.functional.cross_entropy(found.double(), sample.labels[sample.is_target], reduction="none")
        for found, sample in zip(logits, samples, strict=True)
    ]
    return math.exp(min(_mean(nats), 700.0))  # more is no float
