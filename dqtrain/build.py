"""RunConfig -> objects: the one place where a knob becomes an argument."""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dqtrain import checkpoint, hub
from dqtrain.artifact.description import check_if_listed
from dqtrain.artifact.export import check_targets
from dqtrain.artifact.load import chosen_checkpoint
from dqtrain.config import SPLITS, Data, RunConfig, check_ranks
from dqtrain.data.folder import Folder, open_folder
from dqtrain.data.prepare import check_same_tokenizer, load_tokenizer, prepare, tokenizer_files, train_tokenizer
from dqtrain.data.reader import own_micro_batches
from dqtrain.data.stream import IGNORED, AnyStream, Batch, DocumentStream, Interleaving, PairStream, Stream
from dqtrain.data.work import Report
from dqtrain.disk import require_room
from dqtrain.distill import terms
from dqtrain.distill.cache import CachedTeacher, cache_folder, write_cache
from dqtrain.distill.chunked import chunked_loss
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.engine import StudentEngine, TeacherEngine, bytes_on_disk, materialise
from dqtrain.errors import ConfigError
from dqtrain.evaluate import Evaluation
from dqtrain.files import digest, write_text
from dqtrain.generation import Writing, check_generation
from dqtrain.metrics import Metrics
from dqtrain.models.checks import check_confined, check_length, check_vocabulary, has_norm_behind
from dqtrain.models.int8 import in_int8
from dqtrain.models.language import LanguageModel, inputs_of
from dqtrain.models.layers import LayerMaps, all_layers, layer_map
from dqtrain.models.making import cut, meta_model, new_model, read_model_config
from dqtrain.models.weights import Reader, open_weights, readers_of, weight_files
from dqtrain.quant.activation import calibrated
from dqtrain.quant.modules import Coverage, initial_scales, is_learned_scale, quantize_model, quantized_parameters, round_matrices
from dqtrain.rundir import RunDir, model_directory, start_directory
from dqtrain.trainer import Trainer
from dqtrain.world import World, broadcast_object, gather_objects, nodes_of_ranks, on_rank_0


