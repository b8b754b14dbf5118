"""Signs of life between ranks, in threads of one process."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from recycle_ds.inference.engine import liveness
from recycle_ds.inference.engine.liveness import Liveness


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
