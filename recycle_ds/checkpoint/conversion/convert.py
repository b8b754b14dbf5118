"""Conversions between formats: any source to any target, a tensor at a time, checked after it is written."""

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
from recycle_ds.checkpoint.tensor_equality import one_nan, same_bits
from recycle_ds.config import RecycleConfig, TrainingConfig

TARGETS = ("hf", "portable", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GIB = 2**30


@dataclass(frozen=True)
class Conversion:
    """What is asked for."""

    target: str
    dtype: str | None = None
    """None keeps the source's."""
    shard_gib: float = 1.0
    tensor: int = 1
    """megatron: tensor ranks that the checkpoint is sharded for."""
    pipeline: int = 1
    """megatron: pipeline stages that it is sharded for."""
    verify: bool = True
    """Read the result back and compare every tensor bit for bit."""
    config: str | None = None
    """Configuration of a source that does not hold its own."""
    recycle_layers: int = 0
    """Blocks of a recycle module that is initialised anew, of a source without one; 0 adds none."""
    recycle_depth: int | None = None
    """Tokens ahead that the new module is to be unrolled for in training; None is 1."""
    seed: int | None = None
    """Of the new module's weights: those that a run of this training.seed begins with. None is a run's default."""

    @property
    def shard_bytes(self) -> int:
        """Largest file, in bytes."""
        return int(self.shard_gib * _GIB)

    def check(self) -> None:
        """Raises CheckpointError for values there are none of."""
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
                f"--tp {self.tensor} --pp {self.pipeline}: only --to megatron has a layout; the others load at any"
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
    """Converts into a folder that does not exist yet, written under a temporary name and renamed once it is whole.

    step: told what is being done and to how many tensors, once for each of them. note: told the source's notes. Returns the
    result, opened. Raises CheckpointError; then nothing is left at the target.
    """
    conversion.check()
    target = check_target(target_path)
    source = _open(source_path, conversion)
    if note is not None:
        for text in source.notes:
            note(text)
    count = len(source.shapes)
    tell = step or (lambda *_: None)
    with new_folder(target_path) as folder:
        _write(source, folder, conversion, lambda _: tell("writing", count))
        if conversion.verify:
            _verify(source, open_source(str(folder)), conversion, lambda _: tell("checking", count))
    return open_source(str(target))


def _open(path: str, conversion: Conversion) -> Source:
    """The source, with a module added where one is asked for."""
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
    """Every tensor of the result is the source's, rounded as asked. Raises CheckpointError."""
    if dict(result.shapes) != {name: tuple(shape) for name, shape in source.shapes.items()}:
        raise CheckpointError(
            f"{source.folder}: what was written has other tensors than it: nothing is left at the target"
        )
    for name in source.shapes:
        wanted, found = source.read(name), result.read(name)
        if conversion.dtype is not None:
            wanted, found = one_nan(wanted.to(DTYPES[conversion.dtype])), one_nan(found)
        if not same_bits(wanted, found):
            raise CheckpointError(
                f"{source.folder}: {name} does not read back as it was written: nothing is left at the target"
            )
        step(name)
