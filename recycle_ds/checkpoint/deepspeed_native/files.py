"""Lists the files of a DeepSpeed folder, derives the layout from their names, and reports missing ones."""

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
    """The files of one checkpoint. A model-parallel rank is stage * tensor + tensor rank."""

    folder: Path
    tensor: int
    pipeline: int
    data: int
    """Number of data ranks that ZeRO partitions over; 1 if the file names do not show it."""
    partitioned: bool
    """Whether weights are partitioned too (ZeRO 3)."""
    model: dict[tuple[int, int], str]
    """model_states files by (model-parallel rank, data rank); only data rank 0 unless ZeRO 3."""
    optimizer: dict[tuple[int, int], str]
    """optim_states files likewise; empty if the optimizer is saved with the model (ZeRO 0) or its files are absent."""
    layers: dict[int, str]
    """Weight files of a pipeline, by model-parallel rank."""

    @property
    def model_parallel(self) -> int:
        """Number of ranks that hold different parts of the model."""
        return self.tensor * self.pipeline

    @property
    def files(self) -> list[str]:
        """Names of all files."""
        return [*self.model.values(), *self.optimizer.values(), *self.layers.values()]


def find_tag(folder: Path) -> Path | None:
    """Returns the tag folder with the files: `folder`, or the one that `folder`/latest names. None if there is no checkpoint.

    Raises CheckpointError if there are several tags and no `latest`, and if `latest` names one that does not exist.
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
        raise CheckpointError(
            f"{folder}: {len(tags)} DeepSpeed checkpoints and no {_LATEST} file: choose one of {shorten(tags)}"
        )
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest}: cannot be read ({error})") from None
    if tag not in tags:
        raise CheckpointError(f"{latest}: names {tag!r}, which does not exist; found {shorten(tags)}")
    return folder / tag


def take_inventory(folder: Path) -> Inventory:
    """Assigns the files of a checkpoint to ranks. Raises CheckpointError that lists missing or contradictory files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    experts = [name for name in names if _EXPERTS.match(name)]
    if experts:
        raise CheckpointError(f"{folder}: mixture-of-experts models are not supported: {shorten(experts)}")
    full = {(int(m.group(1)), 0): m.group(0) for m in map(_MODEL.match, names) if m}
    partitioned = {(int(m.group(2)), int(m.group(1))): m.group(0) for m in map(_PARTITIONED.match, names) if m}
    if full and partitioned:
        raise CheckpointError(
            f"{folder}: files of two saves: {shorten([*full.values()])} and, of ZeRO 3, {shorten([*partitioned.values()])}"
        )
    found = [m for m in map(_OPTIMIZER.match, names) if m]
    if len({m.group(1) for m in found}) > 1:
        raise CheckpointError(f"{folder}: files of two saves: optimizer states with and without bf16_ in their names")
    optimizer = {(int(m.group(3)), int(m.group(2))): m.group(0) for m in found}
    model = full or partitioned
    if not model:
        raise CheckpointError(f"{folder}: mp_rank_00_model_states.pt and all other model_states files are missing")
    ranks = 1 + max(rank for rank, _ in model.keys() | optimizer.keys())
    data = 1 + max(rank for _, rank in model.keys() | optimizer.keys())
    layers, tensor, pipeline = _layers(folder, names, ranks)
    absent = [
        f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks) if not partitioned and (rank, 0) not in model
    ]
    for rank in range(ranks):
        for replica in range(data):
            prefix = f"zero_pp_rank_{replica}_mp_rank_{rank:02d}"
            if partitioned and (rank, replica) not in model:
                absent.append(f"{prefix}_model_states.pt")
            if (optimizer or partitioned) and (rank, replica) not in optimizer:
                bf16 = "bf16_" if found and found[0].group(1) else ""
                absent.append(f"{bf16}{prefix}_optim_states.pt")
    if absent:
        raise CheckpointError(
            f"{folder}: missing for {ranks} model-parallel x {data} data ranks: {shorten(absent)}; copy all files of the save"
        )
    return Inventory(folder, tensor, pipeline, data, bool(partitioned), model, optimizer, layers)


def _layers(folder: Path, names: list[str], ranks: int) -> tuple[dict[int, str], int, int]:
    """Returns layer files by model-parallel rank, and the tensor and pipeline degrees. Raises CheckpointError."""
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
        raise CheckpointError(f"{folder}: missing for {pipeline} stages x {tensor} tensor ranks: {shorten(absent)}")
    if pipeline * tensor != ranks:
        raise CheckpointError(
            f"{folder}: layers ({pipeline}) x tensor ranks ({tensor}) != mp_rank files ({ranks}): a file is missing, or the "
            "pipeline was not saved by this package, which saves each stage as one layer"
        )
    return {stage * tensor + rank: name for (stage, rank), name in found.items()}, tensor, pipeline


def _is_tag(folder: Path) -> bool:
    return any(
        pattern.match(path.name)
        for path in folder.glob("*_states.pt")
        for pattern in (_MODEL, _PARTITIONED, _OPTIMIZER, _LAYER)
    )
