"""Writing a portable checkpoint of weights only: the result of a conversion, for `--model` and `init_from`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recycle_ds.checkpoint.files.checksums import describe
from recycle_ds.checkpoint.files.safetensors_writer import Named, split, write_shards
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.portable.manifest import write_manifest
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.sequence_length import CONVERTED
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config.atomic_files import fsync
from recycle_ds.data.tokenizer import Tokenizer


def write_portable(
    source: Source, folder: Path, dtype: torch.dtype | None, shard_bytes: int, step: Callable[[str], None]
) -> None:
    """Fills an empty folder. dtype None keeps each tensor's dtype. `step` is called with the name of each tensor written."""

    def named(name: str) -> Named:
        return f"{name}/weight/0", source.shapes[name], dtype or source.dtype(name), lambda: source.read(name)

    shards = split((named(name) for name in source.shapes), shard_bytes)
    written = write_shards(folder, shards, lambda n, _: f"shard-00000-{n - 1:03d}.safetensors", step)
    file_of = {key: file for file, keys in written.items() for key in keys}
    fingerprint = ""
    files = list(written)
    if source.tokenizer is not None:
        fingerprint = Tokenizer.load(source.tokenizer).fingerprint
    files += copy_tokenizer(source.tokenizer or source.folder / TOKENIZER, folder)
    tensors: dict[str, Any] = {}
    for name, shape in source.shapes.items():
        key = f"{name}/weight/0"
        piece = {"kind": "weight", "file": file_of[key], "key": key, "axis": 0, "start": 0, "length": shape[0]}
        tensors[name] = {"shape": list(shape), "slices": [piece]}
    manifest = {
        "step": source.step,
        "next_sample": 0,
        "skipped": 0,
        "rollbacks": 0,
        "recent": [],
        "adam_step": 0,
        "config": {
            "model": source.model.model_dump(mode="json"),
            "recycle": source.recycle.model_dump(mode="json"),
            CONVERTED: {"seq_length": source.seq_length},
        },
        "data": {"tokenizer": fingerprint, "train": []},
        "layout": {},
        "provenance": provenance() | {"converted_from": {"kind": source.kind, "folder": source.folder.name}},
        "tensors": tensors,
        "files": {name: describe(folder / name).model_dump() for name in files},
    }
    write_manifest(folder, manifest)
    fsync(folder)
