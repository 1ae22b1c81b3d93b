"""The sibling in 8 bits has the same values, is gone when its time was taken, and only what is slower is told."""

import pytest
import torch
from families import FAMILIES
from test_ggml_blocks import GRIDS_AND_BITS
from test_gguf import QUANT, packed_artifact, student  # noqa: F401 # a fixture
from test_onnx import with_tokenizer
from test_packed import settings

from dqtrain.artifact import format, kernels, parity
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.onnx.target import OnnxTarget
from dqtrain.config import Export


@pytest.mark.parametrize("target", [GgufTarget, OnnxTarget])
@pytest.mark.parametrize("more", [{"linears": 2, "embeddings": 2, "grid": "seq"}, {"linears": 3, "embeddings": 4, "grid": "affine"}, {"positions": 2}])
def test_the_sibling_is_the_student(target, more, student, tmp_path):  # noqa: F811
    model, packed, _ = packed_artifact(student("gpt2"), settings(activations=None, **more), tmp_path / "packed", steps=0)
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        ours, sibling = (target(made, model.config, Export()) for made in (tensors, kernels.Widened(tensors)))
        for place, made in (("ours", ours), ("sibling", sibling)):
            (tmp_path / place).mkdir()
            made.write(tmp_path / place)
        found = parity.verify_weights(model, tmp_path / "sibling", sibling)
        assert found["largest_relative_difference"] == 0.0 and found["bit_identical"] == found["tensors"]
        assert found["types"].keys() == {"Q8_0" if target is GgufTarget else "8 bit"} and found["types"].keys() != set(ours.types.values())
        before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
        times = kernels.measure(ours, tmp_path / "ours", sibling, model.config)
        assert times["ms_per_token"] > 0 and times["ms_per_token_8_bit"] > 0
        assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


@pytest.mark.parametrize("grid", sorted({grid for grid, _ in GRIDS_AND_BITS}))
def test_every_grid_is_widened_to_the_bit(grid, world, tmp_path):
    for bits in [bits for name, bits in GRIDS_AND_BITS if name == grid]:
        model, packed, _ = with_tokenizer(world, FAMILIES["gpt2"](), settings(bits, bits, None, grid=grid, granularity="per_row"), tmp_path / str(bits))
        with format.PackedTensors(packed, format.read_description(packed)) as tensors:
            wider = kernels.Widened(tensors)
            assert {quantizer.bits for quantizer in wider.quantized.values()} == {8} and wider.floats == tensors.floats
            assert all(torch.equal(wider.value(name), tensors.value(name)) for name in tensors.quantized)


def test_nothing_is_left_of_a_sibling_that_does_not_run(student, tmp_path):  # noqa: F811
    class Broken(OnnxTarget):
        def write(self, folder):
            super().write(folder)
            (folder / "model.onnx").write_bytes(b"")

    model, packed, _ = packed_artifact(student("gpt2"), QUANT, tmp_path / "packed", steps=0)
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        ours, sibling = OnnxTarget(tensors, model.config, Export()), Broken(kernels.Widened(tensors), model.config, Export())
        (tmp_path / "ours").mkdir()
        ours.write(tmp_path / "ours")
        before = {path.name for path in (tmp_path / "ours").iterdir()}
        with pytest.raises(Exception, match="model.onnx"):
            kernels.measure(ours, tmp_path / "ours", sibling, model.config)
        assert {path.name for path in (tmp_path / "ours").iterdir()} == before


def test_weights_of_8_bits_have_no_sibling(student, tmp_path):  # noqa: F811
    model, packed, _ = packed_artifact(student("gpt2"), settings(8, 8, 8), tmp_path / "packed", steps=0)
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        ours, sibling = (OnnxTarget(made, model.config, Export()) for made in (tensors, kernels.Widened(tensors)))
        assert kernels.measure(ours, tmp_path, sibling, model.config) == {}


@pytest.mark.parametrize(("own", "wider", "is_told"), [(1.2, 1.0, True), (1.09, 1.0, False), (0.3, 1.0, False), (1.0, 1.0, False)])
def test_what_is_slower_by_more_than_noise_is_told(own, wider, is_told):
    told = kernels.slower("llama.cpp", {"ms_per_token": own, "ms_per_token_8_bit": wider})
    assert len(told) == is_told and all("1.2 ms a token here, and 1 for the same weights in 8 bits" in line for line in told)


@pytest.mark.parametrize("figures", [{}, {"not_measured": "it is large"}])
def test_what_was_not_measured_is_not_slower(figures):
    assert kernels.slower("llama.cpp", figures) == []
