"""Runs plans on many ranks: tensor shards of pipeline stages.

The owner (the first tensor rank of the first stage) has the scheduler, and sends every plan to each other rank as one
message of integers. States go from stage to stage; the last one chooses tokens and sends ids back, never logits. A rank
receives its next plan while others still compute, so with as many plans under way as there are stages, all stages are
busy.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from recycle_ds.inference.engine.plan import Chosen, Outcome, Plan, decode_plan, encode_plan
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.step_watch import StepWatch
from recycle_ds.inference.engine.team import Team, open_links
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Logprobs

_END, _REPORT, _WAIT = -1, -2, -3


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
    """The owner's executor, and what the other ranks run."""

    def __init__(
        self, runner: Runner, team: Team, width: int, dtype: torch.dtype, watch: StepWatch | None = None
    ) -> None:
        """width, dtype: of the states from the stage before. watch: is told of steps. Collective over the team."""
        self._runner, self._team, self._width, self._dtype = runner, team, width, dtype
        self._watch = watch or StepWatch()
        self.depth = team.mesh.pipeline.size
        self._links = open_links(team)
        self._outcomes: deque[Outcome] = deque()
        self._broken = False
        self._clock = _Clock()

    @property
    def computing(self) -> bool:
        """See `Executor`. What the stages compute meanwhile are other plans."""
        return False

    @property
    def first_runs(self) -> int | None:
        """See `Executor`."""
        return self._runner.first_runs

    def submit(self, plan: Plan) -> None:
        """See `Executor`. Raises DecodingError after `discard`."""
        if self._broken:
            raise DecodingError(
                "the ranks were interrupted in the middle of a step, and are out of step: start them again"
            )
        self._tell(encode_plan(plan))
        outcome = self._run(plan)
        if self.depth == 1:
            self._outcomes.append(outcome)

    def collect(self) -> Outcome:
        """See `Executor`."""
        if self._outcomes:
            return self._outcomes.popleft()
        assert self._links.outcomes is not None
        return decode_outcome(self._links.outcomes.receive_numbers("d"))

    def discard(self) -> None:
        """See `Executor`. An exception in the middle of a step leaves the ranks out of step: no plan can follow."""
        self._broken = True

    def explanation(self) -> str:
        """See `Executor`. Only on CPUs: a GPU computes while its rank does something else. Waiting for other tensor ranks
        inside a step counts as busy."""
        if self._broken or self._team.mesh.device.type != "cpu" or not self._links.reports:
            return ""
        self._tell([_REPORT])
        shares = {self._team.owner: self._clock.idle_share()}
        for rank, channel in self._links.reports.items():
            (shares[rank],) = channel.receive_numbers("d")
        return "idle: " + ", ".join(f"rank {rank} {100 * share:.0f} %" for rank, share in shares.items())

    def keep_alive(self) -> None:
        """See `Executor`."""
        if not self._broken:
            self._tell([_WAIT])

    def close(self) -> None:
        """See `Executor`."""
        if self._broken:  # after Ctrl-C, for example, which the other ranks have got too
            return
        self._tell([_END])
        self._links.flush()

    def follow(self) -> None:
        """What every rank but the owner does: runs the owner's plans until it closes."""
        plans = self._links.plans[self._team.owner]
        while (numbers := plans.receive_numbers("q")) != [_END]:
            if numbers == [_REPORT]:
                self._links.reports[self._team.owner].send_numbers(array("d", [self._clock.idle_share()]))
            elif numbers != [_WAIT]:
                self._run(decode_plan(numbers))

    def _run(self, plan: Plan) -> Outcome:
        """Runs this rank's part of a plan. Returns the outcome on the last stage."""
        links, received = self._links, None
        if links.before is not None and plan.parts:
            received = links.before.receive(self._dtype, plan.tokens * self._width).view(-1, self._width)
        with self._clock.running(), self._watch.step(plan.size):
            result = self._runner.run(plan, received)
        if isinstance(result, Tensor):
            assert links.after is not None
            links.after.send(result)
            return ()
        if links.outcomes is not None and not self._team.owns:
            links.outcomes.send_numbers(array("d", encode_outcome(result)))
        return result

    def _tell(self, numbers: Sequence[int]) -> None:
        """Sends the owner's numbers to all other ranks."""
        message = array("q", numbers)
        for channel in self._links.plans.values():
            channel.send_numbers(message)


def encode_outcome(outcome: Outcome) -> list[float]:
    """An outcome as numbers; ids are exact in fp64."""
    numbers: list[float] = [len(outcome)]
    for one in outcome:
        numbers += [one.sequence, len(one.tokens), len(one.drafts), len(one.logprobs), len(one.scored)]
        numbers += [one.calls, len(one.parents), *one.tokens, *one.drafts, *one.confidences, *one.parents]
        for value, best in (*one.logprobs, *one.scored):
            numbers += [value, len(best)]
            for token, logprob in best:
                numbers += [token, logprob]
    return numbers


def decode_outcome(numbers: Sequence[float]) -> Outcome:
    """The outcome that `encode_outcome` made numbers of."""
    found, at = [], 1

    def take(count: int) -> Sequence[float]:
        nonlocal at
        at += count
        return numbers[at - count : at]

    def ints(count: int) -> tuple[int, ...]:
        return tuple(map(int, take(count)))

    def scores(count: int) -> Logprobs:
        return tuple(_score(take) for _ in range(count))

    for _ in range(int(numbers[0])):
        sequence, tokens, drafts, logprobs, scored, calls, parents = ints(7)
        head = (sequence, ints(tokens), ints(drafts), tuple(take(drafts)))
        tree = (ints(parents), calls)
        found.append(Chosen(*head, scores(logprobs), scores(scored), *tree))
    assert at == len(numbers), "an outcome was cut"
    return tuple(found)


def _score(take: Callable[[int], Sequence[float]]) -> tuple[float, tuple[tuple[int, float], ...]]:
    """One token's log probability and the highest ones. take: the next numbers."""
    value, count = take(2)
    best = take(2 * int(count))
    return value, tuple(zip(map(int, best[::2]), best[1::2], strict=True))
