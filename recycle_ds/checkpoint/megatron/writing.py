"""Writes a checkpoint that megatron.core.dist_checkpointing loads into a GPTModel, one layer at a time.

The files are those that its own `save` writes: one per tensor and pipeline rank, with that rank's shards as chunks. The
checkpoint can be loaded at any layout.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.rounding import rounded
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.megatron.arguments import write_arguments
from recycle_ds.checkpoint.megatron.fusing import fuse
from recycle_ds.checkpoint.megatron.names import Entry, entries, extra_states
from recycle_ds.checkpoint.megatron.reading import BACKEND, FORMAT, OURS, TRACKER, VERSION
from recycle_ds.checkpoint.megatron.unpickling import COMMON, METADATA
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.sources import Source, check_tensors, shorten
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.config.atomic_files import fsync, write_atomically, write_json_atomically
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.layers import padded_vocabulary

# Megatron-LM calls weights without optimizer state a release, and then loads no optimizer state and no random generators.
RELEASE = "release"


def write_megatron(
    source: Source,
    folder: Path,
    dtype: torch.dtype | None,
    tensor: int,
    pipeline: int,
    step: Callable[[str], None],
) -> None:
    """Fills an empty folder. dtype None keeps the source's. `step` is called with the name of each tensor written.

    Raises CheckpointError, before anything is written, for sizes that the ranks do not divide, and for a module, a RoPE scaling
    or a mix of dtypes that Megatron's format does not support.
    """
    model, recycle = source.model, source.recycle
    table = entries(model, recycle)
    check_tensors(source, whole_shapes(model, recycle))
    _check_layout(model, recycle, tensor, pipeline)
    assert model.vocab_size is not None, "a source has a vocabulary size"
    padded = padded_vocabulary(model.vocab_size, model.vocab_multiple, tensor)
    types = _types(source, table, dtype)
    args = write_arguments(model, recycle, padded, source.seq_length, types[table[0].key], (tensor, pipeline))
    checkpoint = folder / RELEASE
    checkpoint.mkdir()
    writer = _Writer(checkpoint, model.layers)
    for stage in range(pipeline):
        with writer.stage(stage, tensor):
            for entry in table:
                if _stage(entry.layer, entry.key, model.layers, pipeline) == stage:
                    writer.add(entry, types[entry.stacked or entry.key], padded, _chunks(source, entry, padded, tensor))
                    for name in entry.parts:
                        step(name)
            for layer, key in extra_states(model, recycle):
                if _stage(layer, key, model.layers, pipeline) == stage:
                    writer.add_state(key)
    writer.finish()
    _write_rest(source, checkpoint, args, {"tensor": tensor, "pipeline": pipeline})
    write_atomically(folder / TRACKER, f"{RELEASE}\n")


def _check_layout(model: ModelConfig, recycle: RecycleConfig, tensor: int, pipeline: int) -> None:
    """Raises CheckpointError for sizes that the ranks do not divide."""
    sizes = {"model.heads": model.heads, "model.kv_heads": model.kv_heads, "model.ffn": model.ffn}
    if recycle.layers:
        sizes["model.hidden"] = model.hidden
    wrong = [f"{name} ({size}) must be divisible by --tp ({tensor})" for name, size in sizes.items() if size % tensor]
    if model.layers % pipeline:
        wrong.append(f"model.layers ({model.layers}) must be divisible by --pp ({pipeline})")
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _types(source: Source, table: list[Entry], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Returns the dtype of every key; stacked layers share one. Raises CheckpointError if dtypes differ within a key."""
    types: dict[str, torch.dtype] = {}
    mixed: list[str] = []
    for entry in table:
        for part in entry.parts:
            own = dtype or source.dtype(part)
            if types.setdefault(entry.stacked or entry.key, own) != own:
                mixed.append(f"{part} ({own})")
    if mixed:
        raise CheckpointError(
            f"{source.folder}: dtypes differ within one Megatron tensor: {shorten(mixed)}; give --dtype"
        )
    return types


def _stage(layer: int | None, key: str, layers: int, pipeline: int) -> int:
    """Returns the pipeline rank that holds a tensor."""
    if layer is not None:
        return layer // (layers // pipeline)
    return 0 if key.startswith("embedding.") else pipeline - 1


