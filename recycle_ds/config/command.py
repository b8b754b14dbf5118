"""How every command ends: a user error or a full disk is one line on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recycle_ds.config.errors import ConfigError, RecycleError

if TYPE_CHECKING:
    import typer

USER_ERROR, INTERRUPTED = 2, 130
# Seconds that the rank which prints an error may be behind the others.
_LEAD = 3.0
# Options whose value is a text, not a name or a number.
_TEXTS = ("--prompt", "--system", "--stop")
# A disk that is full, broken or read-only. Any other OSError that no one handles is a fault of this program.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@contextmanager
def user_errors(*, print_error: bool = True, on_error: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turns a RecycleError into `error: ...` on stderr and exit code 2, Ctrl-C into exit code 130.

    print_error: False prints nothing (of ranks that share an error, one prints it). on_error: called with the error's
    text on every rank: the first rank to exit may take the others down before they can report."""
    try:
        yield
    except RecycleError as error:
        if on_error is not None:
            on_error(str(error))
        tell_torchrun(str(error))
        if print_error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            _let_the_reporter_be_first()
        sys.exit(USER_ERROR)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        # not through on_error: a batch job may find space at its next start
        message = (
            f"{error.filename or 'the output or a file'}: {error.strerror}; free space there, or name another place"
        )
        tell_torchrun(message)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def run_command(
    application: typer.Typer,
    argv: list[str] | None,
    *,
    print_error: bool = True,
    on_error: Callable[[str], None] | None = None,
) -> None:
    """Runs a typer command so that wrong options and every RecycleError are one line on stderr. Exits the process."""
    import typer

    # typer exports this error but not its base, which every wrong option or value belongs to
    usage_error = cast(type[Exception], typer.BadParameter.__mro__[1])
    with user_errors(print_error=print_error, on_error=on_error):
        try:
            _check_empty(sys.argv[1:] if argv is None else argv)
            code = application(args=argv, standalone_mode=False)
            _flush_output()
        except usage_error as error:
            message = " ".join(str(cast(Any, error).format_message()).split())
            message = message.replace("Input should be", "must be").partition(", unable to parse")[0]
            if on_error is not None:
                on_error(message)
            tell_torchrun(message)
            if print_error:
                print(f"error: {message} (--help lists all options)", file=sys.stderr, flush=True)
            else:
                _let_the_reporter_be_first()
            sys.exit(USER_ERROR)
        except typer.Abort:
            sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _check_empty(arguments: Sequence[str]) -> None:
    """Raises ConfigError for an empty argument, which as a path would mean the current folder. Texts may be empty."""
    for before, word in pairwise(("", *arguments)):
        if before == "--":
            return
        name, equals, value = word.partition("=")
        option = name if name.startswith("--") and equals and before not in _TEXTS else before
        if option not in _TEXTS and (not word or (option == name and equals and not value)):
            place = f" of {option}" if option.startswith("-") else f" behind {option}" if option else ""
            raise ConfigError(f"the argument{place} is empty: give a value; if it is a shell variable, set it")


def shown_command(module: str, *arguments: str) -> str:
    """A command line for the user to copy: `module` with the interpreter that runs now, quoted for a shell."""
    python = os.path.relpath(sys.executable)
    below = os.sep in python and not python.startswith(os.pardir)
    words = [python if below else sys.executable, "-m", module, *arguments]
    return " ".join(
        f'"{word}"' if " " in word and not set(word) & set('"\\$`!') else shlex.quote(word) for word in words
    )


def _flush_output() -> None:
    """Writes what is left of the output: its error is reported like any other, not by the interpreter after its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again
        if error.errno == errno.EPIPE:  # `| head`
            sys.exit(1)
        raise


def _let_the_reporter_be_first() -> None:
    """Waits on a rank that prints nothing: torchrun ends all ranks as soon as one exits, also one that is about to print."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        time.sleep(_LEAD)


def tell_torchrun(message: str) -> None:
    """Leaves the error in the file that torchrun reads: its own report, which comes last, then names the cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    details = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):  # torchrun reports the exit code all the same
        Path(file).write_text(json.dumps({"message": details}), encoding="utf-8")
