"""What every command does with an error: one line for the user's own, exit code 2; no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from recycle_ds.config.errors import RecycleError

USER_ERROR, INTERRUPTED = 2, 130


@contextmanager
def user_errors(*, speak: bool = True) -> Iterator[None]:
    """Turns a RecycleError into `error: ...` on stderr and exit code 2, Ctrl-C into 130. `speak` False keeps quiet."""
    try:
        yield
    except RecycleError as error:
        if speak:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
