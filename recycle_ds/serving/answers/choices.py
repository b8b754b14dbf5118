"""Parts of choices in OpenAI's shapes: log probabilities and single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recycle_ds.serving.answers.text import TokenText
from recycle_ds.serving.answers.tokens import TokenNames

_LEAST = -9999.0  # in place of minus infinity, which JSON does not have; as OpenAI's


class ChoiceParts:
    """details: with `tokens`. logprobs: None for none, else how many of the most likely tokens."""

    def __init__(self, names: TokenNames, *, details: bool, logprobs: int | None) -> None:
        self._names, self._details, self._logprobs = names, details, logprobs

    @property
    def by_token(self) -> bool:
        """Whether single tokens are reported."""
        return self._details or self._logprobs is not None

    def details(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        """The `tokens` field, if asked for."""
        if not self._details:
            return {}
        return {
            "tokens": [
                {
                    "id": token.event.token_id,
                    "text": token.text,
                    "source": "recycled" if token.event.recycled else "full",
                    "logprob": finite(token.event.logprob),
                    "rejected": [{"id": one, "text": self._names.name_of(one)} for one in token.event.rejected],
                }
                for token in tokens
            ]
        }

    def old_logprobs(self, tokens: Sequence[TokenText], start: int) -> dict[str, Any] | None:
        """`logprobs` of /v1/completions. start: characters before the answer's text (of an echoed prompt)."""
        if self._logprobs is None:
            return None
        return {
            "tokens": [self._names.name_of(token.event.token_id) for token in tokens],
            "token_logprobs": [finite(token.event.logprob) for token in tokens],
            "top_logprobs": [
                self.by_name(token.event.token_id, token.event.logprob, self._best(token)) for token in tokens
            ],
            "text_offset": [start + token.offset for token in tokens],
        }

    def by_name(
        self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> dict[str, float | None]:
        """The most likely tokens and the chosen one, by name; the likelier of two with the same name."""
        found: dict[str, float | None] = {}
        for one, value in (*top, (token_id, logprob)):
            found.setdefault(self._names.name_of(one), finite(value))
        return found

    def chat_logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        """`logprobs` of /v1/chat/completions."""
        if self._logprobs is None:
            return None
        content = [
            {
                **self._named(token.event.token_id, token.event.logprob),
                "top_logprobs": [self._named(*one) for one in self._best(token)],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _best(self, token: TokenText) -> tuple[tuple[int, float], ...]:
        return token.event.top[: self._logprobs]

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        found = self._names.bytes_of(token_id)
        return {"token": self._names.name_of(token_id), "logprob": finite(logprob), "bytes": list(found)}


def finite(value: float | None) -> float | None:
    """A log probability that JSON can hold."""
    return value if value is None or math.isfinite(value) else _LEAST
