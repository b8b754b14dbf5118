"""megatron-core's tensor-parallel linear layers and embedding, with a plain torch call if the tensor axis has one rank.

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
    """megatron-core's configuration for a mesh. Weights are left uninitialised: `initialise` fills them by name."""
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tensor.size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        sequence_parallel=mesh.sequence,
        gradient_accumulation_fusion=False,
    )


def _mark_sharded(weight: nn.Parameter, axis: int) -> None:
    """Marks a weight as split over tensor ranks, for gradient norms. megatron-core only does so when it initialises weights."""
    set_tensor_model_parallel_attributes(weight, True, axis, 1)


def _no_initialisation(_: Tensor) -> None:
    """Does nothing: megatron-core requires an init method even when it performs no initialisation."""


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with W's rows split over the tensor axis.

        W = [W_1; ...; W_p], rank i holds W_i; within a rank the rows of each of `parts` are contiguous:
        for query|key|value, W_i = [Q_i; K_i; V_i].

    `parts` maps the canonical tensors stacked in W to their unsharded row counts; a single unnamed part is W itself.
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
        self.unsharded = mesh.tensor.size == 1

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, D] to [S, B, rows of this rank]. Sequence parallelism: the input is this rank's part of S, the output all."""
        if self.unsharded:
            return linear(x, self.weight, self.bias)
        return super().forward(x)[0]

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class RowLinear(RowParallelLinear):
    """y = x W^T with W's columns split over the tensor axis: y = sum_i x_i W_i^T, an all-reduce over the axis.

    Under sequence parallelism it is a reduce-scatter: the input is all of S, the output this rank's part.
    """

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
        self.unsharded = mesh.tensor.size == 1

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns of this rank] to [..., D]."""
        if self.unsharded:
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
        self.unsharded = mesh.tensor.size == 1

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """[S, B] token ids to [S, B, D]. Under sequence parallelism the output is this rank's part of S."""
        if self.unsharded:
            return F.embedding(tokens_SB, self.weight)
        if self.reduce_scatter_embeddings:  # megatron-core transposes the embeddings before it scatters them
            tokens_SB = tokens_SB.t()
        return super().forward(tokens_SB)


class OutputHead(ColumnLinear):
    """An untied output head; only its weight is used, by `losses` and `RecycleGPT.logits`."""

    def __init__(self, vocab_size: int, padded_vocab: int, width: int, mesh: Mesh, config: ModelParallelConfig) -> None:
        super().__init__(width, {"": padded_vocab}, mesh, config)
        self.vocab_size = vocab_size


def padded_vocabulary(vocab_size: int, multiple: int, tensor_size: int) -> int:
    """Rows of the embedding over all tensor ranks: the vocabulary rounded up to a multiple of `multiple` on each of them."""
    unit = multiple * tensor_size
    return -(-vocab_size // unit) * unit
