"""Input and target tokens at every recycle depth. All offsets are defined here.

Shapes: B sequences, S positions, K recycle depth (depth 0 is the backbone).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is excluded from the loss."""


@dataclass(frozen=True)
class Targets:
    """Inputs and targets of every depth.

    At position t (from 0), with x the tokens of one sequence:

        inputs[0]  = x_t      read by the backbone                targets[0] = x_{t+1}
        inputs[k]  = x_{t+k}  read by the module at depth k       targets[k] = x_{t+k+1}
    """

    inputs: Tensor
    """[K+1, B, S] int64; 0 where x_{t+k} is beyond the sample (its target is IGNORE)."""
    targets: Tensor
    """[K+1, B, S] int64; IGNORE where the target is beyond the sample or in another document."""


def make_targets(tokens_BT: Tensor, documents_BT: Tensor, depth: int) -> Targets:
    """Build inputs and targets of all depths from samples of T = S + 1 tokens.

    A target counts only if x_t .. x_{t+k+1} all exist and belong to one document, so no prediction crosses a document
    boundary.

    Args:
        tokens_BT: [B, S+1] int64 token ids.
        documents_BT: [B, S+1] int64 document numbers; only equality of neighbours matters.
        depth: K, 0 for a plain language model.

    Raises:
        ValueError: the shapes differ, there is no position to predict, or `depth` is negative.
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape != documents_BT.shape:
        raise ValueError(
            f"tokens {tuple(tokens_BT.shape)} and documents {tuple(documents_BT.shape)} must both be [B, S+1]"
        )
    positions = tokens_BT.shape[1] - 1
    if positions < 1 or depth < 0:
        raise ValueError(f"need at least 2 tokens per sample and depth >= 0, got {positions + 1} tokens, depth {depth}")
    # Windows of S tokens, one per offset 0 .. K+1: [B, K+2, S]. Tokens beyond the sample are padding.
    windows = torch.nn.functional.pad(tokens_BT, (0, depth)).unfold(1, positions, 1)
    # joined[t]: x_t and x_{t+1} are in one document; a target at depth k needs joined[t] .. joined[t+k].
    joined = torch.nn.functional.pad(documents_BT[:, 1:] == documents_BT[:, :-1], (0, depth), value=False)
    counted = joined.unfold(1, positions, 1).to(torch.uint8).cumprod(dim=1).bool()
    inputs = windows[:, :-1].transpose(0, 1).contiguous()
    targets = windows[:, 1:].masked_fill(~counted, IGNORE).transpose(0, 1).contiguous()
    return Targets(inputs=inputs, targets=targets)
