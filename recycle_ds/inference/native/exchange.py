"""Exchanges between the tensor ranks of one host, by the kernels and by Python: see exchange.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from recycle_ds.parallel.peers import PeerLost


class ExchangeStruct(ctypes.Structure):
    """`Exchange` in c/exchange.h."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("timeout", ctypes.c_double),
    )


class Exchange:
    """This rank's side of the exchanges: where they take place, and how many there have been."""

    def __init__(self, memory: int, rank: int, ranks: Sequence[int], room: int, timeout: float) -> None:
        """memory: address of a counter for each rank, then two places of `room` bytes for each; the caller keeps it. rank:
        index of this one. ranks: the global ranks. timeout: seconds to wait for another rank."""
        self._ranks, self._timeout = list(ranks), timeout
        self.struct = ExchangeStruct(memory, rank, len(self._ranks), room, 0, timeout)

    def lost(self, index: int) -> PeerLost:
        """The error for a rank that has not answered in time."""
        return PeerLost(f"rank {self._ranks[index]} has not answered for {self._timeout:.0f} s: it hangs")
