"""An artifact, or any model directory or run, as a transformers model that computes what was trained."""

import functools
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import offload_weight, save_offload_index
from torch import Tensor, nn
from transformers import PreTrainedModel

from dqtrain import checkpoint
from dqtrain.artifact import format
from dqtrain.artifact.compressed.load import is_compressed, load_compressed
from dqtrain.artifact.description import check_if_listed
from dqtrain.artifact.pretrained import DTYPES, METHOD
from dqtrain.artifact.text import Text, decoder, read_prompt, require_room
from dqtrain.config import ActivationQuant, Generation
from dqtrain.data.prepare import load_tokenizer
from dqtrain.errors import CheckpointError, ConfigError
from dqtrain.generation import generate as write
from dqtrain.models.language import open_head
from dqtrain.models.making import empty_model, load_model, meta_model, model_class, read_model_config
from dqtrain.models.weights import by_names, leave_in_files, open_weights, stored_tensors, whole_tensors
from dqtrain.quant.modules import quantize_activations, quantize_model, round_matrices
from dqtrain.rundir import RunDir
from dqtrain.world import World


def load_artifact(path: Path | str, mode: str = "exact", device: str = "cpu") -> PreTrainedModel:
    """The model of a packed artifact, in eval mode, on a device: `exact`, `dense` or `fast` (`pretrained`); as transformers' from_pretrained gives it after `import dqtrain`.

    Raises CheckpointError for a damaged artifact and for a folder that holds none, ConfigError for what a mode cannot do.
    """
    folder = Path(path)
    if not (folder / "artifact.json").is_file():
        raise CheckpointError(f"{folder}: no artifact.json there, so that it is no packed artifact. Give a folder that `dqtrain export RUN` wrote.")
    config = read_model_config(folder)
    config.quantization_config = {"quant_method": METHOD, "mode": mode}
    how = {"dtype": DTYPES.get(mode) or torch.float32, "device_map": None if device == "cpu" else {"": device}}
    try:
        return model_class(config).from_pretrained(folder, config=config, local_files_only=True, **how)
    except OSError as error:  # of transformers, where a file is missing
        raise CheckpointError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}). Copy it again, or export the run again.") from None


def chosen_checkpoint(run: RunDir) -> Path:
    """The checkpoint that a finished run tested and exported. Raises CheckpointError for an unfinished run."""
    return checkpoint.at_step(run.checkpoints, run.load_result()["step"])


def trained_model(run: RunDir, folder: Path) -> PreTrainedModel:
    """The student of a run with the weights and scales of one of its checkpoints, fake-quantized as in training, in eval mode."""
    model = _as_trained(empty_model(run.student), run)
    left_over = checkpoint.fill(model, folder)
    if left_over:
        raise CheckpointError(f"{folder}: holds {', '.join(sorted(left_over)[:3])}, which the student of {run.config} does not have. Restore that file.")
    return model.eval()


def trained_in_files(run: RunDir, folder: Path) -> PreTrainedModel:
    """As `trained_model`, but its parameters stay in the checkpoint, and each is read when it is needed. Raises CheckpointError for another model's."""
    model = _as_trained(meta_model(run.student), run)
    checkpoint.require_fits(folder, model)
    leave_in_files(model, whole_tensors(checkpoint.readers(folder, model), model))
    return model


def artifact_in_files(path: Path, mode: str = "exact") -> PreTrainedModel:
    """The model of a packed artifact in mode `exact` or `dense`, or of a Hugging Face directory, whose parameters stay in the files: for one that does not fit memory."""
    config = read_model_config(path)
    if not (path / "artifact.json").is_file():
        model = meta_model(config)
        _untie(model, stored_tensors(path))
        leave_in_files(model, whole_tensors(open_weights(path, model), model))
        return model
    about = format.read_description(path)
    packed = format.PackedTensors(path, about)
    config.__dict__.pop("quantization_config", None)
    model = meta_model(config)
    if mode == "exact":
        quantize_activations(model, packed.coverage, about["activations"] and ActivationQuant(**about["activations"]))
    stored = {*packed.quantized, *packed.floats}
    _untie(model, stored)
    read: dict[str, Callable[[], Tensor]] = {}
    for names, tensor in by_names(model):
        found = next((name for name in names if name in stored), None)
        if found is None and isinstance(tensor, nn.Parameter):
            raise CheckpointError(f"{path}: has no tensor {names[0]}, which {type(model).__name__} needs. Export the run again.")
        read[names[0]] = functools.partial(torch.zeros, tensor.shape) if found is None else functools.partial(_floats, packed, found)
    leave_in_files(model, read)
    return model


def _floats(packed: format.PackedTensors, name: str) -> Tensor:
    return packed.value(name).float()


