"""Models and data sets by their id on the Hugging Face hub, `hf:NAME@COMMIT`: fetched and checked once where there is a network, found again where there is none.

The files lie in the hub's own cache (HF_HOME). huggingface_hub is imported only where there is such an id: the login node checks in under a second.
"""

import fnmatch
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from dqtrain.config import SPLITS, RunConfig
from dqtrain.errors import ConfigError
from dqtrain.files import DISK_ERRORS, write_text

Kind = Literal["model", "dataset"]

_PREFIX = "hf:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
_WEIGHTS = (("model*.safetensors",), ("pytorch_model*.bin",))
"""Of these the first that a repository has."""


def fetch(path: Path, weights: bool = True) -> Path:
    """The local directory of a hub id, downloaded if it is not there yet, with the weights or without; any other path as it is.

    Every file is held against the hash that the hub has of it in that commit, once; no network is needed from then on. Raises ConfigError for an id without a commit,
    for what the hub does not have, and where it does not answer; OSError for a disk that is full.
    """
    if not _is_id(path):
        return path
    name, commit = _parse(path)
    folder = _find(name, commit)
    known = _read_record(folder) if folder is not None else {}
    has_weights = any(_matches(file, kinds) for file in known for kinds in _WEIGHTS)
    if folder is not None and known and all((folder / file).is_file() for file in known) and (has_weights or not weights):
        return folder

    def choose(files: Collection[str]) -> list[str]:
        chosen = [file for file in files if _matches(file, _SMALL)]
        if weights:
            found = next((own for kinds in _WEIGHTS if (own := [file for file in files if _matches(file, kinds)])), [])
            if not found:
                raise ConfigError(
                    f"{path}: the repository holds neither model*.safetensors nor pytorch_model*.bin, but no other weights can be read. Use another one."
                )
            chosen += found
        return chosen

    return _download(str(path), name, commit, "model", choose, known)


def fetch_data(path: str) -> Path:
    """The local directory of a data set's hub id, all files of which are downloaded if they are not there yet, and checked as by `fetch`; the same errors."""
    name, commit = _parse(path, "dataset")
    return data_directory(path) or _download(path, name, commit, "dataset", list, {})


def fetch_models(config: RunConfig, weights: bool = True) -> None:
    """`fetch` all models that a config names, with their weights or without, and its tokenizer."""
    for path in (config.teacher.path if config.teacher else None, config.student.init_from):
        if path is not None:
            fetch(path, weights)
    if config.data.tokenizer is not None:
        fetch(config.data.tokenizer, weights=False)


def fetch_data_sets(config: RunConfig) -> None:
    """`fetch_data` all data sets that a config names: for a job, which has no network."""
    for source in (source for split in SPLITS for source in config.data.sources(split)):
        if source.path.startswith(_PREFIX) and not Path(source.path.removeprefix(_PREFIX)).is_dir():
            fetch_data(source.path)


def data_directory(path: str) -> Path | None:
    """The local directory of a data set that `fetch_data` has fetched whole; None where it is not there. No network is asked."""
    name, _, commit = path.removeprefix(_PREFIX).partition("@")
    folder = _find(name, commit, "dataset") if _COMMIT.fullmatch(commit) else None
    known = _read_record(folder) if folder is not None else {}
    return folder if folder is not None and known and all((folder / file).is_file() for file in known) else None


