"""From the fields of a request to the engine's parameters, with errors in the request's own terms."""

from __future__ import annotations

import re
from dataclasses import dataclass

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import SEED_LIMIT, SamplingParams
from recycle_ds.serving.protocol.errors import ApiError, invalid
from recycle_ds.serving.protocol.fields import GenerationFields
from recycle_ds.serving.settings import ServerSettings

_LEAST_TOP_P = 1e-9  # of the engine, which takes no 0: any token is likelier
# The engine's names of what a request calls otherwise.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "allowed_tokens": "allowed_token_ids",
    "bad_tokens": "bad_token_ids",
    "stop_tokens": "stop_token_ids",
}


@dataclass(frozen=True)
class Capacity:
    """What a model and its KV cache can decode."""

    context: int
    """Most tokens of a prompt and its answer."""
    cache: int
    """Positions of the KV cache."""
    block: int
    """Positions of one of its blocks."""
    modes: tuple[str, ...]

    def room(self, prompt_tokens: int) -> int:
        """New tokens that fit behind a prompt, in the context and in the KV cache."""
        # as in DecodingEngine.check: a position more for a draft, a block more for the next step
        cached = (self.cache // self.block - 1) * self.block - 1
        return min(self.context, cached) - prompt_tokens


def mode_of(request: GenerationFields, settings: ServerSettings, capacity: Capacity) -> str:
    """The mode in which a request is decoded. Raises ApiError for one that the model does not have."""
    if request.mode is None:
        return settings.default_mode if settings.default_mode in capacity.modes else "autoregressive"
    if request.mode not in capacity.modes:
        raise invalid(
            f"mode={request.mode}: the model has no recycle module; use mode=autoregressive, or serve a model that has one",
            "mode",
            "unsupported_mode",
        )
    return request.mode


def params_of(
    request: GenerationFields,
    *,
    mode: str,
    logprobs: int | None,
    prompt_tokens: int,
    settings: ServerSettings,
    capacity: Capacity,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """Parameters of the engine. logprobs: of the n most
    likely tokens; None for none. prompt_tokens: of the longest prompt. prompt_logprobs: whether its
    tokens are scored too. Raises ApiError (400)."""
    limit = settings.max_prompt_tokens
    if limit is not None and prompt_tokens > limit:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens, this server takes at most {limit}: shorten it",
            code="context_length_exceeded",
        )
    if prompt_tokens >= capacity.context:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens, the model's context holds {capacity.context}, including one new token: "
            f"shorten it to at most {capacity.context - 1} tokens",
            code="context_length_exceeded",
        )
    room = capacity.room(prompt_tokens)
    if room < 1:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens, more than the KV cache of {capacity.cache} positions holds: shorten it, "
            "or restart the server with more --kv-memory-gib",
            code="context_length_exceeded",
        )
    if (request.n or 1) > settings.max_n:
        raise invalid(f"n={request.n}: this server gives at most {settings.max_n} answers; ask several times", "n")
    tokens = _new_tokens(request, room, capacity.context - prompt_tokens, settings.max_new_tokens)
    if (request.min_tokens or 0) > tokens:
        raise invalid(
            f"min_tokens={request.min_tokens}: must be at most the number of new tokens ({tokens})", "min_tokens"
        )
    if logprobs is not None and mode == "alternate":
        raise invalid(
            "logprobs: the model itself does not score the recycled tokens of mode=alternate; use mode=verified or "
            "autoregressive",
            "logprobs",
        )
    try:
        return SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(request.top_k or 0, 0),
            top_p=1.0 if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
            min_p=request.min_p or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            seed=None if request.seed is None else request.seed % SEED_LIMIT,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), value) for token, value in (request.logit_bias or {}).items()),
            allowed_tokens=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
            bad_tokens=tuple(request.bad_token_ids or ()),
            min_new_tokens=request.min_tokens or 0,
            logprobs=logprobs,
            max_new_tokens=tokens,
            stop=request.stop_strings,
            draft_tokens=request.draft_tokens,
            stop_tokens=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            n=request.n or 1,
            prompt_logprobs=prompt_logprobs,
        )
    except DecodingError as error:
        raise as_invalid(error) from error


def _new_tokens(request: GenerationFields, room: int, in_context: int, largest: int | None) -> int:
    """Maximum number of new tokens. room: how many fit; in_context: how many the context holds. Raises ApiError."""
    name, wanted = request.token_limit
    if wanted is None:
        return min(one for one in (request.default_tokens, room, largest) if one is not None)
    if largest is not None and wanted > largest:
        raise invalid(f"{name}={wanted}: this server generates at most {largest}; ask for fewer", name)
    if wanted > room and room < in_context:
        raise invalid(
            f"{name}={wanted}: the KV cache has room for {room} tokens after this prompt; ask for fewer, or restart the "
            "server with more --kv-memory-gib",
            name,
        )
    return max(min(wanted, in_context), 1)  # what goes beyond the context ends there; 0 scores the prompt only


def as_invalid(error: DecodingError) -> ApiError:
    """An error of the engine about a request, with the request's names."""
    message = str(error)
    for theirs, ours in _NAMES.items():
        message = re.sub(rf"\b{theirs}\b", ours, message)
    named = re.match(r"([a-z_]+)[=:]", message)
    param = named[1] if named and named[1] in GenerationFields.model_fields else None
    return invalid(message, param, "invalid_value")
