"""Reads DeepSpeed's native folders as a source of canonical tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from recycle_ds.checkpoint.deepspeed_native.autotp import Shard, check_order
from recycle_ds.checkpoint.deepspeed_native.files import Inventory, take_inventory
from recycle_ds.checkpoint.deepspeed_native.layouts import Described, describe
from recycle_ds.checkpoint.deepspeed_native.loading import PtFiles
from recycle_ds.checkpoint.deepspeed_native.plain_optimizer import with_optimizer
from recycle_ds.checkpoint.deepspeed_native.ranks import Stored, read_rank
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.torch_archives import one_line
from recycle_ds.checkpoint.huggingface.tensors import EMBEDDING
from recycle_ds.checkpoint.sources import shorten

_TOKENIZER = "tokenizer.json"


class DeepSpeedSource:
    """See `Source`. Names, shapes, ranks and steps are checked on opening; tensors are read one at a time."""

    kind = "deepspeed"

    def __init__(self, folder: Path, config: Path | None = None, *, verify: bool = True) -> None:
        """Opens the folder of a tag. config: the run's config.yaml or the model's config.json, if there is none nearby. verify:
        whether to compare all checksums first; if not, call `verify` before using the weights.

        Raises CheckpointError that lists what is missing, contradictory, or does not match the configuration.
        """
        self.folder = folder
        self._inventory = inventory = take_inventory(folder)
        self._files = PtFiles(folder)
        if verify:
            self.verify()
        self.step = _check_agreement(self._files, inventory)
        self.layout = _layout(self._files, inventory)
        """Ranks at save, as far as the files show: tensor, pipeline, data (including sequence-parallel ranks), world_size."""
        ranks = [read_rank(self._files, inventory, rank) for rank in range(inventory.model_parallel)]
        described = describe(inventory, [{name: one.shape for name, one in own.items()} for own in ranks], config)
        if not inventory.optimizer:
            ranks = [
                with_optimizer(self._files, inventory.model[rank, 0], stored, described.groups[rank])
                for rank, stored in enumerate(ranks)
            ]
        _check(inventory, ranks, described)
        for stored in ranks:
            _check_redundant(self._files, stored, described.redundant)
        check_order(self._files, inventory, described.shards)
        self._ranks, self._shards = ranks, described.shards
        self.model, self.recycle, self.seq_length = described.model, described.recycle, described.seq_length
        self.shapes: Mapping[str, tuple[int, ...]] = described.shapes
        self.tokenizer = _tokenizer(folder, described.tokenizer)
        self.notes: tuple[str, ...] = (*described.notes, *self._precision_notes())
        self._files.close()

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compares the checksums of this rank's share of the files. Raises CheckpointError that names the damaged ones."""
        self._files.verify(sorted(self._inventory.files)[rank::world_size])

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return name in self._shards and all(kind in self._stored(shard).spans for shard in self._shards[name])

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return self._stored(self._shards[name][0]).dtype

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        if not self.has(name, kind):
            raise CheckpointError(f"{self.folder}: no {kind} of {name}")
        shards = self._shards[name]
        if length is None:
            length = self.shapes[name][axis] - start
        split = shards[0].piece.axis
        if split != axis:  # split along another axis at save: read the full tensor, then slice
            full = self._gather(shards, kind, 0, self.shapes[name][split])
            return full.narrow(axis, start, length).contiguous()
        return self._gather(shards, kind, start, start + length)

    def _gather(self, shards: tuple[Shard, ...], kind: str, start: int, end: int) -> Tensor:
        """Returns rows [start, end) along the axis that the shards split."""
        parts = []
        for shard in shards:
            piece = shard.piece
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                local = piece.local_start + first - piece.start
                parts.append(self._rows(self._stored(shard), kind, piece.axis, local, last - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shards[0].piece.axis)

    def _rows(self, stored: Stored, kind: str, axis: int, start: int, length: int) -> Tensor:
        """Returns rows of a local parameter. Along axis 0 only these are read; along another, all are read, then sliced."""
        spans, shape = stored.spans[kind], stored.shape
        row = torch.Size(shape[1:]).numel()
        if axis == 0:
            return self._files.read(spans, start * row, length * row).view(length, *shape[1:])
        return self._files.read(spans, 0, shape[0] * row).view(shape).narrow(axis, start, length).contiguous()

    def _stored(self, shard: Shard) -> Stored:
        return self._ranks[shard.rank][shard.parameter]

    def _precision_notes(self) -> list[str]:
        """Returns notes on weights that are saved only in the dtype that the model computed with."""
        types: dict[str, int] = {}
        for row in self._shards.values():
            stored = self._stored(row[0])
            if not stored.master and stored.dtype != torch.float32:
                name = str(stored.dtype).removeprefix("torch.")
                types[name] = types.get(name, 0) + 1
        return [
            f"{count} of {len(self._shards)} tensors are in {name}, in which the model computed: the folder has no fp32 "
            "master weights for them"
            for name, count in types.items()
        ]


def _check_agreement(files: PtFiles, inventory: Inventory) -> int:
    """Compares the ranks and steps recorded in the files with the file names. Returns the step. Raises CheckpointError."""
    steps: dict[int, str] = {}
    for file in inventory.model.values():
        steps.setdefault(files.get(file, ("global_steps",), int), file)
        recorded = {
            "model-parallel ranks": (files.find(file, ("mp_world_size",)), inventory.model_parallel),
            "tensor ranks": (files.find(file, ("checkpoint_parallel_dimensions", "tp_degree")), inventory.tensor),
            "pipeline stages": (files.find(file, ("checkpoint_parallel_dimensions", "pp_degree")), inventory.pipeline),
        }
        if inventory.optimizer:
            recorded["data ranks"] = (files.find(file, ("dp_world_size",)), inventory.data)
        _compare(files.folder / file, recorded)
    if len(steps) > 1:
        shown = [f"{file} of step {step}" for step, file in sorted(steps.items())]
        raise CheckpointError(f"{files.folder}: files of several saves: {shorten(shown)}; copy all files of one save")
    for file in inventory.optimizer.values():
        counts = files.find(file, ("optimizer_state_dict", "partition_count"))
        for count in counts if isinstance(counts, list) else [counts]:
            _compare(files.folder / file, {"data ranks": (count, inventory.data)})
    return next(iter(steps))


def _layout(files: PtFiles, inventory: Inventory) -> dict[str, int]:
    layout = {"tensor": inventory.tensor, "pipeline": inventory.pipeline}
    recorded = files.find(inventory.model[0, 0], ("dp_world_size",))  # ZeRO 0 records the data ranks only here
    data = inventory.data if inventory.optimizer else recorded
    if type(data) is not int or data < 1:
        return layout
    return {"world_size": inventory.model_parallel * data, **layout, "data": data}


def _compare(path: Path, recorded: Mapping[str, tuple[object, int]]) -> None:
    for kind, (inside, by_name) in recorded.items():
        if inside is not None and (type(inside) is not int or inside != by_name):
            raise CheckpointError(
                f"{path}: was saved by {one_line(inside)} {kind}, but the file names show {by_name}: files are missing, or "
                "left over from another save"
            )


def _check(inventory: Inventory, ranks: list[dict[str, Stored]], described: Described) -> None:
    """Raises CheckpointError unless every rank has exactly the expected parameters and shapes, in one dtype per tensor."""
    missing, extra, wrong = [], [], []
    for rank, (stored, expected) in enumerate(zip(ranks, described.expected, strict=True)):
        where = f"mp_rank_{rank:02d} " if len(ranks) > 1 else ""
        missing += [f"{where}{name}" for name in sorted(expected.keys() - stored.keys())]
        extra += [f"{where}{one_line(name)}" for name in sorted(stored.keys() - expected.keys() - described.redundant)]
        wrong += [
            f"{where}{name} {list(stored[name].shape)} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & stored.keys())
            if stored[name].shape != tuple(expected[name])
        ]
    if not missing:
        for name, row in described.shards.items():
            types = {str(ranks[shard.rank][shard.parameter].dtype) for shard in row}
            if len(types) > 1:
                wrong.append(f"{name} has dtypes {' and '.join(sorted(types))}")
    problems = [
        f"{title}: {shorten(names)}"
        for title, names in (("missing", missing), ("not in this model", extra), ("wrong shape or dtype", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{inventory.folder}: parameters (tensor ranks {inventory.tensor}, stages {inventory.pipeline}) do not match the "
            f"configuration: {'; '.join(problems)}"
        )


def _check_redundant(files: PtFiles, stored: Mapping[str, Stored], redundant: frozenset[str]) -> None:
    """Raises CheckpointError for a head of its own in a model whose configuration ties it to the embedding."""
    for name in redundant & stored.keys():
        head, embedding = stored[name], stored[EMBEDDING]
        if head is embedding or head.shape != embedding.shape:
            continue
        count = math.prod(head.shape)
        left, right = (files.read(one.spans["weight"], 0, count) for one in (head, embedding))
        rounded = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)  # one may be a master weight
        if not torch.equal(left.to(rounded), right.to(rounded)):
            raise CheckpointError(
                f"{files.folder}: {name} differs from the embedding, but the configuration has tie_word_embeddings=true: "
                "set it to false there"
            )


def _tokenizer(folder: Path, configured: Path | None) -> Path | None:
    """Returns the tokenizer.json that the run's configuration names, else one in the folder or up to two folders above it."""
    above = Path(os.path.abspath(folder))
    candidates = [parent / _TOKENIZER for parent in [above, *above.parents][:3]]
    return next((path for path in [*([configured] if configured else []), *candidates] if path.is_file()), None)
