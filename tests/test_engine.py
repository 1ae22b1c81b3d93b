"""Two DeepSpeed engines on two ranks equal plain torch in one process: losses, gradient norms, weights, scales and bank."""

import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from engine_worker import (
    DISTILL,
    FACTORS,
    NUM_TARGETS,
    TRAIN,
    float_model,
    micro_batches,
    settings_of,
    start_ranks,
    state_of,
    student_model,
    student_module,
    teacher_module,
)
from families import FAMILIES
from quant.reference import reference as equations
from safetensors.torch import load_file

from dqtrain import checkpoint
from dqtrain.data.stream import IGNORED
from dqtrain.distill import objective as objective_module
from dqtrain.distill.chunked import plain_loss
from dqtrain.models.language import Inputs, Taught
from dqtrain.quant.modules import is_learned_scale

CASES = {f"fp32-{stage}-{teacher}": {"stage": stage, "teacher": teacher} for stage in (1, 2, 3) for teacher in (0, 3)}
CASES["persistent"] = {"stage": 3, "teacher": 3, "threshold": 10**6}
CASES["released"] = {"stage": 3, "teacher": 3}
CASES |= {f"codes-{stage}": {"stage": stage, "teacher": 3, "activations": True} for stage in (1, 3)}
CASES |= {f"bf16-{stage}": {"stage": stage, "teacher": stage % 2 * 3, "precision": "bf16"} for stage in (2, 3)}
CASES |= {f"bf16_weights-{stage}": {"stage": stage, "teacher": stage % 2 * 3, "precision": "bf16_weights"} for stage in (2, 3)}
CASES["codes-learned-3"] = {"stage": 3, "activations": True, "scale": "learned"}
CASES |= {f"checkpointing-{stage}": {"stage": stage, "checkpointing": True} for stage in (1, 2, 3)}
CASES |= {f"untied-{stage}": {"stage": stage, "tie_word_embeddings": False} for stage in (1, 2, 3)}
CASES |= {f"{grid}-3": {"stage": 3, "grid": grid} for grid in ("lsq", "affine")}
CASES |= {f"{family}-{stage}": {"stage": stage, "teacher": 3, "family": family} for family in ("bart", "t5") for stage in (1, 3)}
CASES |= {f"offload-{stage}": {"stage": stage, "teacher": 3, "offload": True} for stage in (1, 2, 3)}
CASES |= {f"spoilt-{stage}": {"stage": stage, "spoilt": True} for stage in (1, 2, 3)}
CASES["slices-3"] = {"stage": 3, "teacher": 3, "slices": True}
ALONE = {"alone-1": {"stage": 1}, "alone-2": {"stage": 2, "grid": "affine"}, "alone-3": {"stage": 3, "tie_word_embeddings": False, "checkpointing": True}}
ALONE |= {f"{family}-alone-{stage}": {"stage": stage, "teacher": 3, "family": family} for family, stage in (("bart", 3), ("t5", 1))}
PRECISIONS = ("fp32", "bf16", "bf16_weights")
GRADIENTS = {f"{precision}, stage {stage}": {"precision": precision, "stage": stage} for precision in PRECISIONS for stage in (1, 2, 3)}
LOW = {"precision": "bf16_weights", "stage": 3}
GRADIENTS_OF_TWO = GRADIENTS | {
    "bf16_weights, untied": {**LOW, "tie_word_embeddings": False},
    "bf16_weights, checkpointing": {**LOW, "checkpointing": True},
    "bf16_weights, offload": {**LOW, "offload": True},
    "bf16_weights, persistent": {**LOW, "threshold": 10**6},
    "bf16_weights, layer by layer": {**LOW, "live": 1},
    "bf16, untied": {**LOW, "precision": "bf16", "tie_word_embeddings": False},
}
STUDENT = ("activations", "precision", "checkpointing", "tie_word_embeddings", "grid", "scale", "family")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder with what two ranks found in every case."""
    folder = tmp_path_factory.mktemp("engine")
    jobs = [("train", {"name": name, **how}) for name, how in CASES.items() if name != "released"] + [("release", {"name": "released"}), ("destroy", {})]
    jobs += [("teach", {"name": f"teacher-{precision}", "teacher": 3, "precision": precision}) for precision in ("fp32", "bf16")]
    for name, make in FAMILIES.items():
        make().save_pretrained(folder / "models" / name, max_shard_size="20KB")  # several files
    loads = [("load_by_slices", {"dtype": dtype, "files": "models"}) for dtype in ("float32", "bfloat16")]
    jobs += [("teach", {"name": "teacher-bfloat16", "teacher": 3, "precision": "fp32", "dtype": "bfloat16"}), ("live", {})]
    gradients = [("gradients", {"name": f"gradients of {name} on 2", **how}) for name, how in GRADIENTS_OF_TWO.items()]
    start_ranks(folder, 2, [*jobs, ("refusals", {}), *loads, *gradients])
    gradients = [("gradients", {"name": f"gradients of {name} on 1", **how}) for name, how in GRADIENTS.items()]
    start_ranks(folder, 1, [*[("train", {"name": name, **how}) for name, how in ALONE.items()], *gradients])
    return folder


@cache
def reference(joined=True, precision="fp32", family="gpt2", **student):
    """(terms of each step, weights after them, weights before, outputs) of plain torch; `joined`: the global batch in one forward.

    With full logits, unless something is rounded in forward, where another order of sums would turn a last bit into a step.
    """
    with pytest.MonkeyPatch.context() as patch:
        if joined and "grid" not in student:
            patch.setattr(objective_module, "chunked_loss", plain_loss)
        return _reference(joined, precision, family, **student)


def _reference(joined, precision, family, **student):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks, so that sums have one order
    objective, teacher = student_module(precision=precision, family=family, **student), teacher_module(precision, family)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    groups = [
        {"params": [p for name, p in objective.named_parameters() if p.ndim == 2], "lr": TRAIN.lr, "weight_decay": TRAIN.weight_decay},
        {"params": [p for name, p in objective.named_parameters() if p.ndim == 1 and not is_learned_scale(name)], "lr": TRAIN.lr, "weight_decay": 0.0},
        {"params": [p for name, p in objective.named_parameters() if is_learned_scale(name)], "lr": TRAIN.scale_lr, "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(groups, eps=TRAIN.adam_eps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    terms = []
    for step, factor in enumerate(FACTORS):
        batches = micro_batches(step, family)
        if joined:
            parts = zip(*(inputs for inputs, _ in batches), strict=True)
            inputs = Inputs(*(None if part[0] is None else torch.cat(part) for part in parts))
            batches = [(inputs, torch.cat([labels for _, labels in batches]))]
        num_tokens = sum(int((labels != IGNORED).sum()) for _, labels in batches)
        assert num_tokens == sum(NUM_TARGETS[step])
        optimizer.zero_grad()
        sums = dict.fromkeys(("total", "task", *settings_of(family).teacher_terms), 0.0)
        for inputs, labels in batches:
            with torch.no_grad():
                taught = Taught(teacher(inputs), teacher.plain_head())
            loss = objective(inputs, labels, taught)
            (loss.total / num_tokens).backward()
            for name, value in {"total": loss.total.detach(), **loss.parts}.items():
                sums[name] += float(value) / num_tokens
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), TRAIN.grad_clip)
        assert norm > 2 * TRAIN.grad_clip
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        optimizer.step()
        objective.end_step()
        terms.append({"gradient_norm": float(norm), **sums})
    objective.eval()
    inputs = micro_batches(0, family)[0][0]
    with torch.no_grad():
        outputs = {"hidden": objective.student(inputs).hidden, "logits": objective.student.logits(inputs), **state_of(objective)}
    torch.set_num_threads(threads)
    return terms, {name: p.detach() for name, p in objective.named_parameters()}, before, outputs


def report(found, name, rank=0):
    return json.loads((found / f"{name}-{rank}.json").read_text())


def deviations(found, name):
    """Largest error of the losses and norms (relative), of the weights and of the scales (both relative to their largest change), of outputs and bank."""
    how = {key: value for key, value in (CASES | ALONE)[name].items() if key in STUDENT}
    exact = "activations" not in how and "precision" not in how
    terms, after, before, outputs = reference(exact, **how)
    ours = report(found, name)["terms"]
    assert [line.keys() for line in ours] == [line.keys() for line in terms]
    result = {"terms": max(abs(line[key] / value - 1) for line, expected in zip(ours, terms, strict=True) for key, value in expected.items())}
    trained = dict(checkpoint.weights(found / name / "step-000000003", prefix=""))
    assert trained.keys() == after.keys()
    for kind in ("weights", "scales"):
        names = [key for key in after if is_learned_scale(key) == (kind == "scales")]
        change = max(float((after[key] - before[key]).abs().max()) for key in names)
        result[kind] = max(float((after[key] - trained[key]).abs().max()) for key in names) / change
    said = load_file(found / f"{name}-0.safetensors")
    assert torch.equal(said["touched"], outputs["touched"])
    for key in outputs.keys() - {"touched"}:
        result[key] = float((said[key] - outputs[key]).abs().max() / outputs[key].abs().max())
    return result


# A change of a weight near 1, or of a gamma near 4, is known to 1e-5: fp32 keeps no more digits of their sum.
EXACT = {"terms": 2e-6, "weights": 3e-5, "scales": 3e-5, "hidden": 1e-5, "logits": 1e-5, "bank": 1e-5, "mean": 1e-5}
# 8-bit rounding and bf16 turn a last bit now and then into a whole step, of which a single output shows more than a sum of many.
ROUNDED = {**dict.fromkeys(EXACT, 1e-3), "hidden": 1e-2, "logits": 1e-2, "bank": 1e-2}


@pytest.mark.parametrize("name", [*CASES, *ALONE])
def test_engines_equal_plain_torch(found, name):
    limits = ROUNDED if name.startswith(("codes", "bf16")) else EXACT
    measured = deviations(found, name)
    assert all(value <= limits[key] for key, value in measured.items()), measured


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_in_every_bit_and_all_state_is_fp32(found, name):
    ours, theirs = (load_file(found / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(ours[key], theirs[key]) for key in ("bank", "touched"))
    assert ours["touched"].any() and not ours["touched"].all()
    assert report(found, name, 0)["terms"] == report(found, name, 1)["terms"]
    for rank in (0, 1):
        assert report(found, name, rank)["dtypes"] == ["torch.bool", "torch.float32"]  # bool: which rows of the bank were touched
    expected = {"lr_weights": TRAIN.lr, "lr_vectors": TRAIN.lr, "lr_scales": TRAIN.scale_lr, "lr_clips": TRAIN.scale_lr}
    expected = {key: value for key, value in expected.items() if key in report(found, name)["learning_rates"]}
    assert len(expected) == (4 if "grid" in CASES[name] or "scale" in CASES[name] else 3)
    assert report(found, name)["learning_rates"] == {key: FACTORS[-1] * value for key, value in expected.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_come_out_of_their_files_into_partitions(found, family, dtype):
    model = FAMILIES[family]()
    expected = {name: p.to(getattr(torch, dtype)) for name, p in model.named_parameters()}
    expected |= {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    for rank in (0, 1):
        loaded = load_file(found / f"{family}-{dtype}-{rank}.safetensors")
        assert loaded.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []


class PlainQuantizer(torch.autograd.Function):
    """QuantGPT's equations and their gradients in float64, one scale for each row."""

    @staticmethod
    def forward(ctx, weight, gamma):
        ctx.save_for_backward(weight, gamma)
        return torch.from_numpy(PlainQuantizer.equations(weight, gamma, torch.zeros_like(weight)).value).float()

    @staticmethod
    def backward(ctx, grad):
        found = PlainQuantizer.equations(*ctx.saved_tensors, grad)
        return torch.from_numpy(found.grad_weight).float(), torch.from_numpy(found.grad_learned[0]).float()

    @staticmethod
    def equations(weight, gamma, grad):
        rows = np.broadcast_to(np.arange(len(gamma))[:, None], weight.shape)
        return equations("dynamic", 2, weight.double().numpy(), [gamma.double().numpy()], rows, True, grad.double().numpy())


