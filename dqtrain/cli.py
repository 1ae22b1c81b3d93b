"""The command line. torch is imported after parsing, so that --help takes well under a second."""

import argparse
import glob
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from dqtrain import hub
from dqtrain.arguments import parse
from dqtrain.config import SPLITS, Export, RunConfig, Source, Target, check_ranks, load_config
from dqtrain.errors import FINAL_CODES, CheckpointError, ConfigError, DataError, Stopped, UserError
from dqtrain.files import DISK_ERRORS
from dqtrain.plan import cheapest, fastest, plan
from dqtrain.rundir import RunDir, model_directory, start_directory
from dqtrain.signals import stop_at_once, withdraw
from launch import status
from launch.local import run_ranks
from launch.side import submit_side
from launch.site import load_site
from launch.submit import load_launch, new_launch, refuse_live_job, submit
from launch.sweep import Point, load_sweep, points, submit_sweep


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
            options = [[*_words(args, "workers"), *(["--part", f"{task}/{args.tasks}"] if args.tasks > 1 else [])] for task in range(args.tasks)]
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
    words = _eval_options(args, runs) if args.command == "eval" else _export_options(args, runs)
    return submit_side(args.command, [(run, words) for run in runs], launch)


def _words(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of these options that were given, as they are typed."""
    return [word for name in names if (value := getattr(args, name)) is not None for word in (f"--{name.replace('_', '-')}", str(value))]


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of `dqtrain export` say instead of a run's config, but the targets."""
    given = {"gguf": args.gguf, "compressed_tensors": args.compressed_tensors, "hf": args.hf, "allow_inexact": args.allow_inexact or None}
    return {name: value for name, value in given.items() if value is not None}


def _export_options(args: argparse.Namespace, runs: Sequence[RunDir]) -> list[str]:
    """The options of `dqtrain export` as they were given. Raises ConfigError for what it would refuse of a run."""
    for run in runs:
        _asked(run, args.to, _given(args))
    given = [word for target in args.to or () for word in ("--to", target)]
    return [*given, *_words(args, "gguf", "compressed_tensors", "hf"), *(["--allow-inexact"] if args.allow_inexact else [])]


def _targets(to: Sequence[str] | None) -> tuple[str, ...]:
    """The targets that `--to` names, once each. Raises ConfigError for one that does not exist."""
    known, targets = get_args(Target), dict.fromkeys(target for word in to or () for target in word.split(","))
    unknown = next((target for target in targets if target not in known), None)
    if unknown is not None:
        raise ConfigError(f"--to {unknown}: there is no such target; give {', '.join(known)}.")
    return tuple(targets)


def _eval_options(args: argparse.Namespace, runs: Sequence[RunDir]) -> list[str]:
    """The options of `dqtrain eval` as they were given, for a job in this folder. Raises ConfigError for those that name nothing to read."""
    like = load_config(args.config) if args.config else None
    for run in runs:
        sources = [Source(path=path) for path in args.data] if args.data else (like or run.load_config()).data.sources(args.split)
        if not sources:
            raise ConfigError(f"{run.path}: nothing says what to evaluate on; give --data FILE, or a run whose config has data.{args.split}.")
        _check_corpora(sources)
    return [*_words(args, "split", "config", "tokens_per_sample"), *(["--data", *args.data] if args.data else [])]


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


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if "RANK" in os.environ:
        stop_at_once()  # before the seconds that importing torch takes
        from dqtrain.rank import run_rank

        return run_rank(config)
    return train(config, args.ranks)


def _submit(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    launch = new_launch(load_site(args.site), args.nodes, args.time)
    _check_paths(config)
    print(submit(config, launch, RunDir(config.run.dir.absolute()), args.dry_run))
    return 0


def _sweep(args: argparse.Namespace) -> int:
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


def _logs(args: argparse.Namespace) -> int:
    status.logs(args.run, args.rank, args.follow)
    return 0


def _stop(args: argparse.Namespace) -> int:
    print(status.stop(args.run))
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from dqtrain.build import prepare_data

    config = load_config(args.config, args.overrides)
    _check_paths(config)
    run = RunDir(config.run.dir)
    run.claim(config)
    for split, folders in prepare_data(config, run, _report, args.workers, args.part).items():
        for folder in folders:
            print(f"{split}: {folder}")
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from dqtrain.quickstart import quickstart

    return quickstart(train, args.seed, args.ablate, args.seq2seq)


def _eval(args: argparse.Namespace) -> int:
    for path in args.models:
        scores = _evaluate(hub.fetch(path), args.split, args.data, args.tokens_per_sample, args.config)
        print(json.dumps({"model": str(path), **scores} if len(args.models) > 1 else scores), flush=True)
    return 0


def _synthesize(args: argparse.Namespace) -> int:
    from dqtrain.metrics import Phase
    from dqtrain.synthesize import synthesize

    synthesize(model_directory(hub.fetch(args.teacher)), args.out, args.documents, args.tokens, args.seed, args.batch, Phase(f"writing {args.out}"))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from dqtrain.inspect import inspect

    return inspect(hub.fetch(args.model), args.quant, args.config, args.grid, args.group_size, args.json)


def _bench(args: argparse.Namespace) -> int:
    print(importlib.import_module(f"dqtrain.bench.{args.what}").run())
    return 0


def _serve(args: argparse.Namespace) -> int:
    from dqtrain.artifact.serve import serve

    return serve(args.model, args.host, args.port, args.flags)


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
    asked = _asked(run, to, given)
    from dqtrain.artifact.export import export
    from dqtrain.artifact.load import chosen_checkpoint
    from dqtrain.build import held_out_text

    held_out = None
    if run.load_config().quant is not None:
        try:
            held_out = held_out_text(run)
        except DataError as error:
            if {*(asked.targets or ())} - {"packed", "hf"}:  # other programs are held to what they say of text
                raise
            print(f"{error}\nWithout it, random words are what the artifact is compared on.", file=sys.stderr)
    print(json.dumps(export(run, chosen_checkpoint(run), asked, held_out), indent=1))
    return 0


def _asked(run: RunDir, to: Sequence[str] | None, given: Mapping[str, Any]) -> Export:
    """What a run's config says of its export, but for what is given. Raises ConfigError for a layout of a target that is not asked for."""
    asked = run.load_config().export.model_copy(update=given)
    if to is not None:
        asked = asked.model_copy(update={"targets": _targets(to)})
    for name, value in given.items():
        target = name.replace("_", "-")
        if target in get_args(Target) and target not in (asked.targets or ()):
            named = ", ".join(asked.targets or ()) or "none by name"
            raise ConfigError(f"--{target} {value}: {target} is not among the targets asked for, {named}. Add it with --to {target}, or leave --{target} out.")
    return asked


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
    from dqtrain.models.language import LanguageModel
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


def _generate(args: argparse.Namespace) -> int:
    """Print the prompt and its greedy continuation, as it is written; or those of two models beside each other, when both are written."""
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not UTF-8. Give it in that encoding.") from None
    model = hub.fetch(args.model)
    named = _teacher(model) if args.compare is True else args.compare
    other = named and hub.fetch(named)
    from dqtrain.artifact.generate import generate, side_by_side

    if other is None:
        generate(model, args.prompt, args.tokens, args.mode, stream=True)
        return 0
    written = generate(model, args.prompt, args.tokens, args.mode, alone=True)
    texts = generate(other, args.prompt, args.tokens, alone=True), written
    headings = (f"teacher: {named}", f"student: {args.model}") if args.compare is True else (str(named), str(args.model))
    print(f"{args.prompt}\n\n{side_by_side(headings, texts, shutil.get_terminal_size().columns)}")
    return 0


def _teacher(path: Path) -> Path:
    """The teacher of the run that an artifact lies in, or that this is. Raises ConfigError where there is no such run, or no such teacher."""
    folder = path.absolute()
    found = [folder, *(parent.parent for parent in folder.parents if parent.name == "artifact")]
    run = next((run for run in map(RunDir, found) if run.config.is_file()), None)
    if run is None:
        raise ConfigError(
            f"--compare: {path} is neither a run nor in RUN/artifact, so that nothing tells its teacher ({found[-1]}/run.yaml is not there). "
            "Name the model to compare with: --compare MODEL."
        )
    teacher = run.load_config().teacher
    if teacher is None:
        raise ConfigError(f"--compare: {run.config} names no teacher (teacher: null). Name the model to compare with: --compare MODEL.")
    if not (str(teacher.path).startswith("hf:") or teacher.path.is_dir()):
        raise ConfigError(
            f"--compare: {teacher.path}, the teacher.path of {run.config}, is not there; a relative path counts from this folder. Name where it is now: --compare MODEL."
        )
    return teacher.path


SIDE_JOBS = ("prepare", "eval", "cache-teacher", "export")
"""Commands that are Slurm jobs where `--site` is given."""

COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "resume": lambda args: resume(args.run, args.ranks, args.here, args.new_code),
    "submit": _submit,
    "sweep": _sweep,
    "status": lambda args: _show_status(args.runs, args.watch),
    "logs": _logs,
    "stop": _stop,
    "prepare": _prepare,
    "data": _look,
    "eval": _eval,
    "cache-teacher": lambda args: cache_teacher(load_config(args.config, args.overrides), args.ranks),
    "synthesize": _synthesize,
    "inspect": _inspect,
    "plan": lambda args: _plan(load_config(args.config, args.overrides), args.nodes, args.gpus, args.gpu, args.json),
    "export": lambda args: _export(RunDir(args.run), args.to, _given(args)),
    "weights": lambda args: _weights(RunDir(args.run), args.out, args.step, args.dtype),
    "bench": _bench,
    "generate": _generate,
    "serve": _serve,
    "quickstart": _quickstart,
}


def _main(argv: Sequence[str] | None) -> int:
    args = parse(argv)
    if args.command in SIDE_JOBS:
        if args.site is not None:
            print(_submit_side(args))
            return 0
        if args.time is not None:
            raise ConfigError("--time is for jobs. Leave it out, or give --site.")
        if getattr(args, "tasks", 1) > 1:
            raise ConfigError("--tasks is for jobs. Leave it out, or give --site; here --workers are processes.")
    return COMMANDS[args.command](args)


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
