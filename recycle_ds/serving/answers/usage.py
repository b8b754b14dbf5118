"""Usage of a request: tokens and figures of recycling, summed over all its answers, complete or so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from recycle_ds.inference.generation import Generation
from recycle_ds.serving.events import Finished, TokenEvent


@dataclass
class Usage:
    """Counts of a request. Times are in seconds of the server's clock."""

    mode: str
    started: float
    prompt_tokens: int
    """Of each prompt once, however many answers it has."""
    prompt_only: bool = False
    """Whether the prompts were to be scored only: the token that had to be decoded for it does not count."""
    completion_tokens: int = 0
    """All tokens decoded, those that end an answer or complete a stop string included."""
    recycled: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    first_token: float | None = None
    latest_token: float | None = None
    finished: list[Generation] = field(default_factory=list)
    _finished_calls: int = 0
    _finished_full: int = 0  # their tokens that are not recycled

    def add(self, tokens: Iterable[TokenEvent], now: float) -> None:
        """Counts new tokens."""
        for token in () if self.prompt_only else tokens:
            self.completion_tokens += 1
            self.recycled += token.recycled
        if self.first_token is None:
            self.first_token = now
        self.latest_token = now

    def end(self, event: Finished) -> None:
        """Counts a complete answer."""
        self.finished.append(event.generation)
        self._finished_calls += event.generation.full_calls
        self._finished_full += len(event.generation.recycled) - sum(event.generation.recycled)
        self.preemptions += event.preemptions
        if event.index == 0:  # other answers to the same prompt share its blocks: that is no hit of an earlier request
            self.cached_tokens += event.cached_tokens

    @property
    def full_calls(self) -> int:
        """Calls of the full model; of answers that are not complete, those whose token was not recycled."""
        running = self.completion_tokens - self.recycled - self._finished_full
        return self._finished_calls + max(running, 0)

    @property
    def tested(self) -> list[int]:
        """Drafts verified in complete answers, by position."""
        return _summed(one.tested for one in self.finished)

    @property
    def accepted(self) -> list[int]:
        """Drafts accepted in complete answers, by position."""
        return _summed(one.accepted for one in self.finished)

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one, per second, of all answers together."""
        if self.first_token is None or self.latest_token is None or self.latest_token <= self.first_token:
            return 0.0
        if self.completion_tokens < 2:  # of requests for the prompt's log probabilities, which yield no token
            return 0.0
        return (self.completion_tokens - 1) / (self.latest_token - self.first_token)

    def figures(self) -> dict[str, Any]:
        """The usage as OpenAI's clients expect it, with the figures of recycling."""
        drafted = sum(sum(one.drafted) for one in self.finished) if self.mode == "verified" else 0
        accepted, tested = self.accepted, self.tested
        calls = self.full_calls
        first = None if self.first_token is None else self.first_token - self.started
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(accepted),
                "rejected_prediction_tokens": max(drafted - sum(accepted), 0),
            },
            "recycle": {
                "mode": self.mode,
                "full_calls": calls,
                "module_calls": sum(one.module_calls for one in self.finished),
                "recycled_tokens": self.recycled,
                "tokens_per_full_call": round(self.completion_tokens / calls, 4) if calls else 0.0,
                "drafts_verified": tested,
                "drafts_accepted": accepted,
                "acceptance": [round(a / t, 4) for a, t in zip(accepted, tested, strict=True) if t],
                "tokens_per_second": round(self.tokens_per_second, 3),
                "time_to_first_token": None if first is None else round(first, 6),
            },
        }


def _summed(rows: Iterable[tuple[int, ...]]) -> list[int]:
    total: list[int] = []
    for row in rows:
        total += [0] * (len(row) - len(total))
        for position, value in enumerate(row):
            total[position] += value
    return total
