"""DeepSpeed's native folders as a source of canonical tensors."""

from __future__ import annotations

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
from recycle_ds.checkpoint.sources import shorten

_TOKENIZER = "tokenizer.json"


class DeepSpeedSource:
    """See `Source`. Names, shapes, ranks and steps are compared when it is opened; tensors are read one at a time."""

    kind = "deepspeed"

    def __init__(self, folder: Path, config: Path | None = None, *, verify: bool = True) -> None:
        """Opens the folder of a tag. config: the run's config.yaml or the model's config.json, where none lies near. verify:
        whether to compare all checksums first; without, that is left to `verify`.

        Raises CheckpointError that lists what is missing, does not agree, or does not fit the configuration.
        """
        self.folder = folder
        self._inventory = inventory = take_inventory(folder)
        self._files = PtFiles(folder)
        if verify:
            self.verify()
        self.step = _check_agreement(self._files, inventory)
        self.layout = _layout(self._files, inventory)
        """Ranks at save, as far as the folder tells: tensor, pipeline, data (those of a sequence counted too), world_size."""
        ranks = [read_rank(self._files, inventory, rank) for rank in range(inventory.model_parallel)]
        described = describe(inventory, [{name: one.shape for name, one in own.items()} for own in ranks], config)
        if not inventory.optimizer:
            ranks = [
                with_optimizer(self._files, inventory.model[rank, 0], stored, described.groups[rank])
                for rank, stored in enumerate(ranks)
            ]
        _check(inventory, ranks, described)
        check_order(self._files, inventory, described.shards)
        self._ranks, self._shards = ranks, described.shards
        self.model, self.recycle, self.seq_length = described.model, described.recycle, described.seq_length
        self.shapes: Mapping[str, tuple[int, ...]] = described.shapes
        self.tokenizer = _tokenizer(folder, described.tokenizer)
        self.notes: tuple[str, ...] = (*described.notes, *self._rounded())
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
        if split != axis:  # split another way at save: read all, then cut
            whole = self._gather(shards, kind, 0, self.shapes[name][split])
            return whole.narrow(axis, start, length).contiguous()
        return self._gather(shards, kind, start, start + length)

    def _gather(self, shards: tuple[Shard, ...], kind: str, start: int, end: int) -> Tensor:
        """Rows [start, end) along the axis that the shards split."""
        parts = []
        for shard in shards:
            piece = shard.piece
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                local = piece.local_start + first - piece.start
                parts.append(self._rows(self._stored(shard), kind, piece.axis, local, last - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shards[0].piece.axis)

    def _rows(self, stored: Stored, kind: str, axis: int, start: int, length: int) -> Tensor:
        """Rows of a local parameter: of the first axis those alone, of another cut out of the whole."""
        spans, shape = stored.spans[kind], stored.shape
        row = torch.Size(shape[1:]).numel()
        if axis == 0:
            return self._files.read(spans, start * row, length * row).view(length, *shape[1:])
        return self._files.read(spans, 0, shape[0] * row).view(shape).narrow(axis, start, length).contiguous()

    def _stored(self, shard: Shard) -> Stored:
        return self._ranks[shard.rank][shard.parameter]

    def _rounded(self) -> list[str]:
        """Says so where weights are not the optimizer's own but what the model computed with."""
        types: dict[str, int] = {}
        for row in self._shards.values():
            stored = self._stored(row[0])
            if not stored.master and stored.dtype != torch.float32:
                name = str(stored.dtype).removeprefix("torch.")
                types[name] = types.get(name, 0) + 1
        return [
            f"{count} of {len(self._shards)} tensors are in {name}, as the model computed with them: there are no fp32 masters "
            "of them in the folder"
            for name, count in types.items()
        ]


def _check_agreement(files: PtFiles, inventory: Inventory) -> int:
    """Compares what the files say of the save's ranks and steps with their names. Returns the step. Raises CheckpointError."""
    steps: dict[int, str] = {}
    for file in inventory.model.values():
        steps.setdefault(files.get(file, ("global_steps",), int), file)
        said = {
            "model-parallel ranks": (files.find(file, ("mp_world_size",)), inventory.model_parallel),
            "tensor ranks": (files.find(file, ("checkpoint_parallel_dimensions", "tp_degree")), inventory.tensor),
            "pipeline stages": (files.find(file, ("checkpoint_parallel_dimensions", "pp_degree")), inventory.pipeline),
        }
        if inventory.optimizer:
            said["data ranks"] = (files.find(file, ("dp_world_size",)), inventory.data)
        _compare(files.folder / file, said)
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
    said = files.find(inventory.model[0, 0], ("dp_world_size",))  # ZeRO 0 leaves no other trace of them
    data = inventory.data if inventory.optimizer else said
    if type(data) is not int or data < 1:
        return layout
    return {"world_size": inventory.model_parallel * data, **layout, "data": data}


def _compare(path: Path, said: Mapping[str, tuple[object, int]]) -> None:
    for what, (inside, by_name) in said.items():
        if inside is not None and (type(inside) is not int or inside != by_name):
            raise CheckpointError(
                f"{path}: was saved by {one_line(inside)} {what}, but by the names there are files of {by_name}: files are "
                "missing, or are left from another save"
            )


def _check(inventory: Inventory, ranks: list[dict[str, Stored]], described: Described) -> None:
    """Every parameter of every rank is there in its shape and in one type, and nothing besides. Raises CheckpointError."""
    missing, extra, other = [], [], []
    for rank, (stored, expected) in enumerate(zip(ranks, described.expected, strict=True)):
        where = f"mp_rank_{rank:02d} " if len(ranks) > 1 else ""
        missing += [f"{where}{name}" for name in sorted(expected.keys() - stored.keys())]
        extra += [f"{where}{one_line(name)}" for name in sorted(stored.keys() - expected.keys() - described.spare)]
        other += [
            f"{where}{name} {list(stored[name].shape)} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & stored.keys())
            if stored[name].shape != tuple(expected[name])
        ]
    if not missing:
        for name, row in described.shards.items():
            types = {str(ranks[shard.rank][shard.parameter].dtype) for shard in row}
            if len(types) > 1:
                other.append(f"{name} is {' and '.join(sorted(types))}")
    faults = [
        f"{title}: {shorten(names)}"
        for title, names in (("missing", missing), ("not in this model", extra), ("other shape", other))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{inventory.folder}: its parameters (tensor ranks {inventory.tensor}, stages {inventory.pipeline}) are not those "
            f"of the configuration: {'; '.join(faults)}"
        )


def _tokenizer(folder: Path, configured: Path | None) -> Path | None:
    """The tokenizer.json that the run's configuration names, else one beside the files or up to two folders above them."""
    above = Path(os.path.abspath(folder))
    places = [place / _TOKENIZER for place in [above, *above.parents][:3]]
    return next((path for path in [*([configured] if configured else []), *places] if path.is_file()), None)
