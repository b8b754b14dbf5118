"""Decodes one sequence in one of the three modes of RecycleGPT (arXiv 2308.03421): autoregressive, alternate, verified.

The modes differ only in the loops below. Token selection, backbone calls and stop conditions are shared, so that
`verified` ends at the same token as `autoregressive`. Shapes: T positions, B = 1, D hidden width; see drafting.py for
offsets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.parameters import TokenSampling, check_mode, check_stop_strings
from recycle_ds.inference.protocol import DecodableModel, TextSource
from recycle_ds.inference.speculation import draft_length
from recycle_ds.inference.speculation.drafting import Drafts
from recycle_ds.inference.speculation.stopping import FinishReason, StopCondition, TextFilter
from recycle_ds.inference.stream import OnTokens, Stream

_GREEDY = TokenSampling()
_NO_DRAFTS = Drafts(0, None)


class Decoder:
    """Decodes prompts with one model, one at a time. Statistics for the draft length carry over to later prompts.

    eos_id: end-of-sequence token or tokens. text_source: creates a new detokeniser; needed for stop strings only.
    clock: monotonic clock, in seconds, used for all timings.
    """

    def __init__(
        self,
        model: DecodableModel,
        eos_id: int | Iterable[int] | None = None,
        text_source: Callable[[], TextSource] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self._eos_ids = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
        self._text_source = text_source
        self._clock = clock
        self._draft_statistics = draft_length.initial()

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

        draft_tokens: draft tokens per full call. None means 1 in `alternate` (as in the paper) and adaptive in `verified`:
        chosen from measured cost and acceptance, or from acceptance only when sampling with a seed, because timings are
        not reproducible.
        on_tokens: called in each cycle with the new ids and, for each id, whether it was recycled.

        Raises DecodingError for a request that cannot be decoded, DecodingInterrupted on Ctrl-C.
        """
        self._check(prompt_ids, mode, max_new_tokens, draft_tokens, stop)
        if mode == "alternate" and draft_tokens is None:
            draft_tokens = 1
        drafts = mode != "autoregressive" and draft_tokens != 0
        with torch.inference_mode():
            stream = Stream(
                self.model,
                prompt_ids,
                params,
                self._stopping(len(prompt_ids), max_new_tokens, stop),
                self._eos_ids,
                on_tokens,
                self._clock,
            )
            try:
                stream.prefill(with_module=drafts)
                if not drafts:
                    _autoregressive(stream)
                elif mode == "alternate":
                    assert draft_tokens is not None
                    _alternate(stream, draft_tokens)
                elif draft_tokens is not None:
                    _verified(stream, draft_tokens)
                elif params.seed is not None and not params.greedy:
                    _verified_adaptive(stream, draft_length.initial(measured=False), self._clock)
                else:
                    self._draft_statistics = _verified_adaptive(stream, self._draft_statistics, self._clock)
            except KeyboardInterrupt:
                raise DecodingInterrupted(stream.result("interrupted")) from None
            assert stream.stopping.reason is not None
            return stream.result(stream.stopping.reason)

    def _check(
        self, prompt_ids: Sequence[int], mode: str, max_new_tokens: int, draft_tokens: int | None, stop: Sequence[str]
    ) -> None:
        check_mode(mode)
        model = self.model
        if mode != "autoregressive" and not model.recycle_layers:
            raise DecodingError(
                f"mode={mode}: the model has no recycle module; use --mode autoregressive, or train one"
            )
        if max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        if draft_tokens is not None and draft_tokens < 0:
            raise DecodingError(f"draft_tokens={draft_tokens}: must be 0 (no drafts) or more")
        if len(prompt_ids) == 0:
            raise DecodingError("the prompt is empty: give at least one token")
        if len(prompt_ids) >= model.max_positions:
            raise DecodingError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context holds {model.max_positions}, "
                f"including one new token: shorten the prompt to at most {model.max_positions - 1} tokens"
            )
        wrong = [token for token in prompt_ids if not 0 <= token < model.vocab_size]
        if wrong:
            raise DecodingError(
                f"the prompt contains the token {wrong[0]}, outside the model's vocabulary of {model.vocab_size}: "
                "encode it with the model's own tokenizer"
            )
        check_stop_strings(stop)
        if stop and self._text_source is None:
            raise DecodingError(
                f"stop={list(stop)!r}: stop strings need a tokenizer, and this decoder was built without one"
            )

    def _stopping(self, prompt_tokens: int, max_new_tokens: int, stop: Sequence[str]) -> StopCondition:
        room = self.model.max_positions - prompt_tokens
        reason: FinishReason = "length" if max_new_tokens <= room else "context"
        text = TextFilter(self._text_source(), stop) if stop and self._text_source is not None else None
        return StopCondition(self._eos_ids, min(max_new_tokens, room), reason, text)


def _autoregressive(stream: Stream) -> None:
    """One full call per token, without the recycle module."""
    while stream.running:
        stream.keep([stream.next_token(stream.read(stream.length))], [False])


def _alternate(stream: Stream, draft_tokens: int) -> None:
    """The paper's mode: recycled tokens are kept without verification. The next full call reads them and adds one token."""
    while stream.running:
        drafts = stream.drafter.draft(stream.length, min(draft_tokens, stream.stopping.remaining))
        stream.tally.add(drafts.count, 0, 0)
        stream.keep(stream.draft_ids(drafts.count), [True] * drafts.count)
        if not stream.running:
            return
        hidden_TBD = stream.read(stream.length)
        stream.drafter.add(hidden_TBD)
        stream.keep([stream.next_token(hidden_TBD)], [False])


def _verified(stream: Stream, draft_tokens: int) -> None:
    """Drafts of fixed length, verified by one full call per cycle."""
    while stream.running:
        # The full call itself adds one token, so a draft of the last allowed token would never be used.
        count = min(draft_tokens, stream.stopping.remaining - 1)
        stream.verify(stream.drafter.draft(stream.length, count) if count else _NO_DRAFTS)


def _verified_adaptive(
    stream: Stream, statistics: draft_length.DraftStatistics, clock: Callable[[], float]
) -> draft_length.DraftStatistics:
    """Verified decoding with the draft length chosen in each cycle. Returns the updated statistics."""
    while stream.running:
        count = draft_length.choose(statistics, stream.stopping.remaining - 1)
        # After cycles without drafts, one module call reads all skipped positions: its cost is not representative.
        representative = stream.drafter.pending <= statistics.max_draft + 1
        start = clock()
        drafts = stream.drafter.draft(stream.length, count) if count else _NO_DRAFTS
        if statistics.measured:
            stream.wait()
        drafted_at = clock()
        tested, accepted = stream.verify(drafts)
        if statistics.measured:
            module = (drafted_at - start) / drafts.count if drafts.count and representative else None
            full = clock() - drafted_at
        else:
            module = full = None
        statistics = draft_length.update(statistics, drafts.count, tested, accepted, full, module)
    return statistics