class PlainHead(torch.autograd.Function):
    """What autocast makes of a linear layer, of whose gradients `factor` is taken after the products: as of a loss whose gradients are made before its factor is known."""

    @staticmethod
    def forward(ctx, hidden, weight, factor):
        ctx.save_for_backward(hidden.bfloat16(), weight.bfloat16())
        ctx.factor = factor
        return (hidden.bfloat16() @ weight.bfloat16().T).float()

    @staticmethod
    def backward(ctx, slope):
        hidden, weight = ctx.saved_tensors
        slope = slope.bfloat16()
        return (slope @ weight).float() * ctx.factor, ((slope.T @ hidden).float() * ctx.factor).bfloat16().float(), None


@cache
def plain_gradients(precision, **changes):
    """Parameter -> gradient of one step's loss: transformers' own model, the papers' equations in float64, torch's autocast; nothing of dqtrain but the start of the scales."""
    compute = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
    start = {
        name: p.detach().clone().requires_grad_() for name, p in student_model(grid="partly", rounded=precision == "bf16_weights", **changes).named_parameters()
    }
    student, teacher = float_model(2, **changes).eval(), float_model(1).eval()

    def rounded(weight):
        return weight + (weight.bfloat16().float() - weight).detach() if precision == "bf16_weights" else weight

    def value(name):
        weight = rounded(start[name]) if start[name].ndim == 2 else start[name]
        if f"{name}_gamma" not in start:
            return weight
        gamma = start[f"{name}_gamma"]
        return PlainQuantizer.apply(weight.reshape(len(gamma), -1), gamma).view(weight.shape)

    factor = 1 / sum(NUM_TARGETS[0])
    for inputs, labels in micro_batches(0):
        at = labels != IGNORED
        with compute:
            values = {name: value(name) for name in start if not is_learned_scale(name)}
            body = {name.removeprefix("transformer."): p for name, p in values.items() if "lm_head" not in name}
            hidden = torch.func.functional_call(student.transformer, body, inputs.ids)[0][at].float()
            weight = values.get("lm_head.weight", values["transformer.wte.weight"])
            logits = hidden @ weight.T if precision == "fp32" else PlainHead.apply(hidden, weight, factor)
            with torch.no_grad():
                said = teacher(inputs.ids).logits[at].float()
        task = torch.nn.functional.cross_entropy(logits, labels[at], reduction="sum")
        soft = -(said.log_softmax(-1).exp() * logits.log_softmax(-1)).sum()  # by softmax, a last bit of its gradient would become one of bf16
        ((0.5 * task + soft) * (factor if precision == "fp32" else 1)).backward()
    return {name: p.grad for name, p in start.items()}


