"""Explains with measured numbers why verified decoding was not faster and where it diverged from autoregressive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recycle_ds.inference.bench.quality import shared_prefix
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

    expected: tokens of `autoregressive` by prompt; found: those of `verified` by repeat and prompt, empty if they are not to
    be the same; figures: the report of `verified`.
    """
    notes = []
    if figures["speedup"] <= 1 and draft_tokens != 0:
        notes.append(_why_not_faster(decoder, draft_tokens, figures))
    for one in first_divergences(decoder.model, prompts, expected, found):
        notes.append(
            f"verified diverges from autoregressive on prompt {one['prompt']} at new token {one['token']}, where the two "
            f"highest logits differ by {one['gap']:.2e}"
        )
    return notes


def first_divergences(
    model: RecycleGPT,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[tuple[int, ...]],
    found: Sequence[Sequence[tuple[int, ...]]],
) -> list[dict[str, Any]]:
    """For each prompt with another text than expected in any repeat: `prompt` and `token`, both from 1, where the first such
    text differs first, and `gap`, how far the full model's two highest logits are apart there."""
    places = []
    for index, (prompt, reference) in enumerate(zip(prompts, expected, strict=True)):
        divergent = [tokens[index] for tokens in found if tokens[index] != reference]
        if divergent:
            same = shared_prefix(reference, divergent[0])
            gap = _gap(model, [*prompt, *reference[:same]])
            places.append({"prompt": index + 1, "token": same + 1, "gap": gap})
    return places


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


@torch.inference_mode()
def _gap(model: RecycleGPT, tokens: Sequence[int]) -> float:
    """How far the full model's two highest logits after some tokens are apart."""
    tokens_1T = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    best = model.logits(model.hidden_states(tokens_1T)[-1:])[0, 0].float().topk(2).values.tolist()
    return float(best[0] - best[1])
