"""Messages from one rank to another: sent without waiting for the receiver, and received in order.

Through a process group, or between ranks of one x86 host through shared memory. Between two one-thread ranks on cores
of their own, a message of a kilobyte took 0.5 ms through gloo and 0.03 ms through shared memory; a pipeline of decoding
stages waits for four of them in a step. Between two steps little of a channel's code is left in the processor's caches, and
every call of PyTorch takes some 20 µs: there, numbers are copied without it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import shared_memory
from typing import Any, Literal, Protocol, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.parallel.common_memory import LINE, common_memory
from recycle_ds.parallel.peers import PeerLost
from recycle_ds.parallel.waiting import wait_until

# Numbers in the first part of a message through a process group, its length among them. Longer ones take a second part.
_FIRST = 2048
# Bytes of the longest message that takes shared memory. Longer ones take the process group.
_ROOM = 64 * 1024
# Seconds that a sender waits for a free place; there is one unless the receiver hangs.
_TIMEOUT = 120.0
# In place of a message's length: it was sent through the process group.
_ELSEWHERE = -1

Kind = Literal["q", "d"]
"""Type code of a message's numbers, as in the array module: "q" for int64, "d" for fp64."""
_DTYPES: dict[Kind, torch.dtype] = {"q": torch.int64, "d": torch.float64}


class Channel(Protocol):
    """One direction between two ranks. The receiver has to know whether a tensor or numbers come next."""

    def send(self, message: Tensor) -> None:
        """Sends a tensor without waiting for the receiver. It must not be changed afterwards."""

    def receive(self, dtype: torch.dtype, count: int) -> Tensor:
        """Waits for the next message, a tensor, and returns its elements [count]."""

    def send_numbers(self, numbers: array[int] | array[float]) -> None:
        """Sends an array, of type "q" or "d", without waiting for the receiver."""

    @overload
    def receive_numbers(self, kind: Literal["q"]) -> list[int]: ...
    @overload
    def receive_numbers(self, kind: Literal["d"]) -> list[float]: ...
    def receive_numbers(self, kind: Kind) -> list[Any]:
        """Waits for the next message, an array of this type. Returns its numbers."""

    def flush(self) -> None:
        """Waits until all messages that were sent have been received, or are where the receiver finds them."""


class GroupChannel:
    """Through a process group."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, device: torch.device, *, under_way: int = 8) -> None:
        """peer: global rank of the other end. device: of received tensors. under_way: messages that may not have been
        received yet; older ones are freed."""
        self._peer, self._group, self._device = peer, group, device
        self._most_sending = 2 * under_way  # a message may have two parts
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, message: Tensor) -> None:
        """See `Channel`."""
        self._start(message.contiguous())
        while len(self._sending) > self._most_sending:  # received long ago; only waiting for them frees them
            self._sending.popleft()[0].wait()

    def receive(self, dtype: torch.dtype, count: int) -> Tensor:
        """See `Channel`."""
        message = torch.empty(count, dtype=dtype, device=self._device)
        dist.recv(message, src=self._peer, group=self._group)
        return message

    def send_numbers(self, numbers: array[int] | array[float]) -> None:
        """See `Channel`. A first part has the count and as many numbers as fit."""
        message = torch.from_numpy(np.array(numbers)).to(self._device)
        first = message.new_zeros(_FIRST)
        first[0] = len(message)
        first[1 : 1 + len(message)] = message[: _FIRST - 1]
        self.send(first)
        if len(message) >= _FIRST:
            self.send(message)

    def receive_numbers(self, kind: Kind) -> list[Any]:
        """See `Channel`."""
        first = self.receive(_DTYPES[kind], _FIRST)
        count = int(first[0])
        message = first[1 : 1 + count] if count < _FIRST else self.receive(_DTYPES[kind], count)
        return message.tolist()

    def flush(self) -> None:
        """See `Channel`."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _start(self, message: Tensor) -> None:
        work = dist.isend(message, dst=self._peer, group=self._group)
        assert work is not None
        self._sending.append((work, message))


