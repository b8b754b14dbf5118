"""Messages from one rank to another: sent without waiting for the receiver, and received in order.

Through a process group, or between ranks of one x86 host through shared memory. Between two one-thread ranks on cores
of their own, a message of a kilobyte took 0.5 ms through gloo and 0.03 ms through shared memory; a pipeline of decoding
stages waits for four of them in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import shared_memory
from typing import Protocol

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


class Channel(Protocol):
    """One direction between two ranks."""

    def send(self, message: Tensor) -> None:
        """Sends a tensor without waiting for the receiver. It must not be changed afterwards."""

    def receive(self, dtype: torch.dtype, count: int | None = None) -> Tensor:
        """Waits for the next message and returns its numbers [N]. count: N, where the receiver has to know it."""

    def flush(self) -> None:
        """Waits until all messages that were sent have been received, or are where the receiver finds them."""


class GroupChannel:
    """Through a process group."""

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        under_way: int = 8,
        known_lengths: bool = False,
    ) -> None:
        """peer: global rank of the other end. device: of received tensors. under_way: messages that may not have been
        received yet; older ones are freed. known_lengths: the receiver always gives the count; otherwise messages are int64
        or fp64 tensors [N]."""
        self._peer, self._group, self._device, self._known = peer, group, device, known_lengths
        self._most_sending = 2 * under_way  # a message may have two parts
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, message: Tensor) -> None:
        """See `Channel`."""
        if self._known:
            self._start(message)
        else:
            first = message.new_zeros(_FIRST)
            first[0] = len(message)
            first[1 : 1 + len(message)] = message[: _FIRST - 1]
            self._start(first)
            if len(message) >= _FIRST:
                self._start(message)
        while len(self._sending) > self._most_sending:  # received long ago; only waiting for them frees them
            self._sending.popleft()[0].wait()

    def receive(self, dtype: torch.dtype, count: int | None = None) -> Tensor:
        """See `Channel`."""
        if self._known:
            assert count is not None
            return self._take(dtype, count)
        first = self._take(dtype, _FIRST)
        length = int(first[0])
        return first[1 : 1 + length] if length < _FIRST else self._take(dtype, length)

    def flush(self) -> None:
        """See `Channel`."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _start(self, message: Tensor) -> None:
        work = dist.isend(message, dst=self._peer, group=self._group)
        assert work is not None
        self._sending.append((work, message))

    def _take(self, dtype: torch.dtype, count: int) -> Tensor:
        message = torch.empty(count, dtype=dtype, device=self._device)
        dist.recv(message, src=self._peer, group=self._group)
        return message


class SharedMemoryChannel:
    """Through a ring of places in shared memory, for tensors of a CPU.

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
        self._bytes = [torch.frombuffer(memory.buf, dtype=torch.uint8, count=_ROOM, offset=at + LINE) for at in starts]
        self._count = 0
        """Messages that this end has written or read."""

    @staticmethod
    def length(places: int) -> int:
        """Bytes of memory."""
        return 2 * LINE + places * (LINE + _ROOM)

    def send(self, message: Tensor) -> None:
        """See `Channel`. Raises PeerLost if the receiver leaves all places full."""
        self._wait(self._read, self._count - self._places + 1, _TIMEOUT)
        place = self._count % self._places
        length = message.numel() * message.itemsize
        if length > _ROOM:
            self._lengths[place][0] = _ELSEWHERE
            self._large.send(message)
        else:
            self._bytes[place][:length] = message.contiguous().view(-1).view(torch.uint8)
            self._lengths[place][0] = length
        self._count += 1
        self._written[0] = self._count

    def receive(self, dtype: torch.dtype, count: int | None = None) -> Tensor:
        """See `Channel`. Waits without limit: an idle engine may have nothing to say for days, and a dead rank is noticed
        elsewhere."""
        self._wait(self._written, self._count + 1, None)
        place = self._count % self._places
        length = int(self._lengths[place][0])
        message = (
            self._large.receive(dtype, count)
            if length == _ELSEWHERE
            else self._bytes[place][:length].clone().view(dtype)
        )
        self._count += 1
        self._read[0] = self._count
        return message

    def flush(self) -> None:
        """See `Channel`."""
        self._large.flush()

    def _wait(self, counter: np.ndarray[tuple[int], np.dtype[np.int64]], least: int, timeout: float | None) -> None:
        """Waits until a counter has reached a number."""
        if not wait_until(lambda: bool(counter[0] >= least), timeout):
            raise PeerLost(f"rank {self._peer} has not read a message for {timeout:.0f} s: it hangs")


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
