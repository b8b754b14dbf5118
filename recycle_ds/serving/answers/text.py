"""Text of an answer while it grows, and of each of its tokens.

The text is that of `inference.answers.text_of`, however the tokens arrive: the same detokeniser and the same filter of
stop strings make it. What is held back is only what may still change: bytes of an incomplete character, and characters
that may become a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recycle_ds.inference.protocol import TextSource
from recycle_ds.inference.speculation.stopping import TextFilter
from recycle_ds.serving.events import TokenEvent


@dataclass(frozen=True)
class TokenText:
    """A token of an answer and the text that it added."""

    event: TokenEvent
    text: str
    """Empty for a token inside a character, for special tokens and for those that end the text."""
    offset: int
    """Characters of the answer before it."""


@dataclass
class _Waiting:
    event: TokenEvent
    owed: int
    """Characters that the detokeniser gave for it."""
    text: str = ""
    """Those that no stop string can cut any more."""

    @property
    def settled(self) -> bool:
        return len(self.text) == self.owed


class AnswerText:
    """Turns tokens into text, and keeps which token added what.

    by_token: the text is released with the tokens that made it, so that both agree in every chunk. Otherwise a token that
    completes one character and begins another releases the first at once.
    """

    def __init__(
        self,
        source: TextSource,
        stop: Sequence[str],
        hidden_ids: frozenset[int],
        *,
        by_token: bool = False,
        least: int = 0,
    ) -> None:
        """hidden_ids: tokens that are no part of the text (those that end it). least: see `TextFilter`."""
        self._source = _Counting(source)
        self._filter = TextFilter(self._source, stop, least)
        self._hidden_ids, self._by_token = hidden_ids, by_token
        self._waiting: deque[_Waiting] = deque()
        self._first = 0  # number of the first waiting token
        self._latest: int | None = None  # number of the latest token that has text
        self._length = 0

    def feed(self, events: Iterable[TokenEvent]) -> tuple[str, list[TokenText]]:
        """Adds tokens. Returns the text that they release, and the tokens whose text is now certain."""
        released: list[str] = []
        for event in events:
            if self._filter.stopped:
                break
            number = self._first + len(self._waiting)
            hidden = event.token_id in self._hidden_ids
            if hidden:
                self._filter.skip()
            pieces = [] if hidden else self._filter.feed(event.token_id, number)
            self._waiting.append(_Waiting(event, 0 if hidden else self._source.latest))
            if not hidden:
                self._latest = number
            self._release(pieces, released)
        return self._result(released, self._take(final=self._filter.stopped))

    def finish(self) -> tuple[str, list[TokenText]]:
        """The rest, at the end of the answer. To be called once."""
        released: list[str] = []
        if not self._filter.stopped:
            number = self._first if self._latest is None else max(self._latest, self._first)
            pieces = self._filter.flush(number)
            if self._waiting and number - self._first < len(self._waiting):
                self._waiting[number - self._first].owed += self._source.latest
            self._release(pieces, released)
        return self._result(released, self._take(final=True))

    def _release(self, pieces: Iterable[tuple[str, int]], released: list[str]) -> None:
        for text, number in pieces:
            released.append(text)
            if 0 <= number - self._first < len(self._waiting):
                self._waiting[number - self._first].text += text

    def _result(self, released: list[str], tokens: list[TokenText]) -> tuple[str, list[TokenText]]:
        return "".join(token.text for token in tokens) if self._by_token else "".join(released), tokens

    def _take(self, final: bool) -> list[TokenText]:
        """Removes the tokens at the front whose text is certain; behind the cut of a stop string, none is kept."""
        waiting = list(self._waiting)
        if final:
            count = len(waiting)
            if self._filter.stopped:  # tokens of the stop string, and any behind it, are no part of the answer
                count = max((n for n, one in enumerate(waiting, start=1) if one.text), default=0)
        else:
            settled = next((n for n, one in enumerate(waiting) if not one.settled), len(waiting))
            # a token without text may be part of a character, or of a stop string: it waits for one with text
            count = max((n for n, one in enumerate(waiting[:settled], start=1) if one.text), default=0)
            if count and count == len(waiting) and self._source.holds_back:
                count -= 1  # its last bytes are not shown yet
        taken = []
        for one in waiting[:count]:
            taken.append(TokenText(one.event, one.text, self._length))
            self._length += len(one.text)
        for _ in range(len(waiting) if final else count):
            self._waiting.popleft()
            self._first += 1
        return taken


class _Counting:
    """A detokeniser that remembers how much text its last call gave."""

    def __init__(self, source: TextSource) -> None:
        self._source = source
        self.latest = 0

    def feed(self, token_id: int) -> str:
        text = self._source.feed(token_id)
        self.latest = len(text)
        return text

    def flush(self) -> str:
        text = self._source.flush()
        self.latest = len(text)
        return text

    @property
    def holds_back(self) -> bool:
        """Whether bytes of an incomplete character are held back."""
        return bool(getattr(self._source, "holds_back", False))
