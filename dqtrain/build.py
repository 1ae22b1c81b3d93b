"""RunConfig -> objects: the one place where a knob becomes an argument."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dqtrain import checkpoint
from dqtrain.artifact.load import chosen_checkpoint
from dqtrain.config import RunConfig, check_ranks
from dqtrain.data.prepare import check_same_tokenizer, load_tokenizer, prepare, read_index, tokenizer_files, train_tokenizer
from dqtrain.data.stream import IGNORED, Stream
from dqtrain.distill.objective import Objective
from dqtrain.engine import StudentEngine, TeacherEngine
from dqtrain.errors import ConfigError
from dqtrain.files import write_text
from dqtrain.metrics import Metrics
from dqtrain.models import LanguageModel, check_length, check_vocabulary, empty_model, load_model, new_model, read_model_config
from dqtrain.quant.activation import calibrate
from dqtrain.quant.modules import Coverage, quantize_model
from dqtrain.rundir import RunDir, model_directory, start_directory
from dqtrain.trainer import Trainer
from dqtrain.world import World, broadcast_object


def build(config: RunConfig, run: RunDir, world: World) -> Trainer:
    """Make everything a run needs, from its config alone. Collective: rank 0 prepares the data while the others wait."""
    check_ranks(config.train, world.world_size)
    metrics = Metrics(run, world, config.train.steps)
    _check_models(config)  # before minutes of tokenising
    tokenizer = tokenizer_directory(config, run)
    shards = broadcast_object(prepare_data(config, run, metrics.say) if world.rank == 0 else {})
    streams = {split: Stream(folder, config.data.tokens_per_sample, config.run.seed, shuffle=split == "train") for split, folder in shards.items()}

    loaded = load_tokenizer(tokenizer)
    student, coverage = student_model(config, len(loaded), loaded.eos_token_id)
    name = str(config.student.init_from or (config.teacher.path if config.teacher else "student.architecture"))
    check_length(student.config, config.data.tokens_per_sample, name)
    check_vocabulary(student.config, streams["train"].vocab_size, name, tokenizer)
    if config.teacher is not None:
        check_same_tokenizer(tokenizer, model_directory(config.teacher.path))
    language_model = LanguageModel(student, config.train.precision)
    calibrate(student, lambda: _show_samples(language_model, streams["train"], config))
    objective = Objective(language_model, config.distill)
    teacher = None
    if config.teacher is not None and objective.needs_teacher:
        model = load_model(model_directory(config.teacher.path))
        teacher = TeacherEngine(LanguageModel(model, config.train.precision), config.train, config.zero, world)
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
    return Trainer(config, run, world, engine, teacher, streams["train"], streams.get("validation"), streams.get("test"), metrics)


CALIBRATION_SAMPLES = 32
"""Training samples that learned activation scales start from."""


def _show_samples(student: LanguageModel, stream: Stream, config: RunConfig) -> None:
    """Run the student on the first samples of the training, the same ones on every rank."""
    for start in range(0, CALIBRATION_SAMPLES, config.train.micro_batch):
        batch = stream.batch(range(start, start + config.train.micro_batch))
        student(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels) != IGNORED)


def _check_models(config: RunConfig) -> None:
    """Raise ConfigError for models that cannot be used, or not together; looks at their config.json alone."""
    models = {"teacher.path": model_directory(config.teacher.path)} if config.teacher else {}
    models |= {"student.init_from": start_directory(config.student.init_from)} if config.student.init_from else {}
    configs = {name: read_model_config(folder) for name, folder in models.items()}
    for name, model in configs.items():
        check_length(model, config.data.tokens_per_sample, name)
    if len(configs) == 2:
        names = ["vocab_size"] + ["hidden_size"] * (config.distill.contrast is not None and config.distill.contrast.weight > 0)
        for name in names:
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
        return config.data.tokenizer
    if config.student.init_from is not None:
        return start_directory(config.student.init_from)
    assert config.teacher is not None, "config.py asks for a tokenizer where there is no model to take it from"
    return model_directory(config.teacher.path)


def prepare_data(config: RunConfig, run: RunDir, say: Callable[[str], None]) -> dict[str, Path]:
    """Tokenizer and token shards of every split, made unless they are there; split -> folder."""
    tokenizer = tokenizer_directory(config, run)
    if config.data.train_tokenizer is not None:
        train_tokenizer(config.data.train, config.data.text_field, config.data.train_tokenizer.vocab_size, tokenizer, progress=say)
    sources = {"train": config.data.train, "validation": config.data.validation, "test": config.data.test}
    root = config.data.shards or run.path / "shards"
    return {split: prepare(source, split, tokenizer, root, config.data.text_field, progress=say) for split, source in sources.items() if source is not None}


def student_model(config: RunConfig, vocab_size: int, eos_token_id: int) -> tuple[PreTrainedModel, Coverage | None]:
    """The student's model, quantized if the config says so, and its Coverage (None if it does not)."""
    source = config.student.init_from
    learned: dict[str, Tensor] = {}
    if config.student.architecture is not None:
        model = new_model(config.student.architecture, vocab_size, eos_token_id, config.run.seed)
    elif source is not None and RunDir(source).config.is_file():
        model = empty_model(RunDir(source).student)
        learned = checkpoint.fill(model, chosen_checkpoint(RunDir(source)))
    else:
        assert source is not None or config.teacher is not None, "config.py asks for one of them"
        model = load_model(source or model_directory(config.teacher.path))  # type: ignore[union-attr]
    if config.quant is None:
        return model, None
    coverage = quantize_model(model, config.quant)
    if learned:
        assert source is not None
        before = {row.name: row for row in Coverage.from_json(RunDir(source).coverage.read_text()).rows}
        parameters = dict(model.named_parameters())
        for row in coverage.rows:
            # The scales of another grid would mean something else here, so those start anew.
            for name in row.learned_names if before[row.name] == row else []:
                parameters[name].data.copy_(learned.pop(name))
        if all(before[row.name].input_quantizer == row.input_quantizer for row in coverage.rows):
            for name in learned.keys() & parameters.keys():  # what is learned of activations
                parameters[name].data.copy_(learned[name])
    return model, coverage


