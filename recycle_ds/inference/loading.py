"""Loads a model folder and builds its decoder. Shared by all decoding commands."""

from __future__ import annotations

import torch

from recycle_ds.checkpoint.loading import LoadedModel, load_model
from recycle_ds.data.tokenizer import TextStream
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.parameters import check_runtime


def load(path: str, dtype: str, threads: int | None, local_rank: int = 0) -> LoadedModel:
    """Loads a model for decoding in this process. threads: CPU threads; None keeps PyTorch's default. local_rank: device index.

    Raises DecodingError for an argument out of range, CheckpointError for a folder that cannot be loaded.
    """
    check_runtime(dtype, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(path, dtype=dtype, local_rank=local_rank)


def decoder_of(loaded: LoadedModel) -> Decoder:
    """A decoder that stops at the tokenizer's end-of-text token and supports stop strings."""
    return Decoder(loaded.model, loaded.tokenizer.eos_id, lambda: TextStream(loaded.tokenizer))
