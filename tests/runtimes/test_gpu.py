"""Mode fast of packed artifacts on a GPU. For a machine that has one: `pytest tests/runtimes/test_gpu.py`; without one it fails."""

import pytest
import torch
from families import FAMILIES, IDS, logits_of
from test_fast import CASES, WIDE, layers
from test_pretrained import settings, write

import dqtrain
from dqtrain.artifact.fast import FastEmbedding, FastLinear


def check(folder):
    """Every layer of its own against float64, to the precision of a bf16 product and a bf16 bias."""
    dense, found = dqtrain.load_artifact(folder, mode="dense"), dqtrain.load_artifact(folder, mode="fast", device="cuda")
    assert any(isinstance(module, FastLinear) for module in layers(found).values())
    for name, module in layers(found).items():
        layer = dense.get_submodule(name)
        if isinstance(module, FastEmbedding):
            ids = torch.arange(module.num_embeddings)[None]
            torch.testing.assert_close(module(ids.cuda()).cpu().double(), layer(ids).detach().double(), rtol=2.0**-7, atol=0.0)
            continue
        for tokens in (1, 3, 100):
            x = torch.randn(2, tokens, module.in_features).bfloat16()
            expected = layer.double()(x.double()).detach()
            assert (module(x.cuda()).cpu().double() - expected).norm() <= 2.0**-6 * expected.norm(), name


@pytest.mark.parametrize(("quant", "shape"), CASES)
def test_every_grid(quant, shape, tmp_path):
    write(tmp_path, quant, **shape)
    check(tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_every_family_is_as_near_as_bf16(family, tmp_path):
    write(tmp_path, settings(activations=None), family)
    check(tmp_path)
    exact, dense = (dqtrain.load_artifact(tmp_path, mode=mode) for mode in ("exact", "dense"))
    found = dqtrain.load_artifact(tmp_path, mode="fast", device="cuda")
    with torch.no_grad():
        expected = logits_of(exact).double()
        ours, theirs = (logits_of(model.to("cuda"), IDS.cuda()).cpu().double() for model in (found, dense.to(torch.bfloat16)))
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
    assert found.generate(IDS.cuda(), max_new_tokens=6, min_new_tokens=6, do_sample=False).is_cuda


def test_no_matrix_is_dense(tmp_path):
    write(tmp_path, settings(), "gpt2", **WIDE)
    found = dqtrain.load_artifact(tmp_path, mode="fast", device="cuda")
    assert {name for name, p in found.named_parameters() if p.ndim > 1} == {"transformer.wpe.weight"}
    assert all(tensor.is_cuda for tensor in (*found.parameters(), *found.buffers()))