def build(config: RunConfig, run: RunDir, world: World) -> Trainer:
    """Make everything a run needs, from its config alone. Collective: rank 0 prepares the data while the others wait."""
    check_ranks(config.train, world.world_size)
    metrics = Metrics(run, world, config.train.steps)
    _check_models(config, world)  # before minutes of tokenising
    if config.zero.nvme is not None:
        require_room(config.zero.nvme, 1, world)
    tokenizer = tokenizer_directory(config, run)
    shards = broadcast_object(prepare_data(config, run, lambda message, share: metrics.say(message)) if world.rank == 0 else {})

    loaded = load_tokenizer(tokenizer)
    goes_on = on_rank_0(world, lambda: run.has_checkpoint)
    student, coverage, maps, weights = student_model(config, len(loaded), loaded.eos_token_id, world, goes_on)
    for lines in check_targets(config, config.export, student, coverage, tokenizer).values():
        for line in lines:
            metrics.say(line)
    quarantine = functools.partial(_quarantined, run, world.rank) if config.data.quarantine else None
    streams = {
        split: open_stream(
            folders, config.data, student.config, config.run.seed, split == "train", quarantine, interleaving(config) if split == "train" else None
        )
        for split, folders in shards.items()
    }
    _check_same_data([source.path for source in config.data.sources("train")], streams["train"].folders, run, world)
    numbers = own_micro_batches(world.rank, nodes_of_ranks(), config.train.global_batch // config.train.micro_batch, config.data.parts)
    name = str(config.student.init_from or (config.teacher.path if config.teacher else "student.architecture"))
    check_length(student.config, config.data, name)
    if config.eval.generation is not None and config.data.pairs is not None:
        check_generation(student.config, config.eval.generation, config.data.pairs.source_tokens)
    check_vocabulary(student.config, streams["train"].vocab_size, name, tokenizer)
    if config.data.attention == "within" and config.student.architecture is not None:
        check_confined(student.config, name)
    if config.teacher is not None:
        check_same_tokenizer(tokenizer, model_directory(config.teacher.path))
    if config.train.activation_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    learned_later = {name: torch.full((1,), math.nan) for name, _ in student.named_parameters() if is_learned_scale(name) and name not in weights}
    offloaded = None if config.zero.offload_parameters == "none" else "cpu"
    if config.zero.nvme is not None:
        require_room(config.zero.nvme, bytes_on_disk(student, config.zero, world.world_size), world)
    disk = config.zero.nvme if config.zero.offload_parameters == "nvme" else None
    materialise(student, weights | readers_of(learned_later), partitioned=config.zero.student == 3, device=offloaded, disk=disk)
    del weights  # they may hold a whole model in memory
    language_model = LanguageModel(student, config.train.computes_in, **needed_outputs(config.distill))
    teacher: TeacherEngine | CachedTeacher | None = None
    beta, weight = None, 1.0
    if config.teacher is not None and config.distill.teacher_terms:
        logits = config.distill.logits
        if config.teacher.source == "online":
            _check_same_teacher(model_directory(config.teacher.path), run, world)
            teacher = _online_teacher(config, world)
        else:
            folder = broadcast_object(_cache_folder(config, shards["train"], student.config) if world.rank == 0 else Path())
            teacher = CachedTeacher(folder, f"dqtrain cache-teacher {run.config}", world.device)
        if logits is not None and logits.divergence == "confidence_kl" and logits.beta is None:
            beta = _first_mean(teacher, streams["train"], config, lambda said, labels: terms.confidence(said))
            metrics.say(f"the teacher's mean confidence, beta of confidence_kl, is {beta:.4f}")
        if logits is not None and logits.tokens != "equal":
            weight = _first_mean(teacher, streams["train"], config, functools.partial(terms.token_weights, logits.tokens))
    objective = Objective(language_model, config.distill, maps, config.data.longest(student.config.is_encoder_decoder), beta, weight)
    if world.rank == 0:
        student.config.save_pretrained(run.student)
        if student.generation_config is not None:
            student.generation_config.save_pretrained(run.student)
        for file in tokenizer_files(tokenizer):
            shutil.copy(file, run.student)  # as it is, so that its hash, and with it the shards, stay the same
        if coverage is not None:
            write_text(run.coverage, coverage.to_json())
            metrics.say(coverage.table())
    engine = StudentEngine(objective, config.train, config.zero, world)
    if learned_later and not goes_on:
        starts = calibrated(student, lambda: _show_samples(language_model, streams["train"], config, world.device), learned_later)
        engine.overwrite({f"student.model.{name}": value for name, value in starts.items()})
    judge = teacher if isinstance(teacher, TeacherEngine) else None
    writing = writing_of(config, loaded, world, synced=config.zero.student == 3)
    evaluation = Evaluation(streams.get("validation"), streams.get("test"), judge, writing, config.train.micro_batch, config.eval.max_samples, world)
    train = config.train
    batches = functools.partial(streams["train"].steps, numbers=numbers, global_batch=train.global_batch, micro_batch=train.micro_batch)
    return Trainer(config, run, world, engine, teacher, batches, train.global_batch * streams["train"].mean_tokens, evaluation, metrics)


def _quarantined(run: RunDir, rank: int, why: str) -> None:
    run.event("quarantined", rank=rank, why=why)


def interleaving(config: RunConfig) -> Interleaving:
    """In which shares the sources of the training take turns, from which positions on, and in how many parts."""
    weights = tuple(source.weight for source in config.data.sources("train") if source.weight is not None)
    later = ((stage.from_step * config.train.global_batch, stage.weights) for stage in config.data.mixture)
    stages = ((0, weights), *later) if weights else ()
    return Interleaving(stages, config.data.parts, config.train.micro_batch)


def writing_of(config: RunConfig, tokenizer: Any, world: World, synced: bool) -> Writing | None:
    """How text is generated and scored, if the config says so."""
    data, settings = config.data, config.eval.generation
    if settings is None or data.pairs is None:
        return None
    corpora = {split: sources for split in ("validation", "test") if (sources := data.sources(split))}
    return Writing(tokenizer, corpora, data.pairs, settings, config.train.micro_batch, config.train.computes_in, world, synced)


def _check_same_teacher(folder: Path, run: RunDir, world: World) -> None:
    """Keep the hashes of the teacher's files in the run's teacher.json, and raise ConfigError when a run that goes on has another teacher. Collective."""
    files = weight_files(folder)
    mine = {path.name: digest(path) for path in files[world.rank :: world.world_size]}
    found = {name: value for part in gather_objects(mine) for name, value in part.items()}
    record = run.path / "teacher.json"

    def compare() -> None:
        before = json.loads(record.read_text()) if record.is_file() and run.has_checkpoint else found
        changed = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
        if changed:
            raise ConfigError(
                f"{folder}: {', '.join(changed)} changed since {run.path} started, so that it would go on with another teacher. "
                "Restore the files, or use another run.dir."
            )
        write_text(record, json.dumps(found, indent=1))

    on_rank_0(world, compare)


def _check_same_data(sources: Sequence[str], folders: Sequence[Folder], run: RunDir, world: World) -> None:
    """Keep what the samples are made of in the run's data.json, and raise ConfigError when a run that goes on has other ones. Collective."""
    found = [
        {"source": source, "tokens": int(folder.num_tokens.sum()), "shards": len(folder.num_tokens), "hash": folder.fingerprint()}
        for source, folder in zip(sources, folders, strict=True)
    ]
    record = run.path / "data.json"

    def compare() -> None:
        before = json.loads(record.read_text()) if record.is_file() and run.has_checkpoint else found
        for was, now in zip(before, found, strict=True):
            if was["hash"] != now["hash"]:
                counts = [f"{entry['tokens']:,} tokens in {entry['shards']:,} shards" for entry in (was, now)]
                raise ConfigError(
                    f"data.train: {now['source']} changed since {run.path} started ({counts[0]} then, {counts[1]} now), so that samples would come twice or not at all. "
                    "Restore it, or use another run.dir."
                )
        write_text(record, json.dumps(found, indent=1))

    on_rank_0(world, compare)


def _online_teacher(config: RunConfig, world: World) -> TeacherEngine:
    assert config.teacher is not None
    folder = model_directory(config.teacher.path)
    model = meta_model(folder)
    weights = open_weights(folder, model)
    if config.teacher.dtype == "int8":
        weights = in_int8(model, weights)
    dtype = torch.float32 if config.teacher.dtype == "fp32" else torch.bfloat16
    materialise(model, weights, dtype, partitioned=config.zero.teacher == 3)
    module = LanguageModel(model, config.train.computes_in, **needed_outputs(config.distill))
    return TeacherEngine(module, config.train, config.zero, world, config.teacher.live_layers)


def _cache_folder(config: RunConfig, shards: Sequence[Path | str], model: PretrainedConfig) -> Path:
    """Where the teacher's words on the training samples are stored."""
    assert config.teacher is not None
    local = [folder for folder in shards if isinstance(folder, Path)]
    if len(local) < len(shards):
        raise ConfigError(f"teacher.source {config.teacher.source} stores words beside the tokens, but those of data.train are at an address; copy them here.")
    start = model.decoder_start_token_id if model.is_encoder_decoder else None
    layout = {"tokens_per_sample": config.data.tokens_per_sample, "attention": config.data.attention, "decoder_start_token_id": start}
    return cache_folder(local, config.teacher, model_directory(config.teacher.path), layout, config.run.seed, config.train.computes_in)


def cache_teacher(config: RunConfig, run: RunDir, world: World) -> None:
    """Store what the teacher says about every training sample, where `teacher.source` says what. Collective."""
    assert config.teacher is not None and config.teacher.source != "online"
    metrics = Metrics(run, world, config.train.steps)
    _check_models(config, world)
    path, tokenizer = model_directory(config.teacher.path), tokenizer_directory(config, run)
    shards = broadcast_object(prepare_data(config, run, lambda message, share: metrics.say(message)) if world.rank == 0 else {})
    student = read_model_config(start_directory(config.student.init_from) if config.student.init_from else path)
    stream = open_stream(shards["train"], config.data, student, config.run.seed, shuffle=False)
    check_vocabulary(student, stream.vocab_size, str(path), tokenizer)
    check_same_tokenizer(tokenizer, path)
    folder = broadcast_object(_cache_folder(config, shards["train"], student) if world.rank == 0 else Path())
    dtype = torch.bfloat16 if config.train.computes_in == "bf16" else torch.float32
    progress = metrics.phase("storing the teacher's words")
    teacher = _online_teacher(config, world)
    about = write_cache(folder, config.teacher, teacher, stream, config.train.micro_batch, config.run.seed, dtype, world, progress)
    samples, tokens, ids, size = (about[key] for key in ("num_samples", "num_tokens", "num_ids", "num_bytes"))
    what = f", {ids / tokens:.1f} ids per token" if ids else ""
    metrics.say(f"{samples:,} samples, {tokens:,} target tokens{what}, {size / 1e6:,.1f} MB in {folder}")


CALIBRATION_SAMPLES = 32
"""Training samples that learned activation scales, and what is measured of the teacher, start from."""


def _show_samples(student: LanguageModel, stream: AnyStream, config: RunConfig, device: torch.device) -> None:
    """Run the student on the first samples of the training, the same ones on every rank. Collective under ZeRO-3."""
    for batch in _first_batches(stream, config):
        inputs, _ = inputs_of(batch, device)
        student.through_head(student(inputs, layers=False).hidden[inputs.is_target], lambda hidden, head: None)


def _first_batches(stream: AnyStream, config: RunConfig) -> Iterator[Batch]:
    for start in range(0, CALIBRATION_SAMPLES, config.train.micro_batch):
        yield stream.batch(range(start, start + config.train.micro_batch))


def _first_mean(
    teacher: TeacherEngine | CachedTeacher, stream: AnyStream, config: RunConfig, values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> float:
    """Mean of `values(teacher's logits, labels)` over the target tokens of the first samples, the same number on every rank. Collective."""

    def add(said: torch.Tensor, _: None, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return said.new_zeros(()), {"sum": values(said, labels).double().sum(), "count": said.new_tensor(float(len(said)), dtype=torch.float64)}

    total = count = 0.0
    for batch in _first_batches(stream, config):
        inputs, labels = inputs_of(batch, teacher.device)
        with torch.no_grad(), teacher.teaching(batch, inputs, layers=False) as taught:
            assert taught.outputs is not None and taught.head is not None
            hidden = taught.outputs.hidden[inputs.is_target]
            _, parts = chunked_loss(hidden, taught.head, None, None, [labels[inputs.is_target]], add)
        total, count = total + parts["sum"].item(), count + parts["count"].item()
    return total / count


def _check_models(config: RunConfig, world: World) -> None:
    """Raise ConfigError for models that cannot be used, or not together, by their config.json; CheckpointError for what is not as a list of its own says. Collective."""
    models = {"teacher.path": model_directory(config.teacher.path)} if config.teacher else {}
    models |= {"student.init_from": start_directory(config.student.init_from)} if config.student.init_from else {}
    for folder in models.values():
        on_rank_0(world, functools.partial(check_if_listed, folder))
    configs = {name: read_model_config(folder) for name, folder in models.items()}
    for name, model in configs.items():
        check_length(model, config.data, name)
        if config.data.attention == "within":
            check_confined(model, name)
    if len(configs) == 2:
        names = ["is_encoder_decoder", "vocab_size"] + ["hidden_size"] * bool({"hidden", "contrast"} & set(config.distill.teacher_terms))
        names += ["num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"] * ("attention" in config.distill.teacher_terms)
        names += ["decoder_start_token_id"]
        for name in [name for name in names if all(hasattr(model, name) for model in configs.values())]:
            teacher, student = (getattr(model, name) for model in configs.values())
            if teacher != student:
                raise ConfigError(
                    f"{name} is {teacher} in teacher.path, but {student} in student.init_from; distill compares them entry by entry, so give equal models."
                )


def tokenizer_directory(config: RunConfig, run: RunDir) -> Path:
    """Where the run's tokenizer is, or will be when it is trained."""
    if config.data.train_tokenizer is not None:
        return run.tokenizer
    if config.data.tokenizer is not None:
        return hub.directory(config.data.tokenizer)
    if config.student.init_from is not None:
        return start_directory(config.student.init_from)
    assert config.teacher is not None, "config.py asks for a tokenizer where there is no model to take it from"
    return model_directory(config.teacher.path)


def prepare_data(
    config: RunConfig, run: RunDir, report: Report, workers: int | None = None, share: tuple[int, int] | None = None
) -> dict[str, list[Path | str]]:
    """Tokenizer and token shards of every split, made unless they are there, as `prepare` does; split -> folders of its sources."""
    tokenizer = tokenizer_directory(config, run)
    if config.data.train_tokenizer is not None:
        train_tokenizer(
            config.data.sources("train"), config.data.train_tokenizer.vocab_size, tokenizer, lambda message: report(message, None), config.data.pairs
        )
    root, kind = config.data.shards or run.path / "shards", is_encoder_decoder(config)
    return {
        split: prepare(config.data, split, tokenizer, root, encoder_decoder=kind, progress=report, workers=workers, share=share)
        for split in SPLITS
        if getattr(config.data, split) is not None
    }


def is_encoder_decoder(config: RunConfig) -> bool:
    """Whether the model of a config reads sources with an encoder; looks at a config.json alone."""
    if config.student.architecture is not None:
        return AutoConfig.for_model(config.student.architecture["model_type"]).is_encoder_decoder
    source = start_directory(config.student.init_from) if config.student.init_from else model_directory(config.teacher.path)  # type: ignore[union-attr]
    return read_model_config(source).is_encoder_decoder


def open_stream(
    folders: Sequence[Path | str],
    data: Data,
    model: PretrainedConfig,
    seed: int,
    shuffle: bool,
    quarantine: Callable[[str], None] | None = None,
    interleaved: Interleaving | None = None,
) -> AnyStream:
    """The samples of folders of shards, as a model of this config reads them; `interleaved`: how they take turns, None for those of one folder behind the other."""
    opened = [open_folder(folder, data.cache, model.vocab_size) for folder in folders]
    order = (seed, shuffle, interleaved or Interleaving(), quarantine)
    if data.pairs is None:
        assert data.tokens_per_sample is not None
        if data.samples == "documents":
            return DocumentStream(opened, data.tokens_per_sample, *order)
        return Stream(opened, data.tokens_per_sample, *order, within=data.attention == "within")
    pad = model.pad_token_id if model.pad_token_id is not None else 0  # padding is masked, so that any id will do
    if model.is_encoder_decoder and model.decoder_start_token_id is None:
        raise ConfigError(f"the config.json of this {model.model_type} has no decoder_start_token_id, which its decoder begins with. Add it.")
    return PairStream(opened, pad, model.decoder_start_token_id if model.is_encoder_decoder else None, *order)


class Student(NamedTuple):
    """A student before it has memory: `engine.materialise` gives it some."""

    model: PreTrainedModel  # on the meta device, quantized if the config says so
    coverage: Coverage | None  # None where it is not quantized
    maps: LayerMaps  # the teacher's layer of each of its layers
    weights: dict[str, Reader]  # of everything but learned activation scales that start with the data


def student_model(config: RunConfig, vocab_size: int, eos_token_id: int, world: World, goes_on: bool = False) -> Student:
    """What a config says of the student. The tokenizer's size and end of text are for a new model alone. Collective: ranks share the search of scales.

    Of a run that `goes_on` the checkpoint knows the learned scales, so that they are not searched.
    """
    source = config.student.init_from and hub.directory(config.student.init_from)
    learned: set[str] = set()
    if config.student.architecture is not None:
        new = new_model(config.student.architecture, vocab_size, eos_token_id, config.run.seed)
        model, weights = meta_model(new.config), readers_of(new.state_dict())
    elif source is not None and RunDir(source).config.is_file():
        model = meta_model(RunDir(source).student)
        weights = checkpoint.readers(on_rank_0(world, lambda: chosen_checkpoint(RunDir(source))), model)
        learned = weights.keys() - model.state_dict().keys()
    else:
        assert source is not None or config.teacher is not None, "config.py asks for one of them"
        folder = source or model_directory(config.teacher.path)  # type: ignore[union-attr]
        model = meta_model(folder)
        weights = open_weights(folder, model)
    everything = all_layers(model.config)
    settings = {"student.decoder_layers": config.student.decoder_layers, "student.encoder_layers": config.student.encoder_layers}
    if config.student.encoder_layers is not None and len(everything.encoder) == 0:
        raise ConfigError(
            f"student.encoder_layers is set, but {type(model).__name__} has no encoder. Set student.decoder_layers, which cuts a causal model too."
        )
    maps = LayerMaps(*(layer_map(kept, len(layers), key) for (key, kept), layers in zip(settings.items(), filter(None, everything), strict=False)))
    if learned and maps != everything:
        raise ConfigError(
            "student.init_from is a quantized run, which is not cut. Remove student.encoder_layers and decoder_layers, or start from the float model."
        )
    if maps != everything:
        model, names = cut(model, maps)
        weights = {name: weights[before] for name, before in names.items()}
    if config.teacher is not None:
        maps = _teacher_layers(config, model, maps, everything)
    rounded = config.train.rounds_matrices
    if config.quant is None:
        if rounded:
            round_matrices(model)
        return Student(model, None, maps, weights)
    coverage = quantize_model(model, config.quant, initialise=False, rounded=rounded)
    head = model.get_output_embeddings()
    is_own = getattr(head, "weight_quantizers", None) and head.weight is not model.get_input_embeddings().weight
    if is_own and not config.distill.task and "logits" not in config.distill.teacher_terms:
        raise ConfigError(
            f"the head of {type(model).__name__} is not tied to its embeddings and is quantized, but no live term trains it. "
            "Add distill.logits or distill.task, or keep it float with an entry of quant.overrides."
        )
    known: set[str] = set()
    if learned:
        assert source is not None
        # A scale means the same whether the weight is rounded to bf16 first or not.
        rows = Coverage.from_json(RunDir(source).coverage.read_text()).rows
        before = {row.name: replace(row, quantizer=row.quantizer and replace(row.quantizer, rounded=rounded)) for row in rows}
        # The scales of another grid would mean something else here, so those start anew.
        known = {name for row in coverage.rows if before[row.name] == row for name in row.learned_names}
        if all(before[row.name].input_quantizer == row.input_quantizer for row in coverage.rows):
            known |= learned - {name for row in before.values() for name in row.learned_names}  # what is learned of activations
    weights = {name: read for name, read in weights.items() if name not in learned - known}
    if goes_on:
        scales = {name: torch.ones(model.get_parameter(name).shape) for row in coverage.rows for name in row.learned_names}
    else:
        scales = _first_scales(model, weights, known, world)
    return Student(model, coverage, maps, weights | readers_of(scales))


def _first_scales(model: PreTrainedModel, weights: dict[str, Reader], known: set[str], world: World) -> dict[str, Tensor]:
    """Where the learned scales of weights start that are not known. Each rank searches those of its share of the weights. Collective."""
    unknown = [
        p for p in quantized_parameters(model) if not known.issuperset(f"{p.name}_{learned}" for learned in p.quantizer.learned) or not p.quantizer.learned
    ]

    def read(name: str) -> Tensor:
        whole = torch.empty(model.get_parameter(name).shape)
        weights[name](0, whole.view(-1))
        return whole.to(world.device)

    mine = initial_scales(unknown[world.rank :: world.world_size], read)
    return {name: scale for part in gather_objects({name: scale.cpu() for name, scale in mine.items()}) for name, scale in part.items()}


def _teacher_layers(config: RunConfig, student: PreTrainedModel, maps: LayerMaps, before: LayerMaps) -> LayerMaps:
    """The teacher's layer of each layer of a student that was cut by `maps` from a model of the layers `before`.

    Raises ConfigError when a live term cannot follow the map: for a student that is deeper, and where the last states, behind a norm, would be compared
    with the states of an inner layer, which are before it.
    """
    assert config.teacher is not None
    settings, live = config.distill, config.distill.teacher_terms
    layer = settings.contrast.layer if settings.contrast is not None and "contrast" in live else None
    if not {"hidden", "attention"} & set(live) and layer is None:
        return maps
    theirs = all_layers(read_model_config(model_directory(config.teacher.path)))
    if before != theirs:  # from another model: spaced as if it had been cut from the teacher
        for side, ours, layers in zip(LayerMaps._fields, maps, theirs, strict=True):
            if len(ours) > len(layers):
                raise ConfigError(
                    f"the student has {len(ours)} {side} layers, but {config.teacher.path} has {len(layers)}, and distill compares them layer by layer. "
                    "Cut the student, or leave out distill.hidden, distill.attention and distill.contrast.layer."
                )
        maps = LayerMaps(*(layer_map(len(ours), len(layers), "") for ours, layers in zip(maps, theirs, strict=True) if ours))
    if layer is not None and layer >= len(maps.decoder):
        raise ConfigError(f"distill.contrast.layer is {layer}, but the student has {len(maps.decoder)} decoder layers, counted from 0.")
    for side, ours, layers in zip(LayerMaps._fields, maps, theirs, strict=False):
        compared = bool(ours) and ("hidden" in live or (side == "decoder" and layer == len(ours) - 1))
        if compared and ours[-1] != layers[-1] and has_norm_behind(student.config, encoder=side == "encoder"):
            raise ConfigError(
                f"student.{side}_layers ends with layer {ours[-1]}, but {type(student).__name__} has a norm behind its last layer, so that the student's last "
                f"states can be compared with the teacher's last ones alone. End with {layers[-1]}, or leave out distill.hidden and distill.contrast.layer."
            )
    return maps


def unigram_entropy(stream: AnyStream) -> float:
    """Entropy of the labels of a split, in nats per token: the loss of the best model that sees no context."""
    counts = np.zeros(stream.vocab_size, dtype=np.int64)
    for index in range(stream.num_samples):
        labels = stream.sample(index)[1]
        np.add.at(counts, labels[labels != IGNORED], 1)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def evaluation_stream(
    path: Path, model: PreTrainedModel, split: str, files: Sequence[str] | None, tokens_per_sample: int | None, config: RunConfig | None = None
) -> AnyStream:
    """The samples that `dqtrain eval` reads: a split of the config of a run, or of another one, or corpus files with the tokenizer beside the model."""
    run = RunDir(path)
    if config is not None:
        data = config.data
        tokenizer, root = (tokenizer_directory(config, run), data.shards or run.path / "shards") if run.config.is_file() else (path, _cache())
    else:
        length = min(1024, getattr(model.config, "max_position_embeddings", 1024))
        data, tokenizer, root = Data(train=(), tokens_per_sample=tokens_per_sample or length), path, _cache()
        if model.config.is_encoder_decoder:
            raise ConfigError(f"{path} reads sources and writes targets; give --config YAML, whose data.pairs says where they are.")
    if files:
        data = data.model_copy(update={split: tuple(files)})
    if not data.sources(split):
        raise ConfigError(f"{path}: nothing says what to evaluate on; give --data FILE, or a run whose config has data.{split}.")
    if tokens_per_sample is not None:
        if data.pairs is not None:
            raise ConfigError("--tokens-per-sample is for text, but data.pairs cuts sources and targets to their own lengths. Leave it out.")
        data = data.model_copy(update={"tokens_per_sample": tokens_per_sample})
    folders = prepare(data, split, tokenizer, root, encoder_decoder=model.config.is_encoder_decoder)
    check_length(model.config, data, str(path))
    stream = open_stream(folders, data, model.config, seed=0, shuffle=False)
    check_vocabulary(model.config, stream.vocab_size, str(path), tokenizer)
    return stream


def held_out_text(run: RunDir) -> AnyStream | None:
    """The test or validation split of a run's config, whichever there is."""
    config = run.load_config()
    split = next((split for split in ("test", "validation") if config.data.sources(split)), None)
    if split is None:
        return None
    model = read_model_config(run.student)
    folders = prepare(config.data, split, run.student, config.data.shards or run.path / "shards", encoder_decoder=model.is_encoder_decoder)
    return open_stream(folders, config.data, model, seed=0, shuffle=False)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dqtrain"
