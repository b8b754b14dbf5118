"""The model and tokenizer interfaces that decoding requires.

Shapes: T new tokens, B sequences, D hidden width, V vocabulary. Hidden states are time-major, as in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from torch import Tensor
from torch.nn import Parameter


class KeyValueCache(Protocol):
    """KV cache of one stack of transformer blocks."""

    @property
    def length(self) -> int:
        """Number of entries; the next entry gets this position."""

    def truncate(self, length: int) -> None:
        """Drops all entries from position `length` on."""


class DecodingCache(Protocol):
    """KV caches of backbone and recycle module. Entry p of the module's cache is computed from (h_p, E x_{p+1})."""

    @property
    def backbone(self) -> KeyValueCache:
        """One entry per token that the backbone has processed."""

    @property
    def recycle(self) -> KeyValueCache:
        """One entry per position that the recycle module has processed."""


CacheT = TypeVar("CacheT", bound=DecodingCache)


class DecodableModel(Protocol[CacheT]):
    """A backbone with an optional recycle module. The cache type is opaque: callers only pass it back to the model."""

    @property
    def recycle_layers(self) -> int:
        """Blocks in the recycle module; 0 means there is none."""

    @property
    def max_positions(self) -> int:
        """Maximum context length, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, without padding."""

    def parameters(self) -> Iterator[Parameter]:
        """Weights. Input tokens must be on the device of the first one."""

    def new_cache(self, batch_size: int, capacity: int) -> CacheT:
        """Empty caches with room for `capacity` positions."""

    def decode(self, tokens_BT: Tensor, cache: CacheT) -> Tensor:
        """Runs the backbone on T new tokens and appends them to cache.backbone. Returns h_TBD, after the final norm."""

    def recycle_decode(self, hidden_TBD: Tensor, next_tokens_BT: Tensor, cache: CacheT) -> Tensor:
        """Runs the module on T entries (h_p, x_{p+1}), appended to cache.recycle. Returns r_TBD; r_p predicts x_{p+2}."""

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """Applies the shared head: fp32 logits_TBV over the vocabulary, without padding."""


class TextSource(Protocol):
    """Incremental detokeniser. A character that spans several tokens is returned with the last of them."""

    def feed(self, token_id: int, /) -> str:
        """Returns the text that this token completes, possibly empty."""

    def flush(self) -> str:
        """Returns the text still held back. To be called at the end of the sequence."""
