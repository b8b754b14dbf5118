"""The decoder's limits, counts, figures and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recycle_ds.inference import MODES, Decoder, DecodingError, DecodingInterrupted, Generation, SamplingParams
from recycle_ds.inference.console import TokenPrinter, figures_line
from tests.unit.inference.models import Letters, random_model


class Ticks:
    """A clock that advances by one second at every reading."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 1.0
        return self._now


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draft_tokens", [None, 0, 1, 5, 100])
def test_no_mode_exceeds_its_limits(mode: str, draft_tokens: int | None) -> None:
    """Prevents tokens beyond the requested number or the context, and cache positions beyond the capacity."""
    model = random_model(6, 3, max_positions=20)
    for prompt_tokens in (1, 7, 18, 19):
        for max_new_tokens in (1, 2, 3, 12, 30):
            generation = Decoder(model).generate(
                [1] * prompt_tokens, mode, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens
            )
            assert len(generation.token_ids) == len(generation.recycled) == min(max_new_tokens, 20 - prompt_tokens)
            assert generation.finish_reason == ("length" if max_new_tokens <= 20 - prompt_tokens else "context")


def test_autoregressive_does_not_run_the_module() -> None:
    """Prevents a reference whose speed includes a module that it does not use."""
    generation = Decoder(random_model(6, 3)).generate([1, 2], "autoregressive", max_new_tokens=20)
    assert (generation.module_calls, generation.full_calls, generation.tokens_per_full_call) == (0, 20, 1.0)
    assert not any(generation.recycled)
    assert generation.acceptance == []


def test_a_model_without_a_module_decodes_autoregressively() -> None:
    """Prevents a plain language model from being unusable, or crashing in a mode that it does not support."""
    decoder = Decoder(random_model(6, 3, recycle_layers=0))
    assert len(decoder.generate([1, 2], "autoregressive", max_new_tokens=5).token_ids) == 5
    for mode in ("alternate", "verified"):
        with pytest.raises(DecodingError, match="no recycle module"):
            decoder.generate([1, 2], mode, max_new_tokens=5)


@pytest.mark.parametrize("mode", MODES)
def test_an_end_of_sequence_is_the_last_token(mode: str) -> None:
    """Prevents text after an end of sequence, including a drafted one."""
    model = random_model(6, 3)
    for eos in range(6):
        unlimited = Decoder(model).generate([1, 2], mode, max_new_tokens=30, draft_tokens=3)
        limited = Decoder(model, eos).generate([1, 2], mode, max_new_tokens=30, draft_tokens=3)
        tokens = list(unlimited.token_ids)
        expected = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert list(limited.token_ids) == expected
        assert limited.finish_reason == ("eos" if eos in tokens else "length")


@pytest.mark.parametrize("mode", MODES)
def test_streamed_tokens_and_text_are_the_final_ones(mode: str) -> None:
    """Prevents a stream that shows tokens twice, late or never, or shows parts of a stop string."""
    decoder = Decoder(random_model(6, 3), None, Letters)
    uncut = decoder.generate([1, 2], mode, max_new_tokens=30, draft_tokens=3)
    text = "".join(map(Letters().feed, uncut.token_ids))
    stop = text[9:12]
    printer = TokenPrinter(Letters(), [stop], frozenset(), mode, None)
    tokens: list[int] = []
    flags: list[bool] = []

    def on_tokens(ids: list[int], recycled: list[bool]) -> None:
        tokens.extend(ids)
        flags.extend(recycled)
        printer.feed(ids, recycled)

    cut = decoder.generate([1, 2], mode, max_new_tokens=30, draft_tokens=3, stop=[stop], on_tokens=on_tokens)
    printer.finish()
    assert (tuple(tokens), tuple(flags)) == (cut.token_ids, cut.recycled)
    assert cut.finish_reason == "stop"
    assert printer.text == text[: text.index(stop)]


def test_counts_add_up() -> None:
    """Prevents figures that contradict each other."""
    generation = Decoder(random_model(5, 1)).generate([1, 2], "verified", max_new_tokens=40, draft_tokens=3)
    assert sum(generation.recycled) == sum(generation.accepted)
    assert len(generation.token_ids) == generation.full_calls + sum(generation.accepted)
    assert all(a <= t <= d for a, t, d in zip(generation.accepted, generation.tested, generation.drafted, strict=True))
    for position in range(1, len(generation.tested)):
        assert generation.tested[position] <= generation.accepted[position - 1]
    assert generation.acceptance[0] == generation.accepted[0] / generation.tested[0]
    # one call per draft: the first call after a full call also reads the kept positions, and the prompt
    assert generation.module_calls == sum(generation.drafted)
    assert generation.tokens_per_full_call == 40 / generation.full_calls


