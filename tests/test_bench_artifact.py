"""`dqtrain bench artifact`: tables of small models, and rows that do not run here, of which it says why."""

import re
import shutil

import pytest

from dqtrain.bench import artifact
from dqtrain.bench.artifact import RUNTIMES, Shape, run


def table(text):
    """Row -> its numbers, of one table."""
    rows = {}
    for name in RUNTIMES:
        found = re.search(rf"^  {re.escape(name)}  +(.*)$", text, re.MULTILINE)
        if found:
            rows[name] = re.findall(r"-?[\d.]+", found[1])
    return rows


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(artifact, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert RUNTIMES["vLLM 4 bit"].missing == "there is no .venv-vllm; `make runtimes` makes it"
    assert RUNTIMES["OpenVINO 2 bit"].missing == "there is no .venv-openvino; `make runtimes` makes it"
    assert RUNTIMES["transformers compiled"].missing == "there is no C++ compiler no-such-compiler; apt-get install g++, or dnf install gcc-c++"
    absent = RUNTIMES["torchao int8 weights"]._replace(packages=("json", "no_such_package"))
    assert absent.missing == "no_such_package is not installed; pip install 'dqtrain[runtimes,bench]'"
    assert RUNTIMES["packed, fast"].missing is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert RUNTIMES["GPU, packed, fast"].missing.endswith(" sees no GPU here")
    monkeypatch.setenv("CXX", "true")
    assert RUNTIMES["transformers compiled"].missing is None


@pytest.mark.slow
def test_rows_are_measured_or_left_out_with_the_reason(monkeypatch, tmp_path, capfd):
    """An environment that is none, and one whose Python ends at once."""
    (tmp_path / ".venv-vllm/bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm/bin/python").symlink_to(shutil.which("false"))
    monkeypatch.setattr(artifact, "ROOT", tmp_path)
    others = ("OpenVINO 2 bit", "vLLM bf16")
    decoder = Shape("gpt2", (1,), 64, 300, ("transformers fp32", "ONNX Runtime 2 bit", *others))
    seq2seq = Shape("bart", (2, 1), 64, 300, ("ONNX Runtime 2 bit",))
    first, second = run((decoder, seq2seq), prompt=4, tokens=4, batches=(2,), rounds=1, threads=1).split("\n\n")
    assert first.startswith("GPT-2 of 1 layers, width 64, vocabulary 300, 2-2-8, random; 1 threads, torch 2")
    assert second.startswith("BART of 2 and 1 layers, width 64")
    assert table(first).keys() == {"transformers fp32", "ONNX Runtime 2 bit"} and table(second).keys() == {"ONNX Runtime 2 bit"}
    size, load, peak, read, *_ = map(float, table(first)["transformers fp32"])
    assert size == round(4 * (300 * 64 + 1024 * 64 + 12 * 64**2 + 13 * 64 + 2 * 64) / 1e6, 1)  # words, positions, a layer, norms
    assert min(load, read) > 0 and peak >= 0
    assert "OpenVINO 2 bit is left out: there is no .venv-openvino; `make runtimes` makes it." in first
    assert "vLLM bf16 is left out: its process ended with exit code 1; what it said is above." in first
