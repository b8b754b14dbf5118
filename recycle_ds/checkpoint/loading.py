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
from recycle_ds.config import ConfigError, ModelConfig
from recycle_ds.data.other_tokenizers import advice
from recycle_ds.data.token_ranking import RANKING, read_ranking
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.sharding import pieces
from recycle_ds.model.stages import decoding_partition
from recycle_ds.parallel.device import local_device, torch_dtype
from recycle_ds.parallel.mesh import Mesh


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with the tokenizer it was trained with."""

    model: RecycleGPT
    tokenizer: Tokenizer
    path: Path
    step: int
    seq_length: int
    """Tokens per training sequence if known, else a length to evaluate at."""


def load_model(path: str, dtype: str = "fp32", local_rank: int = 0, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a run folder's newest intact checkpoint, a checkpoint, or a folder in another supported format.

    dtype: "fp32" or "bf16". local_rank: index of the device on this host, if several processes decode, each for itself.
    mesh: this rank reads only its shard of its pipeline stage, onto the mesh's device; None reads the full model.

    Checksums, names and shapes are compared before a weight is read. Raises CheckpointError, and ConfigError for a
    model that cannot be split over the mesh.
    """
    source = _open(Path(path))
    if mesh is not None:
        check_degree(source.model, mesh.tensor.size)
    for note in source.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    if source.tokenizer is None:
        raise CheckpointError(
            advice(source.folder) or f"{source.folder}: no tokenizer.json; copy the model's own file into this folder"
        )
    tokenizer = Tokenizer.load(source.tokenizer)
    if source.model.vocab_size is None or tokenizer.vocab_size > source.model.vocab_size:
        raise CheckpointError(
            f"{source.folder}: its tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}: "
            "copy the model's own tokenizer into this folder"
        )
    blocks = None
    if mesh is not None:
        blocks = decoding_partition(source.model, source.recycle, mesh.pipeline.size)[mesh.pipeline.rank]
    device = local_device(local_rank) if mesh is None else mesh.device
    on = mesh or Mesh(device=device)
    model = build_model(source.model, source.recycle, on, seed=None, dtype=torch_dtype(dtype), blocks=blocks)
    load_weights(model, source)
    # a padded vocabulary has rows that were never trained
    model.unnamed_ids = tuple(one for one in range(source.model.vocab_size) if one not in tokenizer.token_ids)
    if source.recycle.draft_vocabulary is not None:
        count = source.recycle.draft_vocabulary
        ranking = read_ranking(source.tokenizer.with_name(RANKING), source.model.vocab_size, count)
        model.draft_ids = torch.tensor(sorted(ranking[:count]), device=device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(device)
    return LoadedModel(model.to(device).eval(), tokenizer, source.folder, source.step, source.seq_length)


def check_degree(model: ModelConfig, tensor: int) -> None:
    """Raises ConfigError if the model cannot be split over `tensor` tensor ranks."""
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "ffn": model.ffn, "hidden": model.hidden}
    wrong = [f"{name} ({size})" for name, size in sizes.items() if size % tensor]
    if wrong:
        raise ConfigError(
            f"--tensor {tensor}: must divide the model's {', '.join(wrong)}; use another degree, or --pipeline"
        )


@torch.no_grad()
def load_weights(model: RecycleGPT, source: Source) -> None:
    """Fills a model, or a shard of one. Raises CheckpointError, before any weight changes, if names or shapes differ."""
    table = pieces(model, model.mesh)
    check_tensors(source, whole_shapes(model.config, model.recycle_config))
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
