"""A model folder with random weights, for speeds where SmolLM2-135M is not at hand. Its drafts are accepted by chance only."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import torch

from recycle_ds.checkpoint.conversion.convert import convert
from recycle_ds.checkpoint.conversion.options import Conversion
from recycle_ds.config import load_config
from recycle_ds.data.sources import read_documents
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.training.benchmark.subjects import llama_config

_TEXTS, _VOCABULARY = 4, 600
"""Documents and tokens of its tokenizer, which is trained in a second."""
_SMALL = [
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=2", "model.ffn=96", "model.vocab_size=640",
]  # fmt: skip


def random_model(folder: Path, *, small: bool) -> Path:
    """Makes the folder, unless an earlier call has: the shape of SmolLM2-135M in bf16, or a tiny one, with a new module of one
    layer. Returns it."""
    if (folder / "config.json").is_file():
        return folder
    from transformers import LlamaForCausalLM

    size = _SMALL if small else ["model.tied_embeddings=true"]
    config = load_config("bench_135m", [*size, "model.max_positions=2048"])
    torch.manual_seed(0)
    plain = folder.with_name(f"{folder.name}-plain")
    shutil.rmtree(plain, ignore_errors=True)
    LlamaForCausalLM(llama_config(config)).to(torch.bfloat16).save_pretrained(plain)
    Tokenizer.train(itertools.islice(read_documents("shipped"), _TEXTS), _VOCABULARY).save(plain)
    convert(str(plain), str(folder), Conversion("hf", verify=False, recycle_layers=1, recycle_depth=4))
    shutil.rmtree(plain)
    return folder
