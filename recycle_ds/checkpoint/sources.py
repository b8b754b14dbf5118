"""Where weights come from: one view of every format, by canonical name, so that nothing downstream knows the format."""

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
    """Weights, and where there are any Adam's moments, in a folder."""

    kind: str
    """"portable", "huggingface", "megatron" or "deepspeed"."""
    folder: Path
    model: ModelConfig
    recycle: RecycleConfig
    step: int
    """Optimizer steps behind the weights; 0 where the format does not say."""
    seq_length: int
    """Tokens in a sequence of its training, where that is known; else a length to evaluate at."""
    tokenizer: Path | None
    """Its tokenizer.json, if it has one."""
    shapes: Mapping[str, tuple[int, ...]]
    """Full shape of every canonical tensor that it holds."""
    notes: tuple[str, ...]
    """What a user should know about what was read."""

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compares the checksums of this rank's share of the files, where the format has any. Raises CheckpointError that names
        the damaged ones."""

    def has(self, name: str, kind: str) -> bool:
        """Whether it holds that kind ("weight", "exp_avg", "exp_avg_sq") of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type that a tensor's weight is stored in."""

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Rows [start, start + length) along `axis` of a canonical tensor, in its stored type. Raises CheckpointError."""


def assemble(source: Source, row: Sequence[Piece], shape: tuple[int, ...], kind: str) -> Tensor:
    """A local parameter in fp32, from its pieces; vocabulary padding is zero."""
    value = torch.zeros(shape, dtype=torch.float32)
    for piece in row:
        part = source.read(piece.name, kind, piece.axis, piece.start, piece.length)
        value.narrow(piece.axis, piece.local_start, piece.length).copy_(part)
    return value


def check_tensors(source: Source, wanted: Mapping[str, tuple[int, ...]], optional: str | None = None) -> list[str]:
    """Compares names and shapes before a weight changes. Returns what is wanted and lacking: a whole part, or nothing.

    optional: how names of a part begin that one of the two may have and the other not; never half of it. Raises CheckpointError
    that lists what is missing, unknown or of another shape.
    """
    held = source.shapes
    missing, extra = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    one_sided = optional is not None and not all(
        any(name.startswith(optional) for name in names) for names in (held, wanted)
    )
    excused = [name for name in missing if one_sided and name.startswith(str(optional))]
    if one_sided:
        missing, extra = ([n for n in names if not n.startswith(str(optional))] for names in (missing, extra))
    shapes = [
        f"{name} {list(held[name])} instead of {list(wanted[name])}"
        for name in sorted(wanted)
        if name in held and tuple(held[name]) != tuple(wanted[name])
    ]
    faults = [
        f"{title}: {shorten(names)}"
        for title, names in (
            ("missing", missing),
            ("not in this model", extra),
            ("other shape", shapes),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{source.folder} does not fit the model: {'; '.join(faults)}; set model.* and recycle.layers as it was saved with"
        )
    return excused


def shorten(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
