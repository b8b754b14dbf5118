"""RecycleGPT: a LLaMA-type decoder with a recycle module. One class is used for training, conversion and decoding.

Activations are [S, B, D], sequence first, as megatron-core's sequence parallelism needs them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.model.block import Block
from recycle_ds.model.evaluation import EvaluationSums, judge
from recycle_ds.model.layers import OutputHead, VocabEmbedding, padded_vocabulary, parallel_config
from recycle_ds.model.losses import (
    DraftColumns,
    FusedLosses,
    HeadShard,
    confidence_losses,
    head_predictions,
    training_losses,
)
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.recycle import RecycleModule, StepKeysValues
from recycle_ds.model.rope import Rotary
from recycle_ds.model.stages import partition
from recycle_ds.model.ulysses import gather_sequence
from recycle_ds.parallel.mesh import Mesh


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
        self.trained_drafts: DraftColumns | None = None
        """The draft vocabulary that the module's losses are restricted to, see `train_on_drafts`."""
        self.counted_tokens: Tensor | None = None
        """Bool [V] on the CPU: the targets that count for the module's losses; None if all do."""
        self.unnamed_ids: tuple[int, ...] = ()
        """Ids within vocab_size that the tokenizer has no token for. Decoding never samples them."""
        self.fused_losses: FusedLosses | None = None
        """The losses' compiled functions, if training compiles."""
        self.int8 = False
        """Whether decoding rounds the weights of products to int8."""
        self.checkpoint_blocks, self.loss_chunk = checkpoint_blocks, loss_chunk
        self.mesh = mesh
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

    @property
    def depth(self) -> int:
        """Number of unrolled steps of the recycle module; 0 without a module."""
        return self.recycle_config.depth if self.recycle_config.layers else 0

    @property
    def losses(self) -> int:
        """Number of losses that a forward pass in training returns."""
        return 1 + self.depth * (2 if self.recycle_config.confidence else 1)

    def train_on_drafts(self, ids: Tensor) -> None:
        """Restricts the module's losses and drafts to a draft vocabulary. ids: ascending, on the model's device."""
        self.draft_ids = ids
        self.trained_drafts = DraftColumns.of(ids, self.vocab_size, self.shard)
        if self.recycle_config.objective == "cross_entropy":
            self.counted_tokens = self.trained_drafts.table.cpu()

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head [V_local, D], or of the embedding if tied. Only on the last pipeline stage."""
        holder = self.embedding if self.head is None else self.head
        assert holder is not None, "only the last pipeline stage has a head"
        return holder.weight

    def forward(
        self, batch: Batch, scales: Tensor | None, received: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor] | EvaluationSums:
        """Training: returns the weighted total loss (scalar) and the unweighted sums over rows [losses]: the backbone's cross
        entropy first, then the recycle module's objective by depth, then the confidence layer's loss by depth if it has one.

        scales: [K+1], the weight of one target's loss in the total, by depth (see `training.batches`). scales=None
        evaluates the batch and returns EvaluationSums; it goes through this method because ZeRO-3 gathers weights in
        the root's forward.

        Every pipeline stage except the first takes `received` [S, B, D] from the previous stage; every stage except the
        last returns such a tensor. Tapped states follow in the last dimension, [S, B, (1 + received_taps) D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and scales is not None):
            states = self.states(batch, received)
        if self.final_norm is None:
            return states[0]
        if scales is None:
            return self._evaluate(batch, states)
        total, sums, agrees = training_losses(
            states,
            batch.targets_KBS,
            scales,
            self.head_weight,
            self.shard,
            self.mesh,
            self.recycle_config,
            chunk=self.loss_chunk,
            draft=self.trained_drafts,
            fused=self.fused_losses,
        )
        return (total, sums) if agrees is None else self._with_confidence(total, sums, agrees, batch, states, scales)

    def _with_confidence(
        self, total: Tensor, sums: Tensor, agrees_KN: Tensor, batch: Batch, states: list[Tensor], scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds the confidence layer's loss, whose gradient stops at the states, to the total, and its sums [K] to the sums."""
        assert self.recycle is not None and self.recycle.confidence is not None
        rows = [state.detach() for state in states[1:]]
        if self.shard.scattered:  # every tensor rank sees all rows, so that the layer's gradient is complete
            rows = [gather_from_sequence_parallel_region(row, False, self.shard.axis.group) for row in rows]
        logits_KN = torch.stack([self.recycle.confidence(row).flatten() for row in rows])
        valid_KN = batch.targets_KBS[1 : len(states)].transpose(1, 2).flatten(1) >= 0
        own, own_sums = confidence_losses(logits_KN, agrees_KN, valid_KN, scales[1:])
        return total + own, torch.cat((sums, own_sums.to(sums.dtype)))

    def states(self, batch: Batch, received: Tensor | None = None) -> list[Tensor]:
        """h and r^1..r^K, each [S, B, D]. A pipeline stage before the last returns only its output for the next stage."""
        mask = AttentionMask(batch.documents_BS, single=batch.single)
        frozen = self.recycle_config.gradient == "frozen_backbone"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden, taps = self._backbone(batch, mask, received)
        if self.final_norm is None:
            return [torch.cat((hidden, *taps), dim=-1) if taps else hidden]
        return [hidden, *self._recycled(batch, mask, hidden, taps)]

    def evaluate(self, batch: Batch) -> EvaluationSums:
        """Losses and acceptance of a batch; acceptance is agreement with the backbone's own argmax, not with the data.

        Only for models without pipeline parallelism.
        """
        sums = self(batch, None)
        assert isinstance(sums, EvaluationSums)
        return sums

    @torch.no_grad()
    def _evaluate(self, batch: Batch, states: list[Tensor]) -> EvaluationSums:
        targets = batch.targets_KBS[: len(states)].transpose(1, 2)
        results = [
            self._predictions(depth, state.flatten(0, 1), target.flatten())
            for depth, (state, target) in enumerate(zip(states, targets, strict=True))
        ]
        loss = torch.stack([total for total, _ in results])
        best = torch.stack([tokens for _, tokens in results]).view(targets.shape)
        axis = self.mesh.ulysses
        if axis.size > 1:  # drafts at the end of a part are compared with predictions of the next rank
            dist.all_reduce(loss, group=axis.group)
            targets = gather_sequence(targets.transpose(0, 1), axis).transpose(0, 1)
            best = gather_sequence(best.transpose(0, 1), axis).transpose(0, 1)
        counted = targets >= 0
        if self.trained_drafts is not None:  # other targets have no cross entropy
            counted[1:] &= self.trained_drafts.table[targets[1:].clamp_min(0)]
        return judge(loss, targets, best, counted)

    def _predictions(self, depth: int, states_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross entropy, and the likeliest token of each row [N]: of the draft vocabulary at depths above 0.

        The loss is that of the complete vocabulary, unless the module is trained on the draft vocabulary alone."""
        weight, shard, chunk = self.head_weight, self.shard, self.loss_chunk
        draft = self.trained_drafts
        if depth == 0 or (draft is None and self.draft_ids is None):
            return head_predictions(states_ND, weight, targets_N, shard, chunk=chunk)
        if draft is not None:
            rows, part = draft.head(weight, shard)
            loss, best_N = head_predictions(states_ND, rows, draft.number(targets_N), part, chunk=chunk)
            return loss, draft.ids[best_N]
        assert self.draft_ids is not None
        loss, _ = head_predictions(states_ND, weight, targets_N, shard, chunk=chunk)
        draft = DraftColumns.of(self.draft_ids, self.vocab_size, shard)
        rows, part = draft.head(weight, shard)
        return loss, draft.ids[head_predictions(states_ND, rows, draft.number(targets_N), part, chunk=chunk)[1]]

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

    def _backbone(self, batch: Batch, mask: AttentionMask, received: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The states after this stage, final norm included on the last one, and the tapped ones up to here."""
        taps: list[Tensor] = []
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
