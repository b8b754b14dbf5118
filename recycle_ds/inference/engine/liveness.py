"""Notices a rank that is dead, stopped or unreachable, or whose program hangs, wherever the other ranks are waiting, and ends
the job with one message.

A rank that waits for another one in a collective cannot tell a long step from a dead peer. Every rank therefore has a
thread that counts up in the job's store, whatever its other threads do, and watches the counts of the others. Beside its
count it writes how far the thread that decodes has come: where a step stands still, the tensor ranks of a stage wait for the
one that has come least far.
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

from recycle_ds.inference.engine.step_watch import FAILED, Progress, StepWatch
from recycle_ds.parallel.awake import AwakeClock
from recycle_ds.parallel.processes import kill

_INTERVAL = 1.0
"""Seconds between two signs of life."""
PATIENCE = 8.0
"""Seconds without a sign of life after which a rank is lost."""
_STORE_TIMEOUT = timedelta(seconds=5)
_FOUND = "loss"
"""Key of the number of ranks, of all teams, that have found a loss."""
_ENDED = "end"
_DEAD = "dead, stopped or unreachable"
_NEXT = "the job ends, and the same command resumes it"
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
        progress = Progress(*numbers)
        return _Sign(text, now, progress, self.still_since if progress == self.progress else now)


class Liveness:
    """Watches the ranks of a team from `start` to `stop`.

    ranks: global ranks of the team; own: this one. on_loss: called in a thread with a message, empty on all ranks but one, and
    seconds: it should print the message at once, and end the process after so many seconds. tensor_ranks: those that compute
    every step together with this one; None for this one alone. steps: how far the thread that decodes has come. patience:
    seconds without a sign of life after which a rank is lost. processes: of the ranks, see `identity_of`; those of lost ones on
    this host are killed. Where rank 0 is lost, which has the store, every rank has a message that is not ended within two
    seconds of the first one.
    """

    def __init__(
        self,
        store: dist.Store,
        ranks: Sequence[int],
        own: int,
        on_loss: Callable[[str, float], None],
        *,
        tensor_ranks: Sequence[int] | None = None,
        steps: StepWatch | None = None,
        patience: float = PATIENCE,
        processes: Mapping[int, str] | None = None,
    ) -> None:
        self._store, self._ranks, self._own, self._on_loss, self._patience = store, ranks, own, on_loss, patience
        self._tensor_ranks, self._steps = tensor_ranks or [own], steps or StepWatch()
        self._processes = dict(processes or {})
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._clock, self._reached, self._ending = AwakeClock(), 0.0, False
        """When the store has last answered, for `_guard`; whether the end of this rank is being told to it."""

    def start(self) -> None:
        """Starts to count up and to watch."""
        self._store.set_timeout(_STORE_TIMEOUT)
        self._store.set(self._key(self._own), self._count(0))
        self._reached = self._clock.tick()
        self._thread.start()
        threading.Thread(target=self._guard, name="liveness of the store", daemon=True).start()

    def stop(self, world_size: int) -> str:
        """Says that this rank ends as planned, and stops watching.

        Rank 0 has the store, which ranks of other teams may need longer: it waits until every rank of the world has
        ended, or shows no sign of life any more. Returns the message about one that does not, if any.
        """
        self._stopped.set()
        self._thread.join()
        self._ending = True
        try:
            with contextlib.suppress(dist.DistError, RuntimeError):  # the rank with the store is gone
                self._store.set(self._key(self._own), _ENDED)
                if self._own == 0:
                    return self._wait_for(range(1, world_size))
        finally:
            self._ending = False
        return ""

    def _wait_for(self, ranks: Iterable[int]) -> str:
        clock, signs, lost = AwakeClock(), {rank: _Sign() for rank in ranks}, ""
        while signs:
            now = clock.tick()
            signs = self._look(signs, now)
            self._reached = self._clock.now
            for rank in self._silent(signs, now, self._patience):
                lost = lost or self._silence([rank])
                del signs[rank]
            time.sleep(_INTERVAL / 4 if signs else 0)
        return lost

    def _watch(self) -> None:
        count, others = 0, set[int]()
        signs = {rank: _Sign() for rank in self._ranks}
        while not self._stopped.wait(_INTERVAL):
            count, now = count + 1, self._steps.look()
            try:
                self._store.set(self._key(self._own), self._count(count))
                signs = self._look(signs, now)
                others = set(signs) - {self._own}
                text = self._loss(signs, now)
                self._reached = self._clock.now
                if text is None:
                    continue
                first = self._store.add(_FOUND, 1) == 1
            except (dist.DistError, RuntimeError):
                # nobody knows who else lives. The first speaks, and a launcher then ends the others, unless it is dead too
                if self._own > min(others - {0}, default=sys.maxsize) and self._stopped.wait(2 * _INTERVAL):
                    return
                self._lose_store()
                return
            if not self._stopped.is_set():
                self._end_silent(signs, now)
                # the others look into the store of rank 0 once more: they must not take it for lost too
                self._on_loss(text if first else "", 0 if self._own else 2 * _INTERVAL)
            return

    def _guard(self) -> None:
        """Notices a store that does not answer at all: a call to one whose process is stopped ignores its timeout."""
        while self._thread.is_alive() or self._ending:
            time.sleep(_INTERVAL)
            if self._clock.tick() - self._reached > self._patience:
                if self._own > min(set(self._ranks) - {self._own, 0}, default=sys.maxsize):
                    time.sleep(2 * _INTERVAL)  # as in `_watch`, but also where this rank waits for the store to end
                self._lose_store()
                return

    def _lose_store(self) -> None:
        """Ends this rank because the store cannot be reached."""
        if 0 in self._processes and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            kill(self._processes[0])
        self._on_loss(
            f"rank 0 has the job's store, which cannot be reached: it is {_DEAD}; {_NEXT}",
            0 if self._own else 2 * _INTERVAL,
        )

    def _loss(self, signs: Mapping[int, _Sign], now: float) -> str | None:
        """What ends the job, if anything does; empty if a rank, of any team, has said it."""
        if self._store.check([_FOUND]):
            return ""
        if self._silent(signs, now, self._patience):
            # a host that fails takes several ranks with it, within the time between two signs of life
            return self._silence(self._silent(signs, now, self._patience / 2))
        since = signs[self._own].still_since
        together = {rank: signs[rank].progress for rank in self._tensor_ranks if rank in signs}
        if not self._steps.hangs(since) or any(one.state == FAILED for one in together.values()):
            return None  # one that has failed says so itself
        come = {rank: (one.steps, one.exchanges) for rank, one in together.items()}
        hanging = _subject([rank for rank in come if come[rank] == min(come.values())], "hangs", "hang")
        following = _NEXT if len(self._ranks) > 1 else "it ends, and the same command resumes the job"
        return f"{hanging}: nothing has gone on in a step for {now - since:.0f} s; {following}"

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

    def _end_silent(self, signs: Mapping[int, _Sign], now: float) -> None:
        """Kills the processes of silent ranks on this host: a launcher sends a stopped one SIGTERM, which it does not take, and
        waits for half a minute."""
        for rank in self._silent(signs, now, self._patience / 2):
            if rank in self._processes:
                kill(self._processes[rank])

    def _silence(self, ranks: Sequence[int]) -> str:
        subject, they = _subject(ranks, "has", "have"), "it is" if len(ranks) == 1 else "they are"
        return f"{subject} shown no sign of life for {self._patience:.0f} s: {they} {_DEAD}; {_NEXT}"

    def _count(self, count: int) -> str:
        """This rank's sign of life: a count, and how far it has come."""
        return " ".join(map(str, (count, *self._steps.progress())))

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


def print_and_exit(code: int) -> Callable[[str, float], None]:
    """Prints a message and ends the process after some seconds, whatever its main thread waits for."""

    def leave(text: str, seconds: float) -> None:
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
        time.sleep(seconds)
        os._exit(code)

    return leave
