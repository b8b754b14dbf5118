"""Decoding parameters and their checks. Imports no torch, so that invalid options are reported immediately."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from operator import index
from typing import Any

from recycle_ds.inference.errors import DecodingError

MODES = ("autoregressive", "alternate", "verified")
DTYPES = ("fp32", "bf16", "int8")
# Below this, logits divided by the temperature may overflow fp32.
MIN_TEMPERATURE = 1e-4
# Largest bias or penalty: fp32 holds the changed logits, whatever temperature they are divided by.
_LARGEST = 1e6
_MOST = 2**31 - 1
# Limits with which the likeliest token is mostly the one that is taken.
_SMALL_TOP_P, _LARGE_MIN_P = 0.4, 0.5
SEED_LIMIT = 2**63
MAX_LOGPROBS = 100
MOST_ANSWERS = 16_384
# Threads for each core of the host: beyond that they wait for one another, and thousands end the process.
_MOST_THREADS = 8
_WHOLE_NUMBERS = ("top_k", "seed", "min_new_tokens", "logprobs", "max_new_tokens", "draft_tokens", "n")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_TOKENS = ("allowed_tokens", "bad_tokens", "stop_tokens")
_SWITCHES = ("prompt_logprobs", "ignore_eos")
_OPTIONAL = ("seed", "logprobs", "draft_tokens", "allowed_tokens")
"""May be None."""


@dataclass(frozen=True)
class TokenSampling:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature: 0 takes the most likely token; otherwise logits are divided by it. top_k: keep the k most likely
    tokens; 0 keeps all. top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps
    all. min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all. repetition_penalty:
    divides positive logits (multiplies negative ones) of tokens in prompt and output; 1 disables it. seed: makes
    sampling reproducible; None draws a new seed for every generation. presence_penalty: subtracted from the logits of
    tokens that are in the output; 0 disables it. frequency_penalty: subtracted from the logits of tokens for every time
    they are in the output; 0 disables it. logit_bias: pairs of token id and number to add to its logit (a dict is
    accepted). allowed_tokens: ids that may be chosen; None allows all. bad_tokens: ids that are never chosen.
    min_new_tokens: within so many new tokens no end of sequence is chosen, and no stop string ends the text. logprobs: None
    reports no log probabilities; n reports those of the chosen token and of the n most likely ones. They are the model's own,
    before any of the parameters above. prompt_logprobs: also reports those of the prompt's tokens; its known prefix is then
    read again.

    The order is: repetition, presence and frequency penalty, bias, forbidden tokens, temperature, top-k, top-p, min-p.
    A chain of drafts of the recycle module is chosen by the same rules, and a tree without top-k, top-p and min-p.
    Raises DecodingError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    bad_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= _LARGEST:
            raise DecodingError(
                f"temperature={self.temperature}: must be 0 (greedy), or from {MIN_TEMPERATURE:g} to {_LARGEST:g}"
            )
        if not 0 <= self.top_k <= _MOST:
            raise DecodingError(f"top_k={self.top_k}: must be from 0 (keep all tokens) to {_MOST}")
        if not 0 < self.top_p <= 1:
            raise DecodingError(f"top_p={self.top_p}: must be above 0 and at most 1 (keep all tokens)")
        if not 0 <= self.min_p <= 1:
            raise DecodingError(f"min_p={self.min_p}: must be from 0 (keep all tokens) to 1")
        if not 1 / _LARGEST <= self.repetition_penalty <= _LARGEST:
            raise DecodingError(
                f"repetition_penalty={self.repetition_penalty}: must be from {1 / _LARGEST:g} to {_LARGEST:g}; 1 disables it"
            )
        if self.seed is not None and not 0 <= self.seed < SEED_LIMIT:
            raise DecodingError(f"seed={self.seed}: must be from 0 to 2^63 - 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= _LARGEST:
                raise DecodingError(
                    f"{name}={getattr(self, name)}: must be from {-_LARGEST:g} to {_LARGEST:g}; 0 disables it"
                )
        bias = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        try:
            pairs = tuple((index(token), float(value)) for token, value in bias)
            object.__setattr__(self, "logit_bias", pairs)
        except (TypeError, ValueError):
            raise DecodingError(
                f"logit_bias={self.logit_bias!r}: must be pairs of token id and number, such as {{42: -1.5}}"
            ) from None
        for token, value in self.logit_bias:
            if not abs(value) <= _LARGEST:
                raise DecodingError(
                    f"logit_bias={value} for token {token}: must be from {-_LARGEST:g} to {_LARGEST:g}; bad_tokens forbids a "
                    "token"
                )
        if self.allowed_tokens is not None and not set(self.allowed_tokens) - set(self.bad_tokens):
            raise DecodingError("allowed_tokens: none is left to choose; allow at least one that is not in bad_tokens")
        if not 0 <= self.min_new_tokens <= _MOST:
            raise DecodingError(f"min_new_tokens={self.min_new_tokens}: must be from 0 to {_MOST}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise DecodingError(f"logprobs={self.logprobs}: must be from 0 (the chosen token only) to {MAX_LOGPROBS}")
        negative = next(((name, token) for name, token in self.named_tokens if token < 0), None)
        if negative is not None:
            raise DecodingError(f"{negative[0]}: the token id {negative[1]} must be 0 or more")
        if self.prompt_logprobs and self.logprobs is None:
            raise DecodingError("prompt_logprobs: needs logprobs, the number of most likely tokens; 0 for none of them")

    def _check_types(self) -> None:
        """Raises DecodingError for a value of another type than its field, which would fail, or be taken for another, later.
        Numbers of other libraries become Python's, which can be sent to other ranks."""
        for name, value in ((one.name, getattr(self, one.name)) for one in fields(self)):
            if value is None and name in _OPTIONAL:
                continue
            if name in _WHOLE_NUMBERS:
                _check_whole(name, value)
                object.__setattr__(self, name, int(value))
            if name in _NUMBERS:
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise DecodingError(f"{name}={value!r}: must be a number")
                object.__setattr__(self, name, float(value))
            if name in _SWITCHES and not isinstance(value, bool):
                raise DecodingError(f"{name}={value!r}: must be True or False")
            if name in _TOKENS:
                ids = tuple(value) if isinstance(value, Iterable) else (None,)
                if not all(isinstance(one, Integral) and not isinstance(one, bool) for one in ids):
                    raise DecodingError(f"{name}={value!r}: must be a sequence of token ids")
                object.__setattr__(self, name, tuple(int(one) for one in ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature == 0

    @property
    def nearly_greedy(self) -> bool:
        """Whether the most likely token is mostly the one that is taken."""
        few = self.top_k == 1 or self.top_p <= _SMALL_TOP_P or self.min_p >= _LARGE_MIN_P
        return self.greedy or few

    @property
    def penalises(self) -> bool:
        """Whether a penalty makes logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def adjusts(self) -> bool:
        """Whether logits are changed before the temperature."""
        forbids = bool(self.bad_tokens) or self.allowed_tokens is not None or self.min_new_tokens > 0
        return self.penalises or forbids or bool(self.logit_bias)

    @property
    def named_tokens(self) -> tuple[tuple[str, int], ...]:
        """All token ids that the parameters name, each with its field."""
        by_field = {
            "logit_bias": (token for token, _ in self.logit_bias),
            "allowed_tokens": self.allowed_tokens or (),
            "bad_tokens": self.bad_tokens,
        }
        return tuple((name, token) for name, tokens in by_field.items() for token in tokens)


@dataclass(frozen=True)
class SamplingParams(TokenSampling):
    """All parameters of a request. The defaults are greedy decoding of at most 128 tokens.

    max_new_tokens: maximum number of new tokens. stop: stop strings; the text is cut before the first one found.
    stop_tokens: ids that end the text, besides the model's end of sequence. ignore_eos: the model's own end of sequence
    does not end the text. n: number of independent answers; the i-th one is sampled with seed + i. draft_tokens: draft
    tokens per full call; None means 1 in `alternate` and adaptive in `verified`. The other fields are those of
    `TokenSampling`.

    Raises DecodingError for a value outside its range.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    draft_tokens: int | None = None
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise DecodingError(
                f"min_new_tokens={self.min_new_tokens}: must be at most max_new_tokens ({self.max_new_tokens})"
            )
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise DecodingError(f"draft_tokens={self.draft_tokens}: must be 0 (no drafts) or more")
        if isinstance(self.stop, str):
            raise DecodingError(f"stop={self.stop!r}: must be a sequence of strings; write ({self.stop!r},)")
        if not isinstance(self.stop, Iterable) or not all(isinstance(one, str) for one in self.stop):
            raise DecodingError(f"stop={self.stop!r}: must be a sequence of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_stop_strings(self.stop)
        if self.n > MOST_ANSWERS:
            raise DecodingError(f"n={self.n}: must be at most {MOST_ANSWERS}; ask for the others with another seed")
        if self.n < 1:
            raise DecodingError(f"n={self.n}: must be at least 1")

    @property
    def named_tokens(self) -> tuple[tuple[str, int], ...]:
        """See `TokenSampling`, and the stop tokens."""
        return (*super().named_tokens, *(("stop_tokens", token) for token in self.stop_tokens))

    @property
    def token_sampling(self) -> TokenSampling:
        """The part that decides single tokens."""
        return TokenSampling(**{name.name: getattr(self, name.name) for name in fields(TokenSampling)})


def token_ids(ids: Any) -> list[int]:
    """A prompt as Python's numbers. Raises DecodingError for what is not a sequence of token ids."""
    try:
        if isinstance(ids, str | bytes | dict):
            raise TypeError
        # tensors and arrays have this; their elements are no numbers, or not Python's
        found = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        if any(isinstance(one, bool) or not isinstance(one, Integral) for one in found):
            raise TypeError
    except TypeError:
        raise DecodingError(
            f"prompt_ids={str(ids)[:60]}: must be a sequence of token ids, and encoded first if it is a text"
        ) from None
    return [int(one) for one in found]


def check_mode(mode: str) -> None:
    """Raises DecodingError for an unknown decoding mode, naming the valid ones and the nearest."""
    if mode not in MODES:
        near = difflib.get_close_matches(str(mode), MODES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DecodingError(f"mode={mode!r}: must be one of {', '.join(MODES)}{hint}")


def check_logprobs(mode: str, logprobs: int | None) -> None:
    """Raises DecodingError for log probabilities of tokens of which some are not the model's."""
    if mode == "alternate" and logprobs is not None:
        raise DecodingError(
            f"logprobs={logprobs}: the model itself does not score the recycled tokens of mode=alternate; use verified or "
            "autoregressive"
        )


def check_runtime(dtype: str, threads: int | None) -> None:
    """Raises DecodingError for an unsupported dtype, fewer than one thread, or far more than this host can run."""
    if dtype not in DTYPES:
        raise DecodingError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if threads is not None:
        _check_whole("threads", threads)
    if threads is not None and threads < 1:
        raise DecodingError(f"threads={threads}: must be at least 1")
    cores = os.cpu_count() or 1
    if threads is not None and threads > _MOST_THREADS * cores:
        raise DecodingError(
            f"threads={threads}: this host has {cores} cores; use at most {_MOST_THREADS * cores}, best one for each"
        )


def check_batch(max_batch: int, kv_memory_gib: float | None) -> None:
    """Raises DecodingError for a batch or a KV cache without room."""
    _check_whole("max_batch", max_batch)
    if isinstance(kv_memory_gib, bool) or not isinstance(kv_memory_gib, Real | None):
        raise DecodingError(f"kv_memory_gib={kv_memory_gib!r}: must be a number")
    if max_batch < 1:
        raise DecodingError(f"max_batch={max_batch}: must be at least 1")
    if kv_memory_gib is not None and not (math.isfinite(kv_memory_gib) and kv_memory_gib > 0):
        raise DecodingError(f"kv_memory_gib={kv_memory_gib}: must be a number of GiB above 0")


def _check_whole(name: str, value: object) -> None:
    """Raises DecodingError for anything but a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DecodingError(f"{name}={value!r}: must be a whole number")


def check_stop_strings(stop: Sequence[str]) -> None:
    """Raises DecodingError for an empty stop string, which every text contains."""
    if any(not one for one in stop):
        raise DecodingError(f"stop={list(stop)!r}: a stop string must not be empty; leave it out")
