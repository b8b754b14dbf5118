"""Tiny Hugging Face folders with a tokenizer, and the logits that transformers and this package compute from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.data.loader import Batch
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import build_model

TOKENS = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(1))
CLOSE = 1e-4
"""Largest difference of logits of magnitude 10 that rounding explains."""
_END = "<|endoftext|>"


def theirs(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    """Logits [B, S, V] of transformers' own model of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def ours(source: Source | Path, tokens: Tensor = TOKENS) -> Tensor:
    """Logits [B, S, V] of this package's model of a folder."""
    source = open_source(source) if isinstance(source, Path) else source
    model = build_model(source.model, source.recycle, seed=None).eval()
    load_weights(model, source)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    ahead = tokens.expand(1 + model.depth, -1, -1)
    batch = Batch(tokens, positions, torch.zeros_like(tokens), ahead, ahead)
    with torch.no_grad():
        (hidden, *_) = model.states(batch)
        return model.logits(hidden).transpose(0, 1)


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference."""
    return float((one - other).abs().max())


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes and removes keys of a JSON file; a missing file counts as empty."""
    tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tree |= changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in drop}), encoding="utf-8")


def edit_tensors(folder: Path, changes: dict[str, Tensor]) -> None:
    """Replaces and adds tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})


def rename_tensors(folder: Path, prefix: str) -> None:
    """Puts a prefix before every name in model.safetensors."""
    path = folder / "model.safetensors"
    save_file({prefix + key: value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def byte_tokenizer(folder: Path, *special: str, hole: int | None = None) -> Tokenizer:
    """Writes a tokenizer of 256 bytes, an end of text (256) and special tokens (from 257 on), and returns it.

    hole: an id below 256 that has no token.
    """
    alphabet = Tokenizer.train(["a b c d"], 257)
    tree = json.loads(alphabet.to_json())
    model = tree["model"]
    bytes_only = sorted(token for token in model["vocab"] if token != _END)
    model["vocab"] = {token: number for number, token in enumerate(bytes_only) if number != hole}
    model["vocab"][_END] = 256
    model["merges"] = []
    tree["added_tokens"] = [
        {
            "id": 256 + number, "content": token, "special": True, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False,
        }
        for number, token in enumerate((_END, *special))
    ]  # fmt: skip
    found = Tokenizer(json.dumps(tree), {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END})
    found.save(folder)
    return found
