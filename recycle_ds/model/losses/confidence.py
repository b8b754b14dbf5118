"""The loss of the confidence layer: whether each draft is accepted, given that all before it were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def confidence_losses(
    logits_KN: Tensor, agrees_KN: Tensor, valid_KN: Tensor, scales_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of the logits over the rows whose earlier drafts all agree with the backbone.

    agrees_KN: bool, whether the module's likeliest token is the backbone's, by depth. valid_KN: bool, rows with a target. In
    decoding, a draft matters only if those before it are accepted, so only such rows teach. Their number is not known before a
    forward pass: the sums are weighted by scales_K as the module's losses are, per row with a target.

    Returns the weighted total (scalar, differentiable) and the sums by depth [K] without a gradient, fp32.
    """
    before_KN = torch.ones_like(agrees_KN)
    before_KN[1:] = agrees_KN[:-1].int().cumprod(0).bool()
    losses_KN = F.binary_cross_entropy_with_logits(logits_KN.float(), agrees_KN.float(), reduction="none")
    sums_K = losses_KN.masked_fill(~(valid_KN & before_KN), 0.0).sum(1)
    return torch.dot(sums_K, scales_K.float()), sums_K.detach()
