"""The parameters of one model-parallel rank, by name: their shapes, and where weights and moments are stored."""

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
# A pipeline rank has a single layer, its stage, which contains the model.
_STAGE = re.compile(r"^(?:\d+\.)?model\.")


@dataclass(frozen=True)
class Stored:
    """One parameter. The concatenated spans of a kind are the flattened local tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: Mapping[str, tuple[Span, ...]]
    master: bool
    """Whether the weight is the optimizer's master weight, rather than the one that the model computes with."""


def read_rank(files: PtFiles, inventory: Inventory, rank: int) -> dict[str, Stored]:
    """Returns all parameters of a model-parallel rank, as fp32 master weights if there are any. Raises CheckpointError."""
    model = inventory.model[rank, 0]
    found = _module_weights(files, inventory, rank)
    if inventory.partitioned:
        found |= _frozen_partitions(files, inventory, rank)
    if inventory.optimizer:
        groups = [_shapes(group, files, model) for group in files.get(model, ("param_shapes",), list)]
        found |= _masters(files, inventory, rank, groups)
    # names in layer files have no layer number, those of the optimizer do; after stripping, the later one (the master) wins
    found = {_model_name(name, inventory): stored for name, stored in found.items()}
    aliases = files.find(model, ("shared_params",))
    for alias, holder in (aliases if isinstance(aliases, dict) else {}).items():
        if _model_name(str(holder), inventory) in found:
            found[_model_name(str(alias), inventory)] = found[_model_name(str(holder), inventory)]
    return found


def _model_name(name: str, inventory: Inventory) -> str:
    """Returns a parameter's name in the model, without the prefixes of wrappers."""
    name = _WRAPPERS.sub("", name)
    return _STAGE.sub("", name) if inventory.layers else name


def _module_weights(files: PtFiles, inventory: Inventory, rank: int) -> dict[str, Stored]:
    """Returns the weights that the model computes with. ZeRO 3 saves empty tensors instead, which are skipped."""
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
    """Returns ZeRO 3's frozen weights: each data rank's model file has a partition, in the model's dtype."""
    first = inventory.model[rank, 0]
    shapes = files.find(first, ("frozen_param_shapes",))
    if shapes is None:  # saved without frozen weights
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
                f"{where}: {len(groups)} parameter groups, but {counts[:8]} weight groups by data rank"
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
    """Returns a rank's flat weight tensors. Raises CheckpointError for a tensor that is not flat or not floating point."""
    found = []
    for index in range(len(files.get(file, keys, list))):
        value = files.get(file, (*keys, index), Tensor)
        if value.dim() != 1 or not value.is_floating_point():
            raise CheckpointError(
                f"{files.folder / file}: {'.'.join(map(str, keys))}.{index} has shape {list(value.shape)} and dtype "
                f"{value.dtype}: must be flat and floating point"
            )
        found.append(Flat(file, (*keys, index), value.numel()))
    return found


def _paddings(files: PtFiles, file: str, groups: int) -> list[list[int]] | None:
    """Returns the padding elements after each parameter of each group; None for releases that did not align parameters."""
    found = files.find(file, (_STATE, "param_alignment_paddings"))
    if found is None:
        return None
    complete = isinstance(found, list) and len(found) == groups
    if not complete or not all(isinstance(row, list) and all(type(n) is int and n >= 0 for n in row) for row in found):
        raise CheckpointError(
            f"{files.folder / file}: param_alignment_paddings must be lists of sizes for {groups} groups"
        )
    return [list(row) for row in found]


def _moments(files: PtFiles, spans: tuple[Span, ...], kind: str, inventory: Inventory) -> tuple[Span, ...] | None:
    """Returns the spans of a moment, laid out like its weight but in the optimizer's state; None if it is not saved."""
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
            # partitions of moments are saved with padding, those of weights may be saved without
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= span.start + span.length:
                moments.append(replace(span, keys=(*root, kind)))
                break
        else:
            return None
    return tuple(moments)


def _shapes(tree: object, files: PtFiles, file: str) -> dict[str, tuple[int, ...]]:
    """Returns shapes by name, in the file's order. Raises CheckpointError for anything else."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"{files.folder / file}: parameter shapes are a {type(tree).__name__}, not a dictionary")
    found = {}
    for name, shape in tree.items():
        if not isinstance(shape, tuple | list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(f"{files.folder / file}: the shape of {name} is {one_line(repr(shape))}, not sizes")
        found[str(name)] = tuple(shape)
    return found
