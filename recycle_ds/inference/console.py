"""Terminal output of decoding: streamed text, recycled tokens in colour, a line of figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from recycle_ds.inference.generation import Generation
from recycle_ds.inference.protocol import TextSource
from recycle_ds.inference.speculation.stopping import TextFilter

_RESET = "\x1b[0m"
_COLOURS = {"verified": "\x1b[32m", "alternate": "\x1b[33m"}
_MEANINGS = {"verified": "green: accepted drafts", "alternate": "yellow: recycled tokens, not verified"}


class TokenPrinter:
    """Detokenises tokens, cuts the text before the first stop string, and prints it as it is produced.

    eos_ids: tokens that are not part of the text. out: stream to print to; None only collects the text. colour: whether
    tokens of the recycle module are coloured, by their meaning in `mode`. least: see `TextFilter`.
    """

    def __init__(
        self,
        source: TextSource,
        stop: Sequence[str],
        eos_ids: frozenset[int],
        mode: str,
        out: TextIO | None,
        colour: bool = False,
        least: int = 0,
    ) -> None:
        self._filter = TextFilter(source, stop, least)
        self._eos_ids = eos_ids
        self._out = out
        self._colour_code = _COLOURS.get(mode, "") if colour else ""
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text)

    def feed(self, ids: Sequence[int], recycled: Sequence[bool]) -> None:
        """Prints the text that these tokens complete and no stop string can cut. An `on_tokens` callback of the decoder."""
        pieces: list[tuple[str, int]] = []
        for token_id, is_recycled in zip(ids, recycled, strict=True):
            if token_id in self._eos_ids:
                self._filter.skip()
            else:
                pieces += self._filter.feed(token_id, is_recycled)
        self._print(pieces)

    def finish(self) -> None:
        """Prints the text held back. To be called once, at the end."""
        self._print(self._filter.flush())

    def _print(self, pieces: Sequence[tuple[str, int]]) -> None:
        self._text += [text for text, _ in pieces]
        if self._out is None or not pieces:
            return
        for text, is_recycled in pieces:
            self._out.write(f"{self._colour_code}{text}{_RESET}" if is_recycled and self._colour_code else text)
        self._out.flush()


def wants_colour(out: TextIO) -> bool:
    """Whether `out` is a terminal with colours enabled (see no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def figures_line(generation: Generation, mode: str, coloured: bool = False) -> str:
    """The figures of a generation on one line."""
    parts = [
        f"{mode}: {len(generation.token_ids)} tokens ({generation.finish_reason})",
        f"{generation.tokens_per_second:.1f} tokens/s",
        f"{generation.tokens_per_full_call:.2f} tokens per full call",
    ]
    if generation.acceptance:
        parts.append("acceptance " + " ".join(f"{value:.2f}" for value in generation.acceptance))
    parts.append(f"prefill of {generation.prompt_tokens} tokens {generation.prefill_seconds:.3f} s")
    if coloured and mode in _MEANINGS:
        parts.append(_MEANINGS[mode])
    return " | ".join(parts)


@contextmanager
def private_stdout() -> Iterator[TextIO]:
    """Reserves stdout for the caller: all other output to it, including that of C libraries, is redirected to stderr."""
    sys.stdout.flush()
    saved_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(
            os.dup(saved_fd), "w", encoding=sys.stdout.encoding, errors="backslashreplace", newline=""
        ) as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(saved_fd, 1)
        os.close(saved_fd)
