"""The command line. torch is imported after parsing, so that --help takes well under a second."""

import argparse
import glob
import importlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from dqtrain import hub
from dqtrain.config import BITS_OF_GRID, SPLITS, Export, RunConfig, Source, Target, check_ranks, load_config
from dqtrain.errors import FINAL_CODES, CheckpointError, ConfigError, DataError, Stopped, UserError
from dqtrain.files import DISK_ERRORS
from dqtrain.plan import GPUS, cheapest, fastest, plan
from dqtrain.rundir import RunDir, model_directory, start_directory
from dqtrain.signals import stop_at_once, withdraw
from launch import status
from launch.local import run_ranks
from launch.side import submit_side
from launch.site import load_site
from launch.submit import load_launch, new_launch, refuse_live_job, submit
from launch.sweep import Point, load_sweep, points, submit_sweep

DESCRIPTION = "Make a generative language model small: joint distillation and quantization-aware training."

EXAMPLES = """examples:
  dqtrain quickstart                                     the whole of it on text that this machine already has
  dqtrain train configs/causal.yaml teacher.path=DIR data.train=FILE.jsonl run.dir=runs/mine --ranks 2
  dqtrain resume runs/mine                               continue after Ctrl-C, a kill or a full disk
  dqtrain inspect MODEL --quant 2-2-8                    what it does to a model, before any training
  dqtrain plan configs/causal.yaml teacher.path=DIR --nodes 2 --gpus 8 --gpu h100    what a run takes, before it costs a GPU hour
  dqtrain submit configs/causal.yaml --site mysite.yaml --nodes 4 --time 24:00:00 teacher.path=DIR data.train=FILE.jsonl run.dir=runs/mine
  dqtrain sweep configs/sweeps/example.yaml --here       the same config over a grid of values; as a Slurm array with --site
  dqtrain status runs/mine                               what a run does; logs, stop and resume take the same
  dqtrain eval runs/mine --split validation
  dqtrain export runs/mine --to gguf                     a file for llama.cpp; `dqtrain generate` runs it too
  dqtrain generate runs/mine/artifact/packed "Once upon a time"
  dqtrain serve runs/mine/artifact/gguf --port 8080      an existing server's HTTP interface

exit codes: 0 done; 2 config, 3 data, 4 checkpoint or artifact, 5 numerics: mend it first; 75 saved and stopped: start it again
"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of 1 or more")
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


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dqtrain", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help + ".", epilog=f"example:\n  {example}", formatter_class=raw)

    def side_job(command: argparse.ArgumentParser) -> None:
        command.add_argument("--site", type=Path, metavar="YAML", help="as a Slurm job on one node, of which `dqtrain status` of the run tells (default: here)")
        command.add_argument("--time", metavar="[D-]H:MM:SS", help="time limit of the job (default: the site's)")

    train = command(
        "train", "train from a config, or continue the run it names", "dqtrain train configs/causal.yaml teacher.path=DIR data.train=a.jsonl --ranks 2"
    )
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")
    train.add_argument("--ranks", type=int, help="processes to start here (default 1); under torchrun each process is one rank already")
    resume = command("resume", "continue a run the way it was started: here, or as a Slurm job", "dqtrain resume runs/mine")
    resume.add_argument("run", type=Path, help="run directory")
    resume.add_argument("--ranks", type=int, help="another number of processes; here alone")
    resume.add_argument("--here", action="store_true", help="on this machine, although it was submitted")
    resume.add_argument("--new-code", action="store_true", help="with the dqtrain that is installed now, instead of the run's own copy of its first submission")
    queue = command(
        "submit",
        "train as a Slurm job, which goes on after time limits, preemptions and lost nodes; what cannot run is refused before it is queued",
        "dqtrain submit configs/causal.yaml --site slurm/sites/example.yaml --nodes 4 --time 24:00:00 teacher.path=DIR data.train=a.jsonl run.dir=runs/mine",
    )
    queue.add_argument("config", type=Path, help="YAML file")
    queue.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")
    queue.add_argument("--site", type=Path, required=True, metavar="YAML", help="what this cluster asks of a job; slurm/sites/example.yaml explains it")
    queue.add_argument("--nodes", type=_nodes, default=(1, 1), metavar="N|N-M", help="nodes (default 1); 2-4: as many of 4 as there are, but 2 or more")
    queue.add_argument("--time", metavar="[D-]H:MM:SS", help="time limit of each start (default: the site's); the run goes on after it")
    queue.add_argument("--dry-run", action="store_true", help="print the sbatch command and the script, and touch nothing")
    sweep = command(
        "sweep",
        "train one config over a grid of values, as a Slurm array with each point on one node, or here; a finished point is not run again",
        "dqtrain sweep configs/sweeps/example.yaml --site slurm/sites/example.yaml --time 4:00:00\n  dqtrain sweep configs/sweeps/example.yaml --here --ranks 2",
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
    shown = command("status", "what runs do, where their time went, when they will be done", "dqtrain status runs/mine")
    shown.add_argument("--watch", action="store_true", help="drawn anew every 2 s, until Ctrl-C")
    shown.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories (default: all in runs/)")
    logs = command("logs", "what a run prints", "dqtrain logs -f runs/mine")
    logs.add_argument("run", type=Path, help="run directory")
    logs.add_argument("-f", dest="follow", action="store_true", help="the end of it, and what is added until the run is finished")
    logs.add_argument("--rank", type=int, default=0, help="rank (default 0)")
    stopping = command("stop", "let a run save and end, or take it out of the queue", "dqtrain stop runs/mine")
    stopping.add_argument("run", type=Path, help="run directory")
    prepare = command("prepare", "make the tokenizer and the token shards of a config (train does it too)", "dqtrain prepare configs/quickstart-teacher.yaml")
    prepare.add_argument("config", type=Path, help="YAML file")
    prepare.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")
    prepare.add_argument("--workers", type=_positive, help="processes (default: one for each processor)")
    prepare.add_argument("--part", type=_share, metavar="K/N", help="do every N-th part, from the K-th (from 0): one of N tasks that share the work")
    side_job(prepare)
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
        look = data.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n  {example}", formatter_class=raw)
        look.add_argument("path", type=Path, metavar="DIR", help="folder that prepare made, a folder of several, a run directory, or a YAML file")
        if name == "show":
            look.add_argument("--sample", type=int, default=0, metavar="N", help="its number in the order of the corpus, from 0 (default 0)")
            look.add_argument("--tokens-per-sample", type=_positive, metavar="T", help="the N-th T tokens of packed text, instead of document N")
            look.add_argument("--tokenizer", type=Path, metavar="DIR", help="where the tokenizer is now, if it was moved")
    evaluate = command(
        "eval",
        "loss and perplexity of runs, model directories or artifacts, one line of JSON each; with --site of runs, as a Slurm array",
        "dqtrain eval MODEL --data test.jsonl\n  dqtrain eval runs/sweep/* --split test --site slurm/sites/example.yaml --time 1:00:00",
    )
    evaluate.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="run directory, Hugging Face directory or hub id hf:NAME@COMMIT, or packed artifact"
    )
    evaluate.add_argument("--split", choices=SPLITS, default="validation", help="split of the run's data (default validation)")
    evaluate.add_argument(
        "--data", nargs="+", help="corpus files, or builtin:python-stdlib; needed when MODEL is not a run (their token shards are kept in ~/.cache/dqtrain)"
    )
    evaluate.add_argument(
        "--config", type=Path, metavar="YAML", help="take the data and eval blocks of this config; needed for an encoder-decoder that is not a run"
    )
    evaluate.add_argument("--tokens-per-sample", type=_positive, help="tokens per sample (default: the run's, or the model's longest up to 1024)")
    side_job(evaluate)
    cache = command(
        "cache-teacher",
        "store what the teacher says about every training sample, once, for a config whose teacher.source is hidden, sampled or top_k",
        "dqtrain cache-teacher configs/mine.yaml --ranks 2",
    )
    cache.add_argument("config", type=Path, help="YAML file")
    cache.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")
    cache.add_argument("--ranks", type=int, help="processes to start here (default 1); in a job they are the site's ranks_per_node")
    side_job(cache)
    write = command(
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
    inspect = command(
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
    how.add_argument("--quant", metavar="W-E-A", help="bits of linears, word embeddings and activations: 1, ternary, 2, 3, 4, 8; 32 is float")
    how.add_argument("--config", type=Path, metavar="YAML", help="take the quant block of this config instead")
    inspect.add_argument(
        "--grid", action="append", default=[], help=f"grid of linears and embeddings, may be repeated: {', '.join(BITS_OF_GRID)} (default dynamic)"
    )
    inspect.add_argument("--group-size", type=_positive, help="inputs of linears that share a scale (default: one scale per matrix)")
    inspect.add_argument("--json", action="store_true", help="print the same figures as one JSON object")
    planned = command(
        "plan",
        "memory per GPU, traffic, step time and checkpoints of a config by arithmetic; exit code 2 where it does not fit, with the cheapest plan that does",
        "dqtrain plan configs/causal.yaml teacher.path=DIR --nodes 2 --gpus 8 --gpu h100\n"
        "  dqtrain plan configs/causal.yaml teacher.path=DIR train.micro_batch=1 zero.student=3 --gpu a100-40 --json",
    )
    planned.add_argument("config", type=Path, help="YAML file; of its models config.json is read, and the headers of safetensors files if they are there")
    planned.add_argument("overrides", nargs="*", metavar="a.b=c", help="values put into the config")
    planned.add_argument("--nodes", type=_positive, default=1, help="nodes (default 1)")
    planned.add_argument("--gpus", type=_positive, default=8, help="GPUs of a node (default 8)")
    planned.add_argument("--gpu", choices=list(GPUS), default="h100", help="their kind (default h100)")
    planned.add_argument("--json", action="store_true", help="print the same figures as one JSON object, in bytes and seconds")
    export = command(
        "export",
        "write and verify artifacts of a finished run; all are made of the codes of its packed one",
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
    export.add_argument("--allow-inexact", action="store_true", help="also where a target cannot hold what was trained; by how much is said")
    side_job(export)
    weights = command(
        "weights",
        "take the whole latent weights out of a checkpoint, as a Hugging Face directory; needs no GPU, and memory for one tensor",
        "dqtrain weights runs/mine weights-at-500 --step 500 --dtype bf16",
    )
    weights.add_argument("run", type=Path, help="run directory, finished or not")
    weights.add_argument("out", type=Path, help="directory to make")
    weights.add_argument("--step", type=int, help="step of the checkpoint (default: the newest sound one)")
    weights.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="what they are stored in (default fp32)")
    bench = command("bench", "measure on this machine, side by side", "dqtrain bench quantizers")
    bench.add_argument(
        "what",
        choices=["quantizers", "head", "terms", "memory", "checkpoint", "offload", "sharding", "data", "artifact", "export"],
        help="quantizers: speed of a weight's way through one, and the error of every grid; head: a large vocabulary's loss; terms: what each adds to a step; "
        "memory: bytes of real engines beside those of `dqtrain plan` (8 GB, minutes); checkpoint: saving and loading; "
        "offload: memory with optimizer and weights on a disk; "
        "sharding: 1.5 billion parameters on 2 ranks (20 GB of memory and of disk); data: reading samples, beside other libraries; "
        "artifact: a packed artifact beside float models, in size, memory and speed; export: memory of exporting 1.5 billion parameters (13 GB of disk)",
    )
    generate = command("generate", "let a model or artifact continue a prompt, greedily", 'dqtrain generate runs/mine/artifact/packed "def main(" --mode fast')
    generate.add_argument(
        "model",
        type=Path,
        help="packed artifact, GGUF file or its folder (llama.cpp runs it), folder of an onnx target (ONNX Runtime does), Hugging Face directory "
        "(also of compressed-tensors), hub id hf:NAME@COMMIT or finished run",
    )
    generate.add_argument("prompt", help="text to go on from; for an encoder-decoder the source, in the template of its training")
    generate.add_argument("--tokens", type=_positive, default=40, help="new tokens (default 40)")
    generate.add_argument(
        "--mode",
        choices=["exact", "dense", "fast"],
        help="of a packed artifact: exact, as it was trained (default); dense, float activations; fast, torch's integer kernels for CPUs, float activations",
    )
    generate.add_argument("--compare", type=Path, metavar="MODEL", help="let this model, such as the teacher, write too")
    serving = command(
        "serve",
        "hand an artifact to an existing server with an OpenAI-compatible HTTP interface: llama.cpp's, vLLM's or that of transformers",
        "dqtrain serve runs/mine/artifact/gguf --port 8080\n  dqtrain serve runs/mine/artifact/compressed-tensors -- --max-model-len 1024    flags of the server itself",
    )
    serving.add_argument("model", type=Path, help="GGUF file or its folder, directory of compressed-tensors, packed artifact, or Hugging Face directory")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    serving.add_argument("--port", type=_positive, default=8080, help="port (default 8080)")
    quickstart = command("quickstart", "train a small teacher on Python that is on this machine and compress it to 2-2-8", "dqtrain quickstart --ablate")
    quickstart.add_argument("--ablate", action="store_true", help="also train the student without a teacher, for comparison")
    quickstart.add_argument("--seq2seq", action="store_true", help="an encoder-decoder that says what Python functions do, cut to one decoder layer")
    quickstart.add_argument("--seed", type=int, default=1, help="seed of both runs (default 1); another seed uses another pair of run directories")
    return parser


def _check_paths(config: RunConfig) -> None:
    """Refuse what a look at the file system shows, before torch is imported and ranks are started; of models on the hub the small files are fetched."""
    for split in SPLITS:
        _check_corpora(config.data.sources(split))
    hub.fetch_models(config, weights=False)
    folders = [model_directory(config.teacher.path)] if config.teacher else []
    folders += [start_directory(config.student.init_from)] if config.student.init_from else []
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: no config.json there. Give a Hugging Face model directory, or a finished run.")


def _check_corpora(sources: Sequence[Source]) -> None:
    for source in sources:
        path = source.path.removeprefix("file://")
        if not (path.startswith(("builtin:", "hf:")) or "://" in path or Path(path).exists() or glob.glob(path, recursive=True)):
            known = "files (.txt, .jsonl, .csv, .parquet), globs, addresses, hf:NAME, builtin:python-stdlib or builtin:python-docstrings"
            raise ConfigError(f"data: {source.path} is not a file. Give {known}.")


def train(config: RunConfig, ranks: int | None = None) -> int:
    """Start or continue a run with `ranks` processes on this machine; its exit code."""
    ranks = 1 if ranks is None else ranks
    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; give 1 or more.")
    _check_paths(config)
    check_ranks(config.train, ranks)
    run = RunDir(config.run.dir)
    run.check_claim(config)
    run.refuse_if_owned()
    hub.fetch_models(config)
    withdraw(run.stop)  # it asked an earlier start
    print(f"{'starting' if run.claim(config) == 'start' else 'continuing'} {run.path} on {ranks} rank{'s' if ranks > 1 else ''}", flush=True)
    run.event("launch", ranks=ranks, logged=run.logged_step())
    code = run_ranks([sys.executable, "-m", "dqtrain", "train", str(run.config), "--ranks", str(ranks)], ranks, run)
    if code not in (0, *FINAL_CODES):
        others = f" The other ranks' output is in {run.path}/rank-*.log." if ranks > 1 else ""
        print(f"dqtrain: exit {code}.{others} `dqtrain resume {run.path}` continues.", file=sys.stderr)
    return code


def sweep_here(found: Sequence[Point], ranks: int, dry_run: bool) -> int:
    """Train the points that are not finished one after the other; 75 when one was stopped, else the first exit code that is not 0."""
    waiting = [point for point in found if not point.is_finished]
    for point in waiting:
        check_ranks(point.config.train, ranks)
        point.run.check_claim(point.config)
    if dry_run:
        print("\n".join(["one after the other:", *(f"  {point.run.path}" for point in waiting)]))
        return 0
    codes = []
    for point in waiting:
        codes.append(train(point.config, ranks))
        if codes[-1] == Stopped.exit_code:
            return codes[-1]
    print(f"{len(found) - len(waiting)} of {len(found)} points were finished before, {codes.count(0)} are now.")
    return next((code for code in codes if code), 0)


def _refuse_nothing_to_store(config: RunConfig) -> None:
    if config.teacher is None or config.teacher.source == "online":
        what = "teacher is null" if config.teacher is None else "teacher.source is online"
        raise ConfigError(f"{what}, so that there is nothing to store. Set teacher.source to hidden, sampled or top_k.")


def _submit_side(args: argparse.Namespace) -> str:
    """Check a command and queue it as a side job: what to tell the user."""
    launch = new_launch(load_site(args.site), (1, 1), args.time)
    if args.command in ("prepare", "cache-teacher"):
        config = load_config(args.config, args.overrides)
        run = RunDir(config.run.dir.absolute())
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run.path})})
        options: list[list[str]] = [[]]
        if args.command == "prepare":
            if args.part is not None:
                raise ConfigError("--part is for this machine; give --tasks N, which queues N jobs that share the work.")
            workers = ["--workers", str(args.workers)] if args.workers is not None else []
            options = [[*workers, *(["--part", f"{task}/{args.tasks}"] if args.tasks > 1 else [])] for task in range(args.tasks)]
        if args.command == "cache-teacher":
            _refuse_nothing_to_store(config)
            if args.ranks is not None:
                raise ConfigError("--ranks is for this machine; the ranks of a job are those of the site file, ranks_per_node. Leave it out.")
            run.refuse_if_owned()
            options = [["--ranks", str(launch.site.ranks)]]
        _check_paths(config)
        return submit_side(args.command, [(run, words) for words in options], launch, config)
    runs = [RunDir(path.absolute()) for path in dict.fromkeys([args.run] if args.command == "export" else args.models)]
    for run in runs:
        if not run.config.is_file():
            raise ConfigError(f"{run.path} is no run, in whose directory a job could leave its output. Name runs, or leave out --site.")
        run.load_result()
        hub.fetch_models(run.load_config(), weights=False)
    words = _eval_options(args, runs) if args.command == "eval" else _export_options(args)
    return submit_side(args.command, [(run, words) for run in runs], launch)


def _export_options(args: argparse.Namespace) -> list[str]:
    """The options of `dqtrain export` as they were given. Raises ConfigError for a target that does not exist."""
    _targets(args.to)
    given = [word for target in args.to or () for word in ("--to", target)]
    layouts = [word for name, value in (("--gguf", args.gguf), ("--compressed-tensors", args.compressed_tensors)) if value for word in (name, value)]
    return [*given, *layouts, *(["--allow-inexact"] if args.allow_inexact else [])]


def _targets(to: Sequence[str] | None) -> tuple[str, ...]:
    """The targets that `--to` names, once each. Raises ConfigError for one that does not exist."""
    known, targets = get_args(Target), dict.fromkeys(target for word in to or () for target in word.split(","))
    unknown = next((target for target in targets if target not in known), None)
    if unknown is not None:
        raise ConfigError(f"--to {unknown}: there is no such target; give {', '.join(known)}.")
    return tuple(targets)


def _eval_options(args: argparse.Namespace, runs: Sequence[RunDir]) -> list[str]:
    """The options of `dqtrain eval` as they were given, for a job in this folder. Raises ConfigError for those that name nothing to read."""
    given = [
        word
        for name in ("split", "config", "tokens_per_sample")
        if (value := getattr(args, name)) is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    like = load_config(args.config) if args.config else None
    for run in runs:
        sources = [Source(path=path) for path in args.data] if args.data else (like or run.load_config()).data.sources(args.split)
        if not sources:
            raise ConfigError(f"{run.path}: nothing says what to evaluate on; give --data FILE, or a run whose config has data.{args.split}.")
        _check_corpora(sources)
    return given + (["--data", *args.data] if args.data else [])


def cache_teacher(config: RunConfig, ranks: int | None = None) -> int:
    """Store the teacher's words with `ranks` processes on this machine; the exit code."""
    _refuse_nothing_to_store(config)
    if "RANK" in os.environ:
        stop_at_once()
        from dqtrain.rank import run_rank

        return run_rank(config, "cache-teacher")
    _check_paths(config)
    run = RunDir(config.run.dir)
    run.refuse_if_owned()
    hub.fetch_models(config)
    run.claim(config)
    return run_ranks([sys.executable, "-m", "dqtrain", "cache-teacher", str(run.config)], 1 if ranks is None else ranks, run)


