"""Ranks of a real process group that do named jobs on a tiny model, and leave what they find in files.

Starting a group costs seconds and a job far less, so that many jobs share one. Needs no GPU.
"""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from families import cut_copy
from safetensors.torch import save_file
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from dqtrain import checkpoint, engine
from dqtrain.bench import sharding
from dqtrain.checkpoint import saver as saving
from dqtrain.checkpoint import sound
from dqtrain.config import ActivationQuant, Attention, Contrast, Distill, Hidden, Logits, Override, Quant, Train, WeightQuant, Zero
from dqtrain.data.stream import IGNORED
from dqtrain.disk import require_room
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.engine import StudentEngine, TeacherEngine
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.models.int8 import in_int8
from dqtrain.models.language import Inputs, LanguageModel
from dqtrain.models.layers import LayerMaps, all_layers, layer_map
from dqtrain.models.making import meta_model
from dqtrain.models.weights import open_weights, readers_of
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import quantize_model
from dqtrain.schedule import seed_micro_batch
from dqtrain.world import World, barrier, init_world, sum_over_ranks
from launch.local import free_port

VOCAB, TOKENS, SAMPLES = 97, 12, 2
NUM_TARGETS = [[24, 9, 0, 15], [0, 24, 0, 13], [5, 1, 24, 0]]
"""Step -> target tokens of each micro-batch; in the second step those of rank 0 are all empty."""
FACTORS = [1.0, 0.5, 0.25]
"""Step -> share of the peak learning rate."""
# As many negatives as there are other tokens: nothing is drawn, and the reference may join the micro-batches into one.
DISTILL = Distill(task=0.5, logits=Logits(), contrast=Contrast(weight=0.1, negatives=TOKENS - 1))
LAYERS = Distill(
    task=0.5,
    logits=Logits(weight=0.7, divergence="jensen_shannon", temperature=1.5, tokens="tsld"),
    hidden=Hidden(weight=2.0),
    attention=Attention(weight=20.0),
    contrast=Contrast(weight=0.1, negatives=TOKENS - 1, layer=0),
)
# A large eps: with the default one AdamW's first steps are signs, which turn rounding into whole steps.
TRAIN = Train(steps=3, global_batch=8, micro_batch=2, lr=1e-2, scale_lr=5e-2, weight_decay=0.1, adam_eps=1e-2, grad_clip=0.5)


DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def micro_batches(step: int, family: str = "gpt2", num_targets: Sequence[int] | None = None) -> list[tuple[Inputs, Tensor]]:
    """(inputs, labels) of the step's micro-batches, over all ranks."""
    draw = torch.Generator().manual_seed(step)
    batches = []
    for count in NUM_TARGETS[step] if num_targets is None else num_targets:
        ids = torch.randint(VOCAB, (SAMPLES, TOKENS), generator=draw)
        labels = torch.full((SAMPLES * TOKENS,), IGNORED)
        labels[torch.randperm(len(labels), generator=draw)[:count]] = torch.randint(VOCAB, (count,), generator=draw)
        labels = labels.view(SAMPLES, TOKENS)
        source = (ids.flip(1)[:, :7], torch.arange(7) < torch.tensor([[7], [4]])) if family != "gpt2" else ()
        batches.append((Inputs(ids, labels != IGNORED, *source), labels))
    return batches


def float_model(seed: int, family: str = "gpt2", **changes: Any) -> PreTrainedModel:
    """GPT-2, BART or T5; of encoder-decoder models the teacher's is of 3 + 3 layers."""
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2}
    if family == "bart":
        sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "max_position_embeddings": 16, "dropout": 0.0, "scale_embedding": True, "init_std": 0.1}
        return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **ids, **sizes))
    if family == "t5":
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **ids, d_model=32, d_ff=48, d_kv=16, num_layers=3, num_heads=2, dropout_rate=0.0))
    keys: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    keys |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**keys, **changes}))


def computes_in(precision: str) -> str:
    return TRAIN.model_copy(update={"precision": precision}).computes_in


def settings_of(family: str) -> Distill:
    return DISTILL if family == "gpt2" else LAYERS


def teacher_module(precision: str = "fp32", family: str = "gpt2") -> LanguageModel:
    return LanguageModel(float_model(1, family), computes_in(precision), **needed_outputs(settings_of(family))).eval()


