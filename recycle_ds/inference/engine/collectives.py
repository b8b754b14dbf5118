"""Exchange of small tensors between the tensor ranks of a team, several times in every layer.

Through a process group, or on one x86 host through shared memory. For a kilobyte between two one-thread ranks on cores of their
own, gloo was measured at 1.7 ms, which is longer than the products of a small layer, and a counter in shared memory at 0.03 ms.
DeepSpeed's shared-memory operation is faster still, but has to be compiled, ignores groups, and is slow where ranks are not
bound to cores.
"""

from __future__ import annotations

from multiprocessing import shared_memory
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.inference.native.exchange import Exchange
from recycle_ds.parallel.common_memory import LINE, common_memory
from recycle_ds.parallel.mesh import Axis
from recycle_ds.parallel.waiting import wait_until

_ROOM = 4 * 2**20
"""Bytes of the largest tensor that is exchanged through shared memory; larger ones take the process group."""


class Collectives(Protocol):
    """Collectives over the tensor ranks. All ranks call the same ones in the same order, with the same shapes."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def exchange(self) -> Exchange | None:
        """How the compiled kernels take part; None if they cannot: the ranks share no memory, or there is only one."""

    @property
    def begun(self) -> int:
        """How many collectives this rank has begun. Another thread may ask."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks. May change x."""

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks [ranks, ...]."""


class GroupCollectives:
    """Through a process group; the identity for a single rank."""

    def __init__(self, axis: Axis) -> None:
        self._group, self.size, self.exchange, self.begun = axis.group, axis.size, None, 0

    def sum(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        if self.size > 1:
            self.begun += 1
            x = x.contiguous()
            dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        if self.size == 1:
            return x[None]
        self.begun += 1
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.stack(parts)


class SharedMemoryCollectives:
    """Through shared memory of one host.

    Every rank writes its tensor into its own place and then counts up; when all have, it reads those of all. There are
    two places of each rank, used in turn: who counts up has read what was exchanged before. x86 processors make stores
    visible in the order in which they were made; elsewhere this class must not be used.
    """

    def __init__(self, axis: Axis, memory: shared_memory.SharedMemory, timeout: float = 120.0) -> None:
        """memory: from `common_memory`. timeout: seconds to wait for another rank, which may do a long step. A dead rank is
        noticed earlier, see liveness.py."""
        self._rank, self.size, self._timeout, self._memory = axis.rank, axis.size, timeout, memory
        self._large = GroupCollectives(axis)
        self._counts = np.ndarray((self.size, LINE // 8), dtype=np.int64, buffer=self._memory.buf)[:, 0]
        places = torch.frombuffer(self._memory.buf, dtype=torch.uint8, offset=LINE * self.size)
        self._places = places.view(2, self.size, _ROOM)
        address, ranks = places.data_ptr() - LINE * self.size, dist.get_process_group_ranks(axis.group)
        self.exchange = Exchange(address, axis.rank, ranks, _ROOM, timeout)
        self._order = self.exchange.struct

    @property
    def begun(self) -> int:
        """See `Collectives`."""
        return int(self._counts[self._rank]) + self._large.begun  # the kernels count theirs in the memory

    def sum(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        if x.numel() * x.itemsize > _ROOM:
            return self._large.sum(x)
        parts = self._exchange(x)
        if self.size == 2:
            return parts[0] + parts[1]
        return parts.float().sum(0).to(x.dtype) if x.dtype == torch.bfloat16 else parts.sum(0)

    def gather(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        return self._large.gather(x) if x.numel() * x.itemsize > _ROOM else self._exchange(x).clone()

    def _exchange(self, x: Tensor) -> Tensor:
        """Views of the tensors of all ranks, valid until the exchange after the next one."""
        self._order.done += 1  # the kernels count theirs there too
        done = self._order.done
        length = x.numel() * x.itemsize
        places = self._places[done % 2, :, :length].view(x.dtype).view(self.size, *x.shape)
        places[self._rank] = x
        self._counts[self._rank] = done
        if not wait_until(lambda: bool(self._counts.min() >= done), self._timeout):
            raise self.exchange.lost(int(self._counts.argmin()))
        return places


def collectives(axis: Axis, device: torch.device) -> Collectives:
    """The fastest collectives that are safe for these ranks. Collective over the axis."""
    if axis.size == 1 or device.type != "cpu":
        return GroupCollectives(axis)
    memory = common_memory(axis.group, LINE * axis.size + 2 * axis.size * _ROOM)
    return GroupCollectives(axis) if memory is None else SharedMemoryCollectives(axis, memory)
