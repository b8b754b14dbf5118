"""Notices a rank that is dead, stopped or unreachable, wherever the other ranks are waiting, and ends the job with one
message.

A rank that waits for another one in a collective cannot tell a long step from a dead peer. Every rank therefore has a
thread that counts up in the job's store, whatever its main thread computes, and watches the counts of the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist

_INTERVAL = 1.0
"""Seconds between two signs of life."""
PATIENCE = 8.0
"""Seconds without a sign of life after which a rank is lost."""
_STORE_TIMEOUT = timedelta(seconds=5)
_NEXT = "the job ends, and the same command resumes it"


class Liveness:
    """Watches the ranks of a team from `start` to `stop`.

    ranks: global ranks of the team; own: this one. patience: seconds without a sign of life after which a rank is lost.
    on_loss: called in a thread with a message, empty on all ranks but one; it should end the process. Where rank 0 is lost,
    which has the store, every rank has one that is not ended within two seconds of the first message.
    """

    def __init__(
        self,
        store: dist.Store,
        ranks: Sequence[int],
        own: int,
        on_loss: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        self._store, self._ranks, self._own, self._on_loss, self._patience = store, ranks, own, on_loss, patience
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def start(self) -> None:
        """Starts to count up and to watch."""
        self._store.set_timeout(_STORE_TIMEOUT)
        self._store.set(self._key(self._own), "0")
        self._thread.start()

    def stop(self, world_size: int) -> str:
        """Says that this rank ends as planned, and stops watching.

        Rank 0 has the store, which ranks of other teams may need longer: it waits until every rank of the world has
        ended, or shows no sign of life any more. Returns the message about one that does not, if any.
        """
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError, RuntimeError):  # the rank with the store is gone
            self._store.set(self._key(self._own), "end")
            if self._own == 0:
                return self._wait_for(range(1, world_size))
        return ""

    def _wait_for(self, ranks: Iterable[int]) -> str:
        lost = ""
        seen = {rank: ("", time.monotonic()) for rank in ranks}
        while seen:
            for rank, (value, since) in list(seen.items()):
                found = self._look(rank)
                if found == "end":
                    del seen[rank]
                elif found == value and time.monotonic() - since > self._patience:
                    lost = lost or self._message([rank])
                    del seen[rank]
                elif found != value:
                    seen[rank] = found, time.monotonic()
            time.sleep(_INTERVAL / 4 if seen else 0)
        return lost

    def _message(self, ranks: Sequence[int]) -> str:
        subject = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
        what, it_is = f"shown no sign of life for {self._patience:.0f} s", "it is" if len(ranks) == 1 else "they are"
        return f"{subject} {what}: {it_is} dead, stopped or unreachable; {_NEXT}"

    def _look(self, rank: int) -> str:
        """The latest sign of life of a rank; "" before the first one."""
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    @staticmethod
    def _key(rank: int) -> str:
        return f"liveness/{rank}"

    def _watch(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in self._ranks if rank != self._own}
        count = 0
        while not self._stopped.wait(_INTERVAL):
            count += 1
            try:
                self._store.set(self._key(self._own), str(count))
                for rank, (value, _) in list(seen.items()):
                    found = self._look(rank)
                    if found == "end":
                        del seen[rank]
                    elif found != value:
                        seen[rank] = found, time.monotonic()
                if any(time.monotonic() - since > self._patience for _, since in seen.values()):
                    # a host that fails takes several ranks with it, within the time between two signs of life
                    silent = [
                        rank for rank, (_, since) in seen.items() if time.monotonic() - since > self._patience / 2
                    ]
                    self._lose(self._message(silent), set(seen) - set(silent))
                    return
            except (dist.DistError, RuntimeError):
                text = (
                    f"rank 0 has the job's store, which cannot be reached: it is dead, stopped or unreachable; {_NEXT}"
                )
                # nobody knows who else lives. The first speaks, and a launcher then ends the others, unless it is dead too
                if self._own > min(set(seen) - {0}, default=sys.maxsize) and self._stopped.wait(2 * _INTERVAL):
                    return
                self._lose(text, ())
                return

    def _lose(self, text: str, alive: Iterable[int]) -> None:
        """alive: the others that will notice it too. The first of all speaks."""
        if not self._stopped.is_set():
            self._on_loss(text if self._own < min(alive, default=sys.maxsize) else "")


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
