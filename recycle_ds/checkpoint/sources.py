"""The common interface to weights in every format, by canonical tensor name. All other code is independent of the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.sharding import Piece

_SHOWN = 4


class Source(Protocol):
    """The weights in a folder, and Adam's moments if it has them."""

    kind: str
    """"portable", "huggingface", "megatron" or "deepspeed"."""
    folder: Path
    model: ModelConfig
    recycle: RecycleConfig
    step: int
    """Optimizer steps that the weights were trained for; 0 if the format does not record them."""
    seq_length: int
    """Tokens per training sequence if known, else a length to evaluate at."""
    tokenizer: Path | None
    """Path of its tokenizer.json, if it has one."""
    shapes: Mapping[str, tuple[int, ...]]
    """Full (unsharded) shape of every canonical tensor in it."""
    notes: tuple[str, ...]
    """Notes for the user on what was read."""

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compares the checksums of this rank's share of the files, if the format has checksums. Raises CheckpointError naming
        the damaged files."""

    def has(self, name: str, kind: str) -> bool:
        """Whether it has this kind ("weight", "exp_avg", "exp_avg_sq") of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor's weight is stored in."""

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Slice [start, start + length) along `axis` of a canonical tensor, in its stored dtype. Raises CheckpointError."""


def assemble(source: Source, row: Sequence[Piece], shape: tuple[int, ...], kind: str) -> Tensor:
    """Builds a local fp32 parameter of shape `shape` from its pieces; vocabulary padding is zero."""
    value = torch.zeros(shape, dtype=torch.float32)
    for piece in row:
        part = source.read(piece.name, kind, piece.axis, piece.start, piece.length)
        value.narrow(piece.axis, piece.local_start, piece.length).copy_(part)
    return value


def check_tensors(source: Source, wanted: Mapping[str, tuple[int, ...]], optional: Sequence[str] = ()) -> list[str]:
    """Compares the names and shapes of a source with those of the model (`wanted`), before any weight changes.

    optional: name prefixes of parts. The source or the model may be without the first one, the source without the others.
    Returns the names in parts that only the model has; a source with some of a part's tensors is refused. Raises
    CheckpointError listing tensors that are missing, not in the model or of the wrong shape.
    """
    available = source.shapes
    missing, extra = sorted(set(wanted) - set(available)), sorted(set(available) - set(wanted))
    absent: list[str] = []
    for number, part in enumerate(optional):
        if not any(name.startswith(part) for name in available):
            absent += [name for name in missing if name.startswith(part)]
            missing = [name for name in missing if not name.startswith(part)]
        elif number == 0 and not any(name.startswith(part) for name in wanted):
            extra = [name for name in extra if not name.startswith(part)]
    shapes = [
        f"{name} {list(available[name])} instead of {list(wanted[name])}"
        for name in sorted(wanted)
        if name in available and tuple(available[name]) != tuple(wanted[name])
    ]
    problems = [
        f"{title}: {shorten(names)}"
        for title, names in (
            ("missing", missing),
            ("not in this model", extra),
            ("wrong shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.folder} does not fit the model: {'; '.join(problems)}; "
            "set model.* and recycle.layers to the values it was saved with"
        )
    return sorted(absent)


def shorten(names: Sequence[str]) -> str:
    """A list of names for a message: the first few, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
