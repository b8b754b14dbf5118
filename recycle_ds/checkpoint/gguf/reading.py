"""Reads a GGUF file of the LLaMA architecture as a source of canonical tensors, dequantised to fp32.

llama.cpp rotates adjacent channels where LLaMA rotates halves, so its query and key rows are permuted. Reading undoes this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, build_section
from recycle_ds.model.build import whole_shapes

_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_ENDS = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
_IN_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)\.weight$")


class GgufSource:
    """See `Source`."""

    kind = "gguf"
    step = 0
    recycle = RecycleConfig(layers=0)

    def __init__(self, file: Path, tokenizer: Path | None = None) -> None:
        """Opens a file. tokenizer: the tokenizer.json made from it. Raises CheckpointError if it is not supported."""
        try:
            from gguf import GGUFReader
        except ImportError:
            raise CheckpointError(f"{file}: reading it requires the package gguf: pip install gguf") from None
        self.folder, self.tokenizer = file, tokenizer
        try:
            self._reader = GGUFReader(file)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{file}: cannot be read as GGUF ({error})") from None
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.model = self._read_config()
        self.seq_length = min(2048, self.model.max_positions)
        kinds = sorted({tensor.tensor_type.name for tensor in self._tensors.values()})
        self.notes: tuple[str, ...] = (f"dequantised from {', '.join(kinds)}",)
        self.shapes: Mapping[str, tuple[int, ...]] = whole_shapes(self.model, self.recycle)
        missing = sorted(_name(name) for name in self.shapes if _name(name) not in self._tensors)
        extra = sorted(self._tensors.keys() - {_name(name) for name in self.shapes})
        if missing or extra:
            raise CheckpointError(f"{file}: missing: {shorten(missing) or '-'}; not supported: {shorten(extra) or '-'}")

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Does nothing: the format has no checksums."""

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return kind == "weight" and name in self.shapes

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return torch.float32

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        from gguf.quants import dequantize

        stored = self._tensors[_name(name)]
        value = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32).reshape(
            self.shapes[name]
        )
        if name.endswith("attention.query.weight"):
            value = _unpermute(value, self.model.heads)
        elif name.endswith("attention.key.weight"):
            value = _unpermute(value, self.model.kv_heads)
        return value.narrow(axis, start, value.shape[axis] - start if length is None else length)

    def _read_config(self) -> ModelConfig:
        if self._field("general.architecture") != "llama":
            raise CheckpointError(
                f"{self.folder}: architecture {self._field('general.architecture')!r}: must be 'llama'"
            )
        scaled = [name for name in self._reader.fields if name.startswith("llama.rope.scaling")]
        if scaled:
            raise CheckpointError(f"{self.folder}: {scaled[0]}: RoPE scaling in GGUF files is not supported")
        fields = {
            "layers": self._field("llama.block_count"),
            "hidden": self._field("llama.embedding_length"),
            "heads": self._field("llama.attention.head_count"),
            "kv_heads": self._field("llama.attention.head_count_kv"),
            "ffn": self._field("llama.feed_forward_length"),
            "vocab_size": self._field("llama.vocab_size"),
            "max_positions": self._field("llama.context_length"),
            "rope": {"theta": self._field("llama.rope.freq_base")},
            # stored in fp32, where 1e-5 reads as 9.999999747378752e-06
            "norm_epsilon": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "tied_embeddings": "output.weight" not in self._tensors,
        }
        try:
            return build_section(ModelConfig, fields)
        except ConfigError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        if field is None:
            raise CheckpointError(f"{self.folder}: missing {key}")
        return field.contents()


def _name(canonical: str) -> str:
    match = _IN_BLOCK.match(canonical)
    if match:
        return f"blk.{match.group(1)}.{_BLOCK[match.group(2)]}.weight"
    return f"{_ENDS[canonical.removesuffix('.weight')]}.weight"


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head from llama.cpp's order 0, C/2, 1, C/2 + 1, ... to 0, 1, ..., C - 1."""
    pairs = rows.view(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)
