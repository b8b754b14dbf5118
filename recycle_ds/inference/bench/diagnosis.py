"""Explains with measured numbers why verified decoding was not faster and where it diverged from autoregressive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from recycle_ds.inference.protocol import DecodableModel
from recycle_ds.inference.speculation.draft_length import START
from recycle_ds.parallel.device import synchronise

_COST_REPEATS = 9


def notes_on_verified(
    model: DecodableModel,
    prompts: Sequence[Sequence[int]],
    draft_tokens: int | None,
    expected: Sequence[tuple[int, ...]],
    found: Sequence[Sequence[tuple[int, ...]]],
    figures: dict[str, Any],
) -> list[str]:
    """Notes printed below the table; empty if verified was faster and identical.

    expected: tokens of `autoregressive` by prompt; found: those of `verified` by repeat and prompt; figures: the report
    of `verified`.
    """
    notes = []
    if figures["speedup"] <= 1 and draft_tokens != 0:
        notes.append(_why_not_faster(model, prompts[0], draft_tokens, figures))
    for index, (prompt, reference) in enumerate(zip(prompts, expected, strict=True)):
        divergent = [tokens[index] for tokens in found if tokens[index] != reference]
        if divergent:
            notes.append(_divergence(model, index, prompt, reference, divergent[0]))
    return notes


def _why_not_faster(
    model: DecodableModel, prompt: Sequence[int], draft_tokens: int | None, figures: dict[str, Any]
) -> str:
    drafts = min(draft_tokens or START, model.max_positions - 2)
    costs = measure_costs(model, prompt, drafts)
    cycle = (costs.wide + drafts * costs.module) / costs.full
    note = (
        f"verified is not faster here: a cycle of {drafts} drafts costs {cycle:.2f} single-token full calls (a full "
        f"call over {1 + drafts} tokens {costs.wide / costs.full:.2f}, a module call {costs.module / costs.full:.2f}), "
        f"and a full call produced {figures['tokens_per_full_call']:.2f} tokens on average"
    )
    return note if draft_tokens else f"{note}; the draft length adapted to these costs"


@dataclass(frozen=True)
class Costs:
    """Seconds per call after one prompt, medians of several calls."""

    full: float
    """Full call over one token."""
    wide: float
    """Full call over one token and the drafts."""
    module: float
    """Module call over one entry, head included."""


@torch.inference_mode()
def measure_costs(model: DecodableModel, prompt: Sequence[int], drafts: int) -> Costs:
    """Times the three calls that a verified cycle with `drafts` drafts consists of."""
    device = next(model.parameters()).device
    length = max(1, min(len(prompt), model.max_positions - 1 - drafts))
    cache = model.new_cache(1, length + 1 + drafts)
    tokens_1T = torch.tensor([list(prompt[:length])], device=device)
    hidden_TBD = model.decode(tokens_1T, cache)
    model.recycle_decode(hidden_TBD, tokens_1T, cache)
    step_11, wide_1W = tokens_1T[:, -1:], tokens_1T[:, -1:].expand(1, 1 + drafts)

    def full(tokens_1W: torch.Tensor) -> None:
        cache.backbone.truncate(length)
        model.logits(model.decode(tokens_1W, cache)).argmax(-1).tolist()

    def module() -> None:
        cache.recycle.truncate(length)
        model.logits(model.recycle_decode(hidden_TBD[-1:], step_11, cache)).argmax(-1).tolist()

    def seconds(call: Callable[[], None]) -> float:
        times = []
        for _ in range(_COST_REPEATS):
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            times.append(time.perf_counter() - start)
        return median(times)

    return Costs(seconds(lambda: full(step_11)), seconds(lambda: full(wide_1W)), seconds(module))


@torch.inference_mode()
def _divergence(
    model: DecodableModel, index: int, prompt: Sequence[int], expected: tuple[int, ...], found: tuple[int, ...]
) -> str:
    """Reports where two continuations diverge, and how close the full model's two highest logits are there."""
    # the shorter one may be a prefix of the longer one
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    tokens_1T = torch.tensor([[*prompt, *expected[:same]]], device=next(model.parameters()).device)
    hidden_TBD = model.decode(tokens_1T, model.new_cache(1, tokens_1T.shape[1]))
    best = model.logits(hidden_TBD[-1:])[0, 0].topk(2).values.tolist()
    return (
        f"verified diverges from autoregressive on prompt {index + 1} at new token {same + 1}, where the two highest "
        f"logits differ by {best[0] - best[1]:.2e}"
    )
