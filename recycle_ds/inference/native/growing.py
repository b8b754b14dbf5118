"""Growing trees of drafts in one call of the compiled kernels: see c/grow.h. Shapes: N trees, D width, V token ids."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.native.heads import ChoiceStruct, NativeHead
from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.native.places import BLOCK
from recycle_ds.inference.native.stack import NativeStack
from recycle_ds.inference.native.stack_structs import StepStruct

_POINTER, _INTEGER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_LINE, _SLOTS, _BLOCKS = 64, 256, 64


class _GrowerStruct(ctypes.Structure):
    """`Grower` in c/grow.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("stack", "head", "embedding", "confidence")),
        ("bias", _DOUBLE),
        ("branch", _INTEGER),
    )


class _TreeStruct(ctypes.Structure):
    """`Growing` in c/grow.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("index", "limit", "width")),
        ("floor", _DOUBLE),
        ("layered", _INTEGER),
        ("factor", ctypes.c_float),
        ("table", _INTEGER),
        ("keys", _POINTER),
        ("ends", _POINTER),
        *((name, _INTEGER) for name in ("end_count", "depth", "count")),
        *((name, _POINTER) for name in ("ids", "parents", "confidences", "chances", "expanded", "number")),
        *((name, _INTEGER) for name in ("beam", "first")),
    )


@dataclass(frozen=True)
class Root:
    """From where a tree grows, and how far; see `speculation.tree.GrowingTree`."""

    blocks: Sequence[int]
    """Of the sequence's cache."""
    index: int
    """Position of the latest known token; the nodes that get children take the slots after it."""
    limit: int
    width: int
    floor: float
    end_ids: Sequence[int]
    factor: float = 1.0
    """What logits are multiplied by."""
    keys: Sequence[int] = ()
    """Of the random numbers by depth, see `noise.key`, 0 for none; empty: none at any depth."""
    layered: bool = True
    """Whether confidences are those of the module's confidence layer, if it has one."""


@dataclass(frozen=True)
class Grown:
    """A tree: of its nodes 1, 2, ... token ids, parents (0: the root), confidences, and their products along the path."""

    depth: int
    ids: list[int]
    parents: list[int]
    confidences: list[float]
    chances: list[float]


