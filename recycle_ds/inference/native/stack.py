"""A stack of transformer blocks as one call: see c/stack.h. The numbers of a token do not depend on the other tokens of a call.

Inside, sums and the residual stream are fp32; what enters products, and what the cache keeps, is rounded to bf16 (with
int8 weights, what enters products to integers). Shapes: T tokens, D width, C channels of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from recycle_ds.inference.native.arena import Arena
from recycle_ds.inference.native.contents import Contents
from recycle_ds.inference.native.exchange import Exchange
from recycle_ds.inference.native.joining import NativeJoin
from recycle_ds.inference.native.library import KernelsUnavailable, kernels
from recycle_ds.inference.native.packing import PackedProduct, ProductStruct, address
from recycle_ds.inference.native.places import Places
from recycle_ds.inference.native.spans import Span, divided
from recycle_ds.inference.native.stack_structs import LayerStruct, StackStruct, StepStruct
from recycle_ds.model import RecycleGPT
from recycle_ds.model.attention import Attention
from recycle_ds.model.block import Block
from recycle_ds.model.mlp import MLP
from recycle_ds.model.norm import RMSNorm
from recycle_ds.model.rope import Rotary

_LANES = 16
_POINTER = ctypes.c_void_p


@dataclass(frozen=True)
class Join:
    """How several inputs become one: W [norm_1(a); norm_2(b); ...]."""

    norms: Sequence[nn.Module]
    projection: Tensor


def why_not_compiled(model: RecycleGPT, tensor_ranks: int, exchange: Exchange | None) -> str | None:
    """Why a model's blocks cannot run in the compiled kernels; None if they can. model: this rank's shard. exchange: of the
    tensor ranks, if they share memory."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        return f"they run on CPUs, not on {parameter.device.type}"
    if parameter.dtype != torch.bfloat16:
        return "they compute in bf16 and int8, not in fp32"
    if tensor_ranks > 1 and exchange is None:
        return f"the {tensor_ranks} tensor ranks share no memory: they are on several hosts, or /dev/shm is too small"
    for block in (*model.blocks.values(), *(() if model.recycle is None else model.recycle.blocks)):
        assert isinstance(block, Block) and isinstance(block.attention, Attention) and isinstance(block.mlp, MLP)
        ffn = len(block.mlp.gate_up.weight) // 2
        hidden = model.config.hidden
        sizes = {"hidden": hidden, "ffn": ffn, "channels of a head": block.attention.channels}
        if tensor_ranks > 1 and model.recycle is not None:  # each has some columns of the module's input
            sizes = {"a rank's share of hidden": hidden // tensor_ranks} | sizes
        for name, size in sizes.items():
            if size % _LANES:
                return f"{name} is {size}, no multiple of {_LANES}"
    try:
        kernels()
    except KernelsUnavailable as error:
        return str(error)
    return None


class NativeStack:
    """Blocks with packed weights, in bf16 or int8."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        rotary: Rotary,
        final_norm: nn.Module | None,
        join: Join | None = None,
        *,
        int8: bool = False,
        coarse: bool = False,
        arena: Arena | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """final_norm: applied to the states that leave the last block. coarse: see `PackedProduct`. arena: where packed
        weights go. exchange: of the tensor ranks whose shards the blocks are. Raises KernelsUnavailable."""
        self._kernels, self._arena, self._exchange = kernels(), arena or Arena(), exchange
        self._kept: list[object] = []
        layers = (LayerStruct * max(len(blocks), 1))(*(self._layer(block, int8, coarse) for block in blocks))
        first = blocks[0]
        assert isinstance(first, Block) and isinstance(first.attention, Attention)
        attention, norm = first.attention, first.attention_norm
        assert isinstance(norm, RMSNorm)
        self.width, self._count = len(norm.weight), len(blocks)
        norms = [] if join is None else [self._numbers(norm.weight) for norm in join.norms]
        norm_addresses = (_POINTER * max(len(norms), 1))(*norms)
        joined = ProductStruct()
        if join is not None:
            projection = PackedProduct(join.projection, int8=int8, coarse=coarse, arena=self._arena)
            self._kept.append(projection)
            joined = projection.struct
        self._kept += [layers, norm_addresses]
        self._stack = StackStruct(
            ctypes.addressof(layers), None, self._numbers(rotary.cosine), self._numbers(rotary.sine),
            None if final_norm is None else self._numbers(final_norm.weight), ctypes.addressof(norm_addresses),
            None if exchange is None else ctypes.addressof(exchange.struct), joined,
            len(blocks), len(norms), 0, self.width, attention.heads, attention.kv_heads, attention.channels,
            len(first.mlp.gate_up.weight) // 2, norm.epsilon,
        )  # fmt: skip
        self._room = torch.empty(0, dtype=torch.uint8)
        self._room_for = (0, 0, 0, 0)
        # of the latest call: its fields are written again by each one
        self._step = StepStruct()
        self._addresses = ctypes.addressof(self._stack), ctypes.addressof(self._step)
        self._inputs = (_POINTER * max(len(norms), 1))()
        self._tapped = (_POINTER * max(len(blocks), 1))()
        self._step.inputs = ctypes.addressof(self._inputs)
        self._joined_taps: tuple[int, ...] = ()
        self._joined_states = (_POINTER * 0)()

    def keep_taps(self, join: NativeJoin, taps: Sequence[int]) -> None:
        """Lets `run_in_cache` join the states of some blocks and keep what comes out behind the states. For one tensor rank."""
        assert self._exchange is None and len(taps) == join.count
        self._joined_states = (_POINTER * len(taps))()
        self._kept.append(join)
        self._joined_taps = tuple(taps)
        self._stack.joint, self._stack.joined_states = join.address, ctypes.addressof(self._joined_states)
        self._room_for = (0, 0, 0, 0)

    def _numbers(self, values: object) -> int:
        """Address of a tensor's numbers in fp32."""
        assert isinstance(values, Tensor)
        numbers = values.detach().float().contiguous()
        self._kept.append(numbers)
        return numbers.data_ptr()

    def _layer(self, block: nn.Module, int8: bool, coarse: bool) -> LayerStruct:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)
        mixing = attention.query_key_value
        packed = partial(PackedProduct, int8=int8, coarse=coarse, arena=self._arena)
        products = (
            packed(mixing.weight, mixing.bias),
            packed(attention.output.weight),
            packed(mlp.gate_up.weight, gated=True),
            packed(mlp.down.weight),
        )
        self._kept.append(products)
        assert products[2].struct.gated and len({product.struct.limit == 0 for product in products}) == 1
        head_norms = [
            None if norm is None else self._numbers(norm.weight) for norm in (attention.query_norm, attention.key_norm)
        ]
        norms = [self._numbers(norm.weight) for norm in (block.attention_norm, block.mlp_norm)]
        return LayerStruct(*norms, *head_norms, *(product.struct for product in products), int(attention.rotated))

    def __call__(
        self,
        inputs: Sequence[Tensor],
        spans: Sequence[Span],
        keys_values: Tensor,
        *,
        shift: int = 0,
        added: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the blocks over the tokens of some spans, and stores their keys and values.

        inputs: bf16 [T, D] each; several are joined. keys_values: the cache [layers, slots, 2 H_kv, C]; a block of 16 slots
        has an order of its own, see c/attention.h. shift: what to add to a slot's position for its rotary position. added:
        bf16 [T, D], added to the joined inputs; of tensor ranks, this rank's columns. taps: numbers of blocks whose states
        are returned too. Returns the states and the tapped ones, bf16 [T, D] each. Raises PeerLost.
        """
        tokens = sum(span.count for span in spans)
        if self._exchange is not None and tokens > (most := self._exchange.struct.room // (4 * self.width)):
            return self._in_groups(divided(spans, most), inputs, keys_values, shift, added, taps)
        places = Places(spans)
        inputs = [one.contiguous() for one in inputs]
        added = None if added is None else added.contiguous()
        states = torch.empty(tokens, self.width, dtype=torch.bfloat16)
        tapped = torch.empty(len(taps), tokens, self.width, dtype=torch.bfloat16)
        step = self._step
        for number, one in enumerate(inputs):
            self._inputs[number] = one.data_ptr()
        step.added, step.contents = address(added), None
        self._describe(places, shift, states)
        self._tap(taps, [one.data_ptr() for one in tapped])
        late = self._kernels.recycle_ds_run(self.address_for(keys_values), self._addresses[1])
        if self._exchange is not None and late >= 0:
            raise self._exchange.lost(late)
        return states, list(tapped)

    def run_in_cache(self, contents: Contents, spans: Sequence[Span], keys_values: Tensor, *, shift: int = 0) -> Tensor:
        """The same with what the cache contains as inputs, and of one tensor rank. Returns the states, bf16 [T, D].

        A stack of one input reads the embeddings of its tokens, and keeps its states, with taps joined as `keep_taps` says.
        One of two, the recycle module, reads the states of the slots before its tokens' and their embeddings."""
        assert self._exchange is None and self._stack.pieces in (0, 2)
        assert not self._stack.pieces or all(span.first > 0 for span in spans), "nothing precedes the first slot"
        states = torch.empty(sum(span.count for span in spans), self.width, dtype=torch.bfloat16)
        if taps := self._joined_taps:
            tapped = torch.empty(len(taps), *states.shape, dtype=torch.bfloat16)
            addresses = [tapped.data_ptr() + 2 * number * states.numel() for number in range(len(taps))]
            for number, one in enumerate(addresses):
                self._joined_states[number] = one
            self._tap(taps, addresses)
        else:
            self._step.tapped = None
        self._step.contents = ctypes.addressof(contents.struct)
        places = Places(spans)
        self._describe(places, shift, states)
        self._kernels.recycle_ds_run(self.address_for(keys_values), self._addresses[1])
        return states

    def _tap(self, taps: Sequence[int], addresses: Sequence[int]) -> None:
        """Tells which blocks' states to write, and where."""
        self._step.tapped = ctypes.addressof(self._tapped) if taps else None
        if taps:
            self._tapped[:] = [None] * len(self._tapped)
            for layer, one in zip(taps, addresses, strict=True):
                self._tapped[layer] = one

    def address_for(self, keys_values: Tensor) -> int:
        """Address of the stack, which uses a cache until the next call."""
        self._stack.cache, self._stack.layer_size = keys_values.data_ptr(), keys_values.stride(0)
        return self._addresses[0]

    def room(self, step: StepStruct) -> int:
        """Bytes that steps of a size need."""
        needed: int = self._kernels.recycle_ds_room(self._addresses[0], ctypes.addressof(step))
        return needed

    def _describe(self, places: Places, shift: int, states: Tensor) -> None:
        """Writes the fields of the step, and makes room for it. The caller keeps the arguments until it has run."""
        step = self._step
        size = (len(states), places.longest, torch.get_num_threads(), places.copied)
        step.tokens, step.longest, step.threads, step.copied = size
        room = self._room_for
        if size[0] > room[0] or size[1] > room[1] or size[2] > room[2] or size[3] > room[3]:
            self._make_room(size)
        step.shift = shift
        step.slots, step.positions = places.slots.buffer_info()[0], places.positions.buffer_info()[0]
        step.lowest, step.table = places.lowest.buffer_info()[0], places.table.buffer_info()[0]
        step.blocks = places.blocks.buffer_info()[0]
        step.paths = None if places.paths is None else places.paths.buffer_info()[0]
        step.moved = places.moved.buffer_info()[0]
        step.states = states.data_ptr()

    def _make_room(self, size: tuple[int, int, int, int]) -> None:
        """Makes room for steps up to this size and those before it."""
        tokens, longest, threads, copied = (max(pair) for pair in zip(size, self._room_for, strict=True))
        self._room_for = (tokens, longest, threads, copied)
        largest = StepStruct(tokens, longest, threads, 0, copied)
        self._room = torch.empty(self.room(largest) + 64, dtype=torch.uint8)
        self._step.room = -(-self._room.data_ptr() // 64) * 64

    def _in_groups(
        self,
        groups: Sequence[Sequence[Span]],
        inputs: Sequence[Tensor],
        keys_values: Tensor,
        shift: int,
        added: Tensor | None,
        taps: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """A call in parts, each of which fits into the ranks' memory. No number depends on the division."""
        found, first = [], 0
        for spans in groups:
            part = slice(first, first + sum(span.count for span in spans))
            own = None if added is None else added[part]
            found.append(self([one[part] for one in inputs], spans, keys_values, shift=shift, added=own, taps=taps))
            first = part.stop
        states = torch.cat([one for one, _ in found])
        return states, [torch.cat(tapped) for tapped in zip(*(tapped for _, tapped in found), strict=True)]