def settings(grid: str) -> Quant:
    ternary, positions = WeightQuant(bits=2, granularity="per_row"), WeightQuant(bits=8, granularity="per_row")
    if grid == "dynamic":
        return Quant(linears=WeightQuant(bits=2, granularity="per_tensor"), embeddings=ternary, positions=positions, activations=None)
    groups = WeightQuant(grid=grid, bits=4, granularity="per_group", group_size=16)  # type: ignore[arg-type]
    return Quant(linears=groups, embeddings=groups, positions=positions, activations=None, vectors="bf16")


MAPS = LayerMaps(layer_map(1, 3, ""), layer_map(2, 3, ""))
SETTINGS = {grid: settings(grid) for grid in ("dynamic", "lsq", "affine")}
# Matrices that stay float among those that do not.
SETTINGS["partly"] = SETTINGS["dynamic"].model_copy(
    update={"positions": None, "overrides": (Override(match="transformer.h.1.mlp.c_fc.weight", keep_float=True),)}
)


def student_model(
    seed: int = 2,
    activations: bool = False,
    scale: str = "per_token",
    grid: str = "dynamic",
    checkpointing: bool = False,
    family: str = "gpt2",
    rounded: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """2-2-8, or 2-2-float; scales of one element (linears) and of one per row (embeddings). Other grids: 4-4-8, in groups. Encoder-decoders: 2 + 1 layers."""
    model = float_model(seed, family, **changes)
    if family != "gpt2":
        model = cut_copy(model, MAPS)
    inputs = ActivationQuant(bits=8, scale=scale, attention=True) if activations else None  # type: ignore[arg-type]
    quantize_model(model, SETTINGS[grid].model_copy(update={"activations": inputs}), rounded=rounded)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calibrate(model, lambda: model(micro_batches(0)[0][0].ids))
    torch.set_num_threads(threads)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def in_partitions(model: PreTrainedModel) -> PreTrainedModel:
    """A 2-2-float model's weights and scales in a model that never was whole."""
    again = meta_model(model.config)
    quantize_model(again, SETTINGS["dynamic"], initialise=False)
    engine.materialise(again, readers_of(dict(model.named_parameters())), partitioned=True)
    assert held_whole(again) == []
    return again


def student_module(seed: int = 2, precision: str = "fp32", family: str = "gpt2", slices: bool = False, **student: Any) -> Objective:
    model, distill = student_model(seed, family=family, rounded=precision == "bf16_weights", **student), settings_of(family)
    if slices:
        model = in_partitions(model)
    return Objective(LanguageModel(model, computes_in(precision), **needed_outputs(distill)), distill, MAPS if family != "gpt2" else all_layers(model.config))


def state_of(objective: Objective) -> dict[str, Tensor]:
    """What moves once per step."""
    assert objective.contrast is not None
    mean = {"mean": objective.token_weights.mean} if objective.token_weights is not None else {}
    return {"bank": objective.contrast.bank, "touched": objective.contrast.touched, **mean}


def held_whole(module: torch.nn.Module) -> list[str]:
    """Parameters that are not partitioned now."""
    return [name for name, p in module.named_parameters() if p.ds_status.name != "NOT_AVAILABLE" or p.numel()]  # type: ignore[attr-defined]


class Trained:
    """Student and teacher engines, with what their steps report."""

    def __init__(
        self,
        world: World,
        stage: int,
        teacher: int = 0,
        precision: str = "fp32",
        threshold: int = 0,
        seed: int = 2,
        family: str = "gpt2",
        offload: bool = False,
        nvme: str | None = None,
        optimizer: str = "nvme",
        parameters: str = "nvme",
        **student: Any,
    ):
        zero = Zero(student=stage, teacher=teacher, persistence_threshold=threshold)  # type: ignore[arg-type]
        if offload:
            zero = zero.model_copy(update={"offload_optimizer": "cpu", "offload_parameters": "cpu" if stage == 3 else "none"})
        if nvme is not None:
            zero = zero.model_copy(update={"offload_optimizer": optimizer, "offload_parameters": parameters, "nvme": Path(nvme)})
        train = TRAIN.model_copy(update={"precision": precision})
        self.world, self.stage, self.zero = world, stage, zero
        self.family, self.taught = family, teacher_module(precision, family)
        self.teacher = TeacherEngine(self.taught, train, zero, world)
        self.student = StudentEngine(student_module(seed, precision, family, **student), train, zero, world)
        self.savers: dict[Path, checkpoint.Saver] = {}
        self.terms: list[dict[str, float]] = []
        self.whole: dict[str, set[str]] = {"student": set(), "teacher": set(), "left behind": set()}

    def train(self, *steps: int) -> None:
        for step in steps:
            self.one_step(step, micro_batches(step, self.family), FACTORS[step], range(len(NUM_TARGETS[step])))

    def one_step(self, step: int, batches: list[tuple[Inputs, Tensor]], factor: float, order: Sequence[int]) -> None:
        """A step of micro-batches in an order, in which ranks take turns; one that has none left takes one without targets."""
        self.student.mode(training=True)
        num_targets = sum(int((labels != IGNORED).sum()) for _, labels in batches)
        sums = {name: torch.zeros(1, dtype=torch.float64) for name in ("total", "task", *settings_of(self.family).teacher_terms)}
        for place in range(self.world.rank, len(batches) + -len(batches) % self.world.world_size, self.world.world_size):
            j = order[place] if place < len(batches) else 0
            inputs, labels = batches[j]
            if place >= len(batches):
                inputs, labels = inputs._replace(is_target=torch.zeros_like(inputs.is_target)), torch.full_like(labels, IGNORED)
            seed_micro_batch(1, step, j)  # the order in which negatives are drawn is the order of a sum
            with self.teacher.teaching(None, inputs) as taught:  # type: ignore[arg-type]
                loss = self.student(inputs, labels, taught)
            if self.zero.teacher == 3:
                self.whole["teacher"].update(held_whole(self.taught))
            if self.stage == 3:
                self.whole["student"].update(held_whole(self.student.module))
                self.whole["left behind"].update(name for name, module in self.student.module.named_modules() if "weight" in module.__dict__)
            self.student.backward(loss.total * self.world.world_size / num_targets)
            for name, value in {"total": loss.total.detach(), **loss.parts}.items():
                sums[name] += value.double() / num_targets
        norm = self.student.step(factor)
        self.terms.append({"gradient_norm": norm, **{name: float(sum_over_ranks(value)) for name, value in sums.items()}})

    def spoil(self) -> None:
        """A step whose loss is NaN on the last rank alone."""
        self.student.mode(training=True)
        inputs, labels = micro_batches(0, self.family)[0]
        with self.teacher.teaching(None, inputs) as taught:  # type: ignore[arg-type]
            loss = self.student(inputs, labels, taught)
        self.student.backward(loss.total * (float("nan") if self.world.rank == self.world.world_size - 1 else 1.0))
        assert self.student.step(1.0) == float("inf")

    def begin_save(self, root: Path, step: int, best: dict[str, Any] | None = None, keep_last: int = 10, keep_every: int | None = None) -> checkpoint.Saver:
        saver = self.savers.setdefault(root, checkpoint.Saver(root, self.world, keep_last, keep_every))
        saver.save(step, self.student, {"step": step, "best": best})
        return saver

    def save(self, root: Path, step: int, **how: Any) -> None:
        self.begin_save(root, step, **how).wait()

    def outputs(self) -> dict[str, Tensor]:
        """What the student says in eval mode on one micro-batch, and its bank."""
        inputs = micro_batches(0, self.family)[0][0]
        self.student.mode(training=False)
        with torch.no_grad():
            said = {"hidden": self.student.model(inputs).hidden, "logits": self.student.model.logits(inputs)}
        return said | state_of(self.student.module)

    def write_outputs(self, path: Path) -> None:
        save_file(self.outputs(), path.with_name(f"{path.name}-{self.world.rank}.safetensors"))


def train(world: World, folder: Path, name: str, spoilt: bool = False, **how: Any) -> None:
    """Three steps, with two between them that are not made; -> checkpoint NAME, outputs NAME-RANK.safetensors, report NAME-RANK.json."""
    run = Trained(world, **how)
    if spoilt:
        run.spoil()
        run.train(0)
        run.spoil()
    run.train(*((1, 2) if spoilt else (0, 1, 2)))
    run.save(folder / name, 3)
    run.write_outputs(folder / name)
    tensors = [value for fragment in run.student.fragments() for value in fragment.tensors.values()]
    dtypes = {str(value.dtype) for value in [*tensors, *run.student.module.parameters(), *run.student.module.buffers()]}
    report = {
        "terms": run.terms,
        "whole": {key: sorted(value) for key, value in run.whole.items()},
        "dtypes": sorted(dtypes),
        "learning_rates": run.student.learning_rates(),
        "teacher_gradients": sum(p.grad is not None or p.requires_grad for p in run.taught.parameters()),
    }
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(report))
    run.student.destroy()


