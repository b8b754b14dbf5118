"""Conversions between formats: any source to any target, a tensor at a time, checked after it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.writing import write_hugging_face
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.portable_export import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source

TARGETS = ("hf", "portable", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    def check(self) -> None:
        """Raises CheckpointError for values there are none of."""
        if self.target not in TARGETS:
            raise CheckpointError(f"--to {self.target}: must be one of {', '.join(TARGETS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise CheckpointError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.shard_gib <= 0:
            raise CheckpointError(f"--shard-gib {self.shard_gib}: must be above 0")
        if min(self.tensor, self.pipeline) < 1:
            raise CheckpointError(f"--tp {self.tensor} --pp {self.pipeline}: must be at least 1")
        if self.target != "megatron" and self.tensor * self.pipeline > 1:
            raise CheckpointError(
                f"--tp {self.tensor} --pp {self.pipeline}: only --to megatron has a layout; the others load at any"
            )


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
    target = Path(target_path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists; name a folder that does not, or remove it")
    source = open_source(source_path, config=conversion.config)
    if note is not None:
        for text in source.notes:
            note(text)
    count = len(source.shapes)
    tell = step or (lambda *_: None)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        _write(source, temporary, conversion, lambda _: tell("writing", count))
        if conversion.verify:
            _verify(source, open_source(str(temporary)), conversion, lambda _: tell("checking", count))
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); nothing is left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_source(str(target))


def _write(source: Source, folder: Path, conversion: Conversion, step: Callable[[str], None]) -> None:
    dtype = None if conversion.dtype is None else DTYPES[conversion.dtype]
    shard_bytes = int(conversion.shard_gib * 2**30)
    if conversion.target == "portable":
        write_portable(source, folder, dtype, shard_bytes, step)
    elif conversion.target == "megatron":
        write_megatron(source, folder, dtype, conversion.tensor, conversion.pipeline, step)
    else:
        write_hugging_face(source, folder, dtype, shard_bytes, step)


def _verify(source: Source, result: Source, conversion: Conversion, step: Callable[[str], None]) -> None:
    """Every tensor of the result is the source's, rounded as asked. Raises CheckpointError."""
    if dict(result.shapes) != {name: tuple(shape) for name, shape in source.shapes.items()}:
        raise CheckpointError(f"{result.folder}: its tensors are not those of {source.folder}: nothing is left there")
    for name in source.shapes:
        wanted = source.read(name)
        if conversion.dtype is not None:
            wanted = wanted.to(DTYPES[conversion.dtype])
        if not torch.equal(wanted, result.read(name)):
            raise CheckpointError(
                f"{result.folder}: {name} does not read back as it was written: nothing is left there"
            )
        step(name)