def _download(path: str, name: str, commit: str, kind: Kind, choose: Callable[[Collection[str]], list[str]], known: Mapping[str, str]) -> Path:
    """Fetch the chosen files of a repository, and check those that are not `known` to be sound; their folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    print(f"fetching {path}", file=sys.stderr, flush=True)
    try:
        # Of all requests the one that is not made again and again where nobody answers, so that it comes first.
        about: Any = HfApi().repo_info(name, revision=commit, repo_type=kind, files_metadata=True)
        listed = about.siblings or []
        hashes = {entry.rfilename: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id or "" for entry in listed}
        chosen = choose(hashes)
        folder = Path(snapshot_download(name, revision=commit, repo_type=kind, allow_patterns=chosen))
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise _refused(path, error) from None
    for file in sorted(set(chosen) - known.keys()):
        if _hash(folder / file, len(hashes[file])) != hashes[file]:
            (folder / file).resolve().unlink()
            raise ConfigError(f"{path}: {file} is not what the hub has of it ({hashes[file]}), so that it was damaged on its way. It was removed; start again.")
    record = _record(folder)
    record.parent.mkdir(exist_ok=True)
    write_text(record, json.dumps({**known} | {file: hashes[file] for file in chosen}, indent=1) + "\n")
    return folder


def directory(path: Path) -> Path:
    """The local directory of a hub id that was fetched before; any other path as it is. No network is asked. Raises ConfigError where it is not there."""
    if not _is_id(path):
        return path
    name, commit = _parse(path)
    folder = _find(name, commit)
    if folder is None:
        raise ConfigError(
            f"{path}: is not in this machine's cache of the hub (HF_HOME). Fetch it where there is a network, by `dqtrain plan` of this config or "
            f"`hf download {name} --revision {commit}`, with the same HF_HOME."
        )
    return folder


def _is_id(path: Path) -> bool:
    return str(path).startswith(_PREFIX)


def _parse(path: Path | str, kind: Kind = "model") -> tuple[str, str]:
    """Name and commit of an id. Raises ConfigError that says what to write instead, for a branch or a tag too, which may move."""
    name, _, revision = str(path).removeprefix(_PREFIX).partition("@")
    if _COMMIT.fullmatch(revision):
        return name, revision

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{path}: names {f'the branch or tag {revision}, which may move' if revision else 'no revision'}, but a run needs a commit"
    try:
        now = HfApi().repo_info(name, revision=revision or None, repo_type=kind).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(path, error) from None
    except HFValidationError as error:
        raise ConfigError(
            f"{path}: {str(error).splitlines()[0].rstrip('.')}. Write {_PREFIX}NAME@COMMIT, such as {_PREFIX}openai-community/gpt2@{40 * '0'}."
        ) from None
    except (HTTPError, OSError):
        raise ConfigError(f"{what}. Write {_PREFIX}{name}@COMMIT, with the 40 digits that the hub shows under `Files`, `History`.") from None
    raise ConfigError(f"{what}. Now it is {now}: write {_PREFIX}{name}@{now}.")


def _find(name: str, commit: str, kind: Kind = "model") -> Path | None:
    """The local directory, without a look at the network; None where the files, of a model the small ones, are not all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        small: dict[str, Any] = {"allow_patterns": list(_SMALL), "ignore_patterns": ["*/*"]} if kind == "model" else {}
        return Path(snapshot_download(name, revision=commit, repo_type=kind, local_files_only=True, **small))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(f"{_PREFIX}{name}@{commit}: {str(error).splitlines()[0].rstrip('.')}. Mend the name.") from None


def _refused(path: Path | str, error: Exception) -> ConfigError:
    """What the hub's answer, or its silence, means for the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub = constants.ENDPOINT
    name, _, revision = str(path).removeprefix(_PREFIX).partition("@")
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{path}: {hub} has {name}, but no revision {revision} of it. Give a commit of its history.")
    if isinstance(error, GatedRepoError):
        return ConfigError(f"{path}: {hub} gives {name} to those alone who accepted its terms. Accept them at {hub}/{name}, and log in by `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(f"{path}: {hub} has no {name}, or keeps it from you. Mend the name; for what is private log in by `hf auth login`.")
    said = next(iter(str(error).strip().splitlines()), "")
    return ConfigError(
        f"{path}: cannot be fetched from {hub} ({type(error).__name__}: {said}). Start again where it can be reached; what is fetched once needs no network."
    )


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file of the repository's own folder is one of these."""
    return "/" not in file and any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def _record(folder: Path) -> Path:
    """Where the hashes of what was checked are: beside the hub's own `snapshots/COMMIT`."""
    return folder.parent.parent / "dqtrain" / f"{folder.name}.json"


def _read_record(folder: Path) -> dict[str, str]:
    """File -> its hash."""
    return json.loads(_record(folder).read_text()) if _record(folder).is_file() else {}


def _hash(file: Path, digits: int) -> str:
    """sha256, or, of 40 digits, the sha1 of a git blob, which the hub has of files that git holds itself."""
    result = hashlib.sha256()
    if digits == 40:
        result = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            result.update(block)
    return result.hexdigest()
