"""Types and constants for tests that run the command in their own process."""

from __future__ import annotations

from collections.abc import Callable

PROMPT = "abcd efgh"


class Outcome:
    """Exit code, stdout and stderr of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Generate = Callable[..., Outcome]
