"""Micro-batches: the same samples in every layout, with targets at every depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import Batch, BatchLoader
from recycle_ds.data.sampling import PackedDataset
from recycle_ds.data.targets import make_targets
from tests.unit.data.conftest import WriteTokens

SEQ_LENGTH = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, write_tokens: WriteTokens) -> PackedDataset:
    """A blend of two files of short documents."""
    folder: Path = tmp_path_factory.mktemp("tokens")
    files = [
        write_tokens(folder / name, [[1 + (n * step + i) % 599 for i in range(3 + n % 29)] for n in range(60)])
        for name, step in (("a", 7), ("b", 11))
    ]
    return PackedDataset([(files[0], 2.0), (files[1], 1.0)], SEQ_LENGTH, seed=9)


TENSORS = ("tokens_BS", "positions_BS", "documents_BS", "inputs_KBS", "targets_KBS")


def load(dataset: PackedDataset, size: int, micro: int, first: int, depth: int = 2) -> list[list[Batch]]:
    """Global batch of 24 samples: the micro-batches of each rank."""
    return [
        BatchLoader(
            dataset, global_batch_size=24, micro_batch_size=micro, depth=depth, data_rank=rank, data_size=size
        ).step(first)
        for rank in range(size)
    ]


@pytest.mark.parametrize(("size", "micro"), [(1, 24), (1, 1), (2, 4), (3, 2), (4, 6), (8, 3), (24, 1)])
@pytest.mark.parametrize("first", [0, 24, 24 * 12345])
def test_a_global_batch_is_the_same_in_every_layout(dataset: PackedDataset, size: int, micro: int, first: int) -> None:
    """Prevents training that depends on the number of ranks, or skipped data when resuming with another number."""
    ranks = load(dataset, size, micro, first)
    assert {len(batches) for batches in ranks} == {24 // (size * micro)}
    in_order = [ranks[rank][m] for m in range(24 // (size * micro)) for rank in range(size)]
    (single,) = load(dataset, 1, 24, first)[0]
    for name in ("tokens_BS", "positions_BS", "documents_BS"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in in_order]), getattr(single, name))
    for name in ("inputs_KBS", "targets_KBS"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in in_order], dim=1), getattr(single, name))


def test_a_batch_is_made_of_its_samples(dataset: PackedDataset) -> None:
    """Prevents tensors of other samples, and inputs and targets that differ from the definition."""
    (batch,) = load(dataset, 1, 24, 48, depth=3)[0]
    for row in range(24):
        sample = dataset.sample(48 + row)
        made = make_targets(torch.from_numpy(sample.tokens)[None], torch.from_numpy(sample.documents)[None], 3)
        assert torch.equal(batch.inputs_KBS[:, row], made.inputs[:, 0])
        assert torch.equal(batch.targets_KBS[:, row], made.targets[:, 0])
        assert batch.tokens_BS[row].tolist() == sample.tokens[:-1].tolist()
        assert batch.documents_BS[row].tolist() == sample.documents[:-1].tolist()
        assert batch.positions_BS[row].tolist() == sample.positions[:-1].tolist()
    assert batch.documents_BS[:, 0].eq(0).all()
    assert batch.positions_BS.max() < SEQ_LENGTH


def test_shapes_and_types(dataset: PackedDataset) -> None:
    """Prevents non-contiguous views that a later step must copy, and integer types that an embedding rejects."""
    batch = load(dataset, 2, 4, 0)[1][0].to("cpu")
    for tensor in (getattr(batch, name) for name in TENSORS):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.shape[-2:] == (4, SEQ_LENGTH)
    assert batch.inputs_KBS.shape[0] == batch.targets_KBS.shape[0] == 3
    plain = load(dataset, 1, 24, 0, depth=0)[0][0]
    assert plain.targets_KBS.shape == (1, 24, SEQ_LENGTH)


def test_the_loader_is_stateless(dataset: PackedDataset) -> None:
    """Prevents a dry run or a repeated step from advancing the position in the data."""
    loader = BatchLoader(dataset, global_batch_size=8, micro_batch_size=4, depth=1, data_rank=0, data_size=1)
    before = loader.step(16)
    loader.step(800)
    for first, second in zip(before, loader.step(16), strict=True):
        pairs = [(getattr(first, name), getattr(second, name)) for name in TENSORS]
        assert all(torch.equal(a, b) for a, b in pairs) and first.single == second.single


@pytest.mark.parametrize(
    ("batch", "micro", "size", "product"), [(10, 4, 1, 4), (8, 2, 3, 6), (4, 4, 2, 8), (0, 1, 1, 1)]
)
def test_batches_that_do_not_divide(dataset: PackedDataset, batch: int, micro: int, size: int, product: int) -> None:
    """Prevents a deadlock of ranks with unequal numbers of micro-batches."""
    message = rf"\({batch}\) must be a multiple of .* \({micro}\) x data-parallel ranks \({size}\) = {product}"
    with pytest.raises(DataError, match=message):
        BatchLoader(dataset, global_batch_size=batch, micro_batch_size=micro, depth=1, data_rank=0, data_size=size)


def test_a_rank_that_does_not_exist(dataset: PackedDataset) -> None:
    """Prevents a rank outside the group from silently training on samples of another global batch."""
    with pytest.raises(ValueError, match="data_rank"):
        BatchLoader(dataset, global_batch_size=8, micro_batch_size=1, depth=1, data_rank=2, data_size=2)
