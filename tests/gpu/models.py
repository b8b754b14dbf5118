"""A tiny model with random weights, on the CPU and on the device, and what it decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model import RecycleGPT, build_model
from tests.gpu.device import device

PROMPTS = ([1, 2, 3], [4, 4, 1, 0, 2, 5, 1], [7], [3, 1] * 9, [2, 6, 5, 4, 3])


def tiny(
    place: torch.device, *, dtype: torch.dtype = torch.float32, vocab_size: int = 8, std: float = 0.4
) -> RecycleGPT:
    """Weights large enough that the most likely token changes; the module agrees with the backbone by chance."""
    config = ModelConfig(
        layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocab_size=vocab_size, max_positions=128, init_std=std
    )
    return build_model(config, RecycleConfig(layers=1, depth=2), seed=3).eval().to(place, dtype)


def on_device(*, dtype: torch.dtype = torch.float32, vocab_size: int = 8, std: float = 0.4) -> RecycleGPT:
    """The same model on the GPU."""
    return tiny(device(), dtype=dtype, vocab_size=vocab_size, std=std)


def decode(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], mode: str
) -> list[tuple[int, ...]]:
    """All prompts together. Returns the new tokens of each."""
    asked = [engine.add(prompt, one, mode)[0] for prompt, one in zip(prompts, params, strict=True)]
    engine.finish(asked)
    return [tuple(one.tokens[one.prompt_tokens :]) for one in asked]


def texts(model: RecycleGPT, mode: str, params: SamplingParams) -> list[tuple[int, ...]]:
    """The continuations of PROMPTS by an engine of their own."""
    return decode(local_engine(model, max_batch=len(PROMPTS)), PROMPTS, [params] * len(PROMPTS), mode)