def found_gradients(found, name, size, shapes):
    """Parameter -> gradient, put together from what each rank owns; every element must be there once."""
    flat = {key: torch.full((shape.numel(),), torch.nan) for key, shape in shapes.items()}
    for rank in range(size):
        for key, piece in load_file(found / f"gradients of {name} on {size}-{rank}.safetensors").items():
            parameter, start = key.removeprefix("student.model.").split("|")
            target = flat[parameter][int(start) : int(start) + piece.numel()]
            assert target.isnan().all()
            target.copy_(piece)
    return {key: value.view(shapes[key]) for key, value in flat.items()}


# Relative to the norm of the parameter's gradient. Without autocast a scale's is a sum of many that cancel.
LIMITS = {"fp32": (1e-6, 2e-5), "bf16": (1e-5, 2e-5), "bf16_weights": (1e-5, 2e-5)}


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in GRADIENTS_OF_TWO), *((name, 1) for name in GRADIENTS)])
def test_gradients_are_those_of_plain_torch_in_every_precision(found, name, size):
    how = GRADIENTS_OF_TWO[name]
    expected = plain_gradients(how["precision"], **{key: value for key, value in how.items() if key == "tie_word_embeddings"})
    ours = found_gradients(found, name, size, {key: gradient.shape for key, gradient in expected.items()})
    errors = {key: float((ours[key] - gradient).norm() / gradient.norm()) for key, gradient in expected.items()}
    weights, scales = (max(error for key, error in errors.items() if is_learned_scale(key) == which) for which in (False, True))
    print(f"{name} on {size}: weights {weights:.1e}, scales {scales:.1e}")
    assert weights <= LIMITS[how["precision"]][0] and scales <= LIMITS[how["precision"]][1], errors


