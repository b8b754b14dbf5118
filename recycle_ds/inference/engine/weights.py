"""A model's weights laid out for decoding: packed once for products of few rows, projections fused.

In bf16 and int8 on CPUs, blocks, heads and the recycle module run in compiled kernels (see native/), which also sum over
tensor ranks that share memory.
Everything else is computed here, in PyTorch's operations: oneDNN can keep a weight in the order in which its kernel for few
rows reads it, which takes half the time of the plain call on products of one to sixteen rows. Under tensor parallelism
every rank holds its shard; outputs of row-parallel products are summed over the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recycle_ds.inference.engine.cache import Tokens
from recycle_ds.inference.engine.collectives import Collectives
from recycle_ds.inference.engine.device.products import Product
from recycle_ds.inference.engine.heads import Head, head_of
from recycle_ds.inference.native.contents import Contents
from recycle_ds.inference.native.growing import NativeGrower
from recycle_ds.inference.native.joining import NativeJoin
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.native.stack import Join, NativeStack, why_not_compiled
from recycle_ds.inference.native.torch_products import Norm, TorchJoin
from recycle_ds.inference.speculation.tree import BRANCH
from recycle_ds.model import RecycleGPT
from recycle_ds.model.attention import Attention
from recycle_ds.model.block import Block
from recycle_ds.model.mlp import MLP
from recycle_ds.model.rope import CosineSine, Rotary, rotate

ENTRY_SHIFT = -1
"""The module's entry (h_p, E x_{p+1}) lies in the slot of its token, p + 1, and has the rotary position p."""


class Attend(Protocol):
    """Attention of the step's tokens over the cache of one layer."""

    def __call__(self, layer: int, query_THC: Tensor, keys_values_THC: Tensor, /) -> Tensor:
        """Stores the tokens' keys and values [T, 2 H_kv, C] and attends with their queries [T, H, C]. Returns [T, H * C]."""


class Candidates(Protocol):
    """See `NativeHead.candidates`."""

    def __call__(
        self, states_RD: Tensor, count: int, inverse_temperature_R: Tensor | None, keys_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and log probabilities [R, K]."""


class RowProduct:
    """A row-parallel product: the sum of the ranks' products, plus the residual."""

    def __init__(self, weight: Tensor, ranks: Collectives | None, *, int8: bool = False) -> None:
        self._product, self._ranks = Product(weight, int8=int8), ranks

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, D of this rank] to [T, E], plus the residual [T, E]."""
        if self._ranks is None:
            return self._product(x, residual)
        return self._ranks.sum(self._product(x)) + residual


class Layer:
    """One transformer block over a step's tokens, without padding."""

    def __init__(self, block: nn.Module, ranks: Collectives | None, *, int8: bool = False) -> None:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)
        self._heads, self._kv_heads, self._channels = attention.heads, attention.kv_heads, attention.channels
        self._attention_norm, self._mlp_norm = Norm(block.attention_norm), Norm(block.mlp_norm)
        projection = attention.query_key_value
        self._query_key_value = Product(projection.weight, projection.bias, int8=int8)
        self._rotated = attention.rotated
        norms = (attention.query_norm, attention.key_norm)
        self._head_norms = [Norm(norm) for norm in norms if norm is not None]
        self._output = RowProduct(attention.output.weight, ranks, int8=int8)
        self._gate_up = Product(mlp.gate_up.weight, int8=int8)
        self._down = RowProduct(mlp.down.weight, ranks, int8=int8)

    def __call__(self, x_TD: Tensor, rotary: CosineSine, attend: Attend, layer: int) -> Tensor:
        """[T, D] to [T, D]."""
        mixed = self._query_key_value(self._attention_norm(x_TD))
        mixed = mixed.view(len(x_TD), self._heads + 2 * self._kv_heads, self._channels)
        rotated = mixed[:, : self._heads + self._kv_heads]
        if self._head_norms:
            parts = rotated.split((self._heads, self._kv_heads), dim=1)
            rotated = torch.cat([norm(part) for norm, part in zip(self._head_norms, parts, strict=True)], dim=1)
        if self._rotated:
            rotated = rotate(rotated, rotary)
        keys_values = torch.cat((rotated[:, self._heads :], mixed[:, self._heads + self._kv_heads :]), dim=1)
        x_TD = self._output(attend(layer, rotated[:, : self._heads], keys_values), x_TD)
        gate, up = self._gate_up(self._mlp_norm(x_TD)).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up, x_TD)


