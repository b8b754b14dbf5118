"""Grouped-query self-attention over megatron-core's tensor-parallel projections."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig as MegatronConfig
from torch import Tensor, nn

from recycle_ds.config import ModelConfig
from recycle_ds.model import cpu_attention
from recycle_ds.model.layers import ColumnLinear, RowLinear
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.rope import CosineSine, rotate
from recycle_ds.model.ulysses import to_heads, to_sequence
from recycle_ds.parallel.compiler import raise_recompile_limit
from recycle_ds.parallel.mesh import Mesh

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, [B, H, S, C] each."""


class Attention(nn.Module):
    """Multi-head attention with fewer key/value heads than query heads (Ainslie et al., arXiv 2305.13245).

    With `qk_norm`, each query and key head is normalised first (Henry et al., arXiv 2010.04245; RMSNorm as in Qwen3)."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, megatron: MegatronConfig, dtype: torch.dtype, *, rotated: bool = True
    ) -> None:
        """rotated: whether queries and keys get the rotary embedding."""
        super().__init__()
        self.rotated = rotated
        self.rotate = rotate
        """`rope.rotate`, or what a compiler made of it."""
        self.channels = config.dim_per_head
        self.ulysses = mesh.ulysses
        self.heads = config.heads // mesh.tensor.size
        self.kv_heads = config.kv_heads // mesh.tensor.size
        query, kv = config.heads * self.channels, config.kv_heads * self.channels
        self.query_key_value = ColumnLinear(
            config.hidden, {"query": query, "key": kv, "value": kv}, mesh, megatron, bias=config.qkv_bias
        )
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = RMSNorm(self.channels, config.norm_epsilon, mesh, dtype, of_heads=True)
            self.key_norm = RMSNorm(self.channels, config.norm_epsilon, mesh, dtype, of_heads=True)
        self.output = RowLinear(query, config.hidden, mesh, megatron)

    def forward(
        self, x_SBD: Tensor, rotary: CosineSine, mask: AttentionMask, past: tuple[KeysValues, ...] = ()
    ) -> tuple[Tensor, KeysValues]:
        """Attends within packed sequences; `past` holds the keys and values of earlier unrolled steps.

        Returns the output [S, B, D] and this step's keys and values, [B, H, S, C] each. With Ulysses, S in the output
        is this rank's part of the sequence; S in keys and values is the full sequence, for this rank's heads."""
        query, key, value = self._project(x_SBD, rotary)
        keys = torch.cat([k for k, _ in past] + [key], dim=2) if past else key
        values = torch.cat([v for _, v in past] + [value], dim=2) if past else value
        return self._merge(attend(query, keys, values, mask)), (key, value)

    def _project(self, x_SBD: Tensor, rotary: CosineSine) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, C], keys and values [B, H_kv, S, C]. Queries and keys are normalised and rotated."""
        heads, kv_heads = self.heads, self.kv_heads
        mixed = self.query_key_value(x_SBD)
        mixed = mixed.view(*mixed.shape[:2], heads + 2 * kv_heads, self.channels)
        both, value = mixed.split((heads + kv_heads, kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = both.split((heads, kv_heads), dim=2)
            both = torch.cat((self.query_norm(query), self.key_norm(key)), dim=2)
        query, key = (self.rotate(both, rotary) if self.rotated else both).split((heads, kv_heads), dim=2)
        if self.ulysses.size > 1:
            query, key, value = to_heads((query, key, value), self.ulysses)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)

    def _merge(self, mixed_BHSC: Tensor) -> Tensor:
        mixed = mixed_BHSC.permute(2, 0, 1, 3)
        if self.ulysses.size > 1:
            mixed = to_sequence(mixed, self.ulysses)
        return self.output(mixed.reshape(*mixed.shape[:2], -1))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(C)) v under a packed mask, [B, H, S, C].

    On CUDA FlexAttention, or a fused kernel of SDPA (flash in bf16) if each row is one document; elsewhere SDPA with a dense
    mask. Inside compiled code FlexAttention is compiled along with what is around it.
    """
    if query.is_cuda and not mask.plain_causal:
        return flex(query, keys, values, mask, compiled=not torch.compiler.is_compiling())
    return dense(query, keys, values, mask)


def dense(query: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """The reference back end: scaled_dot_product_attention with a dense mask.

    `cpu_attention` replaces it on CPUs with fast bf16 products.
    """
    if mask.steps == 1 and not torch.compiler.is_compiling() and cpu_attention.is_faster(query):
        return cpu_attention.causal(query, keys, values, None if mask.plain_causal else mask.additive(query.dtype))
    grouped = query.shape[1] != keys.shape[1]
    if mask.plain_causal:
        if grouped and query.is_cuda and query.dtype == torch.float32:
            # no fused kernel takes grouped heads in fp32: all scores would be in memory
            groups = query.shape[1] // keys.shape[1]
            keys, values, grouped = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), False
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.additive(query.dtype), enable_gqa=grouped)


def flex(query: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, *, compiled: bool) -> Tensor:
    """The CUDA back end: FlexAttention skips fully masked blocks. With compiled=False it runs on any device, slowly."""
    function = compiled_flex() if compiled else _plain_flex()
    grouped = query.shape[1] != keys.shape[1]
    return function(query, keys, values, block_mask=mask.block_mask, enable_gqa=grouped)


def _plain_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache(maxsize=2)
def compiled_flex(backend: str | Any = "inductor") -> Any:
    """`flex_attention` compiled for each variant of its arguments. backend: a backend of torch.compile."""
    # fullgraph: at the limit of recompilations it raises, instead of going back to the unfused operations without a word
    raise_recompile_limit()
    return torch.compile(_plain_flex(), fullgraph=True, dynamic=False, backend=backend)
