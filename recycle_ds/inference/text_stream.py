"""Incremental detokenisation: the text of a growing sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from recycle_ds.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8
_MOST_PENDING = 32  # ids that are decoded again with each new one


class TextStream:
    """Decodes a growing sequence of tokens into pieces of text that can be printed immediately.

    The concatenated pieces equal `decode` of all ids. Ids are decoded together with those of the previous piece,
    because decoders treat the first token of their input differently (SentencePiece drops its leading space).

    after: ids of the text that the sequence continues, none of which is returned. Its last character may be incomplete: if the
    sequence completes it, it is returned with the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # ids of the last piece, returned completely
        self._pending: list[int] = []  # ids after those
        self._shown = 0  # characters of the pending ids' text already returned
        self._incomplete = ""  # what the last bytes of `after` look like alone
        if after:
            self._continue(after)

    def feed(self, token_id: int) -> str:
        """Add one id and return the text that it completes; empty inside a multi-byte character."""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""  # as in decode: dropped before its neighbours are decoded
        self._pending.append(token_id)
        text = self._pending_text()
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        # A trailing U+FFFD may be the start of a character. If four tokens did not complete it, it is not (or the text
        # contains U+FFFD), and only as many are held back as could still start another character.
        if len(self._pending) > _LONGEST_CHARACTER:
            held = min(held, _LONGEST_CHARACTER - 1)
        end = len(text) - held
        if end and self._incomplete:
            self._skip_incomplete(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if text and not held:
            self._context, self._pending, self._shown = self._pending, [], 0
        elif len(self._pending) > _MOST_PENDING:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """Return the text held back, at the end of the sequence, and reset the stream."""
        text = self._pending_text()
        self._skip_incomplete(text)
        piece = text[self._shown :]
        self._context, self._pending, self._shown = [], [], 0
        return piece

    def _shorten(self, text: str) -> None:
        """Drops ids from the middle of the pending ones, whose text has been returned: else n bytes that are no characters
        would take n * n steps.

        The first ids stay because a decoder may treat all bytes after an invalid one as invalid (SentencePiece's), the last
        ones because a character may still be completed. text: that of the pending ids.
        """
        head = self._pending[:_LONGEST_CHARACTER]
        before = len(self._decode(self._context))
        kept = len(self._decode(self._context + head)) - before
        for count in range(3 * _LONGEST_CHARACTER, 4 * _LONGEST_CHARACTER):
            pending = head + self._pending[-count:]
            shorter = self._decode(self._context + pending)[before:]
            dropped = len(text) - len(shorter)
            # not so if a character would be cut, or if two of its parts would meet that are no neighbours
            if 0 <= dropped <= self._shown - kept and shorter == text[:kept] + text[kept + dropped :]:
                self._pending, self._shown = pending, self._shown - dropped
                return

    def _continue(self, after: Sequence[int]) -> None:
        """Takes the last ids of a text as context, the bytes of an incomplete character as pending."""
        tail: list[int] = []
        for token_id in reversed(after[-2 * _LONGEST_CHARACTER :]):
            if self._skip and token_id in self._tokenizer.special_ids:
                break  # decoders begin anew behind it, as encoders do
            tail.insert(0, token_id)
        self._context = tail
        while self._context and len(tail) - len(self._context) < _LONGEST_CHARACTER:
            if not self._decode(self._context).endswith(_REPLACEMENT):
                break
            self._pending.insert(0, self._context.pop())
        self._incomplete = self._pending_text() if self._pending else ""

    def _skip_incomplete(self, text: str) -> None:
        """Leaves out the incomplete end of the text before, unless these tokens have completed it."""
        if self._incomplete and text.startswith(self._incomplete):
            self._shown = max(self._shown, len(self._incomplete))
        self._incomplete = ""

    @property
    def holds_back(self) -> bool:
        """Whether `flush` may return text: the latest tokens are not complete, or not known to be."""
        return bool(self._pending)

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
