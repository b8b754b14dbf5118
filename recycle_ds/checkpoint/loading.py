"""Loads a model for decoding and evaluation: weights only, in one process, from any format and saved at any layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import MANIFEST
from recycle_ds.checkpoint.portable.newest import newest_intact
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import is_hugging_face, open_source
from recycle_ds.checkpoint.sources import Source, assemble, check_tensors
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.device import local_device, torch_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with the tokenizer it was trained with."""

    model: RecycleGPT
    tokenizer: Tokenizer
    path: Path
    step: int
    seq_length: int
    """Tokens per training sequence if known, else a length to evaluate at."""


def load_model(path: str, dtype: str = "fp32", local_rank: int = 0) -> LoadedModel:
    """Loads a run folder's newest intact checkpoint, a checkpoint, or a folder in another supported format.

    dtype: "fp32" or "bf16". local_rank: index of the device on this host, if several processes decode.

    Checksums, names and shapes are compared before a weight is read. Raises CheckpointError.
    """
    source = _open(Path(path))
    for note in source.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    if source.tokenizer is None:
        raise CheckpointError(f"{source.folder}: no tokenizer.json; copy the model's own file into this folder")
    tokenizer = Tokenizer.load(source.tokenizer)
    if source.model.vocab_size is None or tokenizer.vocab_size > source.model.vocab_size:
        raise CheckpointError(
            f"{source.folder}: its tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}: "
            "copy the model's own tokenizer into this folder"
        )
    model = build_model(source.model, source.recycle, seed=None)
    load_weights(model, source)
    device = local_device(local_rank)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(device, torch_dtype(dtype))
    return LoadedModel(model.to(device).eval(), tokenizer, source.folder, source.step, source.seq_length)


@torch.no_grad()
def load_weights(model: RecycleGPT, source: Source) -> None:
    """Fills an unsharded model. Raises CheckpointError, before any weight changes, if names or shapes differ."""
    table = pieces(model, model.mesh)
    check_tensors(source, canonical_shapes(table))
    if isinstance(source, PortableSource):
        source.probe(source.shapes)
    for name, parameter in model.named_parameters():
        parameter.copy_(assemble(source, table[name], tuple(parameter.shape), "weight"))


def _open(folder: Path) -> Source:
    """Opens the newest intact checkpoint of a run, or the folder itself if it is not a run. Raises CheckpointError."""
    run = folder.parent if folder.name == "checkpoints" else folder
    found = completed(run)
    if not found or (folder / MANIFEST).is_file() or is_hugging_face(folder):
        return open_source(folder)
    newest = newest_intact(found, open_source, lambda text: print(text, file=sys.stderr))
    assert newest is not None, "there are checkpoints"
    return newest[1]
