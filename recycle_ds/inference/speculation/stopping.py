"""Stop conditions: end-of-sequence tokens, stop strings, the maximum number of new tokens, the context length.

All are checked token by token, in order, on the kept tokens only. Every decoding mode therefore ends at the same token,
regardless of how many tokens a cycle produces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from recycle_ds.inference.parameters import check_stop_strings
from recycle_ds.inference.protocol import TextSource

FinishReason = Literal["eos", "stop", "length", "context", "interrupted"]


class TextFilter:
    """Streams the text of a growing token sequence, cut before the first stop string.

    Text that may be the start of a stop string is held back until that is ruled out. Each piece carries the tag of the
    token that completed it (a number), so that a caller can tell the tokens' texts apart.

    least: so many tokens complete no stop string, like `min_new_tokens` for tokens that end a text.
    """

    def __init__(self, source: TextSource, stop: Sequence[str] = (), least: int = 0) -> None:
        check_stop_strings(stop)
        self._source = source
        self._stop = tuple(stop)
        self._held: list[tuple[str, int]] = []
        self._left = least  # of these tokens
        self._passed = 0  # characters of the held text that they have completed
        self.stopped = False
        """Whether a stop string has been completed."""

    def feed(self, token_id: int, tag: int = 0) -> list[tuple[str, int]]:
        """Adds a token. Returns the (text, tag) pieces that no stop string can cut any more; empty after a stop."""
        if self.stopped:
            return []
        found = self._take(self._source.feed(token_id), tag, final=False)
        self.skip()
        return found

    def skip(self) -> None:
        """Counts a token that is no part of the text."""
        self._left = max(self._left - 1, 0)

    def flush(self, tag: int = 0) -> list[tuple[str, int]]:
        """Returns the remaining pieces at the end of the sequence; empty after a stop."""
        return [] if self.stopped else self._take(self._source.flush(), tag, final=True)

    def _take(self, text: str, tag: int, final: bool) -> list[tuple[str, int]]:
        if not self._stop:
            return [(text, tag)] if text else []
        if text:
            self._held.append((text, tag))
        held = "".join(piece for piece, _ in self._held)
        if self._left:
            self._passed = len(held)
        # a stop string that is complete before is passed
        starts = [
            at for at in (held.find(stop, max(self._passed - len(stop) + 1, 0)) for stop in self._stop) if at >= 0
        ]
        if starts:
            self.stopped = True
            return self._release(min(starts))
        return self._release(len(held) if final else self._safe_length(held))

    def _safe_length(self, held: str) -> int:
        """Length of the longest prefix of `held` that no stop string completed later can overlap."""
        longest = max(map(len, self._stop)) - 1
        for start in range(max(0, len(held) - longest), len(held)):
            tail = held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return len(held)

    def _release(self, length: int) -> list[tuple[str, int]]:
        """Removes the first `length` characters from the held-back pieces and returns them."""
        self._passed = max(self._passed - length, 0)
        released: list[tuple[str, int]] = []
        while length > 0:
            piece, tag = self._held.pop(0)
            released.append((piece[:length], tag))
            if len(piece) > length:
                self._held.insert(0, (piece[length:], tag))
            length -= len(piece)
        return released


class StopCondition:
    """Decides, token by token, where a generation ends.

    eos_ids: token ids that end it (they are kept). limit: maximum number of new tokens. limit_reason: what set the limit,
    "length" (the requested maximum) or "context" (the room after the prompt). text: filter with the stop strings, None
    without stop strings.
    """

    def __init__(
        self, eos_ids: frozenset[int], limit: int, limit_reason: FinishReason, text: TextFilter | None = None
    ) -> None:
        self._eos_ids = eos_ids
        self._limit_reason = limit_reason
        self._text = text
        self.remaining = limit
        """Tokens that may still be kept."""
        self.reason: FinishReason | None = None
        """Why the generation ended; None before its end."""

    def take(self, ids: Sequence[int]) -> int:
        """Checks the next tokens of the sequence. Returns how many are kept; sets `reason` if one of them is the last."""
        for kept, token_id in enumerate(ids, start=1):
            self.remaining -= 1
            self.reason = self._reason_after(token_id)
            if self.reason is not None:
                return kept
        return len(ids)

    def _reason_after(self, token_id: int) -> FinishReason | None:
        if token_id in self._eos_ids:
            return self._final_reason("eos")
        if self._text is not None:
            self._text.feed(token_id)
            if self._text.stopped:
                return "stop"
        return self._final_reason(self._limit_reason) if self.remaining == 0 else None

    def _final_reason(self, reason: FinishReason) -> FinishReason:
        """`reason`, or "stop" if text still held back by the tokenizer completes a stop string."""
        if self._text is not None:
            self._text.flush()
            if self._text.stopped:
                return "stop"
        return reason
