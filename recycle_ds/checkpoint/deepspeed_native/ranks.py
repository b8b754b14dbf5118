"""The parameters of one model-parallel rank, by name: their shapes, and where weights and moments lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recycle_ds.checkpoint.deepspeed_native.files import Inventory
from recycle_ds.checkpoint.deepspeed_native.loading import Keys, PtFiles, Span
from recycle_ds.checkpoint.deepspeed_native.partitions import Flat, Shapes, cut_each, cut_groups
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.torch_archives import one_line
from recycle_ds.parallel.partitions import partition_range

MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = "optimizer_state_dict"
_GROUPS, _SUBGROUPS = (_STATE, "single_partition_of_fp32_groups"), (_STATE, "fp32_flat_groups")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# A stage is the pipeline's only layer on its rank, and the model is in it.
_STAGE = re.compile(r"^(?:\d+\.)?model\.")


@dataclass(frozen=True)
class Stored:
    """One parameter: spans by kind, whose elements laid end to end are the flattened local tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: Mapping[str, tuple[Span, ...]]
    master: bool
    """Whether the weight is the one that the optimizer updates, rather than what the model computes with."""


def read_rank(files: PtFiles, inventory: Inventory, rank: int) -> dict[str, Stored]:
    """All parameters of a model-parallel rank, fp32 masters where there are any. Raises CheckpointError."""
    model = inventory.model[rank, 0]
    found = _module_weights(files, inventory, rank)
    if inventory.partitioned:
        found |= _frozen_partitions(files, inventory, rank)
    if inventory.optimizer:
        groups = [_shapes(group, files, model) for group in files.get(model, ("param_shapes",), list)]
        found |= _masters(files, inventory, rank, groups)
    # a layer's names lack the number that the optimizer's have; of two with one plain name the later one, the master, stays
    found = {_plain(name, inventory): stored for name, stored in found.items()}
    aliases = files.find(model, ("shared_params",))
    for alias, holder in (aliases if isinstance(aliases, dict) else {}).items():
        if _plain(str(holder), inventory) in found:
            found[_plain(str(alias), inventory)] = found[_plain(str(holder), inventory)]
    return found


def _plain(name: str, inventory: Inventory) -> str:
    """A parameter's name in the model, without what wrappers put before it."""
    name = _WRAPPERS.sub("", name)
    return _STAGE.sub("", name) if inventory.layers else name


def _module_weights(files: PtFiles, inventory: Inventory, rank: int) -> dict[str, Stored]:
    """The weights that the model computes with; ZeRO 3 leaves empty tensors in their place."""
    file = inventory.model[rank, 0]
    keys: Keys = ("module",)
    listed = files.find(file, ("buffer_names",))
    buffers = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    if rank in inventory.layers:
        file, keys = inventory.layers[rank], ()
    found = {}
    for name, value in files.get(file, keys, dict).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and name not in buffers:
            span = Span(file, (*keys, name), 0, value.numel())
            found[str(name)] = Stored(tuple(value.shape), value.dtype, {"weight": (span,)}, False)
    return found


def _frozen_partitions(files: PtFiles, inventory: Inventory, rank: int) -> dict[str, Stored]:
    """ZeRO 3's weights that no optimizer updates: a partition in each data rank's model file, in the model's type."""
    first = inventory.model[rank, 0]
    shapes = files.find(first, ("frozen_param_shapes",))
    if shapes is None:  # saved without them
        return {}
    found = {}
    for name, shape in _shapes(shapes, files, first).items():
        elements, spans, dtype = torch.Size(shape).numel(), [], torch.float32
        for replica in range(inventory.data):
            keys, file = ("frozen_param_fragments", name), inventory.model[rank, replica]
            fragment = files.get(file, keys, Tensor)
            length, dtype = len(partition_range(elements, inventory.data, replica)), fragment.dtype
            if fragment.numel() < length:
                raise CheckpointError(
                    f"{files.folder / file}: {name} has {fragment.numel()} of {length} elements (data rank {replica} of "
                    f"{inventory.data})"
                )
            if length:
                spans.append(Span(file, keys, 0, length))
        if elements:
            found[name] = Stored(shape, dtype, {"weight": tuple(spans)}, False)
    return found


