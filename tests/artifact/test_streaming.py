"""A model that is never whole: what is written of it is what is written of the one in memory, and it computes the same."""

import copy
import gc
import json
import weakref

import pytest
import torch
from conftest import edit_description
from families import FAMILIES, IDS, logits_of
from test_pretrained import settings, write
from torch import nn

from dqtrain import tensor_file
from dqtrain.artifact import format, parity
from dqtrain.artifact.load import artifact_in_files, load_artifact
from dqtrain.artifact.size import artifact_bytes, float_part
from dqtrain.config import BITS_OF_GRID, Quant
from dqtrain.errors import CheckpointError
from dqtrain.models.language import LanguageModel
from dqtrain.models.weights import leave_in_files, readers_of, whole_tensors
from dqtrain.quant.modules import quantized_parameters, served_parameters


def in_files(model):
    """A copy of a model whose parameters are read when they are needed."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    found = copy.deepcopy(model, memo)
    leave_in_files(found, whole_tensors(readers_of(model.state_dict()), found))
    return found


def same_files(model, folder, other):
    """Whether a model in files is written as the one in memory was."""
    about = format.read_description(folder)
    other.mkdir()
    format.write(in_files(model), other, {key: about[key] for key in ("activations", "coverage")})
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in ("artifact.json", *about["weights"]))


@pytest.mark.parametrize(
    ("quant", "rounded"),
    [
        *((settings(widths[0], widths[-1], grid=grid), False) for grid, widths in BITS_OF_GRID.items()),
        (settings(3, 3, None, grid="affine", granularity="per_group", group_size=8), False),
        (settings(2, 4, vectors="bf16", scale_dtype="fp32", activations=None), True),
        (settings(4, 4, scale="learned", attention=True), False),
        (settings(2, 4, None, float_head=True, scale="per_tensor"), True),
    ],
    ids=lambda value: f"{value.linears.grid}-{value.linears.bits}" if isinstance(value, Quant) else str(value),
)
def test_every_grid_is_written_and_verified_as_in_memory(quant, rounded, tmp_path, monkeypatch):
    model = write(tmp_path / "packed", quant, rounded=rounded)
    assert same_files(model, tmp_path / "packed", tmp_path / "again")
    monkeypatch.setattr(parity, "WHOLE_BYTES", 0)
    assert parity.verify(in_files(model), tmp_path / "packed")["relative_logit_difference"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_from_files(family, tmp_path):
    model = write(tmp_path / "packed", settings(attention=family != "mixtral"), family)
    assert same_files(model, tmp_path / "packed", tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(logits_of(in_files(model)), logits_of(model))
        found = artifact_in_files(tmp_path / "packed")
        assert torch.equal(logits_of(found), logits_of(model))
        assert all(p.is_meta for p in found.parameters())
        if family in ("gpt2", "mixtral", "t5"):
            dense = load_artifact(tmp_path / "packed", "dense")
            dense.save_pretrained(tmp_path / "float")
            for found in (artifact_in_files(tmp_path / "packed", "dense"), artifact_in_files(tmp_path / "float")):
                assert torch.equal(logits_of(found), logits_of(dense))


@torch.no_grad()
def test_a_buffer_that_is_not_stored_since_it_is_zero_is_zero(tmp_path):
    model = write(tmp_path, settings(), "bart")
    model.final_logits_bias.zero_()
    about = format.read_description(tmp_path)
    format.write(model, tmp_path, {key: about[key] for key in ("activations", "coverage")})
    with format.PackedTensors(tmp_path, format.read_description(tmp_path)) as packed:
        assert "final_logits_bias" not in packed.floats
    assert torch.equal(logits_of(artifact_in_files(tmp_path)), logits_of(model))


def test_a_module_that_fails_holds_nothing():
    model = in_files(FAMILIES["gpt2"]())
    with pytest.raises(IndexError):
        logits_of(model, IDS + 97)
    assert all(p.is_meta for p in model.parameters())


def test_verifying_from_files_notices_one_changed_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "WHOLE_BYTES", 0)
    model = write(tmp_path, settings())
    model.transformer.h[0].attn.c_attn.weight.data[3, 5] += 1.0
    with pytest.raises(CheckpointError, match=r"c_attn\.weight is not what was trained"):
        parity.verify(in_files(model), tmp_path)
    edit_description(tmp_path, lambda about: about["activations"].update(attention=True))
    with pytest.raises(CheckpointError, match=r"its logits differ"):
        parity.verify(in_files(write(tmp_path / "other", settings())), tmp_path)


def test_no_more_than_one_weight_is_there_at_a_time(tmp_path):
    """What is read, and the values that are made of it, while an artifact is written and its weights are looked at, and while the model computes."""
    model = write(tmp_path / "packed", settings(), "llama", num_hidden_layers=8)
    largest = max(p.nbytes for p in model.parameters())
    live, most = [0], [0]

    def counted(read):
        def count():
            value = read()
            live[0] += value.nbytes
            most[0] = max(most[0], live[0])
            weakref.finalize(value.untyped_storage(), freed, value.nbytes)
            return value

        return count

    def freed(size):
        live[0] -= size

    memo = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
    found = copy.deepcopy(model, memo)
    readers = whole_tensors(readers_of(model.state_dict()), found)
    leave_in_files(found, {name: counted(read) for name, read in readers.items()})
    numbers = live[0]  # what is read at once
    about = format.read_description(tmp_path / "packed")
    format.write(found, tmp_path / "packed", {key: about[key] for key in ("activations", "coverage")})
    for _ in served_parameters(found):
        pass
    with torch.no_grad():
        logits_of(found)
    gc.collect()
    assert live == [numbers] and largest <= most[0] < 1.2 * largest, (most, largest)


def test_the_noise_of_8_bit_activations_is_the_same_from_files(tmp_path):
    write(tmp_path, settings(activations=None))
    about = format.read_description(tmp_path)
    with torch.no_grad():
        whole, read = (logits_of(parity._with_8_bit_inputs(load, tmp_path, about)) for load in (load_artifact, artifact_in_files))
        assert torch.equal(whole, read) and not torch.equal(whole, logits_of(load_artifact(tmp_path)))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """(model, its artifact in parts)."""
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 3000)
    model = write(tmp_path / "packed", settings())
    (tmp_path / "packed/model.safetensors").unlink()  # what `save_pretrained` has left
    return model, tmp_path / "packed"


def test_an_artifact_in_parts_is_loaded_as_one_file_is(parts):
    model, folder = parts
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json" and not (folder / "model.safetensors").exists()
    assert set(files) == format.read_description(folder)["weights"].keys()
    assert parity.verify(model, folder)["relative_logit_difference"] == 0.0
    with torch.no_grad():
        assert torch.equal(logits_of(artifact_in_files(folder)), logits_of(model))
    about = {key: format.read_description(folder)[key] for key in ("activations", "coverage")}
    coverage = format.PackedTensors(folder, format.read_description(folder)).coverage
    predicted = artifact_bytes(coverage, float_part(model), about)
    assert predicted.weights == sum((folder / name).stat().st_size for name in files)
    assert predicted.description == (folder / "artifact.json").stat().st_size
    assert {p.name for p in quantized_parameters(model)} == {row.name for row in coverage.rows if row.quantizer}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_damaged_part_is_refused_by_its_name(parts, harm, number):
    _, folder = parts
    file = sorted(folder.glob("model-*.safetensors"))[number - 1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink() if harm == "missing" else file.write_bytes(content[:-5] if harm == "truncated" else content)
    with pytest.raises(CheckpointError, match=f"{file.name}: {'does not have the hash' if harm == 'flipped' else 'has [0-9]+ bytes, artifact.json says'}"):
        load_artifact(folder)


def test_a_description_that_was_touched_is_refused(tmp_path):
    """A bit of artifact.json that is flipped anywhere, and a shape that an editor changed."""
    write(tmp_path, settings())
    path = tmp_path / "artifact.json"
    content = path.read_bytes()
    assert format.read_description(tmp_path)["coverage"]
    for position in [*range(0, len(content), 9), *range(len(content) - 50, len(content))]:
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"artifact\.json: (cannot be read|has format|does not have the hash in its last line)"):
            format.read_description(tmp_path)
    about = json.loads(content)
    about["coverage"][0][1] = about["coverage"][0][1][::-1]
    path.write_text(json.dumps(about, indent=1))
    with pytest.raises(CheckpointError, match="it was edited or damaged"):
        format.read_description(tmp_path)


def test_logits_from_files_are_those_of_the_split_model(tmp_path):
    """Of a head that is asked for its weight: `LanguageModel` calls it with a function."""
    model = write(tmp_path, settings(float_head=True))
    inputs = parity.Inputs(IDS, torch.ones_like(IDS, dtype=torch.bool))
    with torch.no_grad():
        expected = LanguageModel(model).logits(inputs)
        assert torch.equal(LanguageModel(in_files(model)).logits(inputs), expected)
        assert torch.equal(LanguageModel(artifact_in_files(tmp_path)).logits(inputs), expected)
