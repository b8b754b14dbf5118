"""A pre-norm transformer block, used by the backbone and by the recycle module."""

from __future__ import annotations

import torch
from megatron.core import ModelParallelConfig as MegatronConfig
from torch import Tensor, nn

from recycle_ds.config import ModelConfig
from recycle_ds.model.attention import Attention, KeysValues
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.mlp import MLP
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.rope import CosineSine
from recycle_ds.parallel.mesh import Mesh


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, megatron: MegatronConfig, dtype: torch.dtype, *, rotated: bool = True
    ) -> None:
        """rotated: whether its attention has the rotary embedding."""
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype)
        self.attention = Attention(config, mesh, megatron, dtype, rotated=rotated)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype)
        self.mlp = MLP(config, mesh, megatron)

    def forward(
        self, x_SBD: Tensor, rotary: CosineSine, mask: AttentionMask, past: tuple[KeysValues, ...] = ()
    ) -> tuple[Tensor, KeysValues]:
        """Training and evaluation over packed sequences; see Attention.forward."""
        mixed, keys_values = self.attention(self.attention_norm(x_SBD), rotary, mask, past)
        x_SBD = x_SBD + mixed
        return x_SBD + self.mlp(self.mlp_norm(x_SBD)), keys_values
