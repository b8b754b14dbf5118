"""Growth of trees of drafts in tensors, like `GrowingTree` in speculation/tree.py, with beams of one width for all sequences.

A node that is not in use has the chance 0. Shapes: N sequences, B nodes of a beam, K children of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Beam:
    """Nodes of one depth that get children."""

    chances_NB: Tensor
    """The probability that all of a node's path is accepted, fp64; 0 for none."""
    bits_NB: Tensor
    """The slots of the path after the latest known token, as bits: see paged.py."""


def first_beam(sequences: int, device: torch.device) -> Beam:
    """The latest known token of every sequence, alone [N, 1]."""
    return Beam(
        torch.ones((sequences, 1), dtype=torch.float64, device=device),
        torch.zeros((sequences, 1), dtype=torch.int64, device=device),
    )


def confidences(probabilities_NBK: Tensor, layer_NB: Tensor | None, greedy_N: Tensor) -> Tensor:
    """`confidences_of` in tree.py, for all nodes, fp64; 0 for children with the probability 0 or NaN, which are none.

    layer_NB: by the module's confidence layer, which counts for greedy sequences; None without one."""
    probs_NBK = probabilities_NBK.double().nan_to_num(0.0)
    if layer_NB is None:
        return probs_NBK
    layer_NB1, first_NB1 = layer_NB.double()[..., None], probs_NBK[..., :1]
    rest_NB1 = 1 - first_NB1
    shared_NBK = torch.where(rest_NB1 > 0, ((1 - layer_NB1) * probs_NBK / rest_NB1).clamp_max(1.0), 0.0)
    shared_NBK = torch.cat((layer_NB1, shared_NBK[..., 1:]), dim=-1)
    kept_NBK = torch.where(greedy_N[:, None, None], shared_NBK, probs_NBK)
    return torch.where(probs_NBK > 0, kept_NBK, 0.0)


def next_beam(
    beam: Beam, confidences_NBK: Tensor, ended_NBK: Tensor, open_N: Tensor, widths_N: Tensor, depth: int, width: int
) -> tuple[Tensor, Beam]:
    """The likeliest children of a beam, as indices into [B * K] (-1 for none) [N, B], and the beam that they are.

    ended_NBK: whether a child ends the text. open_N: whether the sequence's tree grows further. widths_N: nodes of a beam
    that it may have. depth: of the children, from 1. width: of the new beam, at most B * K.
    """
    count = confidences_NBK.shape[2]
    chances_NC = (beam.chances_NB[..., None] * confidences_NBK).masked_fill(ended_NBK, 0.0).flatten(1)
    best_NB, picked_NB = chances_NC.topk(width, dim=-1)
    place_B = torch.arange(width, device=picked_NB.device)
    used_NB = (best_NB > 0) & open_N[:, None] & (place_B < widths_N[:, None])
    own_NB = (depth - 1) * widths_N[:, None] + place_B
    bits_NB = beam.bits_NB.gather(1, picked_NB // count) | (torch.ones_like(own_NB) << own_NB)
    kept = Beam(torch.where(used_NB, best_NB, 0.0), torch.where(used_NB, bits_NB, 0))
    return torch.where(used_NB, picked_NB, -1), kept
