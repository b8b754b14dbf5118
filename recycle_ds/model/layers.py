"""megatron-core's tensor-parallel linears and embedding, with the plain torch call where one rank holds everything.

Shape legend, used throughout the model: S sequence, B batch, D hidden width, H heads, C channels of a head, V vocabulary,
K recycle depth, N rows (tokens).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.products import linear


def parallel_config(mesh: Mesh, dtype: torch.dtype) -> ModelParallelConfig:
    """megatron-core's settings of a mesh. Weights are left uninitialised: `initialise` fills them by name."""
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tensor.size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        sequence_parallel=mesh.sequence,
        gradient_accumulation_fusion=False,
    )


def _mark_sharded(weight: nn.Parameter, axis: int) -> None:
    """Says that tensor ranks hold different parts, so that norms count them all; megatron-core does so when it initialises."""
    set_tensor_model_parallel_attributes(weight, True, axis, 1)


def _no_initialisation(_: Tensor) -> None:
    """megatron-core asks for an init method even when it performs no initialisation."""


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with W's rows split over the tensor axis.

        W = [W_1; ...; W_p], rank i holds W_i; within a rank the rows of each of `parts` lie together:
        for query|key|value, W_i = [Q_i; K_i; V_i].

    `parts` names the canonical tensors stacked in W and their full numbers of rows; a single unnamed part is W itself.
    """

    def __init__(
        self,
        inputs: int,
        parts: dict[str, int],
        mesh: Mesh,
        config: ModelParallelConfig,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(
            inputs,
            sum(parts.values()),
            config=config,
            init_method=_no_initialisation,
            bias=bias,
            gather_output=False,
            tp_group=mesh.tensor.group,
        )
        _mark_sharded(self.weight, 0)
        self.parts = parts
        self.whole = mesh.tensor.size == 1

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, D] to [S, B, rows of this rank]; under sequence parallelism S is this rank's part in, and whole out."""
        if self.whole:
            return linear(x, self.weight, self.bias)
        return super().forward(x)[0]

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class RowLinear(RowParallelLinear):
    """y = x W^T with W's columns split over the tensor axis: y = sum_i x_i W_i^T, reduced over the axis (under sequence
    parallelism reduced and scattered: S whole in, this rank's part out)."""

    def __init__(self, inputs: int, outputs: int, mesh: Mesh, config: ModelParallelConfig) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_no_initialisation,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tensor.group,
        )
        _mark_sharded(self.weight, 1)
        self.whole = mesh.tensor.size == 1

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns of this rank] to [..., D]."""
        if self.whole:
            return linear(x, self.weight)
        return super().forward(x)[0]

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class VocabEmbedding(VocabParallelEmbedding):
    """Token embedding with the (padded) vocabulary split over the tensor axis; also the weight of a tied head."""

    def __init__(self, vocab_size: int, padded_vocab: int, width: int, mesh: Mesh, config: ModelParallelConfig) -> None:
        super().__init__(
            padded_vocab,
            width,
            init_method=_no_initialisation,
            reduce_scatter_embeddings=mesh.sequence,
            config=config,
            tp_group=mesh.tensor.group,
        )
        _mark_sharded(self.weight, 0)
        self.vocab_size = vocab_size
        self.whole = mesh.tensor.size == 1

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """[S, B] token ids to [S, B, D]; under sequence parallelism to this rank's part of S."""
        if self.whole:
            return F.embedding(tokens_SB, self.weight)
        if self.reduce_scatter_embeddings:  # megatron-core transposes what it scatters
            tokens_SB = tokens_SB.t()
        return super().forward(tokens_SB)


class OutputHead(ColumnLinear):
    """An untied output head; only its weight is used, by `losses` and `RecycleGPT.logits`."""

    def __init__(self, vocab_size: int, padded_vocab: int, width: int, mesh: Mesh, config: ModelParallelConfig) -> None:
        super().__init__(width, {"": padded_vocab}, mesh, config)
        self.vocab_size = vocab_size


def padded_vocabulary(vocab_size: int, multiple: int, tensor_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of `multiple` on every tensor rank."""
    unit = multiple * tensor_size
    return -(-vocab_size // unit) * unit
