"""Conversion between formats: any source to any target, tensor by tensor, verified after writing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.conversion.fresh_module import FreshModule
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.new_folder import check_target, new_folder
from recycle_ds.checkpoint.huggingface.writing import write_hugging_face
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.checkpoint.tensor_equality import canonical_nan, same_bits
from recycle_ds.config import RecycleConfig, TrainingConfig

TARGETS = ("hf", "portable", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GIB = 2**30


@dataclass(frozen=True)
class Conversion:
    """The options of a conversion."""

    target: str
    dtype: str | None = None
    """None keeps the source's dtype."""
    shard_gib: float = 1.0
    tensor: int = 1
    """megatron: tensor-parallel ranks to shard for."""
    pipeline: int = 1
    """megatron: pipeline stages to shard for."""
    verify: bool = True
    """Read the result back and compare every tensor bit for bit."""
    config: str | None = None
    """Configuration file for a source without one of its own."""
    recycle_layers: int = 0
    """Blocks of a newly initialised recycle module to add to a source without one; 0 adds none."""
    recycle_depth: int | None = None
    """Unrolled steps of the new module in training; None is 1."""
    seed: int | None = None
    """Seed of the new module's weights, as training.seed of a run. None is the default of training.seed."""

    @property
    def shard_bytes(self) -> int:
        """Maximum file size in bytes."""
        return int(self.shard_gib * _GIB)

    def check(self) -> None:
        """Raises CheckpointError for invalid options."""
        if self.target not in TARGETS:
            raise CheckpointError(f"--to {self.target}: must be one of {', '.join(TARGETS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise CheckpointError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if not (self.shard_gib > 0 and math.isfinite(self.shard_gib * _GIB)):
            raise CheckpointError(f"--shard-gib {self.shard_gib}: must be above 0, and finite")
        if min(self.tensor, self.pipeline) < 1:
            raise CheckpointError(f"--tp {self.tensor} --pp {self.pipeline}: must be at least 1")
        if self.target != "megatron" and self.tensor * self.pipeline > 1:
            raise CheckpointError(
                f"--tp {self.tensor} --pp {self.pipeline}: only --to megatron has a layout; the other formats load at any"
            )
        for option, value, least in (
            ("--recycle-layers", self.recycle_layers, 0),
            ("--recycle-depth", self.recycle_depth, 1),
            ("--seed", self.seed, 0),
        ):
            if value is None:
                continue
            if value < least:
                raise CheckpointError(f"{option} {value}: must be at least {least}")
            if not self.recycle_layers and option != "--recycle-layers":
                raise CheckpointError(f"{option} {value}: only with --recycle-layers N, which adds a module")


def convert(
    source_path: str,
    target_path: str,
    conversion: Conversion,
    step: Callable[[str, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Source:
    """Converts into a new folder, which is written under a temporary name and renamed once it is complete.

    step: called for each tensor written or checked, with the name of the phase and the number of tensors. note: called with
    each of the source's notes. Returns the result, opened. Raises CheckpointError; nothing is left at the target then.
    """
    conversion.check()
    target = check_target(target_path)
    source = _open(source_path, conversion)
    if note is not None:
        for text in source.notes:
            note(text)
    count = len(source.shapes)
    progress = step or (lambda *_: None)
    with new_folder(target_path) as folder:
        _write(source, folder, conversion, lambda _: progress("writing", count))
        if conversion.verify:
            _verify(source, open_source(str(folder)), conversion, lambda _: progress("checking", count))
    return open_source(str(target))


def _open(path: str, conversion: Conversion) -> Source:
    """Opens the source, and adds a recycle module if requested."""
    source = open_source(path, config=conversion.config)
    if not conversion.recycle_layers:
        return source
    recycle = RecycleConfig(layers=conversion.recycle_layers, depth=conversion.recycle_depth or 1)
    seed = TrainingConfig.model_fields["seed"].default if conversion.seed is None else conversion.seed
    return FreshModule(source, recycle, seed)


def _write(source: Source, folder: Path, conversion: Conversion, step: Callable[[str], None]) -> None:
    dtype = None if conversion.dtype is None else DTYPES[conversion.dtype]
    if conversion.target == "portable":
        write_portable(source, folder, dtype, conversion.shard_bytes, step)
    elif conversion.target == "megatron":
        write_megatron(source, folder, dtype, conversion.tensor, conversion.pipeline, step)
    else:
        write_hugging_face(source, folder, dtype, conversion.shard_bytes, step)


def _verify(source: Source, result: Source, conversion: Conversion, step: Callable[[str], None]) -> None:
    """Compares every tensor of the result with the source's, rounded as requested. Raises CheckpointError if one differs."""
    if dict(result.shapes) != {name: tuple(shape) for name, shape in source.shapes.items()}:
        raise CheckpointError(
            f"{source.folder}: the result has other tensors than the source: nothing is left at the target"
        )
    for name in source.shapes:
        wanted, found = source.read(name), result.read(name)
        if conversion.dtype is not None:
            wanted, found = canonical_nan(wanted.to(DTYPES[conversion.dtype])), canonical_nan(found)
        if not same_bits(wanted, found):
            raise CheckpointError(
                f"{source.folder}: {name} in the result differs from the source: nothing is left at the target"
            )
        step(name)
