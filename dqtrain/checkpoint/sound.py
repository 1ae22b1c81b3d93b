"""Which checkpoints can be used: every file is compared with its size and hash in the manifest before anything is read."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dqtrain.checkpoint.index import FORMAT, Index, complete_names, name_of, rank_file
from dqtrain.engine import StudentEngine
from dqtrain.errors import CheckpointError
from dqtrain.files import digest
from dqtrain.world import World, broadcast_object, first_problem

Files = dict[str, tuple[int, str]]
"""File -> (bytes, hash), as a manifest has them."""


def _problem(folder: Path, check: Callable[[Files], str | None]) -> str | None:
    """What `check` says of the files in a checkpoint's manifest, or why that cannot be said. Raises OSError for files that are there but cannot be read now."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"MANIFEST.json has format {manifest['format']}, this dqtrain reads {FORMAT}"
        return check(manifest["files"])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        # No file, no JSON, or JSON of another shape. A disk that fails or forbids is no damage: the checkpoint may be sound, and must not be passed over.
        return f"{type(error).__name__}: {error}"


def _wrong_size(folder: Path, files: Files) -> str | None:
    for name, (size, _) in files.items():
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, the manifest says {size}"
    return None


def _wrong_hash(folder: Path, files: Files, names: Iterable[str]) -> str | None:
    damaged = next((name for name in names if digest(folder / name) != files[name][1]), None)
    return None if damaged is None else f"{damaged} does not have the hash in the manifest"


def problem_with(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing: every size and hash is compared with the manifest."""
    return _problem(folder, lambda files: _wrong_size(folder, files) or _wrong_hash(folder, files, files))


def _newest(root: Path, names: Sequence[str], problem_with: Callable[[Path], str | None]) -> tuple[Path | None, list[str]]:
    passed_over: list[str] = []
    for name in reversed(names):
        problem = problem_with(root / name)
        if problem is None:
            return root / name, passed_over
        passed_over.append(f"{root / name} is damaged ({problem}); the checkpoint before it is used.")
    if passed_over:
        raise CheckpointError(f"{root}: no checkpoint is sound; the newest: {passed_over[0].split('; the checkpoint')[0]}. Start a new run in another run.dir.")
    return None, []


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and one message for each newer one that is passed over.

    Raises CheckpointError when there are checkpoints but none is sound: starting from step 0 would be silent loss.
    """
    return _newest(root, complete_names(root), problem_with)


def agree_on_newest(root: Path, engine: StudentEngine, world: World) -> tuple[Path | None, list[str]]:
    """`newest` for an engine: rank 0 compares sizes, each rank the hashes of what it will read. Collective; every rank gets, or raises, the same.

    After it the folder is the newest of all: damaged ones are renamed to `damaged-...`, so that retention does not count them.
    """
    wanted = [(fragment.name, fragment.start, fragment.numel) for fragment in engine.fragments()]

    def problem_with(folder: Path) -> str | None:
        problem = _problem(folder, lambda files: _wrong_size(folder, files)) if world.rank == 0 else None
        return broadcast_object(problem) or first_problem(_problem(folder, lambda files: _wrong_in_share(folder, files, wanted, world)))

    names = broadcast_object(complete_names(root))
    folder, passed_over = _newest(root, names, problem_with)
    if folder is not None and world.rank == 0:
        for name in (name for name in names if name > folder.name):
            shutil.rmtree(root / f"damaged-{name}", ignore_errors=True)
            (root / name).rename(root / f"damaged-{name}")
    return folder, passed_over


def _wrong_in_share(folder: Path, files: Files, wanted: Iterable[tuple[str, int, int]], world: World) -> str | None:
    """Damage in the files that this rank reads for (name, start, numel); those that nobody reads are shared out."""
    problem = _wrong_hash(folder, files, [name for name in files if not name.startswith("rank-")])
    if problem is not None:
        return problem
    index = Index.read(folder)
    written = {int(name.removeprefix("rank-").removesuffix(".safetensors")) for name in files if name.startswith("rank-")}
    idle = {rank for rank in written - index.holders() if rank % world.world_size == world.rank}
    return _wrong_hash(folder, files, [rank_file(rank) for rank in sorted(index.ranks(wanted) | idle)])


def at_step(root: Path, step: int) -> Path:
    """The checkpoint of a step. Raises CheckpointError if it is missing or damaged."""
    folder = root / name_of(step)
    problem = problem_with(folder)
    if problem is not None:
        others = ", ".join(name for name in complete_names(root) if name != folder.name) or "none"
        raise CheckpointError(f"{folder}: cannot be used ({problem}). Restore it, or use another one; there are: {others}.")
    return folder
