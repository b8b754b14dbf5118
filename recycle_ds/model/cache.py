"""Key/value caches of decoding. Lengths are Python integers, so that rolling back costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer's past, [B, H, capacity, C] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def extend(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Writes [B, H, T, C] at positions start.. and returns views of everything up to there."""
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
        """Counts entries just written. Raises ValueError beyond the capacity, before anything is written there."""
        if self.length + count > self.capacity:
            raise ValueError(f"cache of {self.capacity} entries cannot take {count} more after {self.length}")
        self.length += count

    def truncate(self, length: int) -> None:
        """Forgets entries from `length` on; they are overwritten by whatever comes next."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} entries to {length}")
        self.length = length


@dataclass
class DecodingCache:
    """Past of the backbone and of the recycle module. Entry p of the module is made of (h_p, E x_{p+1})."""

    backbone: KVCache
    recycle: KVCache
