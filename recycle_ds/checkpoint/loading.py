"""Loading a model for decoding and evaluation: weights only, one process, any format and any layout at save."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import MANIFEST
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import is_hugging_face, open_source
from recycle_ds.checkpoint.sources import Source, assemble, check_tensors
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.device import device, torch_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with the tokenizer it was trained with."""

    model: RecycleGPT
    tokenizer: Tokenizer
    path: Path
    step: int
    seq_length: int
    """Tokens in a sequence of its training, where that is known."""


def load_model(path: str, dtype: str = "fp32", local_rank: int = 0) -> LoadedModel:
    """Loads a run folder's newest whole checkpoint, a checkpoint, or a folder of another known format.

    dtype: "fp32" or "bf16". local_rank: which of this host's devices, where several processes decode.

    Checksums, names and shapes are compared before a weight is read. Raises CheckpointError.
    """
    source = _open(Path(path))
    for note in source.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    if source.tokenizer is None:
        raise CheckpointError(f"{source.folder}: no tokenizer.json; copy the model's own there")
    tokenizer = Tokenizer.load(source.tokenizer)
    if source.model.vocab_size is None or tokenizer.vocab_size > source.model.vocab_size:
        raise CheckpointError(
            f"{source.folder}: its tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}: "
            "copy the model's own tokenizer there"
        )
    model = build_model(source.model, source.recycle, seed=None)
    load_weights(model, source)
    place = device(local_rank)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(place, torch_dtype(dtype))
    return LoadedModel(model.to(place).eval(), tokenizer, source.folder, source.step, source.seq_length)


@torch.no_grad()
def load_weights(model: RecycleGPT, source: Source) -> None:
    """Fills a whole model. Raises CheckpointError, before anything changes, where names or shapes differ."""
    table = pieces(model, model.mesh)
    check_tensors(source, canonical_shapes(table))
    if isinstance(source, PortableSource):
        source.probe(source.shapes)
    for name, parameter in model.named_parameters():
        parameter.copy_(assemble(source, table[name], tuple(parameter.shape), "weight"))


def _open(folder: Path) -> Source:
    """The newest checkpoint that is whole; one that was named itself must be. Raises CheckpointError."""
    run = folder.parent if folder.name == "checkpoints" else folder
    found = completed(run)
    if not found or (folder / MANIFEST).is_file() or is_hugging_face(folder):
        return open_source(folder)
    for checkpoint in found:
        try:
            return open_source(checkpoint)
        except CheckpointError as error:
            print(f"warning: {error}; falling back to the checkpoint before", file=sys.stderr)
    raise CheckpointError(f"{run / 'checkpoints'}: no checkpoint there is whole; restore one")