class Module:
    """The recycle module: W [norm_h(h); norm_e(e)], its blocks and its final norm."""

    def __init__(self, model: RecycleGPT, ranks: Collectives | None, *, compiled: bool) -> None:
        module, int8 = model.recycle, model.int8 or compiled  # drafts are only guesses
        assert module is not None
        self._rotary = model.rotary
        self.stack: NativeStack | None = None
        """The module without taps, where it is compiled."""
        taps = module.tap_projection
        self.join_taps: Callable[[Sequence[Tensor]], Tensor] | None = None
        """What tapped states [T, D] each add to this rank's columns of the module's input [T, `tapped_width`]."""
        if taps is not None:
            norms = list(module.tap_norms)
            if compiled:
                self.join_taps = NativeJoin(norms, taps.weight, int8=int8)
            else:
                self.join_taps = TorchJoin(norms, Product(taps.weight, int8=int8))
        self._width, self.tapped_width = model.config.hidden, 0 if taps is None else len(taps.weight)
        self._ranks = ranks
        exchange = None if ranks is None else ranks.exchange
        self.confidence_layer = module.confidence
        if compiled:
            join = Join((module.hidden_norm, module.embedding_norm), module.projection.weight)
            blocks, final = list(module.blocks), module.final_norm
            self.stack = NativeStack(blocks, model.rotary, final, join, int8=True, coarse=True, exchange=exchange)
            return
        self._hidden_norm, self._embedding_norm = Norm(module.hidden_norm), Norm(module.embedding_norm)
        self._projection = Product(module.projection.weight, int8=int8)
        self._layers = [Layer(block, ranks, int8=int8) for block in module.blocks]
        self._final_norm = Norm(module.final_norm)

    def __call__(self, hidden_TD: Tensor, embedded_TD: Tensor, tokens: Tokens) -> Tensor:
        """The states r [T, D] of entries made from h (or the r before) and the embedding of the next token.

        hidden_TD: with what `join_taps` returned for h in `tapped_width` further columns."""
        tapped_TE = None
        if hidden_TD.shape[1] > self._width:
            hidden_TD, tapped_TE = hidden_TD[:, : self._width], hidden_TD[:, self._width :].contiguous()
        if self.stack is not None:
            inputs = (hidden_TD, embedded_TD)
            return self.stack(inputs, tokens.spans, tokens.keys_values, shift=tokens.shift, added=tapped_TE)[0]
        pair = torch.cat((self._hidden_norm(hidden_TD), self._embedding_norm(embedded_TD)), dim=-1)
        x_TD = self._projection(pair, tapped_TE)
        if self._ranks is not None:  # every rank has some of the columns
            x_TD = torch.cat(list(self._ranks.gather(x_TD)), dim=-1)
        rotary, attend = _angles(self._rotary, tokens, x_TD.dtype), tokens.attention()
        for layer, block in enumerate(self._layers):
            x_TD = block(x_TD, rotary, attend, layer)
        return self._final_norm(x_TD)

    def confidence(self, states_TD: Tensor) -> Tensor | None:
        """The probability that the draft of each state is accepted [T], by the module's confidence layer; None without one."""
        return None if self.confidence_layer is None else self.confidence_layer(states_TD)[:, 0].float().sigmoid()

    def read_cache(self, contents: Contents, spans: Sequence[Span], keys_values: Tensor) -> Tensor:
        """The states r [T, D] of tokens that the cache has, with the states of the slots before theirs; if it is compiled."""
        assert self.stack is not None
        return self.stack.run_in_cache(contents, spans, keys_values, shift=ENTRY_SHIFT)