def test_matrices_rounded_to_bf16_are_another_function():
    """And so is autocast: the references above tell the three precisions apart."""
    for one, other in itertools.combinations(PRECISIONS, 2):
        ours, theirs = plain_gradients(one), plain_gradients(other)
        assert max(float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in ours) > 1e-2


def test_matrices_are_gathered_in_two_bytes(found):
    """As often as in fp32, which DeepSpeed chooses; vectors and scales in four bytes as ever. One rank gathers nothing."""
    for where in ("untied", "stage 3"):
        low, usual = (json.loads((found / f"gradients of {precision}, {where} on 2-0.json").read_text()) for precision in ("bf16_weights", "bf16"))
        assert low.keys() == {"torch.bfloat16", "torch.float32"} and usual.keys() == {"torch.float32"}
        assert low["torch.bfloat16"] + low["torch.float32"] == usual["torch.float32"]
        changes = {"tie_word_embeddings": False} if where == "untied" else {}
        matrices, others = (
            sum(-(-p.numel() // 2) for p in student_model(grid="partly", **changes).parameters() if (p.ndim == 2) == which) for which in (True, False)
        )
        if where == "untied":  # each parameter equally often
            assert low["torch.bfloat16"] * others == low["torch.float32"] * matrices and low["torch.bfloat16"] % matrices == 0
        print(f"{where}: {(2 * low['torch.bfloat16'] + 4 * low['torch.float32']) / usual['torch.float32']:.2f} bytes per element, in fp32 4")
    assert json.loads((found / "gradients of bf16_weights, stage 3 on 1-0.json").read_text()) == {}


def test_learned_scales_and_every_term_take_part():
    terms, after, before, _ = reference()
    assert all(abs(line[key]) > 0.1 for line in terms for key in line)
    for line in terms:
        contrast = DISTILL.contrast.weight * line["contrast"]
        assert line["total"] == pytest.approx(DISTILL.task * line["task"] + line["logits"] + contrast, rel=1e-6)
    assert all(not torch.equal(after[key], before[key]) for key in after)
    for how in ({"activations": True}, {"precision": "bf16"}, {"precision": "bf16_weights"}):  # not the same numbers under another name
        assert abs(reference(**how, joined=False)[0][-1]["contrast"] / terms[-1]["contrast"] - 1) > 10 * EXACT["terms"]
        assert (reference(**how, joined=False)[3]["logits"] - reference()[3]["logits"]).abs().max() > 10 * ROUNDED["terms"]


def test_a_quantized_weight_leaves_no_dense_copy(found):
    for rank in (0, 1):
        assert report(found, "released", rank)["whole"] == {"student": [], "teacher": [], "left behind": []}
        persistent = report(found, "persistent", rank)["whole"]
        assert persistent["student"] and persistent["teacher"], "the probe sees parameters that are whole"
        assert not any(report(found, name, rank)["whole"]["left behind"] for name in CASES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_partitioned_teacher_equals_plain_torch(found, precision):
    module = teacher_module(precision)
    for rank in (0, 1):
        said = load_file(found / f"teacher-{precision}-{rank}.safetensors")
        for j, (inputs, _) in enumerate(micro_batches(0)):
            with torch.no_grad():
                torch.testing.assert_close(said[f"hidden-{j}"], module(inputs).hidden, rtol=1e-6, atol=1e-6)
                logits = module.plain_head().logits(module(inputs).hidden[inputs.is_target])
                torch.testing.assert_close(said[f"logits-{j}"], logits, rtol=1e-6, atol=1e-6)


def test_teacher_in_bf16_equals_plain_torch_in_bf16(found):
    module = teacher_module().to(torch.bfloat16)
    for rank in (0, 1):
        said = load_file(found / f"teacher-bfloat16-{rank}.safetensors")
        for j, (inputs, _) in enumerate(micro_batches(0)):
            with torch.no_grad():
                assert torch.equal(said[f"hidden-{j}"], module(inputs).hidden) and said[f"hidden-{j}"].dtype == torch.float32
                assert torch.equal(said[f"logits-{j}"], module.plain_head().logits(module(inputs).hidden[inputs.is_target]))


def test_no_more_of_a_teacher_is_whole_than_was_asked_for(found):
    model = float_model(1, n_layer=8)
    layer, words = (sum(p.numel() for p in module.parameters()) for module in (model.transformer.h[0], model.transformer.wte))
    for rank in (0, 1):
        live = {int(layers): elements for layers, elements in json.loads((found / f"live-{rank}.json").read_text()).items()}
        for layers, elements in live.items():
            assert layer * layers / 2 < elements <= max((layers + 1) * layer, words + layer)
        assert live[7] > live[4] > live[2] > live[1]


def test_destroyed_engines_give_their_memory_back(found):
    for rank in (0, 1):
        for before, during, after in report(found, "destroy", rank).values():
            assert during - before > 10 * max(after - before, 0)


def test_teacher_is_released_after_forward_and_has_no_gradient(found):
    for name, how in CASES.items():
        for rank in (0, 1):
            assert report(found, name, rank)["teacher_gradients"] == 0
            if how.get("teacher") == 3 and "threshold" not in how:
                assert report(found, name, rank)["whole"]["teacher"] == []


def test_an_engine_that_did_not_start_as_asked_is_refused(found):
    refusals = json.loads((found / "refusals.json").read_text())
    assert refusals["nothing else"] is None
    assert "zero_optimization.stage is 3, asked 2" in refusals["stage"]
    assert "gradient_clipping is 0.5, asked 0.25" in refusals["clip"]
    assert "train_micro_batch_size_per_gpu is 2, asked 5" in refusals["micro_batch"]
    assert "stage3_param_persistence_threshold is 7, asked 8" in refusals["threshold"]
    assert all("student" in message for message in refusals.values() if message and "asked" in message)
    for how in ("moved", "means something else"):
        message = refusals[f"the dtype of gathers {how}"]
        assert "no get_allgather_dtype that reads comm_dtype" in message and "constraints.txt" in message and "train.precision to bf16" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_private_name_that_moved_is_named(found, stage):
    message = json.loads((found / "refusals.json").read_text())[f"private name at stage {stage}"]
    assert "a_name_that_moved" in message and "constraints.txt" in message