class NativeGrower:
    """The recycle module and the head of its drafts as one call for trees of any depth."""

    def __init__(
        self,
        stack: NativeStack,
        head: NativeHead,
        embedding_VD: Tensor,
        confidence: torch.nn.Linear | None,
        branch: int,
    ) -> None:
        """stack: the module's, of a single tensor rank. embedding_VD: bf16. confidence: its confidence layer. branch: most
        children of a node."""
        assert embedding_VD.dtype == torch.bfloat16 and embedding_VD.is_contiguous()
        self._kernels, self._stack, self._head = kernels(), stack, head
        self._count = min(branch, head.allowed)
        layer = None if confidence is None else confidence.weight.detach()[0].float().contiguous()
        bias = 0.0 if confidence is None or confidence.bias is None else float(confidence.bias.detach())
        self._kept = (embedding_VD, layer)
        self._grower = _GrowerStruct(
            None, head.address, embedding_VD.data_ptr(), None if layer is None else layer.data_ptr(), bias, self._count
        )
        self._room: _Room | None = None

    def grow(self, states_ND: Tensor, roots: Sequence[Root], keys_values: Tensor) -> list[Grown]:
        """Grows a tree from each root. states_ND: the module's states of the latest known tokens, bf16. keys_values: the
        module's cache, as of `NativeStack`. Writes the entries of all nodes that got children."""
        assert states_ND.dtype == torch.bfloat16 and all(root.limit >= 1 and root.width >= 1 for root in roots)
        states_ND = states_ND.contiguous()
        count, limit = len(roots), max(root.limit for root in roots)
        rows = max(sum(root.width for root in roots), count)
        nodes = self._count * (1 + max((root.limit - 1) * root.width for root in roots))
        slots = max(root.index + 1 + (root.limit - 1) * root.width for root in roots)
        longest = -(-slots // _SLOTS) * _SLOTS  # texts grow: not new room for every token
        threads, blocks = torch.get_num_threads(), sum(len(root.blocks) for root in roots)
        blocks = -(-blocks // _BLOCKS) * _BLOCKS
        ends = max(len(root.end_ids) for root in roots)
        room = self._room
        if room is None or not room.holds(count, rows, limit, nodes, longest, threads, blocks, ends):
            old = (0,) * 8 if room is None else room.sizes
            sizes = (count, rows, limit, nodes, longest, threads, blocks, ends)
            room = self._room = _Room(self._stack, self._head, self._count, *map(max, zip(sizes, old, strict=True)))
        self._grower.stack = self._stack.address_for(keys_values)
        room.describe(roots, states_ND)
        self._kernels.recycle_ds_grow(
            ctypes.addressof(self._grower), ctypes.addressof(room.trees), count, ctypes.addressof(room.choice),
            ctypes.addressof(room.step),
        )  # fmt: skip
        return [room.grown(i) for i in range(count)]


class _Room:
    """Arrays for calls up to a size."""

    def __init__(self, stack: NativeStack, head: NativeHead, found: int, *sizes: int) -> None:
        """found: children of a node. sizes: trees, rows of a beam, depth, nodes of a tree, slots of a sequence, threads, blocks
        of all sequences, and end tokens of a request."""
        self.sizes = sizes
        count, rows, limit, nodes, longest, threads, blocks, ends = sizes
        width = stack.width
        self._nodes, self._limit, self._ends = nodes, limit, max(ends, 1)
        self.trees = (_TreeStruct * count)()
        self._integers, self._numbers = (_INTEGER * (count * nodes * 4))(), (_DOUBLE * (count * nodes * 2))()
        self._keys, self._end_ids = (_INTEGER * (count * limit))(), (_INTEGER * (count * self._ends))()
        of_rows = (_INTEGER * (rows * (found + 1)))(), (ctypes.c_float * (rows * (found + 1)))()
        places = (ctypes.c_int32 * (rows * (limit + 6)))()
        self._blocks = (ctypes.c_int32 * max(blocks, 1))()
        vectors = torch.empty(3, rows, width, dtype=torch.bfloat16)
        inputs = (_POINTER * 2)(vectors[0].data_ptr(), vectors[1].data_ptr())
        ids, numbers = ctypes.addressof(of_rows[0]), ctypes.addressof(of_rows[1])
        self.choice = ChoiceStruct(
            rows, found, threads, None, numbers + 4 * rows * found, ids, numbers, None, ids + 8 * rows * found
        )
        at = [
            ctypes.addressof(places) + 4 * rows * i for i in range(6)
        ]  # slots, positions, lowest, table, paths, moved
        self.step = StepStruct(
            rows, longest, threads, -1, limit // BLOCK + 2, at[0], at[1], at[2], at[3], ctypes.addressof(self._blocks), at[4],
            at[5], ctypes.addressof(inputs), None, None, vectors[2].data_ptr(), None,
        )  # fmt: skip
        choice_room = torch.empty(head.room(self.choice) + _LINE, dtype=torch.uint8)
        step_room = torch.empty(stack.room(self.step) + _LINE, dtype=torch.uint8)
        self.choice.room, self.step.room = _aligned(choice_room), _aligned(step_room)
        self._kept = (of_rows, places, vectors, inputs, choice_room, step_room)
        for i, tree in enumerate(self.trees):
            integers = ctypes.addressof(self._integers) + 8 * 4 * nodes * i
            doubles = ctypes.addressof(self._numbers) + 8 * 2 * nodes * i
            tree.ids, tree.parents = integers, integers + 8 * nodes
            tree.expanded, tree.number = integers + 16 * nodes, integers + 24 * nodes
            tree.confidences, tree.chances = doubles, doubles + 8 * nodes
            tree.ends = ctypes.addressof(self._end_ids) + 8 * self._ends * i

    def holds(self, *sizes: int) -> bool:
        """Whether a call of some sizes fits."""
        return all(own >= size for own, size in zip(self.sizes, sizes, strict=True))

    def describe(self, roots: Sequence[Root], states_ND: Tensor) -> None:
        """Writes what a call reads. The caller keeps the states until it has run."""
        self.choice.x = states_ND.data_ptr()
        self.choice.threads = self.step.threads = torch.get_num_threads()
        table = 0
        for i, (tree, root) in enumerate(zip(self.trees, roots, strict=False)):  # there may be room for more
            tree.index, tree.limit, tree.width, tree.floor = root.index, root.limit, root.width, root.floor
            tree.layered, tree.factor, tree.table = root.layered, root.factor, table
            tree.keys = None
            if root.keys:
                first = i * self._limit
                self._keys[first : first + root.limit] = list(root.keys[: root.limit])
                tree.keys = ctypes.addressof(self._keys) + 8 * first
            tree.end_count = len(root.end_ids)
            self._end_ids[i * self._ends : i * self._ends + len(root.end_ids)] = list(root.end_ids)
            self._blocks[table : table + len(root.blocks)] = list(root.blocks)
            table += len(root.blocks)

    def grown(self, i: int) -> Grown:
        """What the latest call found from the i-th root."""
        count, integers, numbers = self.trees[i].count, 4 * self._nodes * i, 2 * self._nodes * i
        parents, chances = integers + self._nodes, numbers + self._nodes
        return Grown(
            self.trees[i].depth, self._integers[integers : integers + count], self._integers[parents : parents + count],
            self._numbers[numbers : numbers + count], self._numbers[chances : chances + count],
        )  # fmt: skip


def _aligned(room: Tensor) -> int:
    return -(-room.data_ptr() // _LINE) * _LINE
