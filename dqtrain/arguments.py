"""What may be typed: commands, their options and examples. Nothing heavy is imported, so that --help takes well under a second."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from dqtrain.config import BITS_OF_GRID, SPLITS, Export, Target
from dqtrain.plan import GPUS

DESCRIPTION = "Make a generative language model small: joint distillation and quantization-aware training."

EXAMPLES = """examples:
  dqtrain quickstart                                     the whole of it on text that this machine already has
  dqtrain train configs/causal.yaml teacher.path=DIR data.train=FILE.jsonl run.dir=runs/mine --ranks 2
  dqtrain resume runs/mine                               continue after Ctrl-C, a kill or a full disk
  dqtrain inspect MODEL --quant 2-2-8                    what it does to a model, before any training
  dqtrain plan configs/causal.yaml teacher.path=DIR train.micro_batch=2 --nodes 2 --gpus 8 --gpu h100    what a run takes, before it costs a GPU hour
  dqtrain submit configs/causal.yaml --site mysite.yaml --nodes 4 --time 24:00:00 train.micro_batch=1 teacher.path=DIR data.train=FILE.jsonl run.dir=runs/mine
  dqtrain sweep configs/sweeps/example.yaml --here       the same config over a grid of values; as a Slurm array with --site
  dqtrain status runs/mine                               what a run does; logs, stop and resume take the same
  dqtrain eval runs/mine --split validation
  dqtrain export runs/mine --to gguf                     a file for llama.cpp; `dqtrain generate` runs it too
  dqtrain generate runs/mine/artifact/packed "Once upon a time" --compare    what it writes, beside what its teacher does
  dqtrain serve runs/mine/artifact/gguf --port 8080      an existing server's HTTP interface

exit codes: 0 done; 2 config, 3 data, 4 checkpoint or artifact, 5 numerics: mend it first; 75 saved and stopped: start it again
"""


RAW = argparse.RawDescriptionHelpFormatter


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give 1 to 65535")
    return int(text)


def _nodes(text: str) -> tuple[int, int]:
    """`4`, or `2-4`: the fewest and the most."""
    fewest, dash, most = text.partition("-")
    found = _positive(fewest), _positive(most if dash else fewest)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text}: the fewest nodes come first, as in {found[1]}-{found[0]}")
    return found


def _share(text: str) -> tuple[int, int]:
    """`2/8`: the third of eight."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not of the form K/N with K from 0 to N - 1, such as 0/8")
    return int(number), int(count)


Commands = argparse._SubParsersAction


