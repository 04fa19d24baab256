"""The errors a person can cause or mend, in one small tree.

    MedllavaError               anything a command reports as one line, without a traceback
    |-- ConfigError             a recipe, a flag or an environment that does not fit
    |-- DataError               an input file or record that cannot be used (names file and line)
    |   |-- ImageTooLarge       a picture beyond the limit of pixels or bytes
    |   `-- PromptTooLong       a conversation that does not fit the model's context
    |-- CheckpointError         a model folder that is incomplete or does not match
    |-- ServiceError            an HTTP service that refuses, is unreachable or answers nonsense
    `-- MissingExtraError       an optional package that a chosen feature needs

Every message says what happened, where, what was expected and what to do next.
Programming mistakes are not in this tree: they keep their traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class MedllavaError(Exception):
    """Base of every error that a person can mend."""


class ConfigError(MedllavaError):
    """A recipe, a flag or an environment variable does not fit."""


class DataError(MedllavaError):
    """An input file or one of its records cannot be used."""


class ImageTooLarge(DataError):
    """A picture has more pixels or bytes than the limit."""


class PromptTooLong(DataError):
    """A conversation, its pictures and the room for an answer do not fit the model's context."""


class CheckpointError(MedllavaError):
    """A model folder is incomplete, damaged or does not match what was asked."""


class ServiceError(MedllavaError):
    """An HTTP service refused, could not be reached or answered nonsense."""


class MissingExtraError(MedllavaError):
    """A feature needs an optional package that is absent or broken."""

    def __init__(self, package: str, extra: str, cause: BaseException | None = None) -> None:
        why = f" ({type(cause).__name__}: {cause})" if cause else ""
        super().__init__(
            f"{package} could not be imported{why}; install it with: pip install 'medllava[{extra}]'"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA, MPS and host memory. torch's class is known by its name, so that this file needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("out of memory", "not enough memory", "can't allocate memory")
    )


def first_line(error: BaseException, most: int = 200) -> str:
    """What a library's error says, cut to its first line, for use within one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def run_cli(main: Callable[[], int]) -> int:
    """Run a command and turn mendable errors into one line on stderr.

    Returns the exit code: the command's own, 1 for a MedllavaError or a full or read-only disk, 130 for Ctrl-C.
    """
    try:
        return main()
    except MedllavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from the last finished step", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: not a fault. Point stdout elsewhere so that exit does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT}:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror}{where}; free some space or choose another --out, then run again",
            file=sys.stderr,
        )
        return 1
