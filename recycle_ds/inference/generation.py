"""The result of a generation: tokens, counts and timings."""

from __future__ import annotations

from dataclasses import dataclass, field

from recycle_ds.inference.speculation.stopping import FinishReason

Logprobs = tuple[tuple[float, tuple[tuple[int, float], ...]], ...]
"""Of each token: its log probability, and the most likely token ids with theirs."""


@dataclass(frozen=True)
class Generation:
    """The outcome of `Decoder.generate`.

    Speeds exclude the prefill, which ends with the first token: `tokens_per_second` is the number of tokens *after the
    first* divided by `decode_seconds`, in every mode (0 for a single token). `tokens_per_full_call` counts all tokens
    and all full calls, including the prefill: exactly 1 for `autoregressive`.
    """

    token_ids: tuple[int, ...]
    """New tokens, including a final end-of-sequence token and the tokens that completed a stop string."""
    recycled: tuple[bool, ...]
    """Per token: whether the recycle module produced it (an accepted draft, or an unverified token of `alternate`)."""
    finish_reason: FinishReason
    prompt_tokens: int
    full_calls: int
    """Calls of the backbone, including the prefill."""
    module_calls: int
    """Calls of the recycle module, including the one over the prompt."""
    drafted: tuple[int, ...]
    """Draft tokens proposed by the module, by draft position (`alternate` keeps them all, `verified` verifies them); of a tree,
    the depths at which any were verified."""
    tested: tuple[int, ...]
    """`verified`: drafts verified, by position: those whose predecessors were all accepted; drafts of a tree at one depth count
    once."""
    accepted: tuple[int, ...]
    """`verified`: drafts accepted, by position."""
    prefill_seconds: float
    """From the start to the first token; in the modes with drafts, including the module's pass over the prompt."""
    decode_seconds: float
    """From the first token to the last."""
    logprobs: Logprobs = ()
    """Per token, if asked for: its log probability, and the most likely token ids with theirs."""
    prompt_logprobs: Logprobs = ()
    """The same for the tokens of the prompt after the first one, which nothing predicts."""

    @property
    def acceptance(self) -> list[float]:
        """Acceptance rate by draft position, given that all earlier drafts were accepted. Omits positions never verified."""
        return [accepted / tested for accepted, tested in zip(self.accepted, self.tested, strict=True) if tested]

    @property
    def tokens_per_full_call(self) -> float:
        """New tokens per call of the backbone."""
        return len(self.token_ids) / self.full_calls if self.full_calls else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, per second of decoding."""
        return (len(self.token_ids) - 1) / self.decode_seconds if len(self.token_ids) > 1 else 0.0

    def figures(self) -> dict[str, object]:
        """All figures without the tokens, for JSON."""
        return {
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "recycled_tokens": sum(self.recycled),
            "full_calls": self.full_calls,
            "module_calls": self.module_calls,
            "tokens_per_full_call": self.tokens_per_full_call,
            "drafted": list(self.drafted),
            "tested": list(self.tested),
            "accepted": list(self.accepted),
            "acceptance": self.acceptance,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass
class Tally:
    """Counts by draft position. The lists grow to the longest draft seen."""

    drafted: list[int] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, drafted: int, tested: int, accepted: int) -> None:
        """Adds one cycle: increments the first `drafted`, `tested` and `accepted` positions."""
        for counts, number in ((self.drafted, drafted), (self.tested, tested), (self.accepted, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(number):
                counts[position] += 1


class DecodingInterrupted(KeyboardInterrupt):
    """Ctrl-C during decoding: a KeyboardInterrupt that carries the partial result."""

    def __init__(self, generation: Generation) -> None:
        super().__init__("decoding was interrupted")
        self.generation = generation