class StageWeights:
    """The weights of this rank: its shard of its pipeline stage. Only the last stage has heads."""

    def __init__(self, model: RecycleGPT, ranks: Collectives | None = None, *, compiled: bool = True) -> None:
        """Packs the weights of a model, which is not changed. ranks: that hold it together by tensor parallelism. compiled:
        whether the compiled kernels are used where they can be."""
        ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.rotary = model.rotary
        self._embedding, self._ranks = model.embedding, ranks
        self.embeddings = 0 if model.embedding is None else len(model.embedding.weight)
        """Rows of this rank's embedding."""
        exchange = None if ranks is None else ranks.exchange
        self.why_not_compiled = (
            why_not_compiled(model, 1 if ranks is None else ranks.size, exchange)
            if compiled
            else "they are switched off"
        )
        """Why the compiled kernels are not used; None if they are."""
        self.final_norm: Norm | None = None
        self._layers: list[Layer] = []
        self._stack: NativeStack | None = None
        blocks, compiled = list(model.blocks.values()), self.why_not_compiled is None
        if compiled and blocks:
            self._stack = NativeStack(blocks, model.rotary, model.final_norm, int8=model.int8, exchange=exchange)
        else:
            self._layers = [Layer(block, ranks, int8=model.int8) for block in blocks]
        self.head: Head | None = None
        self.draft_head: Head | None = None
        self.draft_ids: Tensor | None = None
        """The token ids of `draft_head`, ascending; None for those of `head`."""
        self.likeliest: Callable[[Tensor], list[int]] | None = None
        """From states [R, D] to the token id of each with the highest logit by `head`, among equal ones the lowest; None
        without the compiled kernels or with several tensor ranks."""
        self.candidates: Candidates | None = None
        """`NativeHead.candidates` of `draft_head`; None where `likeliest` is."""
        self.module: Module | None = None
        self.grower: NativeGrower | None = None
        """Grows trees of drafts in one call; None where `likeliest` is, or without a recycle module."""
        if model.final_norm is not None:
            self.final_norm = Norm(model.final_norm)
            self.head = self.draft_head = head_of(model, compiled)[1]
        if model.recycle is not None:
            self.module = Module(model, ranks, compiled=compiled)
            if model.draft_ids is not None:
                self.draft_ids, self.draft_head = head_of(model, compiled, model.draft_ids)
        if self.head is not None and self.draft_head is not None and ranks is None:
            full, drafts = self.head.native, self.draft_head.native
            self.likeliest = None if full is None else self.head.likeliest
            self.candidates = None if drafts is None else drafts.candidates
            if drafts is not None and drafts.allowed > 0 and self.module is not None and self.module.stack is not None:
                assert self._embedding is not None, "the module reads embeddings"
                weight, layer = self._embedding.weight.detach(), self.module.confidence_layer
                self.grower = NativeGrower(self.module.stack, drafts, weight, layer, BRANCH)
        attention = _any_block(model).attention
        self._taps = [number for number, index in enumerate(model.blocks) if int(index) in model.recycle_config.taps]
        self.layers = len(blocks)
        self._whole = ranks is None and model.mesh.first_stage and model.final_norm is not None
        """Whether this rank has all of the model."""
        join = None if self.module is None else self.module.join_taps
        if self._stack is not None and self._whole and isinstance(join, NativeJoin):
            self._stack.keep_taps(join, self._taps)
        self.module_layers = 0 if model.recycle is None else len(model.recycle.blocks)
        self.kv_heads, self.channels, self.width = attention.kv_heads, attention.channels, model.config.hidden
        self.received_width = (1 + model.received_taps) * self.width
        """Columns of the states from the stage before: tapped ones follow the residual stream."""
        self.kept_width = 0 if self.module is None else self.width + self.module.tapped_width
        """Columns that the cache keeps of every position for the recycle module."""
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device

    def embed(self, ids_T: Tensor) -> Tensor:
        """Embeddings [T, D] of token ids."""
        assert self._embedding is not None, "this stage has no embedding"
        weight = self._embedding.weight
        if self._ranks is None:
            return F.embedding(ids_T, weight)
        local_T = ids_T - self._embedding.vocab_start_index
        own_T = (local_T >= 0) & (local_T < len(weight))
        rows_TD = F.embedding(local_T.clamp(0, len(weight) - 1), weight).masked_fill_(~own_T[:, None], 0.0)
        return self._ranks.sum(rows_TD)

    def contents(self, ids: Tensor, states: Tensor) -> Contents | None:
        """A cache's tokens [slots] and states [slots, `kept_width`] for `run_in_cache`; None without compiled kernels, or if
        several ranks hold the model."""
        if self._stack is None or self._embedding is None or not self._whole:
            return None
        joined = 0 if self.module is None else self.module.tapped_width
        assert not len(states) or states.shape[1] == self.width + joined
        return Contents(self._embedding.weight.detach(), ids, states)

    def run_in_cache(self, contents: Contents, spans: Sequence[Span], keys_values: Tensor) -> Tensor:
        """`run` of the tokens that the cache has. Returns the states [T, D]; the cache keeps them, with their columns for
        taps."""
        assert self._stack is not None
        return self._stack.run_in_cache(contents, spans, keys_values)

    def run(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        """Runs this stage's blocks. Returns the states [T, D], after the final norm on the last stage, and with taps further
        columns: the tapped states for the next stage, or what they add to the recycle module's input."""
        taps: list[Tensor] = []
        if x_TD.shape[1] > self.width:
            x_TD, *taps = (part.contiguous() for part in x_TD.split(self.width, dim=1))
        if self._stack is not None:
            x_TD, own = self._stack((x_TD,), tokens.spans, tokens.keys_values, taps=self._taps)
            return self._with_taps(x_TD, [*taps, *own])
        rotary, attend = _angles(self.rotary, tokens, self.dtype), tokens.attention()
        for layer, block in enumerate(self._layers):
            x_TD = block(x_TD, rotary, attend, layer)
            if layer in self._taps:
                taps.append(x_TD)
        return self._with_taps(x_TD if self.final_norm is None else self.final_norm(x_TD), taps)

    def _with_taps(self, x_TD: Tensor, taps: list[Tensor]) -> Tensor:
        """The states with the columns for taps."""
        if self.final_norm is not None:
            join = None if self.module is None else self.module.join_taps
            taps = [join(taps)] if taps and join is not None else []
        return torch.cat((x_TD, *taps), dim=1) if taps else x_TD


def _angles(rotary: Rotary, tokens: Tokens, dtype: torch.dtype) -> CosineSine:
    """Cosines and sines [T, 1, C/2] of the tokens' positions."""
    cosine, sine = rotary(tokens.rotary_positions()[:, None], dtype)
    return cosine[:, 0], sine[:, 0]


def _any_block(model: RecycleGPT) -> Block:
    """A block of this stage: one of the backbone, or of the module on a last stage without any."""
    blocks = list(model.blocks.values()) or list(model.recycle.blocks if model.recycle is not None else ())
    assert blocks and isinstance(blocks[0], Block), "a stage has at least one block"
    return blocks[0]
