"""Runs plans on many ranks: tensor shards of pipeline stages.

The owner (the first tensor rank of the first stage) has the scheduler, and sends every plan to each other rank as one
message of integers. States go from stage to stage; the last one chooses tokens and sends ids back, never logits. A rank
receives its next plan while others still compute, so with as many plans under way as there are stages, all stages are
busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.inference.engine.plan import Chosen, Outcome, Plan, decode_plan, encode_plan
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.team import Team

# Numbers that a message's first part has room for. Longer ones take a second part.
_ROOM = 2048
_END, _REPORT = -1, -2


class _Clock:
    """The share of the time in which a rank computes."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._busy = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time inside as busy. The first one starts the clock."""
        start = time.perf_counter()
        self._start = start if self._start is None else self._start
        yield
        self._busy += time.perf_counter() - start

    def idle_share(self) -> float:
        """The rest of the time since the clock was started, as a share; starts over."""
        if self._start is None:
            return 0.0
        idle = 1 - self._busy / (time.perf_counter() - self._start)
        self._start, self._busy = None, 0.0
        return idle


class TeamExecutor:
    """The owner's executor, and what the other ranks run. width: of the states from the stage before."""

    def __init__(self, runner: Runner, team: Team, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._runner, self._team, self._width, self._dtype, self._device = runner, team, width, dtype, device
        self.depth = team.mesh.pipeline.size
        self._outcomes: deque[Outcome] = deque()
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._most_sending = 8 * team.mesh.pipeline.size * team.mesh.tensor.size
        self._broken = False
        self._clock = _Clock()

    def submit(self, plan: Plan) -> None:
        """See `Executor`."""
        self._tell(encode_plan(plan))
        outcome = self._run(plan)
        if self.depth == 1:
            self._outcomes.append(outcome)

    def collect(self) -> Outcome:
        """See `Executor`."""
        if self._outcomes:
            return self._outcomes.popleft()
        return _decode(self._receive(self._team.chooser, torch.float64))

    def discard(self) -> None:
        """See `Executor`. An exception in the middle of a step leaves the ranks out of step: no plan can follow."""
        self._broken = True

    def explanation(self) -> str:
        """See `Executor`. Only on CPUs: a GPU computes while its rank does something else. Waiting for other tensor ranks
        inside a step counts as busy."""
        ranks = dist.get_process_group_ranks(self._team.control)
        if self._broken or self._device.type != "cpu" or len(ranks) == 1:
            return ""
        self._tell([_REPORT])
        shares = {self._team.owner: self._clock.idle_share()}
        for rank in ranks:
            if rank != self._team.owner:
                (shares[rank],) = self._receive(rank, torch.float64)
        return "idle: " + ", ".join(f"rank {rank} {100 * share:.0f} %" for rank, share in shares.items())

    def close(self) -> None:
        """See `Executor`."""
        if self._broken:  # after Ctrl-C, for example, which the other ranks have got too
            return
        self._tell([_END])
        while self._sending:
            self._sending.popleft()[0].wait()

    def follow(self) -> None:
        """What every rank but the owner does: runs the owner's plans until it closes."""
        while (numbers := self._receive(self._team.owner, torch.int64)) != [_END]:
            if numbers == [_REPORT]:
                self._send(torch.tensor([self._clock.idle_share()], dtype=torch.float64), self._team.owner)
            else:
                self._run(decode_plan(numbers))

    def _run(self, plan: Plan) -> Outcome:
        """Runs this rank's part of a plan. Returns the outcome on the last stage."""
        mesh = self._team.mesh
        received = None
        if not mesh.first_stage and plan.parts:
            received = torch.empty(plan.tokens, self._width, dtype=self._dtype, device=self._device)
            dist.recv(received, group_src=mesh.pipeline.rank - 1, group=mesh.pipeline.group)
        with self._clock.running():
            result = self._runner.run(plan, received)
        while len(self._sending) > self._most_sending:  # received long ago; only waiting for them frees them
            self._sending.popleft()[0].wait()
        if isinstance(result, Tensor):
            work = dist.isend(result, group_dst=mesh.pipeline.rank + 1, group=mesh.pipeline.group)
            assert work is not None
            self._sending.append((work, result))
            return ()
        if self.depth > 1 and mesh.rank == self._team.chooser:
            self._send(torch.tensor(_encode(result), dtype=torch.float64), self._team.owner)
        return result

    def _tell(self, numbers: Sequence[int]) -> None:
        """Sends the owner's numbers to all other ranks."""
        message = torch.tensor(numbers, dtype=torch.int64)
        for rank in dist.get_process_group_ranks(self._team.control):
            if rank != self._team.owner:
                self._send(message, rank)

    def _send(self, numbers: Tensor, rank: int) -> None:
        """Sends numbers without waiting for the receiver, which may still compute: that is what keeps stages busy."""
        first = numbers.new_zeros(_ROOM)
        first[0] = len(numbers)
        first[1 : 1 + len(numbers)] = numbers[: _ROOM - 1]
        for part in (first, numbers) if len(numbers) >= _ROOM else (first,):
            work = dist.isend(part, dst=rank, group=self._team.control)
            assert work is not None
            self._sending.append((work, part))

    def _receive(self, rank: int, dtype: torch.dtype) -> list[Any]:
        first = torch.zeros(_ROOM, dtype=dtype)
        dist.recv(first, src=rank, group=self._team.control)
        length = int(first[0])
        if length < _ROOM:
            return first[1 : 1 + length].tolist()
        numbers = torch.zeros(length, dtype=dtype)
        dist.recv(numbers, src=rank, group=self._team.control)
        return numbers.tolist()


def _encode(outcome: Outcome) -> list[float]:
    """An outcome as numbers; ids are exact in fp64."""
    numbers: list[float] = [len(outcome)]
    for one in outcome:
        numbers += [one.sequence, len(one.tokens), len(one.drafts), len(one.logprobs)]
        numbers += [*one.tokens, *one.drafts, *one.confidences]
        for value, best in one.logprobs:
            numbers += [value, len(best)]
            for token, logprob in best:
                numbers += [token, logprob]
    return numbers


def _decode(numbers: Sequence[float]) -> Outcome:
    """The outcome that `_encode` made numbers of."""
    source = iter(numbers)

    def ints(count: int) -> tuple[int, ...]:
        return tuple(int(next(source)) for _ in range(count))

    found = []
    for _ in range(ints(1)[0]):
        sequence, tokens, drafts, logprobs = ints(4)
        head = (sequence, ints(tokens), ints(drafts), tuple(next(source) for _ in range(drafts)))
        scores = []
        for _ in range(logprobs):
            value = next(source)
            scores.append((value, tuple((ints(1)[0], next(source)) for _ in range(ints(1)[0]))))
        found.append(Chosen(*head, tuple(scores)))
    return tuple(found)
