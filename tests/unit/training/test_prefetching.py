"""Batches that are read ahead are those that were asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import Batch, BatchLoader, open_dataset
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.training.prefetching import PrefetchingLoader, prefetch
from tests.runs import make_corpus, tiny_run


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> BatchLoader:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), documents=40)
    config = tiny_run(corpus, Path("unused"))
    dataset = open_dataset(config.data.train, Tokenizer.load(config.data.tokenizer), 24, 1)
    return BatchLoader(dataset, global_batch_size=4, micro_batch_size=2, depth=2, data_rank=0, data_size=1)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    names = ("tokens_BS", "positions_BS", "documents_BS", "inputs_KBS", "targets_KBS")
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) and a.single == b.single
        for a, b in zip(one, other, strict=True)
        for name in names
    )


def test_same_batches(loader: BatchLoader) -> None:
    """Prevents a step's data from depending on what was read ahead: in order, repeated (a retry), or elsewhere (a rollback)."""
    ahead = PrefetchingLoader(loader, pin=False)
    for first in (0, 4, 8, 8, 4, 40, 44):
        assert equal(ahead.step(first), loader.step(first))
    with prefetch(loader, torch.device("cpu"), 48) as same:
        assert same is loader
    ahead.close()


def test_the_thread_ends_with_the_run(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a thread for each run of a process, and data that are read, or prepared at length, beyond the last step."""
    seen: list[int] = []
    read = loader.step

    def watched(first_sample: int) -> list[Batch]:
        seen.append(first_sample)
        return read(first_sample)

    monkeypatch.setattr(loader, "step", watched)
    before = set(threading.enumerate())
    ahead = PrefetchingLoader(loader, pin=False, end=8)
    for first in (0, 4):
        ahead.step(first)
    (thread,) = set(threading.enumerate()) - before
    ahead.close()
    thread.join(60)
    assert seen == [0, 4] and not thread.is_alive()


def test_an_error_belongs_to_its_step(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a damaged part of the data from ending a step before it, or from being lost in the thread."""
    read = loader.step

    def damaged(first_sample: int) -> list[Batch]:
        if first_sample == 8:
            raise DataError("damaged")
        return read(first_sample)

    monkeypatch.setattr(loader, "step", damaged)
    ahead = PrefetchingLoader(loader, pin=False)
    ahead.step(0)
    ahead.step(4)
    with pytest.raises(DataError, match="damaged"):
        ahead.step(8)
    ahead.step(12)


def test_single_documents_are_known_on_the_host(loader: BatchLoader) -> None:
    """Prevents packed batches that take the causal kernel, which would let documents see each other."""
    seen = set()
    for first in range(0, 40, 4):
        for batch in loader.step(first):
            assert batch.single is bool((batch.documents_BS == batch.documents_BS[:, :1]).all())
            seen.add(batch.single)
    assert False in seen