def test_speed_counts_the_tokens_after_the_first() -> None:
    """Prevents speeds that include the prefill, or a token that the prefill produced."""
    generation = Decoder(random_model(5, 1), clock=Ticks()).generate([1, 2], "autoregressive", max_new_tokens=11)
    assert (generation.prefill_seconds, generation.decode_seconds) == (1.0, 1.0)
    assert generation.tokens_per_second == 10.0
    one = Decoder(random_model(5, 1), clock=Ticks()).generate([1, 2], "autoregressive", max_new_tokens=1)
    assert one.tokens_per_second == 0.0


def test_alternate_recycles_one_token_by_default() -> None:
    """Prevents a default other than the paper's."""
    generation = Decoder(random_model(5, 1)).generate([1, 2], "alternate", max_new_tokens=20)
    assert generation.recycled == (False, True) * 10
    assert (generation.full_calls, generation.tokens_per_full_call) == (10, 2.0)


def test_an_interrupted_generation_keeps_its_tokens() -> None:
    """Prevents Ctrl-C from discarding text and figures."""
    seen: list[int] = []

    def on_tokens(ids: list[int], recycled: list[bool]) -> None:
        seen.extend(ids)
        if len(seen) >= 6:
            raise KeyboardInterrupt

    with pytest.raises(DecodingInterrupted) as caught:
        Decoder(random_model(5, 1)).generate([1, 2], "verified", max_new_tokens=40, on_tokens=on_tokens)
    generation = caught.value.generation
    assert generation.token_ids == tuple(seen)
    assert generation.finish_reason == "interrupted"
    assert isinstance(caught.value, KeyboardInterrupt)


def test_decoding_computes_no_gradients() -> None:
    """Prevents an autograd graph that grows with every token until memory is exhausted."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        Decoder(random_model(5, 1)).generate([1, 2], "verified", max_new_tokens=10)
    assert not saved and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "verifed"}, "did you mean verified?"),
        ({"mode": "beam"}, "must be one of autoregressive, alternate, verified"),
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [1] * 48}, "the prompt has 48 tokens, the model's context holds 48"),
        ({"prompt_ids": [1] * 500}, "shorten the prompt to at most 47 tokens"),
        ({"prompt_ids": [1, 5]}, "the token 5, outside the model's vocabulary of 5"),
        ({"prompt_ids": [-1]}, "the token -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"draft_tokens": -1}, "draft_tokens=-1: must be 0 (no drafts) or more"),
        ({"stop": [""]}, "must not be empty"),
        ({"stop": ["x"]}, "need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_decoded_are_refused(changes: dict[str, Any], words: str) -> None:
    """Prevents a stack trace from inside the model, or wrong output, in place of a one-line error."""
    request: dict[str, Any] = {"prompt_ids": [1, 2], "mode": "verified", "max_new_tokens": 5, **changes}
    with pytest.raises(DecodingError) as caught:
        Decoder(random_model(5, 1)).generate(**request)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_of_figures_names_them_all() -> None:
    """Prevents a final line without the speed, the tokens per full call or the acceptance."""
    generation = Generation((1, 2, 3), (False, True, False), "eos", 5, 2, 3, (1,), (1,), (1,), 0.5, 0.25)
    line = figures_line(generation, "verified", coloured=True)
    for words in ("verified: 3 tokens (eos)", "8.0 tokens/s", "1.50 tokens per full call", "acceptance 1.00", "green"):
        assert words in line
    assert "\n" not in line


def test_one_decoder_decodes_many_prompts() -> None:
    """Prevents state of one generation from leaking into the next."""
    model, decoder = random_model(5, 2), Decoder(random_model(5, 2))
    prompts = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4]]
    for prompt in prompts * 2:
        expected = Decoder(model).generate(prompt, "autoregressive", SamplingParams(), max_new_tokens=25)
        assert decoder.generate(prompt, max_new_tokens=25).token_ids == expected.token_ids
