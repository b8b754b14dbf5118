"""Decodes one sequence of token ids at a time, on an engine of its own. `Engine` in api.py decodes texts, and many at
once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.sequence import OnTokens
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.parameters import SamplingParams, TokenSampling
from recycle_ds.inference.protocol import NewTextSource
from recycle_ds.model import RecycleGPT

_GREEDY = TokenSampling()


class Decoder:
    """Decodes prompts with one model, one at a time. Statistics of drafts carry over to later prompts.

    eos_id: end-of-sequence token or tokens. text_source: creates a new detokeniser; needed for stop strings only.
    clock: monotonic clock, in seconds, used for all timings.
    """

    def __init__(
        self,
        model: RecycleGPT,
        eos_id: int | Iterable[int] | None = None,
        text_source: NewTextSource | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.model = model
        self.engine = local_engine(model, max_batch=1, eos_ids=eos_ids, text_source=text_source, clock=clock)

    def generate(
        self,
        prompt_ids: Sequence[int],
        mode: str = "verified",
        params: TokenSampling = _GREEDY,
        *,
        max_new_tokens: int,
        draft_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Continues a prompt.

        draft_tokens: draft tokens per full call. None means 1 in `alternate` (as in the paper) and adaptive in
        `verified`: chosen from measured cost and acceptance, which never changes the text. on_tokens: called in each
        step with the new ids and, for each id, whether it was recycled.

        Raises DecodingError for a request that cannot be decoded, DecodingInterrupted on Ctrl-C.
        """
        own = {field.name: getattr(params, field.name) for field in fields(TokenSampling)}
        request = SamplingParams(**own, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, stop=tuple(stop))
        return decode_one(self.engine, prompt_ids, request, mode, on_tokens)


def decode_one(
    engine: DecodingEngine,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    mode: str,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues a single prompt on an engine. Raises what `Decoder.generate` raises."""
    (sequence,) = engine.add(prompt_ids, replace(params, n=1), mode, on_tokens=on_tokens)
    try:
        engine.finish([sequence])
    except KeyboardInterrupt:
        generation = sequence.generation(engine.scheduler.clock())
        engine.abort()
        raise DecodingInterrupted(generation) from None
    assert sequence.ended_at is not None
    return sequence.generation(sequence.ended_at)
