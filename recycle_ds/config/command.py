"""What every command does with an error: one line for the user's own, exit code 2; no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from recycle_ds.config.errors import RecycleError

if TYPE_CHECKING:
    import typer

USER_ERROR, INTERRUPTED = 2, 130


@contextmanager
def user_errors(*, speak: bool = True, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turns a RecycleError into `error: ...` on stderr and exit code 2, Ctrl-C into 130. `speak` False keeps quiet on stderr;
    `tell` is told the error's text all the same: whoever leaves first may take the others with it, the first rank too."""
    try:
        yield
    except RecycleError as error:
        if tell is not None:
            tell(str(error))
        if speak:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def run_command(
    application: typer.Typer,
    argv: list[str] | None,
    *,
    speak: bool = True,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Runs a typer command so that wrong options and every RecycleError are one line on stderr. Exits the process."""
    import typer

    # typer exports this error but not its base, which every wrong option or value belongs to
    usage_error = cast(type[Exception], typer.BadParameter.__mro__[1])
    with user_errors(speak=speak, tell=tell):
        try:
            code = application(args=argv, standalone_mode=False)
        except usage_error as error:
            message = " ".join(str(cast(Any, error).format_message()).split())
            if tell is not None:
                tell(message)
            if speak:
                print(f"error: {message} (--help lists all options)", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR)
        except typer.Abort:
            sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
