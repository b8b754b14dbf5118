"""Loads a model folder and builds its decoder or engine. Shared by all decoding commands."""

from __future__ import annotations

import torch

from recycle_ds.checkpoint.loading import LoadedModel, load_model
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.engine.build import local_engine, team_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.parameters import check_runtime
from recycle_ds.inference.ranks import Ranks
from recycle_ds.inference.text_stream import TextStream
from recycle_ds.parallel.mesh import Mesh


def load(path: str, dtype: str, threads: int | None, local_rank: int = 0, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a model for decoding. dtype: "fp32", "bf16", or "int8": bf16, with the weights of products rounded to int8 when
    they are packed for decoding. threads: CPU threads; None keeps PyTorch's default. local_rank: device index. mesh: of
    the ranks that hold the model together; None for this process alone.

    Raises DecodingError for an argument out of range, CheckpointError for a folder that cannot be loaded.
    """
    check_runtime(dtype, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    int8 = dtype == "int8"
    loaded = load_model(path, dtype="bf16" if int8 else dtype, local_rank=local_rank, mesh=mesh)
    loaded.model.int8 = int8
    return loaded


def decoder_of(loaded: LoadedModel) -> Decoder:
    """A decoder that stops at the tokenizer's end tokens and supports stop strings."""
    return Decoder(loaded.model, loaded.tokenizer.end_ids, lambda prompt: TextStream(loaded.tokenizer, after=prompt))


def engine_of(
    loaded: LoadedModel, max_batch: int, kv_memory_gib: float | None, ranks: Ranks | None = None
) -> DecodingEngine:
    """An engine in this process that stops at the tokenizer's end tokens and supports stop strings. ranks: among which this
    process has a model of its own; None if it is alone."""
    return local_engine(
        loaded.model,
        max_batch=max_batch,
        kv_memory_gib=kv_memory_gib,
        ranks_on_host=ranks.on_host if ranks else 1,
        eos_ids=loaded.tokenizer.end_ids,
        text_source=lambda prompt: TextStream(loaded.tokenizer, after=prompt),
        watch=ranks.watch if ranks else None,
    )


def engine_of_ranks(
    loaded: LoadedModel, ranks: Ranks, max_batch: int, kv_memory_gib: float | None
) -> DecodingEngine | None:
    """The same over the ranks of a team: the engine on its owner, None on the others, once the owner has closed its engine.
    An engine in this process for a rank that has a model of its own."""
    if ranks.team is None:
        return engine_of(loaded, max_batch, kv_memory_gib, ranks)
    return team_engine(
        loaded.model,
        ranks.team,
        max_batch=max_batch,
        kv_memory_gib=kv_memory_gib,
        ranks_on_host=ranks.on_host,
        eos_ids=loaded.tokenizer.end_ids,
        text_source=lambda prompt: TextStream(loaded.tokenizer, after=prompt),
        watch=ranks.watch,
    )
