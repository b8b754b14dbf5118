"""RecycleGPT: a LLaMA-type decoder with a recycle module. One class is used for training, conversion and decoding.

Activations are [S, B, D], sequence first, as megatron-core's sequence parallelism needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.model.acceptance import EvaluationSums
from recycle_ds.model.block import Block
from recycle_ds.model.layers import OutputHead, VocabEmbedding, padded_vocabulary, parallel_config
from recycle_ds.model.losses import DraftColumns, HeadShard, LossSettings, evaluation_sums, training_losses
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.recycle import RecycleModule, StepKeysValues
from recycle_ds.model.rope import Rotary
from recycle_ds.model.stages import partition
from recycle_ds.parallel.mesh import Mesh

Result = TypeVar("Result")


class RecycleGPT(nn.Module):
    """Backbone, recycle module and the head they share; with pipeline parallelism, the part of one stage.

    The first stage has the embedding, the last one the final norm, the head and the recycle module.
    """

    def __init__(
        self,
        config: ModelConfig,
        recycle: RecycleConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint_blocks: bool = False,
        loss_chunk: int = 1024,
        seq_length: int | None = None,
        blocks: range | None = None,
    ) -> None:
        """seq_length (default: max_positions) decides attention's cost when blocks are distributed over pipeline stages.
        blocks: those of this stage, to be distributed in another way.

        Raises ConfigError when there are more pipeline stages than blocks, and for taps beyond the last block.
        """
        super().__init__()
        recycle.check_taps(config.layers)
        assert config.vocab_size is not None, "model.vocab_size must be set before a model is built"
        self.config, self.recycle_config = config, recycle
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.recycle_layers = recycle.layers
        self.draft_ids: Tensor | None = None
        """The draft vocabulary when decoding, ascending token ids; None for the complete vocabulary."""
        self.unnamed_ids: tuple[int, ...] = ()
        """Ids within vocab_size that the tokenizer has no token for. Decoding never samples them."""
        self.int8 = False
        """Whether decoding rounds the weights of products to int8."""
        self.checkpoint_blocks, self.mesh = checkpoint_blocks, mesh
        megatron = parallel_config(mesh, dtype)
        padded = padded_vocabulary(config.vocab_size, config.vocab_multiple, mesh.tensor.size)
        if blocks is None:
            length = seq_length or config.max_positions
            blocks = partition(config, recycle, length, mesh.pipeline.size)[mesh.pipeline.rank]
        last = mesh.last_stage
        self.embedding: VocabEmbedding | None = None
        # the last stage needs a copy for a tied head and for the recycle module's input
        if mesh.first_stage or (last and (config.tied_embeddings or recycle.layers)):
            self.embedding = VocabEmbedding(config.vocab_size, padded, config.hidden, mesh, megatron)
        self.rotary = Rotary(config.dim_per_head, config.max_positions, config.rope)
        # named by their index in the full model, on every stage
        unrotated = config.rope.unrotated_layers
        self.blocks = nn.ModuleDict(
            {str(index): Block(config, mesh, megatron, dtype, rotated=index not in unrotated) for index in blocks}
        )
        self.final_norm = RMSNorm(config.hidden, config.norm_epsilon, mesh, dtype) if last else None
        self.head: OutputHead | None = None
        if last and not config.tied_embeddings:
            self.head = OutputHead(config.vocab_size, padded, config.hidden, mesh, megatron)
        self.recycle: RecycleModule | None = None
        if last and recycle.layers:
            self.recycle = RecycleModule(recycle, config, mesh, megatron, dtype)
        first_block = min(blocks, default=config.layers)
        self.received_taps = sum(tap < first_block for tap in recycle.taps)
        """Tapped states that earlier pipeline stages send along with the residual stream."""
        rows = padded // mesh.tensor.size
        first = rows * mesh.tensor.rank
        self.shard = HeadShard(first, max(0, min(config.vocab_size - first, rows)), mesh.tensor, mesh.sequence)
        self.loss_settings = LossSettings(recycle, self.shard, mesh.ulysses, loss_chunk)

    @property
    def depth(self) -> int:
        """Number of unrolled steps of the recycle module; 0 without a module."""
        return self.recycle_config.depth if self.recycle_config.layers else 0

    @property
    def loss_count(self) -> int:
        """Number of losses that `train_losses` returns."""
        return 1 + self.depth * (2 if self.recycle_config.confidence else 1)

    def train_on_drafts(self, ids: Tensor) -> None:
        """Restricts the module's losses and drafts to a draft vocabulary. ids: ascending, on the model's device."""
        self.draft_ids = ids
        self.loss_settings.restrict(DraftColumns.of(ids, self.vocab_size, self.shard))

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head [V_local, D], or of the embedding if tied. Only on the last pipeline stage."""
        holder = self.embedding if self.head is None else self.head
        assert holder is not None, "only the last pipeline stage has a head"
        return holder.weight

    def forward(self, method: Callable[..., Result], *inputs: Any) -> Result:
        """Returns `method(*inputs)`. For `train_losses`, `evaluate` and `run_stage`, which are what other code calls.

        All passes go through it because ZeRO 3 gathers the head's weight in a hook on the root module's call."""
        return method(*inputs)

    def train_losses(
        self, batch: Batch, scales: Tensor, received: Tensor | None = None, *, through: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weighted total loss (scalar, differentiable) and the unweighted sums over rows [loss_count], in nats: the
        backbone's cross entropy, the module's objective by depth, the confidence layer's loss by depth if it has one.

        scales: [K+1], the weight of one target's loss in the total, by depth (see `training.batches`). received: see
        `run_stage`; needed on the last of several pipeline stages, the only one with losses. through: DeepSpeed's engine
        around this model, whose call its own backward pass expects. Collective over the tensor and the ulysses axis."""
        root = self if through is None else through
        losses: tuple[Tensor, Tensor] = root(self._train_losses, batch, scales, received)
        return losses

    def evaluate(self, batch: Batch, received: Tensor | None = None) -> EvaluationSums:
        """Losses and acceptance of a batch; acceptance is agreement with the backbone's own argmax, not with the data.

        received: see `run_stage`; needed on the last of several pipeline stages, the only one that can evaluate. Collective
        over the tensor and the ulysses axis."""
        sums: EvaluationSums = self(self._evaluate, batch, received)
        return sums

    def run_stage(self, batch: Batch, received: Tensor | None = None) -> Tensor:
        """What a pipeline stage before the last sends to the next one: the residual stream, and in the last dimension
        after it the tapped states so far, [S, B, (1 + taps) D].

        received: what the previous stage has sent [S, B, (1 + received_taps) D]; None on the first stage."""
        states: Tensor = self(self._run_stage, batch, received)
        return states

    def _train_losses(self, batch: Batch, scales: Tensor, received: Tensor | None) -> tuple[Tensor, Tensor]:
        states = self.states(batch, received)
        confidence = None if self.recycle is None else self.recycle.confidence
        return training_losses(states, batch.targets_KBS, scales, self.head_weight, self.loss_settings, confidence)

    @torch.no_grad()
    def _evaluate(self, batch: Batch, received: Tensor | None) -> EvaluationSums:
        states, drafts = self.states(batch, received), self.loss_settings.drafts
        if drafts is None and self.draft_ids is not None:
            drafts = DraftColumns.of(self.draft_ids, self.vocab_size, self.shard)
        return evaluation_sums(states, batch.targets_KBS, self.head_weight, self.loss_settings, drafts)

    def _run_stage(self, batch: Batch, received: Tensor | None) -> Tensor:
        hidden, taps = self._backbone(batch, AttentionMask(batch.documents_BS, single=batch.single), received)
        return torch.cat((hidden, *taps), dim=-1) if taps else hidden

    def states(self, batch: Batch, received: Tensor | None = None) -> list[Tensor]:
        """h and r^1..r^K, each [S, B, D]. On the last pipeline stage only, which needs `received` (see `run_stage`)."""
        mask = AttentionMask(batch.documents_BS, single=batch.single)
        hidden, taps = self._backbone(batch, mask, received)
        return [hidden, *self._recycled(batch, mask, hidden, taps)]

    def _backbone(self, batch: Batch, mask: AttentionMask, received: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The states after this stage, final norm included on the last one, and the tapped ones up to here, [S, B, D]
        each. They have no graph under `frozen_backbone`."""
        taps: list[Tensor] = []
        frozen = self.recycle_config.gradient == "frozen_backbone"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if received is None:
                assert self.embedding is not None
                x = self.embedding(batch.tokens_BS.t())
            elif self.received_taps:
                x, *taps = received.split(self.config.hidden, dim=-1)
            else:
                x = received
            rotary = self.rotary(batch.positions_BS.t(), x.dtype)
            mask.prepare(x.dtype)
            for index, block in self.blocks.items():
                if self.checkpoint_blocks and torch.is_grad_enabled():
                    x, _ = checkpoint(block, x, rotary, mask, use_reentrant=False)
                else:
                    x, _ = block(x, rotary, mask)
                if int(index) in self.recycle_config.taps:
                    taps.append(x)
            return x if self.final_norm is None else self.final_norm(x), taps

    def _recycled(self, batch: Batch, mask: AttentionMask, hidden: Tensor, taps: list[Tensor]) -> list[Tensor]:
        """The module's states r^1..r^K, each [S, B, D]; an empty list without a module."""
        if self.recycle is None:
            return []
        assert self.embedding is not None
        joint = self.recycle_config.gradient == "joint"
        state = hidden if joint else hidden.detach()
        tapped = tuple(tap if joint else tap.detach() for tap in taps)
        states = []
        earlier: StepKeysValues = ()
        for step in range(1, self.depth + 1):
            embedded = self.embedding(batch.inputs_KBS[step].t())
            # positions restart at each packed document; step k runs up to k - 1 positions past its end, but not past the table
            positions = (batch.positions_BS.t() + step - 1).clamp_max(self.max_positions - 1)
            rotary = self.rotary(positions, hidden.dtype)
            embedded = embedded if joint else embedded.detach()
            visible = mask.at_step(step).prepare(hidden.dtype)
            arguments = (state, embedded, rotary, visible, earlier, tapped if step == 1 else ())
            if self.checkpoint_blocks and torch.is_grad_enabled():
                state, earlier = checkpoint(self.recycle, *arguments, use_reentrant=False)
            else:
                state, earlier = self.recycle(*arguments)
            states.append(state)
        return states

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """States h [T, B, D] of sequences that start at position 0, in one pass. For models without pipeline parallelism."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        documents = torch.zeros_like(tokens_BT)
        batch = Batch(tokens_BT, positions, documents, tokens_BT[None], tokens_BT[None])
        return self._backbone(batch, AttentionMask(documents, single=True), None)[0]

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """fp32 logits [T, B, V] without vocabulary padding, gathered over the tensor axis. Collective over that axis."""
        logits = F.linear(hidden_TBD, self.head_weight).float()
        axis = self.shard.axis
        if axis.size > 1:
            parts = [torch.empty_like(logits) for _ in range(axis.size)]
            dist.all_gather(parts, logits.contiguous(), group=axis.group)
            logits = torch.cat(parts, dim=-1)
        return logits[..., : self.vocab_size]
