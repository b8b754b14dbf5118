"""SwiGLU feed-forward (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core import ModelParallelConfig as MegatronConfig
from torch import Tensor, nn

from recycle_ds.config import ModelConfig
from recycle_ds.model.layers import ColumnLinear, RowLinear
from recycle_ds.parallel.mesh import Mesh


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config: ModelConfig, mesh: Mesh, megatron: MegatronConfig) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(config.hidden, {"gate": config.ffn, "up": config.ffn}, mesh, megatron)
        self.down = RowLinear(config.ffn, config.hidden, mesh, megatron)
        self.activate = swiglu
        """`swiglu`, or what a compiler made of it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(self.activate(self.gate_up(x)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 F] = [gate; up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
