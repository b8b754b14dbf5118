"""Maps canonical names to the keys of Megatron's GPTModel. One of its tensors may contain several canonical ones.

The decoder layers are either stacked under one key along a new first axis, or numbered (`non_homogeneous_layers`); the tensors
are the same. Names as in megatron-core 0.16's `GPTModel.sharded_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.build import whole_shapes

Kind = Literal["plain", "vocabulary", "query_key_value", "gate_up", "swapped"]
"""How our tensors are laid out in Megatron's: see `fusing`."""

DECODER, MODULE = "decoder.layers.", "mtp.layers.0."
# Old and new name of the block inside an MTP layer.
RENAMED = ("mtp.layers.0.transformer_layer.", "mtp.layers.0.mtp_model_layer.")
# Modules that have an `_extra_state` (for FP8) in the checkpoint, in local or Transformer Engine layers; loading requires it.
_BLOCK_STATES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_HEAD_NORM_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_MODULE_STATES = ("enorm", "hnorm", "eh_proj", "final_layernorm")


@dataclass(frozen=True)
class Entry:
    """A tensor of Megatron's model; in the decoder, of one layer."""

    key: str
    """Key with the layer number."""
    stacked: str | None
    """Key of all layers stacked; None outside the decoder layers."""
    layer: int | None
    """Index in that stack."""
    parts: tuple[str, ...]
    """Canonical tensors that it contains."""
    shape: tuple[int, ...]
    """Shape for one layer; the vocabulary without padding."""
    kind: Kind
    axis: int | None
    """Axis split over tensor ranks; None if replicated."""


@dataclass(frozen=True)
class _Names:
    """Creates the entries of one model."""

    shapes: dict[str, tuple[int, ...]]
    qkv_bias: bool
    qk_norm: bool

    def entry(
        self, key: str, parts: tuple[str, ...], kind: Kind = "plain", axis: int | None = None, layer: int | None = None
    ) -> Entry:
        first = self.shapes[parts[0]]
        shape = (sum(self.shapes[part][0] for part in parts), *first[1:])
        stacked = None if layer is None else key.replace(f"{DECODER}{layer}.", DECODER, 1)
        return Entry(key, stacked, layer, parts, shape, kind, axis)

    def block(self, canonical: str, megatron: str, layer: int | None = None) -> Iterator[Entry]:
        def parts(parent: str, names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
            return tuple(f"{canonical}{parent}.{name}.{suffix}" for name in names)

        attention, mlp = f"{megatron}self_attention.", f"{megatron}mlp."
        heads = ("query", "key", "value")
        yield self.entry(
            f"{attention}linear_qkv.layer_norm_weight", (f"{canonical}attention_norm.weight",), layer=layer
        )
        for suffix in ("weight", "bias") if self.qkv_bias else ("weight",):
            members = parts("attention", heads, suffix)
            yield self.entry(f"{attention}linear_qkv.{suffix}", members, "query_key_value", 0, layer)
        for name, key in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm")) if self.qk_norm else ():
            yield self.entry(f"{attention}{key}.weight", (f"{canonical}attention.{name}.weight",), layer=layer)
        yield self.entry(
            f"{attention}linear_proj.weight", (f"{canonical}attention.output.weight",), axis=1, layer=layer
        )
        yield self.entry(f"{mlp}linear_fc1.layer_norm_weight", (f"{canonical}mlp_norm.weight",), layer=layer)
        yield self.entry(f"{mlp}linear_fc1.weight", parts("mlp", ("gate", "up"), "weight"), "gate_up", 0, layer)
        yield self.entry(f"{mlp}linear_fc2.weight", (f"{canonical}mlp.down.weight",), axis=1, layer=layer)


def entries(model: ModelConfig, recycle: RecycleConfig) -> list[Entry]:
    """Returns all tensors of Megatron's model, in its order. Raises CheckpointError for a module as `check_module` does."""
    check_module(recycle)
    names = _Names(whole_shapes(model, recycle), model.qkv_bias, model.qk_norm)
    found = [names.entry("embedding.word_embeddings.weight", ("embedding.weight",), "vocabulary", 0)]
    for layer in range(model.layers):
        found += names.block(f"blocks.{layer}.", f"{DECODER}{layer}.", layer)
    found.append(names.entry("decoder.final_layernorm.weight", ("final_norm.weight",)))
    if not model.tied_embeddings:
        found.append(names.entry("output_layer.weight", ("head.weight",), "vocabulary", 0))
    if recycle.layers:
        found.append(names.entry(f"{MODULE}enorm.weight", ("recycle.embedding_norm.weight",)))
        found.append(names.entry(f"{MODULE}hnorm.weight", ("recycle.hidden_norm.weight",)))
        found.append(names.entry(f"{MODULE}eh_proj.weight", ("recycle.projection.weight",), "swapped", 0))
        found += names.block("recycle.blocks.0.", RENAMED[0])
        found.append(names.entry(f"{MODULE}final_layernorm.weight", ("recycle.final_norm.weight",)))
    return found


def check_module(recycle: RecycleConfig) -> None:
    """Raises CheckpointError for a module with several blocks, and for one with parts that Megatron's has not."""
    if recycle.taps:
        raise CheckpointError(
            f"recycle.taps={list(recycle.taps)}: an MTP layer of Megatron takes one state only; "
            "convert to portable or hf instead"
        )
    if recycle.confidence:
        raise CheckpointError(
            "recycle.confidence=true: an MTP layer of Megatron has no confidence layer; convert to portable or hf instead"
        )
    if recycle.layers > 1:
        raise CheckpointError(
            f"recycle.layers={recycle.layers}: an MTP layer of Megatron has one block; convert to portable or hf instead"
        )


def extra_states(model: ModelConfig, recycle: RecycleConfig) -> list[tuple[int | None, str]]:
    """Returns layer (None for those after the decoder) and key of the empty states that loading stacked layers requires."""
    count = model.layers
    of_block = (*_BLOCK_STATES, *(_HEAD_NORM_STATES if model.qk_norm else ()))
    found: list[tuple[int | None, str]] = [
        (layer, f"{DECODER}{name}._extra_state/shard_{layer}_{count}") for layer in range(count) for name in of_block
    ]
    names = ["decoder.final_layernorm"]
    if recycle.layers:
        names += [f"{MODULE}{name}" for name in _MODULE_STATES] + [f"{RENAMED[0]}{name}" for name in of_block]
    return found + [(None, f"{name}._extra_state/shard_0_1") for name in names]
