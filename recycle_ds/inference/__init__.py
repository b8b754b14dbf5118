"""Decoding: autoregressive, alternate (the paper) and verified (lossless)."""

from recycle_ds.inference.decoder import MODES, Decoder
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.speculation.sampling import SamplingParams
from recycle_ds.inference.speculation.stopping import TextFilter

__all__ = ["MODES", "Decoder", "DecodingError", "DecodingInterrupted", "Generation", "SamplingParams", "TextFilter"]
