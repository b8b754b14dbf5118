"""Signs of life between ranks, in threads of one process."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist

from recycle_ds.inference.engine import liveness, step_watch
from recycle_ds.inference.engine.liveness import Liveness
from recycle_ds.inference.engine.plan import Part, Plan
from recycle_ds.inference.engine.step_watch import COMPUTING, FAILED, WAITING, Progress, StepWatch


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

    def told(rank: int, text: str, seconds: float) -> None:
        messages[rank] = text
        heard.release()

    ranks = [Liveness(store, range(4), rank, partial(told, rank), patience=5.0) for rank in range(4)]
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

    def told(rank: int, text: str, seconds: float) -> None:
        messages[rank] = text
        heard.release()

    for rank in (1, 2):
        Liveness(Gone(), range(3), rank, partial(told, rank)).start()
    for _ in range(2):
        assert heard.acquire(timeout=30)
    assert all(text.startswith("rank 0 has the job's store, which cannot be reached") for text in messages.values())


class _Clock:
    """A clock that a suspension of the process moves on."""

    def __init__(self) -> None:
        self.suspended = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.suspended


def test_a_suspended_job_has_lost_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a job that a scheduler suspends for an hour from ending when it goes on, since every rank takes all others for
    dead and its own step for one that hangs, and ranks that hang from being missed afterwards."""
    monkeypatch.setattr(liveness, "_INTERVAL", 0.05)
    clock, store, said = _Clock(), dist.HashStore(), list[str]()
    watches = [StepWatch(blocked=30.0, busy=30.0, clock=clock) for _ in range(2)]
    ranks = [
        Liveness(store, range(2), rank, lambda text, _: said.append(text), steps=watches[rank], patience=30.0)
        for rank in range(2)
    ]
    for one in ranks:
        one.start()
    with watches[0].step(1):
        pass
    with watches[0].step(1):
        time.sleep(0.3)
        clock.suspended = 3600.0
        time.sleep(0.3)
    for one in ranks:
        one._stopped.set()
        one._thread.join()
    assert said == []
    with watches[0].step(1):
        watches[0].look()
        began = watches[0].look()
        for _ in range(40):  # two seconds each
            clock.suspended += 2
            watches[0].look()
        assert watches[0].hangs(began), "the suspended step must not count as one that took an hour"


@pytest.mark.parametrize(
    ("progress", "together", "named"),
    [
        pytest.param([(7, 3), (7, 2), (6, 9, WAITING)], (0, 1), "rank 1 hangs", id="the other one waits for its exchange"),
        pytest.param([(7, 2), (7, 3), (6, 9, WAITING)], (0, 1), "rank 0 hangs", id="itself"),
        pytest.param([(7, 3), (6, 2, WAITING), (5, 0)], (0, 1), "rank 1 hangs", id="the other one has not begun the step"),
        pytest.param([(7, 0), (7, 0), (2, 0)], (0, 1), "ranks 0, 1 hang", id="nothing to tell them by"),
        pytest.param([(7, 0), (7, 0, FAILED), (2, 0)], (0, 1), None, id="the other one has failed, and says so itself"),
    ],
)  # fmt: skip
def test_the_rank_that_the_others_wait_for_is_named(
    progress: list[tuple[int, ...]], together: tuple[int, ...], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a rank that waits inside a step for one that hangs or has failed from being taken for the one that hangs, and
    counts of other stages, which say nothing, from being compared."""
    monkeypatch.setattr(liveness, "_INTERVAL", 0.05)
    store, said, heard = dist.HashStore(), list[str](), threading.Semaphore(0)

    def told(text: str, seconds: float) -> None:
        said.append(text)
        heard.release()

    ranks = []
    for rank, numbers in enumerate(progress):
        watch = StepWatch()
        found = Progress(*(*numbers, COMPUTING)[:3])
        monkeypatch.setattr(watch, "progress", partial(Progress, *found))
        # the first one finds out: the others are given more time
        monkeypatch.setattr(watch, "hangs", lambda since, rank=rank, watch=watch: not rank and watch.look() > since + 1)
        ranks.append(Liveness(store, range(3), rank, told, tensor_ranks=together, steps=watch, patience=60.0))
        ranks[-1].start()
    if named is None:
        assert not heard.acquire(timeout=3)
    for _ in progress if named else ():
        assert heard.acquire(timeout=30)
    for one in ranks:
        one._stopped.set()
        one._thread.join()
    spoken = [text for text in said if text]
    assert [text.split(":")[0] for text in spoken] == ([named] if named else []), said


class _Used:
    """What the process has used, by `resource`."""

    ru_utime = ru_stime = 0.0
    ru_majflt = 0


def test_a_step_hangs_if_nothing_goes_on_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents long steps from being taken for ones that hang: the first one, chunks of long prompts, those that compute or
    read pages from a disk, those of slow models, and on a GPU; and steps that hang from being missed."""
    now, used = 0.0, _Used()
    monkeypatch.setattr(step_watch.resource, "getrusage", lambda _: used)

    def stands_still(watch: StepWatch, seconds: int, *, cpu: float = 0.0, faults: int = 0) -> bool:
        """Whether a step hangs in which nothing has gone on for so long; it uses so much each second."""
        nonlocal now
        began = watch.look()
        for _ in range(seconds):
            now += 1.0
            used.ru_utime += cpu
            used.ru_majflt += faults
            watch.look()
        return watch.hangs(began)

    def watch_after(seconds: int, blocked: float | None = 8.0) -> StepWatch:
        """A watch that has seen one step, of four positions."""
        watch = StepWatch(blocked, busy=120.0, clock=lambda: now)
        with watch.step(4):
            assert not stands_still(watch, seconds), "nothing is known before the first step has ended"
        assert not watch.hangs(-500.0), "it is in no step"
        return watch

    for arguments, limit in (({}, 8), ({"cpu": 0.05}, 8), ({"cpu": 1.0}, 120), ({"faults": 3}, 120)):
        for seconds in (limit, limit + 1):
            with (watch := watch_after(0)).step(4):
                assert stands_still(watch, seconds, **arguments) == (seconds > limit), arguments
    for seconds in (120, 121):
        with (on_gpu := watch_after(0, blocked=None)).step(4):
            assert stands_still(on_gpu, seconds) == (seconds > 120)
    for size, limit in ((2, 200), (8, 400)):  # ten times as long as the slowest step, for its positions
        for seconds in (limit, limit + 1):
            with (slow := watch_after(20)).step(size):
                assert stands_still(slow, seconds) == (seconds > limit)
    with pytest.raises(ValueError), slow.step(1):
        raise ValueError
    assert slow.progress() == Progress(3, 0, FAILED) and not slow.hangs(-5000.0)


def test_positions_that_only_the_module_reads_count_as_work() -> None:
    """Prevents a step of few tokens, in which the module reads a long text for the first time, from being taken for one that
    hangs."""
    part = Part(
        1,
        start=90,
        tokens=(3, 4),
        judged=1,
        samples=True,
        module_start=10,
        drafts=1,
        room=9,
        prompt_tokens=5,
        blocks=(),
    )
    assert Plan((part,)).size == 2 + 91 - 10
    assert Plan((replace(part, module_start=0),)).size == 2
