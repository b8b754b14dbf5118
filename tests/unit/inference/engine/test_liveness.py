"""Signs of life between ranks, in threads of one process."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from recycle_ds.inference.engine import liveness
from recycle_ds.inference.engine.liveness import Liveness
from recycle_ds.inference.engine.step_watch import Progress, StepWatch


@pytest.mark.parametrize(
    ("lost", "ended", "named"),
    [
        pytest.param((2,), (), "rank 2 has", id="one"),
        pytest.param((0, 1), (), "ranks 0, 1 have", id="a host with two ranks"),
        pytest.param((2,), (0,), "rank 2 has", id="the first has ended"),
    ],
)
def test_one_rank_that_lives_names_all_that_are_lost(
    lost: tuple[int, ...], ended: tuple[int, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a job that ends without a word, because the rank that was to speak is lost too, or has ended as planned."""
    monkeypatch.setattr(liveness, "_INTERVAL", 0.05)
    store, messages, heard = dist.HashStore(), dict[int, str](), threading.Semaphore(0)

    def told(rank: int, text: str) -> None:
        messages[rank] = text
        heard.release()

    ranks = [Liveness(store, range(4), rank, lambda text, rank=rank: told(rank, text), 5.0) for rank in range(4)]  # type: ignore[misc]
    for one in ranks:
        one.start()
    time.sleep(0.3)  # all have seen each other
    for rank in ended:
        ranks[rank]._stopped.set()
        ranks[rank]._thread.join()
        store.set(f"liveness/{rank}", "end")
    for rank in lost:
        ranks[rank]._stopped.set()  # it counts no more, and does not say that it ends
    survivors = set(range(4)) - {*lost, *ended}
    for _ in survivors:
        assert heard.acquire(timeout=30)
    assert messages.keys() == survivors
    assert [text.startswith(f"{named} shown no sign of life") for text in messages.values() if text] == [True], messages


def test_a_lost_store_is_named() -> None:
    """Prevents ranks that end without a word where the rank with the job's store is lost: nobody can tell who else lives."""

    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

    messages, heard = dict[int, str](), threading.Semaphore(0)

    def told(rank: int, text: str) -> None:
        messages[rank] = text
        heard.release()

    for rank in (1, 2):
        Liveness(Gone(), range(3), rank, lambda text, rank=rank: told(rank, text)).start()  # type: ignore[misc]
    for _ in range(2):
        assert heard.acquire(timeout=30)
    assert all(text.startswith("rank 0 has the job's store, which cannot be reached") for text in messages.values())


def test_a_suspended_job_has_lost_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a job that a scheduler suspends for an hour from ending when it goes on, since every rank takes all others for
    dead and its own step for one that hangs."""
    suspended = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + suspended, sleep=time.sleep)
    monkeypatch.setattr(liveness, "time", clock)
    monkeypatch.setattr(liveness, "_INTERVAL", 0.05)
    store, said = dist.HashStore(), list[str]()
    watches = [StepWatch(least=5.0) for _ in range(2)]
    ranks = [Liveness(store, range(2), rank, said.append, 5.0, watches[rank]) for rank in range(2)]
    for one in ranks:
        one.start()
    with watches[0].step(1):
        pass
    with watches[0].step(1):
        time.sleep(0.3)
        suspended = 3600.0
        time.sleep(0.3)
    for one in ranks:
        one._stopped.set()
        one._thread.join()
    assert said == []


@pytest.mark.parametrize(
    ("progress", "named"),
    [
        pytest.param([(7, 3), (7, 2), (6, 9, False)], "rank 1 hangs", id="others wait for its exchange"),
        pytest.param([(7, 2), (7, 3), (6, 9, False)], "rank 0 hangs", id="itself"),
        pytest.param([(7, 0), (9, 0), (7, 0)], "ranks 0, 2 hang", id="no exchanges to tell by"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(
    progress: list[tuple[int, ...]], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a rank that waits inside a step for one that hangs from being taken for the one that hangs, or one that waits
    for a plan."""
    monkeypatch.setattr(liveness, "_INTERVAL", 0.05)
    store, said, heard = dist.HashStore(), list[str](), threading.Semaphore(0)

    def told(text: str) -> None:
        said.append(text)
        heard.release()

    for rank, numbers in enumerate(progress):
        watch = StepWatch(least=1.0)
        with watch.step(1):
            pass
        steps, exchanges, computing = (*numbers, True)[:3]
        monkeypatch.setattr(watch, "progress", partial(Progress, steps, exchanges, bool(computing)))
        Liveness(store, range(3), rank, told, 60.0, watch).start()
    for _ in progress:
        assert heard.acquire(timeout=30)
    spoken = [text for text in said if text]
    assert len(spoken) == 1 and spoken[0].startswith(f"{named} in a step of 1 tokens: no progress for 1 s"), said


def test_a_step_may_take_ten_times_as_long_as_the_slowest_one() -> None:
    """Prevents a long chunk of a prompt, or the steps of a model that is slow on its machine, from being taken for ones that
    hang; and the first step, before anything is known."""
    now = 0.0
    watch = StepWatch(least=8.0, clock=lambda: now)
    with watch.step(4):
        assert watch.limit is None
        now += 0.5
    for tokens, limit in ((1, 8.0), (4, 8.0), (8, 10.0), (400, 250.0)):
        with watch.step(tokens):
            assert watch.progress().computing and watch.limit == limit
    with watch.step(4):
        now += 3.0
    with pytest.raises(ValueError), watch.step(1):
        now += 50.0  # a step that fails tells nothing
        raise ValueError
    assert watch.progress() == Progress(steps=7)
    assert watch.limit == 30.0
