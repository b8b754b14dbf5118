"""Which files a DeepSpeed folder has, what layout their names say, and whether any of them is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.sources import shorten

_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
_PARTITIONED = re.compile(r"^zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
_OPTIMIZER = re.compile(r"^(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_LAYER = re.compile(r"^layer_(\d+)(?:-model_(\d+))?-model_states\.pt$")
_EXPERTS = re.compile(r"^(layer_\d+_)?expert_\d+_.*_states\.pt$|^expp_rank_\d+_.*_states\.pt$")
_LATEST = "latest"


@dataclass(frozen=True)
class Inventory:
    """The files of one checkpoint. A model-parallel rank is stage x tensor + tensor rank."""

    folder: Path
    tensor: int
    pipeline: int
    data: int
    """Ranks that ZeRO partitions over; 1 where no file says."""
    partitioned: bool
    """Whether weights are partitioned too (ZeRO 3)."""
    model: dict[tuple[int, int], str]
    """model_states by (model-parallel rank, data rank); data rank 0 alone but for ZeRO 3."""
    optimizer: dict[tuple[int, int], str]
    """optim_states likewise; empty where the optimizer saves with the model (ZeRO 0) or its files are not there."""
    layers: dict[int, str]
    """A pipeline's weights by model-parallel rank."""

    @property
    def model_parallel(self) -> int:
        """Ranks that hold different parts of the model."""
        return self.tensor * self.pipeline

    @property
    def files(self) -> list[str]:
        """All of them."""
        return [*self.model.values(), *self.optimizer.values(), *self.layers.values()]


def find_tag(folder: Path) -> Path | None:
    """The folder with the files: the one named, or the one that its `latest` names. None where there is none.

    Raises CheckpointError where there are several and no `latest`, and where `latest` names none.
    """
    if _is_tag(folder):
        return folder
    if not folder.is_dir():
        return None
    tags = sorted(child.name for child in folder.iterdir() if child.is_dir() and _is_tag(child))
    if not tags:
        return None
    latest = folder / _LATEST
    if not latest.is_file():
        if len(tags) == 1:
            return folder / tags[0]
        raise CheckpointError(f"{folder}: {len(tags)} checkpoints of DeepSpeed and no {_LATEST}: name {shorten(tags)}")
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest}: cannot be read ({error})") from None
    if tag not in tags:
        raise CheckpointError(f"{latest}: names {tag!r}, which is not there; there are {shorten(tags)}")
    return folder / tag


def take_inventory(folder: Path) -> Inventory:
    """Sorts the files of a checkpoint by rank. Raises CheckpointError that lists what is missing or contradictory."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    experts = [name for name in names if _EXPERTS.match(name)]
    if experts:
        raise CheckpointError(f"{folder}: mixtures of experts are not supported: {shorten(experts)}")
    whole = {(int(m.group(1)), 0): m.group(0) for m in map(_MODEL.match, names) if m}
    parts = {(int(m.group(2)), int(m.group(1))): m.group(0) for m in map(_PARTITIONED.match, names) if m}
    if whole and parts:
        raise CheckpointError(
            f"{folder}: files of two saves: {shorten([*whole.values()])} and, of ZeRO 3, {shorten([*parts.values()])}"
        )
    found = [m for m in map(_OPTIMIZER.match, names) if m]
    if len({m.group(1) for m in found}) > 1:
        raise CheckpointError(f"{folder}: files of two saves: optimizer states with and without bf16_ in their names")
    optimizer = {(int(m.group(3)), int(m.group(2))): m.group(0) for m in found}
    model = whole or parts
    if not model:
        raise CheckpointError(f"{folder}: mp_rank_00_model_states.pt is missing, and so are all others of the kind")
    ranks = 1 + max(rank for rank, _ in model.keys() | optimizer.keys())
    data = 1 + max(rank for _, rank in model.keys() | optimizer.keys())
    layers, tensor, pipeline = _layers(folder, names, ranks)
    wanted = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks) if not parts and (rank, 0) not in model]
    for rank in range(ranks):
        for replica in range(data):
            prefix = f"zero_pp_rank_{replica}_mp_rank_{rank:02d}"
            if parts and (rank, replica) not in model:
                wanted.append(f"{prefix}_model_states.pt")
            if (optimizer or parts) and (rank, replica) not in optimizer:
                bf16 = "bf16_" if found and found[0].group(1) else ""
                wanted.append(f"{bf16}{prefix}_optim_states.pt")
    if wanted:
        raise CheckpointError(
            f"{folder}: missing of {ranks} model-parallel x {data} data ranks: {shorten(wanted)}; copy all files of the save"
        )
    return Inventory(folder, tensor, pipeline, data, bool(parts), model, optimizer, layers)


def _layers(folder: Path, names: list[str], ranks: int) -> tuple[dict[int, str], int, int]:
    """Layer files by model-parallel rank, and the tensor and pipeline degrees. Raises CheckpointError."""
    found = {(int(m.group(1)), int(m.group(2) or 0)): m.group(0) for m in map(_LAYER.match, names) if m}
    if not found:
        return {}, ranks, 1
    pipeline, tensor = (1 + max(key[axis] for key in found) for axis in (0, 1))
    absent = [
        f"layer_{stage:02d}-model_{rank:02d}-model_states.pt"
        for stage in range(pipeline)
        for rank in range(tensor)
        if (stage, rank) not in found
    ]
    if absent:
        raise CheckpointError(f"{folder}: missing of {pipeline} stages x {tensor} tensor ranks: {shorten(absent)}")
    if pipeline * tensor != ranks:
        raise CheckpointError(
            f"{folder}: layers ({pipeline}) x tensor ranks ({tensor}) != mp_rank files ({ranks}): a file is missing, or the "
            "pipeline is not of this package, whose stages are one layer each"
        )
    return {stage * tensor + rank: name for (stage, rank), name in found.items()}, tensor, pipeline


def _is_tag(folder: Path) -> bool:
    return any(
        pattern.match(path.name)
        for path in folder.glob("*_states.pt")
        for pattern in (_MODEL, _PARTITIONED, _OPTIMIZER, _LAYER)
    )
