"""Notices a rank that is dead, stopped or unreachable, or whose program hangs, wherever the other ranks are waiting, and ends
the job with one message.

A rank that waits for another one in a collective cannot tell a long step from a dead peer. Every rank therefore has a
thread that counts up in the job's store, whatever its main thread computes, and watches the counts of the others. Beside its
count it writes how far its program has come: where a step stands still, the others wait for the rank that has come least far.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from recycle_ds.inference.engine.step_watch import Progress, StepWatch

_INTERVAL = 1.0
"""Seconds between two signs of life."""
PATIENCE = 8.0
"""Seconds without a sign of life after which a rank is lost."""
_STORE_TIMEOUT = timedelta(seconds=5)
_ENDED = "end"
_DEAD = "dead, stopped or unreachable"
_NEXT = "the job ends, and the same command resumes it"


class _AwakeClock:
    """Seconds for which this process was awake: where a whole job is suspended and goes on later, no rank is lost by that."""

    def __init__(self) -> None:
        self._now, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """The time now. To be called at every interval: of a longer pause two intervals count."""
        last, self._last = self._last, time.monotonic()
        self._now += min(self._last - last, 2 * _INTERVAL)
        return self._now


_NOTHING = Progress()


@dataclass(frozen=True)
class _Sign:
    """A rank's latest sign of life: since when it is the latest, and how far the rank has come, since when."""

    text: str = ""
    since: float = 0.0
    progress: Progress = _NOTHING
    still_since: float = 0.0

    def then(self, text: str, now: float) -> _Sign:
        """The sign after this one."""
        if text == self.text:
            return self
        _, *numbers = map(int, text.split())
        progress = Progress(numbers[0], numbers[1], bool(numbers[2]))
        return _Sign(text, now, progress, self.still_since if progress == self.progress else now)


class Liveness:
    """Watches the ranks of a team from `start` to `stop`.

    ranks: global ranks of the team; own: this one. patience: seconds without a sign of life after which a rank is lost. steps:
    how far this rank's program has come. on_loss: called in a thread with a message, empty on all ranks but one; it should end
    the process. Where rank 0 is lost, which has the store, every rank has one that is not ended within two seconds of the
    first message.
    """

    def __init__(
        self,
        store: dist.Store,
        ranks: Sequence[int],
        own: int,
        on_loss: Callable[[str], None],
        patience: float = PATIENCE,
        steps: StepWatch | None = None,
    ) -> None:
        self._store, self._ranks, self._own, self._on_loss, self._patience = store, ranks, own, on_loss, patience
        self._steps = steps or StepWatch()
        self._found = f"loss/{min(ranks)}"  # how many ranks of the team have found a loss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def start(self) -> None:
        """Starts to count up and to watch."""
        self._store.set_timeout(_STORE_TIMEOUT)
        self._store.set(self._key(self._own), self._count(0))
        self._thread.start()

    def stop(self, world_size: int) -> str:
        """Says that this rank ends as planned, and stops watching.

        Rank 0 has the store, which ranks of other teams may need longer: it waits until every rank of the world has
        ended, or shows no sign of life any more. Returns the message about one that does not, if any.
        """
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError, RuntimeError):  # the rank with the store is gone
            self._store.set(self._key(self._own), _ENDED)
            if self._own == 0:
                return self._wait_for(range(1, world_size))
        return ""

    def _wait_for(self, ranks: Iterable[int]) -> str:
        clock, signs, lost = _AwakeClock(), {rank: _Sign() for rank in ranks}, ""
        while signs:
            now = clock.tick()
            signs = self._look(signs, now)
            for rank in self._silent(signs, now, self._patience):
                lost = lost or self._silence([rank])
                del signs[rank]
            time.sleep(_INTERVAL / 4 if signs else 0)
        return lost

    def _watch(self) -> None:
        clock, count = _AwakeClock(), 0
        signs = {rank: _Sign() for rank in self._ranks}
        others: set[int] = set()
        while not self._stopped.wait(_INTERVAL):
            count, now = count + 1, clock.tick()
            try:
                self._store.set(self._key(self._own), self._count(count))
                signs = self._look(signs, now)
                others = set(signs) - {self._own}
                text = self._loss(signs, now)
                if text is None:
                    continue
                first = self._store.add(self._found, 1) == 1
            except (dist.DistError, RuntimeError):
                text, first = f"rank 0 has the job's store, which cannot be reached: it is {_DEAD}; {_NEXT}", True
                # nobody knows who else lives. The first speaks, and a launcher then ends the others, unless it is dead too
                if self._own > min(others - {0}, default=sys.maxsize) and self._stopped.wait(2 * _INTERVAL):
                    return
            else:
                if self._own == 0 and others:  # the others look into its store once more, and need not take it for lost
                    self._stopped.wait(2 * _INTERVAL)
            if not self._stopped.is_set():
                self._on_loss(text if first else "")
            return

    def _loss(self, signs: Mapping[int, _Sign], now: float) -> str | None:
        """What ends the job, if anything does; empty if another rank has said it."""
        if self._store.check([self._found]):
            return ""
        if self._silent(signs, now, self._patience):
            # a host that fails takes several ranks with it, within the time between two signs of life
            return self._silence(self._silent(signs, now, self._patience / 2))
        own, steps = signs[self._own], self._steps
        limit, still = steps.limit, now - own.still_since
        if not own.progress.computing or limit is None or still <= limit:
            return None
        computing = {rank: sign.progress for rank, sign in signs.items() if sign.progress.computing}
        hanging = [rank for rank, progress in computing.items() if progress == min(computing.values())]
        what = f"{_subject(hanging, 'hangs', 'hang')} in a step of {steps.tokens} tokens"
        return f"{what}: no progress for {still:.0f} s, where the longest step took {steps.slowest:.2g} s; {_NEXT}"

    def _look(self, signs: Mapping[int, _Sign], now: float) -> dict[int, _Sign]:
        """The latest signs of life of the ranks that have not ended."""
        found = {}
        for rank, sign in signs.items():
            key = self._key(rank)
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            if text != _ENDED:
                found[rank] = sign.then(text, now)
        return found

    def _silent(self, signs: Mapping[int, _Sign], now: float, patience: float) -> list[int]:
        """The ranks that have shown no sign of life for so long."""
        return [rank for rank, sign in signs.items() if rank != self._own and now - sign.since > patience]

    def _silence(self, ranks: Sequence[int]) -> str:
        subject, they = _subject(ranks, "has", "have"), "it is" if len(ranks) == 1 else "they are"
        return f"{subject} shown no sign of life for {self._patience:.0f} s: {they} {_DEAD}; {_NEXT}"

    def _count(self, count: int) -> str:
        """This rank's sign of life: a count, and how far its program has come."""
        steps, exchanges, computing = self._steps.progress()
        return f"{count} {steps} {exchanges} {int(computing)}"

    @staticmethod
    def _key(rank: int) -> str:
        return f"liveness/{rank}"


def _subject(ranks: Sequence[int], singular: str, plural: str) -> str:
    """The beginning of a sentence about ranks."""
    return f"rank {ranks[0]} {singular}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} {plural}"


def own_store() -> dist.Store:
    """A connection of its own to the job's store: its timeout is not that of the process groups."""
    store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return store


def print_and_exit(code: int) -> Callable[[str], None]:
    """Prints a message and ends the process at once, whatever its main thread waits for."""

    def leave(text: str) -> None:
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(code)

    return leave