def _command(commands: Commands, name: str, help: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n  {example}", formatter_class=RAW)


def _takes_config(command: argparse.ArgumentParser, help: str = "YAML file") -> None:
    command.add_argument("config", type=Path, help=help)
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")


def _side_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("--site", type=Path, metavar="YAML", help="as a Slurm job on one node, of which `dqtrain status` of the run tells (default: here)")
    command.add_argument("--time", metavar="[D-]H:MM:SS", help="time limit of the job (default: the site's)")


def _runs(commands: Commands) -> None:
    train = _command(
        commands,
        "train",
        "train from a config, or continue the run it names",
        "dqtrain train configs/causal.yaml teacher.path=DIR data.train=a.jsonl --ranks 2",
    )
    _takes_config(train)
    train.add_argument("--ranks", type=int, help="processes to start here (default 1); under torchrun each process is one rank already")
    resume = _command(commands, "resume", "continue a run the way it was started: here, or as a Slurm job", "dqtrain resume runs/mine")
    resume.add_argument("run", type=Path, help="run directory")
    resume.add_argument("--ranks", type=int, help="another number of processes; here alone")
    resume.add_argument("--here", action="store_true", help="on this machine, although it was submitted")
    resume.add_argument("--new-code", action="store_true", help="with the dqtrain that is installed now, instead of the run's own copy of its first submission")
    queue = _command(
        commands,
        "submit",
        "train as a Slurm job, which goes on after time limits, preemptions and lost nodes; what cannot run is refused before it is queued",
        "dqtrain submit configs/causal.yaml --site slurm/sites/example.yaml --nodes 4 --time 24:00:00 train.micro_batch=1 teacher.path=DIR data.train=a.jsonl run.dir=runs/mine",
    )
    _takes_config(queue)
    queue.add_argument("--site", type=Path, required=True, metavar="YAML", help="what this cluster asks of a job; slurm/sites/example.yaml explains it")
    queue.add_argument("--nodes", type=_nodes, default=(1, 1), metavar="N|N-M", help="nodes (default 1); 2-4: as many of 4 as there are, but 2 or more")
    queue.add_argument("--time", metavar="[D-]H:MM:SS", help="time limit of each start (default: the site's); the run goes on after it")
    queue.add_argument("--dry-run", action="store_true", help="print the sbatch command and the script, and touch nothing")
    sweep = _command(
        commands,
        "sweep",
        "train one config over a grid of values, as a Slurm array with each point on one node, or here; a finished point is not run again",
        "dqtrain sweep configs/sweeps/example.yaml --site slurm/sites/example.yaml --time 4:00:00 train.micro_batch=2\n  dqtrain sweep configs/sweeps/example.yaml --here --ranks 2",
    )
    sweep.add_argument(
        "sweep", type=Path, help="YAML file: config, runs and grid; configs/sweeps/example.yaml explains it. Points of more nodes: `dqtrain submit`"
    )
    sweep.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config of all points")
    where = sweep.add_mutually_exclusive_group(required=True)
    where.add_argument("--site", type=Path, metavar="YAML", help="what this cluster asks of a job")
    where.add_argument("--here", action="store_true", help="one after the other on this machine")
    sweep.add_argument("--ranks", type=_positive, help="processes of a point; with --here alone (default 1)")
    sweep.add_argument("--time", metavar="[D-]H:MM:SS", help="time limit of each start of a point (default: the site's); the run goes on after it")
    sweep.add_argument("--dry-run", action="store_true", help="print the points and the batch script, and touch nothing")
    shown = _command(commands, "status", "what runs do, where their time went, when they will be done", "dqtrain status runs/mine")
    shown.add_argument("--watch", action="store_true", help="drawn anew every 2 s, until Ctrl-C")
    shown.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories (default: all in runs/)")
    logs = _command(commands, "logs", "what a run prints", "dqtrain logs -f runs/mine")
    logs.add_argument("run", type=Path, help="run directory")
    logs.add_argument("-f", dest="follow", action="store_true", help="the end of it, and what is added until the run is finished")
    logs.add_argument("--rank", type=int, default=0, help="rank (default 0, which of a run that was not submitted printed to its terminal)")
    stopping = _command(commands, "stop", "let a run save and end, or take it out of the queue", "dqtrain stop runs/mine")
    stopping.add_argument("run", type=Path, help="run directory")


def _corpora(commands: Commands) -> None:
    prepare = _command(
        commands, "prepare", "make the tokenizer and the token shards of a config (train does it too)", "dqtrain prepare configs/quickstart-teacher.yaml"
    )
    _takes_config(prepare)
    prepare.add_argument("--workers", type=_positive, help="processes (default: one for each processor)")
    prepare.add_argument("--part", type=_share, metavar="K/N", help="do every N-th part, from the K-th (from 0): one of N tasks that share the work")
    _side_job(prepare)
    prepare.add_argument("--tasks", type=_positive, default=1, metavar="N", help="with --site: N jobs that share the work (default 1)")
    data = commands.add_parser("data", help="what prepared data holds: info, show, verify", description="Look at prepared data.").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    looks = {
        "info": ("counts, sources, weights, hashes and lengths", "dqtrain data info runs/mine"),
        "show": ("one sample as text, with what is predicted of it in colour", "dqtrain data show runs/mine/shards/train-0123456789ab --sample 7"),
        "verify": ("check every shard against its checksums; exit code 3 names what is damaged", "dqtrain data verify runs/mine/shards"),
    }
    for name, (help, example) in looks.items():
        look = _command(data, name, help, example)
        places = "folder that prepare made; or a folder of several, a run directory or a YAML file" + (" that has one alone" if name == "show" else "")
        look.add_argument("path", type=Path, metavar="DIR", help=places)
        if name == "show":
            look.add_argument("--sample", type=int, default=0, metavar="N", help="its number in the order of the corpus, from 0 (default 0)")
            look.add_argument("--tokens-per-sample", type=_positive, metavar="T", help="the N-th T tokens of packed text, instead of document N")
            look.add_argument("--tokenizer", type=Path, metavar="DIR", help="where the tokenizer is now, if it was moved")
    cache = _command(
        commands,
        "cache-teacher",
        "store what the teacher says about every training sample, once, for a config whose teacher.source is hidden, sampled or top_k",
        "dqtrain cache-teacher configs/mine.yaml --ranks 2",
    )
    _takes_config(cache)
    cache.add_argument("--ranks", type=int, help="processes to start here (default 1); in a job they are the site's ranks_per_node")
    _side_job(cache)
    write = _command(
        commands,
        "synthesize",
        "let the teacher write a training corpus, where there is no data (LLM-QAT's scheme); goes on where it was interrupted",
        "dqtrain synthesize TEACHER corpus.jsonl --documents 10000 --tokens 512",
    )
    write.add_argument("teacher", type=Path, help="causal Hugging Face directory or hub id hf:NAME@COMMIT, or finished unquantized run")
    write.add_argument("out", type=Path, help=".jsonl file")
    write.add_argument("--documents", type=_positive, required=True, help="documents to write")
    write.add_argument("--tokens", type=_positive, default=512, help="longest document (default 512)")
    write.add_argument("--seed", type=int, default=1, help="seed of what is drawn (default 1)")
    write.add_argument("--batch", type=_positive, default=16, help="documents written side by side (default 16)")


def _looks(commands: Commands) -> None:
    evaluate = _command(
        commands,
        "eval",
        "loss and perplexity of runs, model directories or artifacts, one line of JSON each; with --site of runs, as a Slurm array",
        "dqtrain eval MODEL --data test.jsonl\n  dqtrain eval runs/sweep/* --split test --site slurm/sites/example.yaml --time 1:00:00",
    )
    evaluate.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="MODEL",
        help="run directory, Hugging Face directory (also of compressed-tensors), hub id hf:NAME@COMMIT, or packed artifact",
    )
    evaluate.add_argument("--split", choices=SPLITS, default="validation", help="split of the run's data (default validation)")
    evaluate.add_argument(
        "--data", nargs="+", help="corpus files, or builtin:python-stdlib; needed when MODEL is not a run (their token shards are kept in ~/.cache/dqtrain)"
    )
    evaluate.add_argument(
        "--config", type=Path, metavar="YAML", help="take the data and eval blocks of this config; needed for an encoder-decoder that is not a run"
    )
    evaluate.add_argument("--tokens-per-sample", type=_positive, help="tokens per sample (default: the run's, or the model's longest up to 1024)")
    _side_job(evaluate)
    inspect = _command(
        commands,
        "inspect",
        "what a quantization does to a model before training: coverage, bytes, error of every weight, how alike words become",
        "dqtrain inspect MODEL --quant 2-2-8\n"
        "  dqtrain inspect MODEL --quant 2-2-8 --grid dynamic --grid seq --grid lsq   grids side by side\n"
        "  dqtrain inspect MODEL --quant 4-8-16 --grid affine --group-size 128        groups of linears' inputs, float activations\n"
        "  dqtrain inspect MODEL --config configs/causal.yaml --json                  the quant block of a config\n"
        "  dqtrain inspect runs/mine                                                  a quantized run as it was trained",
    )
    inspect.add_argument(
        "model", type=Path, help="Hugging Face directory (a config.json alone gives coverage and bytes), hub id hf:NAME@COMMIT, or finished run"
    )
    how = inspect.add_mutually_exclusive_group()
    how.add_argument(
        "--quant", metavar="W-E-A", help="bits of linears and word embeddings: 1, ternary, 2, 3, 4, 8, or 32, float; of activations: 4, 8, or 16 or 32, float"
    )
    how.add_argument("--config", type=Path, metavar="YAML", help="take the quant block of this config instead")
    inspect.add_argument(
        "--grid", action="append", default=[], help=f"grid of linears and embeddings, may be repeated: {', '.join(BITS_OF_GRID)} (default dynamic)"
    )
    inspect.add_argument("--group-size", type=_positive, help="inputs of linears that share a scale (default: one scale per matrix)")
    inspect.add_argument("--json", action="store_true", help="print the same figures as one JSON object")
    planned = _command(
        commands,
        "plan",
        "memory per GPU, traffic, step time and checkpoints of a config by arithmetic; exit code 2 where it does not fit, with the cheapest plan that does",
        "dqtrain plan configs/causal.yaml teacher.path=DIR train.micro_batch=2 --nodes 2 --gpus 8 --gpu h100\n"
        "  dqtrain plan configs/causal.yaml teacher.path=DIR train.micro_batch=1 zero.student=3 --gpu a100-40 --json",
    )
    _takes_config(planned, "YAML file; of its models config.json is read, and the headers of safetensors files if they are there")
    planned.add_argument("--nodes", type=_positive, default=1, help="nodes (default 1)")
    planned.add_argument("--gpus", type=_positive, default=8, help="GPUs of a node (default 8)")
    planned.add_argument("--gpu", choices=list(GPUS), default="h100", help="their kind (default h100)")
    planned.add_argument("--json", action="store_true", help="print the same figures as one JSON object, in bytes and seconds")
    bench = _command(commands, "bench", "measure on this machine, side by side", "dqtrain bench quantizers")
    bench.add_argument(
        "what",
        choices=["quantizers", "head", "terms", "memory", "checkpoint", "offload", "sharding", "data", "artifact", "export"],
        help="quantizers: speed of a weight's way through one, and the error of every grid; head: a large vocabulary's loss; terms: what each adds to a step; "
        "memory: bytes of real engines beside those of `dqtrain plan` (8 GB, minutes); checkpoint: saving and loading; "
        "offload: memory with optimizer and weights on a disk; "
        "sharding: 1.5 billion parameters on 2 ranks (20 GB of memory and of disk); data: reading samples, beside other libraries, and preparing; "
        "artifact: artifacts beside float models and other runtimes, in size, memory and speed; export: memory of exporting 1.5 billion parameters (13 GB of disk)",
    )


