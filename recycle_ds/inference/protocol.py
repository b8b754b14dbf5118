"""What decoding needs of a model and of a tokenizer, and nothing more.

Shapes: T new tokens, B sequences, D hidden width, V vocabulary. Hidden states are time-major, as in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from torch import Tensor
from torch.nn import Parameter


class KeyValueCache(Protocol):
    """Keys and values of one stack of blocks."""

    @property
    def length(self) -> int:
        """Entries held; the next one gets this position."""

    def truncate(self, length: int) -> None:
        """Forgets every entry from position `length` on."""


class DecodingCache(Protocol):
    """The caches of backbone and recycle module: entry p of the module's is made of (h_p, E x_{p+1})."""

    @property
    def backbone(self) -> KeyValueCache:
        """One entry per token read by the backbone."""

    @property
    def recycle(self) -> KeyValueCache:
        """One entry per position read by the recycle module."""


CacheT = TypeVar("CacheT", bound=DecodingCache)


class DecodableModel(Protocol[CacheT]):
    """A backbone with, possibly, a recycle module. Its cache is its own kind: callers only hand it back."""

    @property
    def recycle_layers(self) -> int:
        """Blocks in the recycle module; 0 means there is none."""

    @property
    def max_positions(self) -> int:
        """Longest context, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, without padding."""

    def parameters(self) -> Iterator[Parameter]:
        """Weights; the first one's device is where tokens must be."""

    def new_cache(self, batch_size: int, capacity: int) -> CacheT:
        """Empty caches with room for `capacity` positions."""

    def decode(self, tokens_BT: Tensor, cache: CacheT) -> Tensor:
        """Runs the backbone on T new tokens, appends them to cache.backbone, returns h_TBD, after the final norm."""

    def recycle_decode(self, hidden_TBD: Tensor, next_tokens_BT: Tensor, cache: CacheT) -> Tensor:
        """Runs the module on T entries (h_p, x_{p+1}), which join cache.recycle. Returns r_TBD, r_p for x_{p+2}."""

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """The shared head: fp32 logits_TBV over the true vocabulary."""


class TextSource(Protocol):
    """Turns token ids into text one at a time; a character spread over tokens appears with its last token."""

    def feed(self, token_id: int, /) -> str:
        """The text that this token completes, possibly empty."""

    def flush(self) -> str:
        """What was still held back, at the end of a text."""
