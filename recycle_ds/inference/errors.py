"""Errors of decoding that a person at the terminal can cause, and what is left of a generation that was interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recycle_ds.config import RecycleError

if TYPE_CHECKING:
    from recycle_ds.inference.generation import Generation


class DecodingError(RecycleError):
    """A request that cannot be decoded as written. One line: the value, the limit and the fix."""


class DecodingInterrupted(KeyboardInterrupt):
    """Ctrl-C during decoding. It behaves like any KeyboardInterrupt and carries what had been produced by then."""

    def __init__(self, generation: Generation) -> None:
        super().__init__("decoding was interrupted")
        self.generation = generation
