"""Fields that /v1/completions and /v1/chat/completions share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from recycle_ds.inference.parameters import MODES, SEED_LIMIT
from recycle_ds.serving.protocol.parsing import Body, shown

MAX_LOGPROBS = 20
_MAX_IDS = 8192
_MAX_STOP_STRINGS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_DRAFTS = 32
_MAX_OPTIONS = 64

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# fail_fast: one error for a list, not one for each of a million elements
TokenIds = Annotated[list[TokenId], Field(max_length=_MAX_IDS, fail_fast=True)]


class StreamOptions(Body):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    """A last chunk with the usage of the complete request."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted as false only: streams are not padded."""

    @model_validator(mode="after")
    def _check(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("stream_options.include_obfuscation: not supported: set it to false")
        return self


class GenerationFields(Body):
    """How tokens are chosen and answers are sent. None stands for the default, as in OpenAI's interface."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    """0 keeps the most likely token only."""
    n: int | None = Field(None, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    """A negative one stands for itself plus 2**63."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=_MAX_IDS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    """Accepted and ignored."""
    # extensions, with vLLM's names where it has them
    mode: str | None = None
    draft_tokens: int | None = Field(None, ge=0, le=_MAX_DRAFTS)
    token_details: bool | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    bad_token_ids: TokenIds | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    """Lower runs first, as in vLLM."""

    @model_validator(mode="before")
    @classmethod
    def _check_unions(cls, tree: Any) -> Any:
        """Checks what a union of types would report once for every type."""
        if isinstance(tree, dict):
            _check_stop(tree.get("stop"))
            _check_size("logit_bias", tree.get("logit_bias"), _MAX_IDS)
            _check_size("stream_options", tree.get("stream_options"), _MAX_OPTIONS)
        return tree

    @model_validator(mode="after")
    def _check(self) -> GenerationFields:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode={shown(self.mode)}: must be one of {', '.join(MODES)}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream=true")
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"logit_bias: {shown(key)} is not a token id")
            if not -100 <= value <= 100:
                raise ValueError(f"logit_bias: {value:g} for token {key}: must be from -100 to 100")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the new tokens, and its value if it was given."""
        return "max_tokens", self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """Maximum number of new tokens of a request that gives none; None for as many as fit."""
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


def _check_size(name: str, value: Any, most: int) -> None:
    """Raises ValueError for an object with more entries than its field has any use for, before each of them is an error."""
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"{name}: {len(value)} entries, at most {most} are possible; give fewer")


def _check_stop(stop: Any) -> None:
    """Raises ValueError for a value that is no string and no list of some strings."""
    listed = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise ValueError(f"stop={shown(stop)}: must be a string or a list of strings")
    if len(listed) > _MAX_STOP_STRINGS:
        raise ValueError(f"stop: {len(listed)} strings, at most {_MAX_STOP_STRINGS} are possible; give fewer")
    if any(not one for one in listed):
        raise ValueError("stop: a stop string must not be empty; leave it out")
    if any(len(one) > _MAX_STOP_CHARACTERS for one in listed):
        raise ValueError(f"stop: a stop string is longer than {_MAX_STOP_CHARACTERS} characters; shorten it")
