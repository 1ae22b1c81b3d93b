"""What can go wrong, each with its exit code (docs/design.md, "Exit codes").

A message says what is (with the value), what must be, and what to do, in one or two sentences.
Anything that is not a `UserError` is a bug or a crash and keeps its traceback.
"""


class UserError(Exception):
    """A mistake or a condition the user can mend: printed as one message, without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A knob, a path or a combination that cannot run."""

    exit_code = 2


class DataError(UserError):
    """A corpus, tokenizer or token shard that cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or artifact that cannot be written, read or trusted."""

    exit_code = 4


class NumericsError(UserError):
    """The loss or a gradient is not finite."""

    exit_code = 5


class Stopped(BaseException):
    """A signal ended the run where nothing is lost: start it again to continue. No Exception, so that no library swallows it."""

    exit_code = 75


FINAL_CODES = (2, 3, 4, 5)
"""Exit codes of mistakes: starting again changes nothing before they are mended."""
