"""The recycle module: a short stack of blocks that reuses the backbone's states to predict the token after next.

RecycleGPT (arXiv 2308.03421), unrolled to depth K with shared weights:

    r^1_t = norm_r(Stack(W [norm_h(h_t);       norm_e(E x_{t+1})]))       p(x_{t+2})   = softmax Head(r^1_t)
    r^k_t = norm_r(Stack(W [norm_h(r^{k-1}_t); norm_e(E x_{t+k})]))       p(x_{t+k+1}) = softmax Head(r^k_t)

With taps (EAGLE-3, arXiv 2503.01840), step 1 also reads the states s_1, s_2, ... after some of the backbone's blocks:
T [norm_1(s_1); norm_2(s_2); ...] is added to its W [...], which is one projection over [h; e; s_1; s_2; ...]. T is zero at
first, so a trained module that gets taps keeps its output. Later steps have no tapped states, since the backbone has not been
there: r stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import ModelParallelConfig as MegatronConfig
from megatron.core.tensor_parallel import all_to_all_hp2sp, gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.attention import KeysValues
from recycle_ds.model.block import Block
from recycle_ds.model.layers import ColumnLinear
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.rope import CosineSine
from recycle_ds.parallel.mesh import Mesh

StepKeysValues = tuple[tuple[KeysValues, ...], ...]
"""Keys and values of the unrolled steps so far, [layer][step]."""


class RecycleModule(nn.Module):
    """W [norm_h(h); norm_e(e)], a stack of blocks and a final norm. Embedding and head are shared with the backbone."""

    def __init__(
        self, recycle: RecycleConfig, config: ModelConfig, mesh: Mesh, megatron: MegatronConfig, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype)
        self.embedding_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype)
        self.projection = ColumnLinear(2 * config.hidden, {"": config.hidden}, mesh, megatron)
        taps = len(recycle.taps)
        self.tap_norms = nn.ModuleList([RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype) for _ in range(taps)])
        self.tap_projection: ColumnLinear | None = None
        if taps:
            self.tap_projection = ColumnLinear(taps * config.hidden, {"": config.hidden}, mesh, megatron)
        self.tensor, self.sequence = mesh.tensor, mesh.sequence
        self.blocks = nn.ModuleList([Block(config, mesh, megatron, dtype) for _ in range(recycle.layers)])
        self.final_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype)
        self.confidence = nn.Linear(config.hidden, 1, dtype=dtype) if recycle.confidence else None
        """The logit of the probability that the draft of a state r is accepted at temperature 0."""

    def join(self, hidden_SBD: Tensor, embedded_SBD: Tensor, taps: Sequence[Tensor] = ()) -> Tensor:
        """The stack's input from the states (h, or r of the previous step), the embedding of the next token, and in step 1
        the tapped states."""
        pair = torch.cat((self.hidden_norm(hidden_SBD), self.embedding_norm(embedded_SBD)), dim=-1)
        joined = self.projection(pair)
        if self.tap_projection is not None and taps:
            normed = [norm(state) for norm, state in zip(self.tap_norms, taps, strict=True)]
            joined = joined + self.tap_projection(torch.cat(normed, dim=-1))
        if self.tensor.size == 1:
            return joined
        if not self.sequence:
            return gather_from_tensor_model_parallel_region(joined, self.tensor.group)
        # [S, B, D / p] to [S / p, B, D]: every rank keeps all columns of its part of the sequence
        return all_to_all_hp2sp(joined, self.tensor.group).view(hidden_SBD.shape)

    def forward(
        self,
        hidden_SBD: Tensor,
        embedded_SBD: Tensor,
        rotary: CosineSine,
        mask: AttentionMask,
        earlier: StepKeysValues,
        taps: Sequence[Tensor] = (),
    ) -> tuple[Tensor, StepKeysValues]:
        """Runs one unrolled step. Returns r^k [S, B, D] and the keys and values of all steps up to this one.

        taps: the tapped states [S, B, D] each, in the order of recycle.taps, in step 1 of a module that has them."""
        x = self.join(hidden_SBD, embedded_SBD, taps)
        steps = []
        for block, past in zip(self.blocks, earlier or ((),) * len(self.blocks), strict=True):
            x, keys_values = block(x, rotary, mask, past)
            steps.append((*past, keys_values))
        return self.final_norm(x), tuple(steps)
