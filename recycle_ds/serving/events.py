"""What the reader of a stream receives."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.inference.generation import Generation


@dataclass(frozen=True)
class TokenEvent:
    """A new token. recycled: whether the recycle module produced it. logprob, top: its log probability, and the most
    likely tokens with theirs, if the request asked for them. rejected: drafts that verification threw away just before
    this token, if asked for."""

    token_id: int
    recycled: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rejected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New tokens of answer `index`: those of one engine step, or of several if the reader is slower than the engine."""

    index: int
    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class Finished:
    """Answer `index` is complete. cached_tokens: positions of its prompt that were found in the KV cache."""

    index: int
    generation: Generation
    preemptions: int
    cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """No answer of the request will be completed: the engine broke, or the server is shutting down."""

    error: str


Event = Delta | Finished | Failed
