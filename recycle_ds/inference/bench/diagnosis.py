"""Explains with measured numbers why verified decoding was not faster and where it diverged from autoregressive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.speculation.budget import START
from recycle_ds.model import RecycleGPT


def notes_on_verified(
    decoder: Decoder,
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
        notes.append(_why_not_faster(decoder, draft_tokens, figures))
    for index, (prompt, reference) in enumerate(zip(prompts, expected, strict=True)):
        divergent = [tokens[index] for tokens in found if tokens[index] != reference]
        if divergent:
            notes.append(_divergence(decoder.model, index, prompt, reference, divergent[0]))
    return notes


def _why_not_faster(decoder: Decoder, draft_tokens: int | None, figures: dict[str, Any]) -> str:
    drafts = min(draft_tokens or START, decoder.model.max_positions - 2)
    costs = decoder.engine.measure_costs()
    full, wide, making = costs.full_call(1), costs.step(1, 1 + drafts, 0, 0), costs.drafts(1, drafts)
    note = (
        f"verified is not faster here: a cycle of {drafts} drafts costs {(wide + making) / full:.2f} single-token full calls "
        f"(a full call over {1 + drafts} tokens {wide / full:.2f}, making the drafts {making / full:.2f}), and a full "
        f"call produced {figures['tokens_per_full_call']:.2f} tokens on average"
    )
    return note if draft_tokens else f"{note}; the draft length adapted to these costs"


def _divergence(
    model: RecycleGPT, index: int, prompt: Sequence[int], expected: tuple[int, ...], found: tuple[int, ...]
) -> str:
    """Reports where two continuations diverge, and how close the full model's two highest logits are there."""
    # the shorter one may be a prefix of the longer one
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    tokens_1T = torch.tensor([[*prompt, *expected[:same]]], device=next(model.parameters()).device)
    with torch.inference_mode():
        best = model.logits(model.hidden_states(tokens_1T)[-1:])[0, 0].topk(2).values.tolist()
    return (
        f"verified diverges from autoregressive on prompt {index + 1} at new token {same + 1}, where the two highest "
        f"logits differ by {best[0] - best[1]:.2e}"
    )