def bytes_of_tensors() -> int:
    """Memory of all tensors of this process."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter) and not thing.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def destroy(world: World, folder: Path) -> None:
    """Engines of every stage, destroyed after a step: nothing but trifles is left of them. -> destroy-RANK.json, bytes of [before, with, after]."""
    found = {}
    for stage in (1, 2, 3):
        before = bytes_of_tensors()
        run = Trained(world, stage=stage, teacher=3 if stage == 3 else 0)
        run.train(0)
        during = bytes_of_tensors()
        run.student.destroy()
        run.teacher.destroy()
        del run
        found[str(stage)] = [before, during, bytes_of_tensors()]
    (folder / f"destroy-{world.rank}.json").write_text(json.dumps(found))


# Without decay of the mean its first gradient is AdamW's first moment, bit for bit.
FIRST_GRADIENT = {"adam_betas": (0.0, 0.999), "grad_clip": 0.0}
TASK_AND_LOGITS = Distill(task=0.5, logits=Logits())


def gradients(
    world: World, folder: Path, name: str, stage: int, precision: str, threshold: int = 0, offload: bool = False, live: int | None = None, **student: Any
) -> None:
    """One step from task and logits; -> NAME-RANK.safetensors, the gradient of each element that this rank owns, as PARAMETER|START; NAME-RANK.json, what was gathered."""
    train = TRAIN.model_copy(update={"precision": precision, **FIRST_GRADIENT})
    zero = Zero(student=stage, teacher=0, persistence_threshold=threshold, live_layers=live)  # type: ignore[arg-type]
    if offload:
        zero = zero.model_copy(update={"offload_optimizer": "cpu", "offload_parameters": "cpu" if stage == 3 else "none"})
    model = student_model(grid="partly", rounded=train.precision == "bf16_weights", **student)
    teacher = TeacherEngine(teacher_module(precision), train, zero, world)
    objective = Objective(LanguageModel(model, train.computes_in, **needed_outputs(TASK_AND_LOGITS)), TASK_AND_LOGITS, all_layers(model.config))
    engine_ = StudentEngine(objective, train, zero, world)
    engine_.mode(training=True)
    with gathered_elements() as elements:
        for inputs, labels in micro_batches(0)[world.rank :: world.world_size]:
            with teacher.teaching(None, inputs) as taught:  # type: ignore[arg-type]
                loss = engine_(inputs, labels, taught)
            engine_.backward(loss.total * world.world_size / sum(NUM_TARGETS[0]))
    engine_.step(1.0)
    found = {f"{fragment.name}|{fragment.start}": fragment.tensors["exp_avg"].clone() for fragment in engine_.fragments()}
    save_file(found, folder / f"{name}-{world.rank}.safetensors")
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(elements))
    engine_.destroy()


@contextmanager
def gathered_elements() -> Iterator[dict[str, int]]:
    """Dtype -> elements that ZeRO-3 hands to all-gathers within it, on this rank."""
    usual, found = engine.deepspeed.comm.allgather_fn, {}

    def count(output: Tensor, mine: Tensor, *arguments: Any, **more: Any) -> Any:
        found[str(mine.dtype)] = found.get(str(mine.dtype), 0) + mine.numel()
        return usual(output, mine, *arguments, **more)

    engine.deepspeed.comm.allgather_fn = count
    try:
        yield found
    finally:
        engine.deepspeed.comm.allgather_fn = usual


def release(world: World, folder: Path, name: str) -> None:
    """`train` at stage 3, where DeepSpeed lets go of a parameter as soon as its module has run: it would keep 1e9 elements for backward."""
    usual = engine._deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        asked = usual(*arguments)
        asked["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        return asked

    engine._deepspeed_config = config
    train(world, folder, name, stage=3, teacher=3)
    engine._deepspeed_config = usual


def teach(world: World, folder: Path, name: str, teacher: int, precision: str, dtype: str = "float32") -> None:
    """The teacher alone; -> its Outputs on every micro-batch of a step, NAME-RANK.safetensors."""
    module = teacher_module(precision).to(getattr(torch, dtype))
    forward = TeacherEngine(module, TRAIN, Zero(teacher=teacher), world)  # type: ignore[arg-type]
    found = {}
    for j, (inputs, _) in enumerate(micro_batches(0)):
        with torch.no_grad(), forward.teaching(None, inputs) as taught:  # type: ignore[arg-type]
            found |= {f"hidden-{j}": taught.outputs.hidden, f"logits-{j}": taught.head.logits(taught.outputs.hidden[inputs.is_target])}
    save_file(found, folder / f"{name}-{world.rank}.safetensors")


def live(world: World, folder: Path) -> None:
    """How much of a teacher of 8 layers is whole at a time, by `live_layers`; -> live-RANK.json."""
    found = {}
    for layers in (1, 2, 4, 7):
        teacher = TeacherEngine(LanguageModel(float_model(1, n_layer=8)).eval(), TRAIN, Zero(teacher=3), world, layers)
        for inputs, _ in micro_batches(0):
            teacher(inputs)
        found[layers] = teacher.live_elements
        assert held_whole(teacher.module) == []
    (folder / f"live-{world.rank}.json").write_text(json.dumps(found))


def int8(world: World, folder: Path, files: str, name: str, stages: list[int]) -> None:
    """Each family's model out of its files in FILES as a teacher in int8; -> what it says about a step, NAME-FAMILY-STAGE-RANK.safetensors, and its bytes here, .json."""
    for path in sorted((folder / files).iterdir()):
        for stage in stages:
            model = meta_model(path)
            engine.materialise(model, in_int8(model, open_weights(path, model)), torch.bfloat16, partitioned=stage == 3)
            teacher = TeacherEngine(LanguageModel(model, states=True), TRAIN, Zero(teacher=stage), world)  # type: ignore[arg-type]
            kept = {key: p.ds_tensor if stage == 3 else p.detach() for key, p in model.named_parameters()}  # type: ignore[attr-defined]
            report: dict[str, Any] = {key: [str(tensor.dtype), tensor.nbytes] for key, tensor in kept.items()}
            found = {}
            for j, (inputs, _) in enumerate(micro_batches(0, "bart" if model.config.is_encoder_decoder else "gpt2")):
                with torch.no_grad(), teacher.teaching(None, inputs) as taught:  # type: ignore[arg-type]
                    found |= {f"{j}-{side}-{i}": state for side in ("decoder", "encoder") for i, state in enumerate(getattr(taught.outputs, side).states)}
                    found |= {f"{j}-hidden": taught.outputs.hidden, f"{j}-logits": taught.head.logits(taught.outputs.hidden[inputs.is_target])}
            dense = [key for key, module in model.named_modules() if set(module.__dict__) & set(module._parameters)]
            report = {"kept": report, "whole": held_whole(model) if stage == 3 else [], "dense": dense, "live": teacher.live_elements}
            save_file(found, folder / f"{name}-{path.name}-{stage}-{world.rank}.safetensors")
            (folder / f"{name}-{path.name}-{stage}-{world.rank}.json").write_text(json.dumps(report))


