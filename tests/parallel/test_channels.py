"""Messages between two ranks: through shared memory where both reach it, else through the process group."""

from __future__ import annotations

import time
from array import array
from multiprocessing import shared_memory

import pytest
import torch
import torch.distributed as dist

from recycle_ds.parallel import channels, common_memory, waiting
from recycle_ds.parallel.channels import GroupChannel, SharedMemoryChannel, share
from recycle_ds.parallel.peers import PeerLost
from tests.distributed import run_ranks
from tests.parallel.test_collectives import _Unreachable

SIZES = (0, 1, 7, 2046, 2047, 2048, 5000, 8192, 8193, 20000, 3)
"""Below, at and above the first part of a group's message and the place of one in shared memory (of numbers, and of fp32)."""


def _numbers(size: int) -> list[int]:
    """Other ones in each message: what an earlier one has left in its place is not right."""
    return [size * 2**40 + number for number in range(size)]


def _states(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


def _talk(rank: int, world_size: int, blocked: int | None) -> tuple[list[str], list[bool]]:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    peer, cpu = 1 - rank, torch.device("cpu")
    routes = [(0, 1), (1, 0), (0, 1)]
    own = {index: GroupChannel(peer, None, cpu) for index in range(3)}
    original = shared_memory.SharedMemory
    if blocked == rank:
        common_memory.shared_memory.SharedMemory = _Unreachable  # type: ignore[misc,assignment]
    try:
        there, back, states = share(routes, own, None).values()
    finally:
        shared_memory.SharedMemory = original  # type: ignore[misc]
    right = []
    if rank == 0:
        for size in SIZES:
            there.send_numbers(array("q", _numbers(size)))
            with torch.inference_mode():
                states.send(_states(size, torch.bfloat16).view(1, size))
                states.send(torch.stack([_states(2 * size, torch.float32)] * 2, dim=1)[:, 0])
        for size in SIZES:
            found = back.receive_numbers("d")
            right.append(
                found == [number / 3 for number in _numbers(size)] and all(type(one) is float for one in found)
            )
        there.flush()
    else:
        time.sleep(0.2)  # the sender has long filled all places
        for size in SIZES:
            numbers = there.receive_numbers("q")
            right.append(numbers == _numbers(size) and all(type(one) is int for one in numbers))
            for dtype, count in ((torch.bfloat16, size), (torch.float32, 2 * size)):
                right.append(torch.equal(states.receive(dtype, count), _states(count, dtype)))
            back.send_numbers(array("d", [number / 3 for number in _numbers(size)]))
        back.flush()
    dist.barrier()
    return [type(one).__name__ for one in (there, back, states)], right


@pytest.mark.parametrize(("blocked", "kind"), [(None, SharedMemoryChannel), (1, GroupChannel), (0, GroupChannel)])
def test_messages_of_all_sizes_arrive_in_order(blocked: int | None, kind: type) -> None:
    """Prevents plans, ids or states that are lost, cut, overwritten or overtaken, whichever way they take."""
    for kinds, right in run_ranks(_talk, 2, blocked):
        assert kinds == [kind.__name__] * 3
        assert right and all(right)


def test_a_receiver_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a sender that waits for ever, without a word, for a rank that has stopped reading."""
    monkeypatch.setattr(channels, "_TIMEOUT", 0.1)
    memory = shared_memory.SharedMemory(create=True, size=SharedMemoryChannel.length(8))
    try:
        channel = SharedMemoryChannel(memory, 0, 8, GroupChannel(5, None, torch.device("cpu")), 5)
        with pytest.raises(PeerLost, match="rank 5 has not read a message"):
            for _ in range(20):
                channel.send_numbers(array("q", [1, 2, 3]))
        del channel
    finally:
        memory.unlink()


def test_a_message_of_another_length_is_refused() -> None:
    """Prevents ranks that are out of step from writing beyond the end of a tensor."""
    memory = shared_memory.SharedMemory(create=True, size=SharedMemoryChannel.length(8))
    try:
        ends = [SharedMemoryChannel(memory, 0, 8, GroupChannel(5, None, torch.device("cpu")), 5) for _ in range(2)]
        ends[0].send(torch.arange(300, dtype=torch.int64))
        with pytest.raises(PeerLost, match="rank 5 sent 2400 bytes where 8 were due"):
            ends[1].receive(torch.int64, 1)
        ends[0].send(torch.arange(3, dtype=torch.int8))
        assert ends[1].receive(torch.int64, 300).tolist() == list(range(300))
        with pytest.raises(PeerLost, match="rank 5 sent 3 bytes where 0 were due"):
            ends[1].receive_numbers("q")
        del ends
    finally:
        memory.unlink()


def _idle(rank: int, world_size: int) -> list[float]:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    own = {0: GroupChannel(1 - rank, None, torch.device("cpu"))}
    (channel,) = share([(0, 1)], own, None).values()
    if rank == 0:
        time.sleep(2.0)
        channel.send_numbers(array("q", [0, 1, 2, 3]))
        return []
    slept: list[float] = []
    original = time.sleep

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        original(seconds)

    time.sleep = sleep
    assert channel.receive_numbers("q") == [0, 1, 2, 3]
    return slept


def test_an_idle_receiver_sleeps_longer_and_longer() -> None:
    """Prevents ranks that follow an idle server from occupying their cores."""
    slept = run_ranks(_idle, 2)[1]
    assert slept == sorted(slept) and set(slept) >= {waiting._SLEEP, waiting._LONG_SLEEP}


def _kind(rank: int, world_size: int) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    routes = [(0, 1), (0, 2)]
    own = {i: GroupChannel(sum(one) - rank, None, torch.device("cpu")) for i, one in enumerate(routes) if rank in one}
    original = shared_memory.SharedMemory
    if rank == 2:
        common_memory.shared_memory.SharedMemory = _Unreachable  # type: ignore[misc,assignment]
    try:
        found = share(routes, own, None)
    finally:
        shared_memory.SharedMemory = original  # type: ignore[misc]
    return ",".join(type(one).__name__ for one in found.values())


def test_ranks_that_reach_the_memory_do_without_if_another_one_does_not() -> None:
    """Prevents two ranks that wait for each other in different kinds of channels."""
    assert run_ranks(_kind, 3) == ["GroupChannel,GroupChannel", "GroupChannel", "GroupChannel"]