def resume(path: Path, ranks: int | None = None, here: bool = False, new_code: bool = False) -> int:
    """Continue an unfinished run the way it was last started: here with as many ranks, or as a Slurm job."""
    run = RunDir(path)
    config = run.load_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": path})})
    launch = load_launch(run)
    if launch is not None and not here:
        if ranks is not None:
            raise ConfigError(f"--ranks is for this machine, but {path} was submitted to Slurm. Leave it out, or add --here.")
        run = RunDir(path.absolute())
        if not launch.folder.is_dir():
            raise ConfigError(
                f"{launch.folder}, where the run was submitted and relative paths of its config count from, is gone. Make it again, or add --here."
            )
        os.chdir(launch.folder)
        _check_paths(config)
        print(submit(config, launch, run, new_code=new_code))
        return 0
    if new_code:
        raise ConfigError(f"--new-code is for submitted runs; here {path} runs with the code that is installed anyway. Leave it out.")
    if launch is not None and shutil.which("scontrol"):  # elsewhere the owner's heartbeat alone tells whether it runs
        refuse_live_job(launch, run)
    started = [event["ranks"] for event in run.read_events() if event["event"] in ("launch", "start", "resume")]
    return train(config, ranks if ranks is not None else started[-1] if started else 1)


def _show_status(paths: Sequence[Path], is_watched: bool) -> int:
    """Print what each run does, once or until Ctrl-C."""
    found = list(paths) or sorted(file.parent for file in Path("runs").glob("*/run.yaml"))
    if not found:
        raise ConfigError("there are no runs in ./runs. Name run directories.")
    if is_watched:
        status.watch(found)
        return 0
    for path in found:
        print(status.status(path), flush=True)
    return 0


