"""Decoding parameters and their checks. Imports no torch, so that invalid options are reported immediately."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from recycle_ds.inference.errors import DecodingError

MODES = ("autoregressive", "alternate", "verified")
DTYPES = ("fp32", "bf16")
# Below this, logits divided by the temperature may overflow fp32.
MIN_TEMPERATURE = 1e-4
_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class TokenSampling:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repetition_penalty: divides positive logits (multiplies negative ones) of tokens in prompt and output; 1 disables it.
    seed: makes sampling reproducible; None draws a new seed for every generation.

    Raises DecodingError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or 0 != self.temperature < MIN_TEMPERATURE:
            raise DecodingError(
                f"temperature={self.temperature}: must be 0 (greedy) or a finite number of at least {MIN_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise DecodingError(f"top_k={self.top_k}: must be 0 (keep all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise DecodingError(f"top_p={self.top_p}: must be above 0 and at most 1 (keep all tokens)")
        if not 0 <= self.min_p <= 1:
            raise DecodingError(f"min_p={self.min_p}: must be from 0 (keep all tokens) to 1")
        if not math.isfinite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise DecodingError(
                f"repetition_penalty={self.repetition_penalty}: must be a finite number above 0; 1 disables it"
            )
        if self.seed is not None and not 0 <= self.seed < _SEED_LIMIT:
            raise DecodingError(f"seed={self.seed}: must be from 0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether a repetition penalty makes logits depend on the tokens so far."""
        return self.repetition_penalty != 1


@dataclass(frozen=True)
class SamplingParams(TokenSampling):
    """All parameters of a request. The defaults are greedy decoding of at most 128 tokens.

    max_new_tokens: maximum number of new tokens. stop: stop strings; the text is cut before the first one found.
    draft_tokens: draft tokens per full call; None means 1 in `alternate` and adaptive in `verified`. The other fields are
    those of `TokenSampling`.

    Raises DecodingError for a value outside its range.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise DecodingError(f"draft_tokens={self.draft_tokens}: must be 0 (no drafts) or more")
        if isinstance(self.stop, str):
            raise DecodingError(f"stop={self.stop!r}: must be a sequence of strings; write ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_stop_strings(self.stop)


def check_mode(mode: str) -> None:
    """Raises DecodingError for an unknown decoding mode, naming the valid ones and the nearest."""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DecodingError(f"mode={mode!r}: must be one of {', '.join(MODES)}{hint}")


def check_runtime(dtype: str, threads: int | None) -> None:
    """Raises DecodingError for an unsupported dtype or fewer than one thread."""
    if dtype not in DTYPES:
        raise DecodingError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise DecodingError(f"threads={threads}: must be at least 1")


def check_stop_strings(stop: Sequence[str]) -> None:
    """Raises DecodingError for an empty stop string, which every text contains."""
    if any(not one for one in stop):
        raise DecodingError(f"stop={list(stop)!r}: a stop string must not be empty; leave it out")
