"""Tiny real things: a tokenizer, a corpus, a teacher; and real runs of them through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("shared machine", deadline=None)  # how long an example takes is no property of the code
hypothesis.settings.load_profile("shared machine")


def prepare_one(source, split: str, tokenizer: Path, root: Path, *, pairs=None, samples: str = "packed", **how) -> Path:
    """The folder that `prepare` makes of one source: a path, or a Source."""
    from dqtrain.config import Data
    from dqtrain.data.prepare import prepare

    data = Data(**{"train": (), split: source}, pairs=pairs, samples=samples, tokens_per_sample=None if pairs else 16)
    [folder] = prepare(data, split, tokenizer, root, **how)
    return folder


def kill(*pids: int) -> None:
    """SIGKILL to processes, of which each may end as soon as another one has."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def flip(path: Path, at: int = -5) -> None:
    """Change a bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def of_format(listing: Path, version: int) -> None:
    """Make a list of the files of a folder one of another format, with a hash that fits."""
    from dqtrain.artifact.description import sealed

    listing.write_text(sealed([f'"format": {version}', f'"files": {json.dumps(json.loads(listing.read_text())["files"])}']))


def edit_description(folder: Path, change) -> None:
    """Change what an artifact.json says, and let it say so with a hash that fits."""
    from dqtrain.artifact.description import sealed

    path = folder / "artifact.json"
    content = json.loads(path.read_text())
    del content["xxh3_128"]
    change(content)
    path.write_text(sealed([f'"{key}": {json.dumps(value)}' for key, value in content.items()]))


@pytest.fixture
def web():
    """What serves a folder by HTTP on this machine: folder -> address."""
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def copyfile(self, source, outputfile) -> None:
            with suppress(ConnectionError):  # a client that has seen enough
                super().copyfile(source, outputfile)

    servers = []

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


WORDS = "the a cat dog bird sees finds eats red small old house tree river and then slowly under over".split()


def write_corpus(path: Path, num_lines: int, seed: int) -> Path:
    """A jsonl file of made-up sentences, with enough structure to be learned."""
    import random

    draw = random.Random(seed)
    lines = [" ".join(WORDS[(i * 3 + draw.randrange(4)) % len(WORDS)] for i in range(draw.randrange(8, 30))) for _ in range(num_lines)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with train.jsonl, validation.jsonl, test.jsonl, tokenizer/ and teacher/ (GPT-2 shape: Conv1D, tied head)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dqtrain.config import Source
    from dqtrain.data.prepare import load_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("world")
    for seed, (split, lines) in enumerate({"train": 400, "validation": 30, "test": 30}.items()):
        write_corpus(folder / f"{split}.jsonl", lines, seed)
    train_tokenizer([Source(path=str(folder / "train.jsonl"))], 300, folder / "tokenizer")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, n_positions=32, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1, embd_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder / "teacher")
    load_tokenizer(folder / "tokenizer").save_pretrained(folder / "teacher")
    return folder


def config_text(world: Path, run: Path, **changes: str) -> str:
    """A complete small config; `changes` replace whole blocks."""
    blocks = {
        "run": f"{{dir: {run}, seed: 5}}",
        "teacher": f"{{path: {world / 'teacher'}}}",
        "data": f"{{train: {world}/train.jsonl, validation: {world}/validation.jsonl, test: {world}/test.jsonl, tokens_per_sample: 16, shards: {world}/shards}}",
        "train": "{steps: 8, global_batch: 8, micro_batch: 2, lr: 1.0e-3, scale_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.01}",
        "zero": "{student: 3, teacher: 3}",
        "quant": "{linears: {bits: 2, granularity: per_tensor}, embeddings: {bits: 2, granularity: per_row}, "
        "positions: {bits: 8, granularity: per_row}, activations: {bits: 8}}",
        "distill": "{logits: {weight: 1.0}, contrast: {weight: 0.1, negatives: 4}}",
        "eval": "{every_steps: 4}",
        "checkpoint": "{every_steps: 3}",
        "log": "{every_steps: 2}",
    } | changes
    return "".join(f"{name}: {text}\n" for name, text in blocks.items())


class Run:
    """One run through the command line, in processes of its own."""

    def __init__(self, path: Path, config: Path) -> None:
        self.path, self.config = path, config

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "dqtrain", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**env, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.path.parent / "cache")},
        )

    def dqtrain(self, *arguments: str, timeout_s: float = 300) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def train(self, *overrides: str, ranks: int = 2) -> tuple[int, str]:
        return self.dqtrain("train", str(self.config), *overrides, "--ranks", str(ranks))

    def log(self) -> list[dict]:
        """Log lines without the fields that differ between two equal runs."""
        from dqtrain.metrics import TIMING

        return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in (self.path / "log.jsonl").read_text().splitlines()]

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        """Until the log shows a step."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            log = self.path / "log.jsonl"
            if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines() if line.endswith("}")):
                return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached")

    def rank_pids(self) -> dict[int, int]:
        """rank -> pid of the live processes of this run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
                if str(self.path) in (folder / "cmdline").read_text() and "RANK" in environment:
                    found[int(environment["RANK"])] = int(folder.name)
            except OSError:
                continue
        return found


@pytest.fixture
def make_run(world, tmp_path):
    """Write a config and give its Run."""

    def make(name: str = "run", **changes: str) -> Run:
        config = tmp_path / f"{name}.yaml"
        config.write_text(config_text(world, tmp_path / name, **changes))
        return Run(tmp_path / name, config)

    return make


LETTERS = "a b c d e f g h say :".split()
SPECIAL = {"gpt2": ["<|endoftext|>"], "bart": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Family -> directory of a tokenizer with one id per word: those of SPECIAL and then of LETTERS, in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("tokenizers")
    for family, special in SPECIAL.items():
        ids = {word: number for number, word in enumerate([*special, *LETTERS])}
        unknown = "<unk>" if "<unk>" in ids else special[0]
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        eos = "</s>" if "</s>" in ids else special[0]
        template = {"bart": "<s> $A </s>", "t5": "$A </s>"}.get(family)
        if template:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[(word, ids[word]) for word in ("<s>", "</s>") if word in ids]
            )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token=unknown).save_pretrained(root / family)
    return {family: root / family for family in SPECIAL}