def _chunks(source: Source, entry: Entry, padded: int, tensor: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yields tensor rank, start along the split axis and values of each chunk of one layer."""
    if entry.kind == "vocabulary":
        (name,) = entry.parts
        rows = padded // tensor
        for rank in range(tensor):
            first = rows * rank
            count = max(0, min(entry.shape[0] - first, rows))
            value = torch.zeros((rows, *entry.shape[1:]), dtype=source.dtype(name))
            if count:
                value[:count] = source.read(name, axis=0, start=first, length=count)
            yield rank, first, value
        return
    fused = fuse(entry, [source.read(name) for name in entry.parts], source.model)
    if entry.axis is None:
        yield 0, 0, fused
        return
    # gate and up are split separately, so a rank has one chunk of each
    runs = len(entry.parts) if entry.kind == "gate_up" else 1
    size = fused.shape[entry.axis] // (tensor * runs)
    for number in range(tensor * runs):
        yield number % tensor, size * number, fused.narrow(entry.axis, size * number, size)


class _Writer:
    """Appends chunks to the files of a stage's ranks, and records where each chunk is."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder, self._layers = folder, layers
        self._metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._where: dict[MetadataIndex, _StorageInfo] = {}
        self._files: list[tuple[str, IO[bytes]]] = []
        state = io.BytesIO()
        torch.save([None], state)
        self._state = state.getvalue()

    def stage(self, number: int, tensor: int) -> ExitStack:
        """Opens the files of a pipeline stage. The end of the caller's `with` closes and fsyncs them."""
        stack = ExitStack()
        self._files = []
        for rank in range(tensor):
            name = f"__{number * tensor + rank}_0.distcp"
            stack.callback(fsync, self._folder / name)
            self._files.append((name, stack.enter_context((self._folder / name).open("wb"))))
        return stack

    def add(self, entry: Entry, dtype: torch.dtype, padded: int, chunks: Iterator[tuple[int, int, Tensor]]) -> None:
        """Writes a tensor's chunks."""
        stacked = entry.layer is not None
        shape = (padded, *entry.shape[1:]) if entry.kind == "vocabulary" else entry.shape
        key = entry.stacked or entry.key
        metadata = self._metadata.get(key)
        if metadata is None:
            size = torch.Size((self._layers, *shape) if stacked else shape)
            metadata = self._metadata[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
        assert isinstance(metadata, TensorStorageMetadata), key
        for rank, start, value in chunks:
            offsets = [0] * len(shape)
            offsets[entry.axis or 0] = start
            # a copy, because torch.save would write the full storage of a view
            value = rounded(entry.key, value, dtype).clone(memory_format=torch.contiguous_format)
            if stacked:
                value, offsets = value.unsqueeze(0), [entry.layer or 0, *offsets]
            metadata.chunks.append(ChunkStorageMetadata(torch.Size(offsets), value.shape))
            self._append(rank, MetadataIndex(key, torch.Size(offsets)), partial(torch.save, value))

    def add_state(self, key: str) -> None:
        """Writes an empty extra state."""
        self._metadata[key] = BytesStorageMetadata()
        self._append(0, MetadataIndex(key), lambda file: file.write(self._state))

    def finish(self) -> None:
        """Writes `.metadata`, the list of all chunks."""
        path = self._folder / METADATA
        listing = Metadata(self._metadata, storage_data=self._where, storage_meta=StorageMeta(), version="1.0.0")
        with path.open("wb") as file:
            pickle.dump(listing, file)
        fsync(path)

    def _append(self, rank: int, index: MetadataIndex, write: Callable[[IO[bytes]], Any]) -> None:
        name, file = self._files[rank]
        start = file.tell()
        write(file)
        self._where[index] = _StorageInfo(name, start, file.tell() - start)


def _write_rest(source: Source, checkpoint: Path, args: dict[str, Any], layout: dict[str, int]) -> None:
    """Writes the descriptions of the tensors: for Megatron's loaders, for Megatron-LM, and for this package."""
    common = {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": source.step,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
    torch.save(common, checkpoint / COMMON)
    fsync(checkpoint / COMMON)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json_atomically(checkpoint / BACKEND, {**backend, "common_backend": "torch", "common_backend_version": 1})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "step": source.step,
        "seq_length": source.seq_length,
        "layout": layout,
        "model": source.model.model_dump(mode="json"),
        "recycle": source.recycle.model_dump(mode="json"),
        "provenance": provenance() | {"converted_from": {"kind": source.kind, "folder": source.folder.name}},
    }
    write_json_atomically(checkpoint / OURS, description)
    copy_tokenizer(source.tokenizer or source.folder / TOKENIZER, checkpoint)
    fsync(checkpoint)