def unigram_entropy(stream: Stream) -> float:
    """Entropy of the labels of a split, in nats per token: the loss of the best model that sees no context."""
    counts = np.zeros(stream.vocab_size, dtype=np.int64)
    for index in range(stream.num_samples):
        labels = stream.sample(index)[1]
        np.add.at(counts, labels[labels != IGNORED], 1)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def evaluation_stream(path: Path, model: PreTrainedModel, split: str, data: Sequence[str] | None, tokens_per_sample: int | None) -> Stream:
    """The samples that `dqtrain eval` reads: a split of the run that `path` names, or corpus files with the tokenizer beside the model."""
    run = RunDir(path)
    if run.config.is_file():
        config = run.load_config()
        source, tokenizer, root = getattr(config.data, split), tokenizer_directory(config, run), config.data.shards or run.path / "shards"
        length, text_field = config.data.tokens_per_sample, config.data.text_field
    else:
        source, tokenizer, root = None, path, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dqtrain"
        length, text_field = min(1024, getattr(model.config, "max_position_embeddings", 1024)), "text"
    if data:
        source = tuple(data)
    if source is None:
        raise ConfigError(f"{path}: nothing says what to evaluate on; give --data FILE, or a run whose config has data.{split}.")
    folder = prepare(source, split, tokenizer, root, text_field)
    check_vocabulary(model.config, read_index(folder)["vocab_size"], str(path), tokenizer)
    check_length(model.config, tokens_per_sample or length, str(path))
    return Stream(folder, tokens_per_sample or length, seed=0, shuffle=False)