def _untie(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Give each name of a tied parameter that has a tensor of its own a parameter of its own: a head that reads the table before rounding."""
    for names, _ in list(by_names(model)):
        for name in [name for name in names if name in stored][1:]:
            owner, _, key = name.rpartition(".")
            parameter = model.get_parameter(name)
            model.get_submodule(owner)._parameters[key] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)


def _as_trained(model: PreTrainedModel, run: RunDir) -> PreTrainedModel:
    """A float model as the run's student is, but for its weights and scales; in place."""
    config = run.load_config()
    rounded = config.train.rounds_matrices
    if config.quant is not None:
        quantize_model(model, config.quant, initialise=False, rounded=rounded)
    elif rounded:
        round_matrices(model)
    return model


def load_any(path: Path) -> PreTrainedModel:
    """A finished run's chosen checkpoint, a packed artifact, or a Hugging Face directory, also of compressed-tensors: whichever the folder is."""
    run = RunDir(path)
    if run.config.is_file():
        return trained_model(run, chosen_checkpoint(run))
    if is_compressed(path):
        return load_compressed(path)
    if (path / "artifact.json").is_file():
        return load_artifact(path)
    check_if_listed(path)
    return load_model(path)


def load_spread(path: Path, max_memory: Mapping[int | str, int] | None = None) -> PreTrainedModel:
    """As `load_any`, over the devices of this machine: its GPUs, then its memory, then temporary files, as far as each has room (accelerate).

    The model never is whole anywhere: tensors are read one at a time. An artifact, which is small, is loaded into memory. `max_memory`: bytes by GPU
    number and `cpu` (default: what is free). Raises CheckpointError as `load_any` does, ConfigError where the temporary files have no room.
    """
    run = RunDir(path)
    if (path / "artifact.json").is_file() or is_compressed(path):
        return load_any(path).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    if run.config.is_file():
        model = _as_trained(meta_model(run.student), run)
        weights = checkpoint.readers(chosen_checkpoint(run), model)
    else:
        check_if_listed(path)
        model = meta_model(path)
        weights = open_weights(path, model)
    open_head(model)  # before accelerate's hooks, which look at a module's class
    classes = list(getattr(model, "_no_split_modules", None) or ())
    device_map = infer_auto_device_map(model, None if max_memory is None else dict(max_memory), classes)
    places = {name: next(device_map[prefix] for prefix in _prefixes(name) if prefix in device_map) for name, _ in model.named_parameters()}
    filed = sum(4 * parameter.numel() for name, parameter in model.named_parameters() if places[name] == "disk")
    files = tempfile.mkdtemp(prefix="dqtrain-")
    weakref.finalize(model, shutil.rmtree, files, ignore_errors=True)
    free = shutil.disk_usage(files).free
    if filed > free:  # a file that is mapped and finds no room kills the process
        raise ConfigError(
            f"{path}: {filed:,} bytes of it fit no device and would go to files in {tempfile.gettempdir()}, which has {free:,} free. "
            "Set TMPDIR to a folder with more, or use a machine with more memory."
        )
    index: dict[str, Any] = {}
    for names, tensor in list(by_names(model)):
        if not isinstance(tensor, nn.Parameter):
            weights[names[0]](0, tensor.view(-1))
            continue
        if names[0] not in weights:
            raise CheckpointError(f"{path}: has no tensor {names[0]}, which {type(model).__name__} needs. Save or export the model again.")
        value = torch.empty(tensor.shape)
        weights[names[0]](0, value.view(-1))
        if places[names[0]] == "disk":
            for name in names:
                index = offload_weight(value, name, files, index)
            continue
        parameter = nn.Parameter(value.to(places[names[0]]), requires_grad=False)
        for name in names:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._parameters[key] = parameter
    save_offload_index(index, files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map names buffers too, which accelerate takes for a mistake of its user
        return dispatch_model(model, device_map, offload_dir=files).eval()


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the machine has available, or what is left of the least limit of a Slurm job or container it is in."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    assert available, "Linux has it since 3.14"
    left = [1024 * int(available[1])]
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, limit, used = (groups / "memory", "limit_in_bytes", "usage_in_bytes") if kinds else (groups, "max", "current")
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no limit, or a group that a container does not see
                left.append(int((group / f"memory.{limit}").read_text()) - int((group / f"memory.{used}").read_text()))
            if group == root:
                break
    return max(0, min(left))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model that `load_spread` gave takes its inputs."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _prefixes(name: str) -> Iterator[str]:
    """A parameter's name, its module's, that one's parent's, ..., and the empty name of all."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def complete(model: PreTrainedModel, path: Path, prompt: str, tokens: int, stream: bool = False, alone: bool = False) -> str:
    """The prompt and its greedy continuation of up to `tokens` tokens, with the tokenizer beside the model; of an encoder-decoder what it writes for the prompt.

    Where the tokenizer has a chat template the prompt is what a user says, and the answer alone is given. `stream`: also print it, as it is written. `alone`: without the prompt.
    Raises ConfigError for too many tokens, DataError for a template that refuses the prompt.
    """
    tokenizer = load_tokenizer(path)
    longest = getattr(model.config, "max_position_embeddings", None)
    if model.config.is_encoder_decoder:
        require_room(path, longest, tokens)
        world = World(0, 1, 0, input_device(model))
        text = Text(decoder(tokenizer), num_hidden=1, stream=stream)  # without the token that a decoder starts with
        write(model, tokenizer, [prompt], Generation(max_new_tokens=tokens), source_tokens=longest or 2**20, micro_batch=1, world=world, streamer=text)
        return str(text)
    ids, is_chat = read_prompt(tokenizer, prompt)
    require_room(path, longest, tokens, len(ids))
    read = torch.tensor([ids], device=input_device(model))
    text = Text(decoder(tokenizer), len(ids) if is_chat or alone else 0, stream)
    search = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, "pad_token_id": tokenizer.eos_token_id}
    generate: Any = model.generate
    with torch.no_grad():
        generate(read, attention_mask=torch.ones_like(read), streamer=text, **search)
    return str(text)
