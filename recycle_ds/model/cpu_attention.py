"""Causal bf16 attention for CPUs with bf16 instructions, built from matrix products.

PyTorch's CPU flash kernel does not reach the peak rate of these instructions. Multiplying blocks of queries with the keys that
are visible to them takes a third to a quarter of its time, forward and backward, at 256 to 2,048 positions. Scores and
probabilities are rounded to bf16; sums and the softmax are fp32, as in Hugging Face's "eager" attention. As in flash attention
(Dao et al., arXiv 2205.14135), probabilities are not stored: the backward pass recomputes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recycle_ds.parallel.products import multiplies_bf16

_ROWS = 128
"""Query rows per product: few enough to compute little above the diagonal, many enough for efficient products."""


def is_faster(query: Tensor) -> bool:
    """Whether `causal` is faster than scaled_dot_product_attention on the query's device and dtype."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and multiplies_bf16()


def causal(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C) + mask) v, causal. [B, H, S, C] queries, [B, H_kv, S, C] keys and values, to [B, H, S, C].

    mask: [B, 1, S, S] of 0 and -inf, added to the scores; it must mask the future too. None: causal only.
    """
    output: Tensor = _Causal.apply(query, keys, values, mask)
    return output


class _Groups(NamedTuple):
    """Queries [N, G, S, C], keys and values [N, S, C]: N = B x H_kv, G query heads share one key/value head."""

    query: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def of(query: Tensor, keys: Tensor, values: Tensor) -> _Groups:
        batch, heads, length, channels = query.shape
        number = batch * keys.shape[1]
        return _Groups(
            query.reshape(number, heads // keys.shape[1], length, channels),
            keys.reshape(number, length, channels),
            values.reshape(number, length, channels),
        )

    def rows(self, first: int) -> tuple[int, Tensor]:
        """The end of the query block that starts at `first`, and its queries [N, G x rows, C]."""
        end = min(first + _ROWS, self.keys.shape[1])
        return end, self.query[:, :, first:end].flatten(1, 2)

    def probabilities(self, first: int, mask: Tensor | None) -> Tensor:
        """Attention probabilities [N, G x rows, end] of the query block that starts at `first`."""
        end, query = self.rows(first)
        number, groups, _, channels = self.query.shape
        empty = query.new_empty((number, query.shape[1], end))
        scores = torch.baddbmm(empty, query, self.keys[:, :end].transpose(1, 2), beta=0, alpha=channels**-0.5)
        by_head = scores.view(number, groups, end - first, end)
        if mask is None:
            hidden = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
            by_head[..., first:].masked_fill_(hidden, float("-inf"))
        else:
            per_batch = by_head.view(mask.shape[0], -1, end - first, end)
            per_batch += mask[:, :, first:end, :end]
        return torch.softmax(scores, dim=-1)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, keys, values, mask)
        groups = _Groups.of(query, keys, values)
        batch, heads, length, channels = query.shape
        # sequence first in memory: the output projection reads this order, so it needs no copy
        mixed = query.new_empty((length, batch, heads, channels)).permute(1, 2, 0, 3)
        for first in range(0, length, _ROWS):
            block = torch.bmm(groups.probabilities(first, mask), groups.values[:, : first + _ROWS])
            end = min(first + _ROWS, length)
            mixed[:, :, first:end] = block.view(batch, heads, end - first, channels)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, keys, values, mask = ctx.saved_tensors
        groups = _Groups.of(query, keys, values)
        length, channels = query.shape[2:]
        grad_output = grad.reshape(groups.query.shape)
        grad_query = torch.empty_like(groups.query)
        # sums over blocks are in fp32
        grad_keys = torch.zeros(groups.keys.shape, dtype=torch.float32)
        grad_values = torch.zeros(groups.values.shape, dtype=torch.float32)
        for first in range(0, length, _ROWS):
            end, rows = groups.rows(first)
            grad_block = grad_output[:, :, first:end].flatten(1, 2)
            probabilities = groups.probabilities(first, mask)
            grad_values[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad_block)
            grad_probabilities = torch.bmm(grad_block, groups.values[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            block = torch.bmm(grad_scores, groups.keys[:, :end])
            grad_query[:, :, first:end] = block.view(grad_query[:, :, first:end].shape)
            grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), rows)
        scale = channels**-0.5
        return (
            (grad_query * scale).view(query.shape),
            (grad_keys * scale).to(keys.dtype).view(keys.shape),
            grad_values.to(values.dtype).view(values.shape),
            None,
        )
