"""Which drafts are accepted: `walk` in speculation/tree.py for many sequences at once, in tensors.

Shapes: N sequences, J nodes that are judged at most, R rows with logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What became of the drafts. `token` follows the last accepted one."""

    accepted_NJ: Tensor
    """Whether each node is accepted: those form one path from the root."""
    count_N: Tensor
    token_N: Tensor
    last_N: Tensor
    """The last accepted node, counted from 1; 0 for none."""


def judge(chosen_R: Tensor, first_N: Tensor, drafts_NJ: Tensor, parent_rows_NJ: Tensor, paths_NJ: Tensor) -> Verdict:
    """Accepts the nodes whose tokens the full model chose after their parents, from the root on.

    chosen_R: its tokens. first_N: each sequence's row of the root. drafts_NJ: ids; -1 for padding. parent_rows_NJ: row of each
    node's parent. paths_NJ: the nodes of each node's path as bits, bit k for node k + 1; of padding its own bit. No two
    children of a node have the same id.
    """
    bits_J = torch.arange(drafts_NJ.shape[1], device=drafts_NJ.device)
    agreed_NJ = chosen_R[parent_rows_NJ] == drafts_NJ
    agreed_N1 = (agreed_NJ.long() << bits_J).sum(-1, keepdim=True)
    accepted_NJ = (paths_NJ & ~agreed_N1) == 0
    last_N = torch.where(accepted_NJ, bits_J + 1, 0).amax(-1)
    return Verdict(accepted_NJ, accepted_NJ.sum(-1), chosen_R[first_N + last_N], last_N)