def _main(argv: Sequence[str] | None) -> int:
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
    if args.command == "train":
        config = load_config(args.config, args.overrides)
        if "RANK" in os.environ:
            stop_at_once()  # before the seconds that importing torch takes
            from dqtrain.rank import run_rank

            return run_rank(config)
        return train(config, args.ranks)
    if args.command == "resume":
        return resume(args.run, args.ranks, args.here, args.new_code)
    if args.command == "submit":
        config = load_config(args.config, args.overrides)
        launch = new_launch(load_site(args.site), args.nodes, args.time)
        _check_paths(config)
        print(submit(config, launch, RunDir(config.run.dir.absolute()), args.dry_run))
        return 0
    if args.command == "sweep":
        asked = load_sweep(args.sweep)
        found = points(asked, args.overrides)
        for point in found:
            _check_paths(point.config)
        if args.here:
            if args.time is not None:
                raise ConfigError("--time is for jobs. Leave it out, or give --site instead of --here.")
            return sweep_here(found, args.ranks or 1, args.dry_run)
        if args.ranks is not None:
            raise ConfigError("--ranks is for --here; the ranks of a job are those of the site file, ranks_per_node. Leave it out.")
        print(submit_sweep(found, new_launch(load_site(args.site), (1, 1), args.time), asked.runs, args.dry_run))
        return 0
    if args.command == "status":
        return _show_status(args.runs, args.watch)
    if args.command == "logs":
        status.logs(args.run, args.rank, args.follow)
        return 0
    if args.command == "stop":
        print(status.stop(args.run))
        return 0
    if getattr(args, "time", None) is not None and args.site is None:
        raise ConfigError("--time is for jobs. Leave it out, or give --site.")
    if getattr(args, "tasks", 1) > 1 and args.site is None:
        raise ConfigError("--tasks is for jobs. Leave it out, or give --site; here --workers are processes.")
    if args.command in ("prepare", "eval", "cache-teacher", "export") and args.site is not None:
        print(_submit_side(args))
        return 0
    if args.command == "prepare":
        from dqtrain.build import prepare_data

        config = load_config(args.config, args.overrides)
        _check_paths(config)
        run = RunDir(config.run.dir)
        run.claim(config)
        for split, folders in prepare_data(config, run, _report, args.workers, args.part).items():
            for folder in folders:
                print(f"{split}: {folder}")
        return 0
    if args.command == "data":
        return _look(args)
    if args.command == "quickstart":
        from dqtrain.quickstart import quickstart

        return quickstart(train, args.seed, args.ablate, args.seq2seq)
    if args.command == "eval":
        for path in args.models:
            scores = _evaluate(hub.fetch(path), args.split, args.data, args.tokens_per_sample, args.config)
            print(json.dumps({"model": str(path), **scores} if len(args.models) > 1 else scores), flush=True)
        return 0
    if args.command == "cache-teacher":
        return cache_teacher(load_config(args.config, args.overrides), args.ranks)
    if args.command == "synthesize":
        from dqtrain.metrics import Phase
        from dqtrain.synthesize import synthesize

        synthesize(model_directory(hub.fetch(args.teacher)), args.out, args.documents, args.tokens, args.seed, args.batch, Phase(f"writing {args.out}"))
        return 0
    if args.command == "inspect":
        from dqtrain.inspect import inspect

        return inspect(hub.fetch(args.model), args.quant, args.config, args.grid, args.group_size, args.json)
    if args.command == "bench":
        print(importlib.import_module(f"dqtrain.bench.{args.what}").run())
        return 0
    if args.command == "plan":
        return _plan(load_config(args.config, args.overrides), args.nodes, args.gpus, args.gpu, args.json)
    if args.command == "weights":
        return _weights(RunDir(args.run), args.out, args.step, args.dtype)
    if args.command == "export":
        given = {"gguf": args.gguf, "compressed_tensors": args.compressed_tensors, "allow_inexact": args.allow_inexact or None}
        return _export(RunDir(args.run), args.to, {name: value for name, value in given.items() if value is not None})
    if args.command == "serve":
        from dqtrain.artifact.serve import serve

        return serve(args.model, args.host, args.port, flags)
    return _generate(hub.fetch(args.model), args.prompt, args.tokens, args.mode, args.compare and hub.fetch(args.compare))


