"""Loading a model for decoding and evaluation: weights only, one process, any layout at save."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files import verify_all
from recycle_ds.checkpoint.folders import completed, find_checkpoint
from recycle_ds.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from recycle_ds.checkpoint.reading import TensorReader
from recycle_ds.checkpoint.resume import check_tensors
from recycle_ds.config import ConfigError, RunConfig, parse_config
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.device import device, torch_dtype
from recycle_ds.parallel.mesh import Mesh


def _newest_whole(newest: Path, *, named: bool) -> tuple[Path, Manifest]:
    """The newest checkpoint that is whole; one that was named itself must be. Raises CheckpointError."""
    for folder in [newest] if named else completed(newest.parent.parent):
        try:
            manifest = read_manifest(folder)
            verify_all(folder, manifest.files)
            return folder, manifest
        except CheckpointError as error:
            if named:
                raise
            print(f"warning: {error}; falling back to the checkpoint before", file=sys.stderr)
    raise CheckpointError(f"{newest.parent}: no checkpoint there is whole; restore one")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with the tokenizer it was trained with."""

    model: RecycleGPT
    tokenizer: Tokenizer
    path: Path
    step: int
    config: RunConfig


def load_model(path: str, dtype: str = "fp32") -> LoadedModel:
    """Loads a run folder's newest checkpoint, or a checkpoint. dtype: "fp32" or "bf16".

    Files are checked against their checksums first. Raises CheckpointError.
    """
    folder, manifest = _newest_whole(find_checkpoint(path), named=(Path(path) / MANIFEST).is_file())
    try:
        config = parse_config(manifest.config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is not valid: {error}") from None
    mesh = Mesh()
    model = build_model(config.model, config.recycle, mesh, seed=None)
    reader = TensorReader(folder, manifest)
    table = pieces(model, mesh)
    check_tensors(canonical_shapes(table), reader, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.local(table[name], tuple(parameter.shape), "weight"))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    place = device()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(place, torch_dtype(dtype))
    return LoadedModel(model.to(place).eval(), tokenizer, folder, manifest.step, config)
