"""What the worker keeps of an accepted request."""

from __future__ import annotations

from dataclasses import dataclass, field

from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.serving.events import Delta, Event, Finished, TokenEvent
from recycle_ds.serving.streams import Channel


@dataclass(eq=False)
class Request:
    """A request. rejected: whether its events name drafts that verification threw away."""

    channel: Channel
    prompt: list[int]
    params: SamplingParams
    mode: str
    priority: int
    rejected: bool
    sequences: list[Sequence] = field(default_factory=list)
    """Those that have not ended."""
    closed: bool = False
    """Whether its reader gets no further event."""


@dataclass(eq=False)
class Answer:
    """One of a request's answers. sent: new tokens that its reader has got."""

    request: Request
    index: int
    sent: int = 0

    def news(self, sequence: Sequence) -> list[Event]:
        """The events since the last call."""
        count = len(sequence.tokens) - sequence.prompt_tokens
        events: list[Event] = []
        if count > self.sent:
            events.append(Delta(self.index, tuple(_token(sequence, number) for number in range(self.sent, count))))
            self.sent = count
        if sequence.ended_at is not None:
            generation = sequence.generation(sequence.ended_at)
            events.append(Finished(self.index, generation, sequence.preemptions, sequence.reused))
        return events


def _token(sequence: Sequence, number: int) -> TokenEvent:
    """The event of the new token with this number, from 0 on."""
    scored = number < len(sequence.logprobs)
    logprob, top = sequence.logprobs[number] if scored else (None, ())
    rejected = sequence.rejected.get(number, ()) if sequence.rejected is not None else ()
    return TokenEvent(
        sequence.tokens[sequence.prompt_tokens + number], sequence.recycled[number], logprob, top, rejected
    )