def int8_peak(world: World, folder: Path, files: str) -> None:
    """How much memory each model of FILES takes while it is loaded; -> int8_peak-RANK.json, model -> (bytes of its partitions, peak)."""
    found = {}
    for path in sorted((folder / files).iterdir()):
        model = meta_model(path)
        barrier()
        with sharding._peak(lambda: [os.getpid()]) as peak:
            engine.materialise(model, in_int8(model, open_weights(path, model)), torch.bfloat16, partitioned=True)
        found[path.name] = sum(p.ds_tensor.nbytes for p in model.parameters()), peak[0]  # type: ignore[attr-defined]
    (folder / f"int8_peak-{world.rank}.json").write_text(json.dumps(found))


def refusals(world: World, folder: Path) -> None:
    """What the engine's own report is compared with; -> refusals.json, what was asked -> the message."""
    found: dict[str, str | None] = {}

    def refused(name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
            found[name] = None
        except ConfigError as error:
            found[name] = str(error)

    zero = Zero(student=3, teacher=0, persistence_threshold=7)
    student = StudentEngine(student_module(), TRAIN, zero, world)
    asked = engine._deepspeed_config(3, TRAIN, zero)
    check = engine._assert_started_as_asked
    refused("nothing else", check, student._engine, asked, "student")
    refused("stage", check, student._engine, {**asked, "zero_optimization": {**asked["zero_optimization"], "stage": 2}}, "student")
    refused("clip", check, student._engine, {**asked, "gradient_clipping": 0.25}, "student")
    refused("micro_batch", check, student._engine, {**asked, "train_micro_batch_size_per_gpu": 5}, "student")
    refused(
        "threshold", check, student._engine, {**asked, "zero_optimization": {**asked["zero_optimization"], "stage3_param_persistence_threshold": 8}}, "student"
    )
    student.destroy()
    for stage, names in list(engine.PRIVATE_NAMES.items()):
        engine.PRIVATE_NAMES[stage] = (*names, "a_name_that_moved")
        refused(f"private name at stage {stage}", StudentEngine, student_module(), TRAIN, Zero(student=stage), world)  # type: ignore[arg-type]
        engine.PRIVATE_NAMES[stage] = names
    partitions = sys.modules["deepspeed.runtime.zero.partition_parameters"]
    usual = partitions.get_allgather_dtype
    for how, dtype_of in (("moved", None), ("means something else", lambda parameter, partition: partition.dtype)):
        partitions.get_allgather_dtype = dtype_of
        refused(f"the dtype of gathers {how}", StudentEngine, student_module(precision="bf16_weights"), TRAIN, Zero(student=3), world)
    partitions.get_allgather_dtype = usual
    if world.rank == 0:
        (folder / "refusals.json").write_text(json.dumps(found))


def load_by_slices(world: World, folder: Path, dtype: str, files: str) -> None:
    """Each family's model out of its files in FILES, straight into partitions; -> FAMILY-DTYPE-RANK.safetensors, and how much memory each rank kept."""
    for path in sorted((folder / files).iterdir()):
        model = meta_model(path)
        tied = len(list(model.parameters()))
        engine.materialise(model, open_weights(path, model), getattr(torch, dtype), partitioned=True)
        assert len(list(model.parameters())) == tied and held_whole(model) == []
        found = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
        for name, parameter in model.named_parameters():
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // world.world_size)
            with engine.gather([parameter], read_only=True):
                found[name] = parameter.detach().clone()
        save_file(found, folder / f"{path.name}-{dtype}-{world.rank}.safetensors")


def save_at(world: World, folder: Path, name: str, **how: Any) -> None:
    """NAME: checkpoints of steps 0, 2 and 3 of one run, and its outputs at step 2."""
    run = Trained(world, **how)
    run.save(folder / name, 0)
    run.train(0, 1)
    run.save(folder / name, 2)
    run.write_outputs(folder / name)
    run.train(2)
    run.save(folder / name, 3)
    run.student.destroy()


def load_at(world: World, folder: Path, source: str, name: str, step: int = 2, then: tuple[int, ...] = (), **how: Any) -> None:
    """SOURCE's checkpoint into a fresh engine whose weights differ, saved again as NAME, then trained further and saved once more."""
    run = Trained(world, seed=5, **how)
    checkpoint.load(folder / source / f"step-{step:09d}", run.student)
    run.save(folder / name, step)
    run.write_outputs(folder / name)
    if then:
        run.train(*then)
        run.save(folder / name, then[-1] + 1)
    run.student.destroy()


ELASTIC_STEPS = 25
"""Steps of `elastic`, whose checkpoint is that of step 5."""


def elastic(world: World, folder: Path, name: str, source: str | None = None, order: Sequence[int] = range(6), **how: Any) -> None:
    """Steps of six micro-batches with dropout, from the start or from step 5 of SOURCE; -> checkpoint NAME of step 5, NAME.json: step -> loss."""
    run = Trained(world, seed=2 if source is None else 5, **how, **DROPOUT)
    if source is not None:
        checkpoint.load(folder / source / "step-000000005", run.student)
    for step in range(0 if source is None else 5, ELASTIC_STEPS):
        if step == 5 and source is None:
            run.save(folder / name, step)
        run.one_step(step, micro_batches(step, num_targets=[24, (step * 5) % 25, 7, 0, 19, (step * 11) % 25]), 1.0, order)
    if world.rank == 0:
        (folder / f"{name}.json").write_text(json.dumps([terms["total"] for terms in run.terms]))
    run.student.destroy()


def retain(world: World, folder: Path) -> None:
    """Checkpoints of steps 1 to 5, the best in the second, then the fifth once more; and of steps 1 to 7, of which every third is kept."""
    run = Trained(world, stage=1)
    for step in (1, 2, 3, 4, 5, 5):
        run.save(folder / "retained", step, keep_last=2, best={"step": 2, "loss": 1.0} if step >= 2 else None)
    for step in range(1, 8):
        run.save(folder / "every-third", step, keep_last=1, keep_every=3)
    run.student.destroy()


def refusal(call: Any, *arguments: Any) -> str | None:
    """The message of the CheckpointError that a call raises."""
    try:
        call(*arguments)
    except CheckpointError as error:
        return str(error)
    return None


def fill_disk(world: World, folder: Path) -> None:
    """Rank 1 alone cannot write its part of step 2; then it can. -> fill_disk-RANK.json, who noticed, the message, and what stood there."""
    run, root = Trained(world, stage=2), folder / "disk"
    run.save(root, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    saver = run.begin_save(root, 2)
    deadline = time.monotonic() + 60
    while not sum_over_ranks(torch.tensor(int(saver.failed))) and time.monotonic() < deadline:  # as the trainer asks, at every step
        time.sleep(0.01)
    failed = saver.failed
    message = refusal(saver.wait)
    names = sorted(path.name for path in root.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder / f"fill_disk-{world.rank}.json").write_text(json.dumps({"failed": failed, "message": message, "names": names}))
    run.save(root, 3)
    run.student.destroy()


def not_shared(world: World, folder: Path) -> None:
    """Rank 1 writes to a disk of its own. -> not_shared-RANK.json, the message."""
    run, usual = Trained(world, stage=3), saving.SHARED_DISK_S
    saving.SHARED_DISK_S = 0.5
    message = refusal(run.begin_save(folder / f"disk-of-rank-{world.rank}", 1).wait)
    (folder / f"not_shared-{world.rank}.json").write_text(json.dumps(message))
    saving.SHARED_DISK_S = usual
    run.student.destroy()


def no_room(world: World, folder: Path, root: str) -> None:
    """A save that the disk has no room for. -> no_room-RANK.json, the message."""
    run = Trained(world, stage=3)
    message = refusal(run.begin_save, Path(root) / "checkpoints", 1)
    (folder / f"no_room-{world.rank}.json").write_text(json.dumps(message))
    run.student.destroy()


def train_on(world: World, folder: Path, stage: int) -> None:
    """While rank 1's part of step 2 is held back, training goes on, and spoils all that there is; twice. -> in-flight-STAGE, in-flight-STAGE-RANK.json."""
    run, usual, go = Trained(world, stage=stage), saving.write_tensors, threading.Event()

    def wait_and_write(*arguments: Any) -> Any:
        go.wait(60)
        return usual(*arguments)

    root, seen = folder / f"in-flight-{stage}", []
    run.train(0)
    run.save(root, 1)
    run.train(1)
    saving.write_tensors = wait_and_write if world.rank == 1 else usual
    saver = run.begin_save(root, 2)
    run.train(2)
    for fragment in run.student.fragments():
        for tensor in fragment.tensors.values():
            tensor.fill_(-7)
    for buffer in state_of(run.student.module).values():
        buffer.fill_(1)
    seen = sorted(path.name for path in root.iterdir())
    barrier()
    go.set()
    saver.wait()
    saving.write_tensors = usual
    (folder / f"in-flight-{stage}-{world.rank}.json").write_text(json.dumps(seen))
    run.student.destroy()


def die_saving(world: World, folder: Path) -> None:
    """Rank 1 is killed when it has written half of its part of step 2; rank 0 sees nothing complete, and leaves."""
    run, root, usual = Trained(world, stage=3), folder / "killed", saving.write_tensors

    def write_half_and_die(path: Path, *arguments: Any) -> Any:
        usual(path, *arguments)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    run.save(root, 1)
    saving.write_tensors = write_half_and_die if world.rank == 1 else usual
    run.begin_save(root, 2)
    time.sleep(2)
    assert world.rank == 0
    os._exit(0)


def save_once(world: World, folder: Path, name: str, step: int, **how: Any) -> None:
    run = Trained(world, stage=3, **how)
    run.save(folder / name, step)
    run.student.destroy()


def choose(world: World, folder: Path, name: str, roots: list[str], stage: int) -> None:
    """What each rank reads to agree on the newest of each root's checkpoints, and on which they agree. -> NAME-RANK.json."""
    run, usual = Trained(world, stage=stage), sound.digest
    found: dict[str, Any] = {}
    for root in roots:
        read: list[str] = []

        def note(path: Path, read: list[str] = read) -> str:
            read.append(f"{path.parent.name}/{path.name}")
            return usual(path)

        sound.digest = note
        try:
            chosen, messages = checkpoint.agree_on_newest(folder / root, run.student, world)
            found[root] = {"chosen": chosen and chosen.name, "messages": messages, "read": read}
        except CheckpointError as error:
            found[root] = {"error": str(error), "read": read}
        sound.digest = usual
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(found))
    run.student.destroy()


def masters_apart(world: World, folder: Path, **how: Any) -> None:
    """`save_at` where what is updated is another copy than what is gathered, as it is when that is on a GPU."""
    usual = engine._are_one
    engine._are_one = lambda gathered, updated: False
    save_at(world, folder, **how)
    engine._are_one = usual


def on_disk(world: World, folder: Path, nvme: str) -> None:
    """What an engine has on a disk of its own; -> on_disk-RANK.json: bytes used there with it and after it, file names, resident bytes, bytes planned, messages."""
    run = Trained(world, stage=3, nvme=nvme)
    run.train(0, 1)
    shapes = [torch.empty(shape, device="meta") for shape in run.student._shapes.values()]
    planned = engine.bytes_on_disk(torch.nn.ParameterList(shapes), run.zero, world.world_size)
    run.student.release()
    barrier()
    mapped = [line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if nvme in line]
    found: dict[str, Any] = {
        "used": shutil.disk_usage(nvme).used,
        "names": os.listdir(nvme),
        "mapped": sum(int(line.split("Size:")[1].split()[0]) * 1024 for line in mapped),
        "resident": sum(int(line.split("Rss:")[1].split()[0]) * 1024 for line in mapped),
        "planned": planned,
    }
    barrier()
    run.student.destroy()
    barrier()
    found["after"] = shutil.disk_usage(nvme).used
    barrier()
    for name, where, num_bytes in (("room", nvme, 1 << 20), ("no room", nvme, 3 << 20), ("no folder", f"{nvme}/none", 1)):
        try:
            require_room(Path(where), num_bytes, world)
            found[name] = None
        except ConfigError as error:
            found[name] = str(error)
    found["left"] = shutil.disk_usage(nvme).used
    (folder / f"on_disk-{world.rank}.json").write_text(json.dumps(found))


def load_another(world: World, folder: Path, source: str, stage: int) -> None:
    """A checkpoint of another model. -> load_another-RANK.json, the message."""
    run = Trained(world, stage=stage, n_layer=3)
    message = refusal(checkpoint.load, folder / source / "step-000000002", run.student)
    (folder / f"load_another-{world.rank}.json").write_text(json.dumps(message))
    run.student.destroy()


def start_ranks(folder: Path, num_ranks: int, jobs: list[tuple[str, dict[str, Any]]], expected: list[int] | None = None) -> None:
    """Do the jobs on so many ranks; a rank that fails, or ends with another code than the expected one, fails the test, with the output of all."""
    folder.mkdir(exist_ok=True)
    run_as_ranks([sys.executable, __file__, str(folder), json.dumps(jobs)], num_ranks, expected)


def run_as_ranks(command: list[str], num_ranks: int, expected: list[int] | None = None) -> None:
    """Run a command as so many ranks; one that fails fails the test, with the output of all."""
    env = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        ranks = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=output, stderr=output) for r in range(num_ranks)]
        try:
            codes = [rank.wait(timeout=300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        output.seek(0)
        assert codes == (expected or [0] * num_ranks), f"exit codes {codes}\n{output.read()}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    world = init_world()
    engine.start(world, timeout_s=120)
    for job, arguments in json.loads(sys.argv[2]):
        globals()[job](world, Path(sys.argv[1]), **arguments)
    barrier()
    os._exit(0)  # after the barrier nobody waits for this rank; leaving a group in any other order may abort