def _artifacts(commands: Commands) -> None:
    export = _command(
        commands,
        "export",
        "write and verify artifacts of a finished run; those of a quantized student are made of the codes of its packed one",
        "dqtrain export runs/mine --to packed,gguf",
    )
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument(
        "--to",
        action="append",
        metavar="TARGET",
        help=f"{', '.join(get_args(Target))}; may be repeated or a list with commas (default: export.targets of the run; else packed, or hf for a float student)",
    )
    export.add_argument(
        "--gguf", choices=get_args(Export.model_fields["gguf"].annotation), help="blocks of ternary weights in a GGUF file (default: the run's)"
    )
    export.add_argument(
        "--compressed-tensors",
        choices=get_args(Export.model_fields["compressed_tensors"].annotation),
        help="program that a directory of compressed-tensors is laid out for (default: the run's)",
    )
    export.add_argument("--hf", choices=get_args(Export.model_fields["hf"].annotation), help="floats of a Hugging Face directory (default: the run's)")
    export.add_argument("--allow-inexact", action="store_true", help="also where a target cannot hold what was trained; by how much is said")
    _side_job(export)
    weights = _command(
        commands,
        "weights",
        "take the whole latent weights out of a checkpoint, as a Hugging Face directory; needs no GPU, and memory for one tensor",
        "dqtrain weights runs/mine weights-at-500 --step 500 --dtype bf16",
    )
    weights.add_argument("run", type=Path, help="run directory, finished or not")
    weights.add_argument("out", type=Path, help="directory to make")
    weights.add_argument("--step", type=int, help="step of the checkpoint (default: the newest sound one)")
    weights.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="what they are stored in (default fp32)")
    generate = _command(
        commands,
        "generate",
        "let a model or artifact continue a prompt, or answer it where its tokenizer has a chat template, greedily",
        'dqtrain generate runs/mine/artifact/packed "def main(" --mode fast\n'
        '  dqtrain generate runs/mine/artifact/gguf "def main(" --compare                        beside what the teacher of runs/mine writes\n'
        '  dqtrain generate runs/mine/artifact/gguf "def main(" --compare runs/mine/artifact/hf   beside what another model writes',
    )
    generate.add_argument(
        "model",
        type=Path,
        help="packed artifact, GGUF file or its folder (llama.cpp runs it), folder of an onnx or openvino target (ONNX Runtime or OpenVINO does), Hugging Face directory "
        "(also of compressed-tensors), hub id hf:NAME@COMMIT or finished run",
    )
    generate.add_argument("prompt", help="text to go on from; for an encoder-decoder the source, in the template of its training")
    generate.add_argument("--tokens", type=_positive, default=40, help="new tokens (default 40)")
    generate.add_argument(
        "--mode",
        choices=["exact", "dense", "fast"],
        help="of a packed artifact: exact, as it was trained (default); dense, float activations; fast, torch's integer kernels, float activations, on the GPU if there is one",
    )
    generate.add_argument(
        "--compare",
        nargs="?",
        const=True,
        type=Path,
        metavar="MODEL",
        help="print it beside what MODEL writes, which is on the left (default: the teacher of the run that the artifact is of)",
    )
    serving = _command(
        commands,
        "serve",
        "hand an artifact to an existing server with an OpenAI-compatible HTTP interface: llama.cpp's, vLLM's or that of transformers",
        "dqtrain serve runs/mine/artifact/gguf --port 8080\n  dqtrain serve runs/mine/artifact/compressed-tensors -- --max-model-len 1024    flags of the server itself",
    )
    serving.usage = "%(prog)s [-h] [--host HOST] [--port PORT] model [-- FLAGS]"
    serving.add_argument("model", type=Path, help="GGUF file or its folder, directory of compressed-tensors, packed artifact, or Hugging Face directory")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    serving.add_argument("--port", type=_port, default=8080, help="port (default 8080)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dqtrain", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RAW)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_runs, _corpora, _looks, _artifacts):
        add(commands)
    quickstart = _command(
        commands, "quickstart", "train a small teacher on Python that is on this machine and compress it to 2-2-8", "dqtrain quickstart --ablate"
    )
    quickstart.add_argument("--ablate", action="store_true", help="also train the student without a teacher, for comparison")
    quickstart.add_argument("--seq2seq", action="store_true", help="an encoder-decoder that says what Python functions do, cut to one decoder layer")
    quickstart.add_argument("--seed", type=int, default=1, help="seed of both runs (default 1); another seed uses another pair of run directories")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; ends the process with a message where they are none. `flags`: what stands behind `--`, for another program."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    flags: list[str] = []
    if words[:1] == ["serve"] and "--" in words:
        words, flags = words[: words.index("--")], words[words.index("--") + 1 :]
    args, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse does not take positionals that follow an option
    args.flags = flags
    return args