def _report(message: str, share: float | None) -> None:
    """Print how far preparing is: a bar that is drawn anew on a terminal, lines elsewhere."""
    if share is not None and sys.stdout.isatty():
        bar = f"[{'=' * int(20 * share):<20}] {share:4.0%} {message}"
        print("\r" + bar[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="" if share < 1 else "\n", flush=True)
    else:
        print(message if share is None else f"{share:4.0%} {message}", flush=True)


def _look(args: argparse.Namespace) -> int:
    """Print what prepared data holds."""
    from dqtrain.data.prepare import INDEX, folders_of
    from dqtrain.data.show import info, prepared_folders, show, verify

    run = RunDir(args.path)
    found: list[tuple[Path, float | None]]
    if args.path.is_file() or run.config.is_file():
        from dqtrain.build import is_encoder_decoder, tokenizer_directory

        config = load_config(args.path) if args.path.is_file() else run.load_config()
        run = RunDir(config.run.dir) if args.path.is_file() else run
        tokenizer, root = tokenizer_directory(config, run), config.data.shards or run.path / "shards"
        found = []
        for split in SPLITS:
            folders = folders_of(config.data, split, tokenizer, root, is_encoder_decoder(config))
            both = list(zip(folders, config.data.sources(split), strict=True))
            found += [(folder, source.weight) for folder, source in both if isinstance(folder, Path) and folder.suffix not in (".bin", ".ds")]
            print("".join(f"not looked at, since it was not prepared here: {folder}\n" for folder, _ in both if folder not in dict(found)), end="")
        missing = [str(folder) for folder, _ in found if not (folder / INDEX).is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(found)} folders are not prepared, first {missing[0]}. Run dqtrain prepare {args.path}.")
    else:
        found = [(folder, None) for folder in prepared_folders(args.path)]
    if args.what == "info":
        print("\n".join(info(folder, weight) for folder, weight in found))
    elif args.what == "verify":
        print(verify([folder for folder, _ in found]))
    else:
        if len(found) > 1:
            raise ConfigError(f"{args.path} has {len(found)} folders of samples. Name one of them: {', '.join(str(folder) for folder, _ in found)}.")
        print(show(found[0][0], args.sample, args.tokens_per_sample, args.tokenizer, sys.stdout.isatty()))
    return 0


def _export(run: RunDir, to: Sequence[str] | None, given: dict[str, Any]) -> int:
    """Write a finished run's artifacts, as its config says but for what is given; prints one JSON object."""
    asked = run.load_config().export.model_copy(update=given)
    if to is not None:
        asked = asked.model_copy(update={"targets": _targets(to)})
    from dqtrain.artifact.export import RUNTIMES, export
    from dqtrain.artifact.load import chosen_checkpoint
    from dqtrain.build import held_out_text

    held_out = held_out_text(run) if RUNTIMES.keys() & set(asked.targets or ()) else None
    print(json.dumps(export(run, chosen_checkpoint(run), asked, held_out), indent=1))
    return 0


def _weights(run: RunDir, out: Path, step: int | None, dtype: str) -> int:
    """Write a checkpoint's weights as a Hugging Face directory."""
    import torch

    from dqtrain import checkpoint

    run.load_config()
    known = run.checkpoint_steps()
    if step is not None and step not in known:
        raise ConfigError(f"{run.checkpoints}: there is no checkpoint of step {step}, but of {', '.join(map(str, known)) or 'none yet'}. Give one of them.")
    folder, messages = (checkpoint.at_step(run.checkpoints, step), []) if step is not None else checkpoint.newest(run.checkpoints)
    if folder is None:
        raise CheckpointError(f"{run.checkpoints}: no checkpoint there yet. `dqtrain resume {run.path}` goes on with the run.")
    for message in messages:
        print(message, file=sys.stderr)
    checkpoint.write_model(folder, run.student, out, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    print(f"{out}: the weights of {folder.name} in {dtype}")
    return 0


def _evaluate(path: Path, split: str, data: Sequence[str] | None, tokens_per_sample: int | None, like: Path | None) -> dict[str, float]:
    """Scores of a run's chosen checkpoint, a model directory or an artifact."""
    from dqtrain.artifact.load import input_device, load_spread
    from dqtrain.build import evaluation_stream, writing_of
    from dqtrain.data.prepare import load_tokenizer
    from dqtrain.evaluate import evaluate
    from dqtrain.models import LanguageModel
    from dqtrain.world import init_world

    world = init_world()
    run = RunDir(path)
    config = load_config(like) if like else run.load_config() if run.config.is_file() else None
    if config is not None and run.config.is_file():
        hub.fetch_models(config, weights=False)  # the tokenizer may be there
    model = load_spread(path)
    world = replace(world, device=input_device(model))
    stream = evaluation_stream(path, model, split, data, tokens_per_sample, config)
    scores = evaluate(LanguageModel(model), stream, 8, world).as_dict()
    if config is not None and config.eval.generation is not None:
        writing = writing_of(config, load_tokenizer(run.student if run.config.is_file() else path), world, False)
        assert writing is not None
        writing = replace(writing, precision="fp32", micro_batch=8)  # as the loss
        writing.corpora[split] = tuple(Source(path=path) for path in data) if data else config.data.sources(split)
        scores |= writing.scores(model, split)
    return scores


def _plan(config: RunConfig, nodes: int, gpus: int, gpu: str, as_json: bool) -> int:
    """Print a plan; raises ConfigError for one that does not fit, or that has fewer micro-batches than ranks."""
    check_ranks(config.train, nodes * gpus)
    hub.fetch_models(config, weights=False)  # the rest is arithmetic
    asked = plan(config, nodes, gpus, gpu)
    best, fitting = fastest(asked), None if asked.fits else cheapest(asked)
    if as_json:
        found = None if fitting is None else {"nodes": fitting.nodes, "gpus_per_node": fitting.gpus, "settings": fitting.settings}
        print(json.dumps(asked.as_dict() | {"fastest_settings": best and best.settings, "cheapest": found}, indent=1))
    else:
        print(asked.table(best))
    if not asked.fits:
        raise ConfigError(asked.refusal(fitting))
    return 0


def _generate(path: Path, prompt: str, tokens: int, mode: str | None, other: Path | None) -> int:
    """Print the prompt and its greedy continuation, as it is written; below it that of another model."""
    for model in (path, other) if other else (path,):
        if other:
            print(f"{model}:")
        file = model if model.suffix == ".gguf" else model / "model.gguf"
        if file.is_file():
            from dqtrain.artifact.llama_cpp import LlamaCpp

            if mode and model == path:
                raise ConfigError(f"--mode is for packed artifacts, but llama.cpp runs {file}. Leave it out.")
            with LlamaCpp(file) as runtime:
                print(runtime.generate(prompt, tokens))
            continue
        if (model / "onnx.json").is_file():
            from dqtrain.artifact.onnx_runtime import OnnxRunner

            if mode and model == path:
                raise ConfigError(f"--mode is for packed artifacts, but ONNX Runtime runs {model}. Leave it out.")
            OnnxRunner(model).generate(prompt, tokens, stream=True)
            continue
        from dqtrain.artifact.load import complete, load_artifact, load_spread

        run = RunDir(model)
        loaded = load_artifact(model, mode) if mode and model == path else load_spread(model)
        complete(loaded, run.student if run.config.is_file() else model, prompt, tokens, stream=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A user's mistake is one message, never a traceback."""
    try:
        return _main(argv)
    except (UserError, Stopped) as error:
        print(f"dqtrain: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `dqtrain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it flushes at its end
        return 141
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"dqtrain: {error.filename}: {error.strerror}. Free space or change the permissions there, then start again.", file=sys.stderr)
        return CheckpointError.exit_code
    except KeyboardInterrupt:
        print("dqtrain: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