def _masters(files: PtFiles, inventory: Inventory, rank: int, groups: Sequence[Shapes]) -> dict[str, Stored]:
    where = str(files.folder / inventory.optimizer[rank, 0])
    owners = [inventory.optimizer[rank, replica] for replica in range(inventory.data)]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if inventory.partitioned:
        partitions = [_flats(files, file, _SUBGROUPS) for file in owners]
        weights = cut_each(shapes, partitions, where)
    else:
        by_rank = [_flats(files, file, _GROUPS) for file in owners]
        counts = [len(flats) for flats in by_rank]
        if set(counts) != {len(groups)}:
            raise CheckpointError(
                f"{where}: {len(groups)} groups of parameters, but by data rank {counts[:8]} of weights"
            )
        weights = cut_groups(groups, _paddings(files, owners[0], len(groups)), list(zip(*by_rank, strict=True)), where)
    found = {}
    for name, spans in weights.items():
        kinds = {"weight": spans} | {
            kind: moments for kind in MOMENTS if (moments := _moments(files, spans, kind, inventory)) is not None
        }
        if spans:
            dtype = files.get(spans[0].file, spans[0].keys, Tensor).dtype
            found[name] = Stored(shapes[name], dtype, kinds, True)
    return found


def _flats(files: PtFiles, file: str, keys: Keys) -> list[Flat]:
    """A rank's flat tensors of weights. Raises CheckpointError for others."""
    found = []
    for index in range(len(files.get(file, keys, list))):
        value = files.get(file, (*keys, index), Tensor)
        if value.dim() != 1 or not value.is_floating_point():
            raise CheckpointError(
                f"{files.folder / file}: {'.'.join(map(str, keys))}.{index} has shape {list(value.shape)} and type "
                f"{value.dtype}; weights are flat and of a floating type"
            )
        found.append(Flat(file, (*keys, index), value.numel()))
    return found


def _paddings(files: PtFiles, file: str, groups: int) -> list[list[int]] | None:
    """Elements of padding after each parameter of each group; None from releases that aligned none."""
    found = files.find(file, (_STATE, "param_alignment_paddings"))
    if found is None:
        return None
    whole = isinstance(found, list) and len(found) == groups
    if not whole or not all(isinstance(row, list) and all(type(n) is int and n >= 0 for n in row) for row in found):
        raise CheckpointError(f"{files.folder / file}: param_alignment_paddings are not those of {groups} groups")
    return [list(row) for row in found]


def _moments(files: PtFiles, spans: tuple[Span, ...], kind: str, inventory: Inventory) -> tuple[Span, ...] | None:
    """A moment lies as its weight does, in the optimizer's own state; None where there is none."""
    moments = []
    for span in spans:
        index = span.keys[-1]
        roots: tuple[Keys, ...] = (
            (_STATE, "base_optimizer_state", "state", index),
            (_STATE, "base_optimizer_state", index),
        )
        if inventory.partitioned:
            roots = ((_STATE, _STATE, "state", index),)
        for root in roots:
            value = files.find(span.file, (*root, kind))
            # partitions of moments keep the padding that those of weights may have lost
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= span.start + span.length:
                moments.append(replace(span, keys=(*root, kind)))
                break
        else:
            return None
    return tuple(moments)


def _shapes(tree: object, files: PtFiles, file: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the file's order. Raises CheckpointError for anything else."""
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{files.folder / file}: shapes of parameters are a {type(tree).__name__}, not a dictionary"
        )
    found = {}
    for name, shape in tree.items():
        if not isinstance(shape, tuple | list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(f"{files.folder / file}: the shape of {name} is {one_line(repr(shape))}")
        found[str(name)] = tuple(shape)
    return found
