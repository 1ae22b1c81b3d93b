"""The only file that knows submitit: several commands as one Slurm array. What becomes of them is not its business, since it would ask sacct alone."""

import io
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy
from pathlib import Path

from launch import slurm

# Else its import sets up logging, which closes the handlers of everyone in the process, and with absl's (TensorBoard has it) what stderr was when that was imported.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError


class _Executor(SlurmExecutor):
    """submitit's own looks for srun before it writes as much as a script."""

    @classmethod
    def affinity(cls) -> int:
        return 2


class Array:
    """Commands of equal needs, each of which becomes the batch process of its own task.

    `folder` gets submitit's files and what the tasks print, `flags` are sbatch's (`batch_flags`), `modules` are loaded first, and `python` runs submitit.
    """

    def __init__(self, folder: Path, flags: dict[str, str | None], modules: Sequence[str], python: Path) -> None:
        load = ["type -t module >/dev/null || source /etc/profile", f"module load {shlex.join(modules)} || exit 2"] if modules else []
        self._export = flags["export"] or ""
        # Without srun and by exec, so that the signal before the time limit, which is for the batch process, reaches the command.
        self._executor = _Executor(folder, python=f"exec {shlex.quote(str(python))}")
        self._executor.update_parameters(
            use_srun=False,
            stderr_to_stdout=True,
            setup=[*load, "export PYTHONSAFEPATH=1"],
            wckey=None,
            additional_parameters={flag.replace("-", "_"): True if value is None else value for flag, value in (flags | {"export": "ALL"}).items()},
        )

    def script(self, tasks: int) -> str:
        """What sbatch would be given."""
        # Private names, under a pinned range of versions and a test that compares this with what is submitted.
        shown = copy(self._executor)
        shown.parameters = shown.parameters | ({"map_count": tasks} if tasks > 1 else {})
        return shown._make_submission_file_text(shown._submitit_command_str, "")

    def submit(self, commands: Sequence[Sequence[str]]) -> list[tuple[str, Path]]:
        """Queue them; the id of each one's job, JOB_TASK or of a single one JOB, and the file that it prints to. Raises SlurmError with what sbatch said."""
        try:
            with redirect_stderr(io.StringIO()), _only(slurm.handed_on(self._export)):  # submitit prints what it also raises
                jobs = self._executor.map_array(os.execv, [command[0] for command in commands], commands)
        except (FailedJobError, FailedSubmissionError) as error:
            raise slurm.SlurmError(f"`sbatch` failed: {'; '.join(str(error).strip().splitlines()[-3:])}.") from None
        return [(job.job_id, job.paths.stdout) for job in jobs]


@contextmanager
def _only(variables: Mapping[str, str]) -> Iterator[None]:
    """This process with these variables alone, which sbatch hands on."""
    all_of_them = dict(os.environ)
    for name in all_of_them.keys() - variables.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(all_of_them)
