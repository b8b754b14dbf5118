"""Key/value caches for decoding. Lengths are Python integers, so a rollback costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class LayerCache:
    """Cached keys and values of one layer, [B, H, capacity, C] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Writes [B, H, T, C] from position `start` on and returns views of all entries up to the last one written."""
        end = start + keys.shape[2]
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """The caches of a stack of layers that advance together. `length` entries are valid."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Uninitialised on purpose: an entry is written before it is read.
        storage = torch.empty(layers, 2, batch, heads, capacity, channels, dtype=dtype, device=device)
        self.layers = [LayerCache(layer[0], layer[1]) for layer in storage]
        self.capacity = capacity
        self.length = 0

    def advance(self, count: int) -> None:
        """Counts entries that will be written next. Raises ValueError, before any is written, if the capacity is too small."""
        if self.length + count > self.capacity:
            raise ValueError(f"cannot add {count} entries to a cache that has {self.length} of {self.capacity}")
        self.length += count

    def truncate(self, length: int) -> None:
        """Drops the entries from `length` on; new entries overwrite them. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} entries to {length}")
        self.length = length


@dataclass
class DecodingCache:
    """Caches of the backbone and of the recycle module. Entry p of the module is computed from (h_p, E x_{p+1})."""

    backbone: KVCache
    recycle: KVCache