class SharedMemoryChannel:
    """Through a ring of places in shared memory, for numbers and for tensors of a CPU.

    The sender counts up messages that it has written, the receiver those that it has read.
    """

    def __init__(
        self, memory: shared_memory.SharedMemory, offset: int, places: int, large: GroupChannel, peer: int
    ) -> None:
        """memory, offset: where the channel lies. places: messages that may not have been received yet, as for `length`.
        large: takes messages that do not fit. peer: rank of the other end."""
        self._memory, self._places, self._large, self._peer = memory, places, large, peer
        self._written, self._read = (np.ndarray(1, np.int64, memory.buf, offset + i * LINE) for i in range(2))
        starts = [offset + 2 * LINE + place * (LINE + _ROOM) for place in range(places)]
        self._lengths = [np.ndarray(1, np.int64, memory.buf, start) for start in starts]
        contents = [np.ndarray(_ROOM, np.uint8, memory.buf, start + LINE) for start in starts]
        self._contents = [memoryview(one) for one in contents]
        self._addresses = [one.ctypes.data for one in contents]  # as long as the memory lives
        self._count = 0
        """Messages that this end has written or read."""

    @staticmethod
    def length(places: int) -> int:
        """Bytes of memory."""
        return 2 * LINE + places * (LINE + _ROOM)

    def send(self, message: Tensor) -> None:
        """See `Channel`; the tensor is on the CPU. Raises PeerLost if the receiver leaves all places full."""
        place, length = self._free_place(), message.numel() * message.itemsize
        if length > _ROOM:
            self._large.send(message)
            length = _ELSEWHERE
        else:
            assert message.device.type == "cpu"
            message = message.contiguous()
            ctypes.memmove(self._addresses[place], message.data_ptr(), length)
        self._publish(place, length)

    def receive(self, dtype: torch.dtype, count: int) -> Tensor:
        """See `Channel`. Waits without limit: an idle engine may have nothing to say for days, and a dead rank is noticed
        elsewhere. Raises PeerLost for a message of another length."""
        place, length = self._next()
        if length == _ELSEWHERE:
            message = self._large.receive(dtype, count)
        else:
            self._check(length, count * dtype.itemsize)
            message = torch.empty(count, dtype=dtype)
            ctypes.memmove(message.data_ptr(), self._addresses[place], length)
        self._release()
        return message

    def send_numbers(self, numbers: array[int] | array[float]) -> None:
        """See `Channel`. Raises PeerLost if the receiver leaves all places full."""
        place, length = self._free_place(), len(numbers) * numbers.itemsize
        if length > _ROOM:
            self._large.send_numbers(numbers)
            length = _ELSEWHERE
        else:
            self._contents[place][:length] = memoryview(numbers).cast("B")
        self._publish(place, length)

    def receive_numbers(self, kind: Kind) -> list[Any]:
        """See `Channel`. Waits without limit. Raises PeerLost for a message that is not of such numbers."""
        place, length = self._next()
        if length == _ELSEWHERE:
            numbers = self._large.receive_numbers(kind)
        else:
            self._check(length, length // _DTYPES[kind].itemsize * _DTYPES[kind].itemsize)
            numbers = self._contents[place][:length].cast(kind).tolist()
        self._release()
        return numbers

    def flush(self) -> None:
        """See `Channel`."""
        self._large.flush()

    def _free_place(self) -> int:
        """Waits for a place that the receiver has read."""
        least = self._count - self._places + 1
        if not wait_until(lambda: bool(self._read[0] >= least), _TIMEOUT):
            raise PeerLost(f"rank {self._peer} has not read a message for {_TIMEOUT:.0f} s: it hangs")
        return self._count % self._places

    def _publish(self, place: int, length: int) -> None:
        """Shows the receiver what has been written."""
        self._lengths[place][0] = length
        self._count += 1
        self._written[0] = self._count

    def _next(self) -> tuple[int, int]:
        """Waits for a message. Returns its place and length."""
        wait_until(lambda: bool(self._written[0] > self._count))
        place = self._count % self._places
        return place, int(self._lengths[place][0])

    def _check(self, length: int, expected: int) -> None:
        """A message of another length would be written beyond the end of a tensor."""
        if length != expected:
            raise PeerLost(
                f"rank {self._peer} sent {length} bytes where {expected} were due: the ranks are out of step"
            )

    def _release(self) -> None:
        """Gives a place that has been read back to the sender."""
        self._count += 1
        self._read[0] = self._count


def share(
    routes: Sequence[tuple[int, int]],
    own: Mapping[int, GroupChannel],
    group: dist.ProcessGroup | None,
    under_way: int = 8,
) -> dict[int, Channel]:
    """Channels through shared memory in place of given ones, if all ranks of a group reach the same memory; else those.

    routes: (sender, receiver), global ranks of the group, the same list on all of them. own: this rank's channels, by
    their index in `routes`. under_way: messages of a channel that may not have been received yet before its sender waits.
    Collective over the group.
    """
    length = SharedMemoryChannel.length(under_way)
    memory = common_memory(group, length * len(routes)) if routes else None
    if memory is None:
        return dict(own)
    rank = dist.get_rank()
    found: dict[int, Channel] = {}
    for index, channel in own.items():
        peer = sum(routes[index]) - rank
        found[index] = SharedMemoryChannel(memory, length * index, under_way, channel, peer)
    return found
