"""From a folder to a decoder: what every command that decodes does first."""

from __future__ import annotations

import torch

from recycle_ds.checkpoint import LoadedModel, load_model
from recycle_ds.data.tokenizer import TextStream
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.errors import DecodingError

DTYPES = ("fp32", "bf16")


def check_runtime(dtype: str, threads: int | None) -> None:
    """Raises DecodingError for a type no model is loaded in, or a number of threads that is not one."""
    if dtype not in DTYPES:
        raise DecodingError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise DecodingError(f"threads={threads}: must be at least 1")


def load(path: str, dtype: str, threads: int | None, local_rank: int = 0) -> LoadedModel:
    """Loads a model for decoding in this process. threads: CPU threads, None leaves PyTorch's choice. local_rank: the device.

    Raises DecodingError, and CheckpointError for a folder that cannot be loaded.
    """
    check_runtime(dtype, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(path, dtype=dtype, local_rank=local_rank)


def decoder_of(loaded: LoadedModel) -> Decoder:
    """A decoder that ends at the tokenizer's end of text and understands stop strings."""
    return Decoder(loaded.model, loaded.tokenizer.eos_id, lambda: TextStream(loaded.tokenizer))
