"""Packed samples: cut, shuffled and blended by pure functions of (seed, number)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.config.schema import TokenSource
from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import open_dataset
from recycle_ds.data.sampling import PackedDataset, permute
from recycle_ds.data.token_files import TokenFile
from recycle_ds.data.tokenizer import Tokenizer
from tests.unit.data.conftest import WriteTokens

KEYS = (3, 1 << 63, 99, 12345678901234567, 7, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, write_tokens: WriteTokens) -> TokenFile:
    """403 tokens in 23 documents of 3 to 40 tokens. Each token is its 1-based stream position; documents end in 0."""
    lengths = [2 + (7 * n) % 38 for n in range(23)]
    documents, end = [], 0
    for length in lengths:
        documents.append(list(range(end + 1, end + 1 + length)))
        end += length + 1
    return write_tokens(tmp_path_factory.mktemp("tokens") / "a", documents)


@given(size=st.integers(1, 700), keys=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_the_order_is_a_permutation(size: int, keys: list[int]) -> None:
    """Prevents an epoch that repeats some samples and omits others."""
    assert sorted(permute(index, size, keys) for index in range(size)) == list(range(size))


def test_the_order_of_a_corpus_too_large_to_list() -> None:
    """Prevents indices outside the corpus, or slow searches, at sizes where 32-bit arithmetic would overflow."""
    size = 10**13 + 7
    images = [permute(index, size, KEYS) for index in range(2000)]
    assert len(set(images)) == 2000
    assert min(images) >= 0
    assert max(images) < size
    assert 0.4 < np.mean(images) / size < 0.6


def test_the_order_looks_random() -> None:
    """Prevents an order in which neighbours stay neighbours or elements keep their positions."""
    size = 5000
    images = np.array([permute(index, size, KEYS) for index in range(size)])
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    assert (np.abs(np.diff(images)) < size / 100).mean() < 0.05
    assert (images == np.arange(size)).sum() < 10


@pytest.mark.parametrize("length", [4, 16, 100])
def test_an_epoch_contains_consecutive_samples_once(file: TokenFile, length: int) -> None:
    """Prevents overlaps and gaps: the samples of an epoch tile one range of the stream, which shifts with the epoch."""
    dataset = PackedDataset([(file, 1.0)], length, seed=5)
    (count,) = dataset.samples_per_epoch
    assert count * length + length >= file.tokens - length, "an epoch omits less than two samples"
    shifts = set()
    for epoch in range(8):
        starts = sorted(dataset.locate(epoch * count + i)[1] for i in range(count))
        assert starts == list(range(starts[0], starts[0] + count * length, length))
        assert 0 <= starts[0] < length
        assert starts[-1] + length + 1 <= file.tokens
        shifts.add(starts[0])
    assert len(shifts) > 1


def test_a_sample_is_the_stream_with_its_documents(file: TokenFile) -> None:
    """Prevents samples whose document numbers or positions do not match their tokens."""
    dataset = PackedDataset([(file, 1.0)], 32, seed=1)
    crossings = 0
    for number in range(40):
        sample = dataset.sample(number)
        start = dataset.locate(number)[1]
        assert sample.tokens.shape == sample.documents.shape == sample.positions.shape == (33,)
        stream = file.read(start, 33)[0]
        assert sample.tokens.tolist() == stream.tolist()
        document = position = 0
        for offset in range(33):
            if offset and stream[offset - 1] == 0:  # the token before ended a document
                document, position = document + 1, 0
            assert (sample.documents[offset], sample.positions[offset]) == (document, position)
            position += 1
        crossings += document
    assert crossings > 40


def test_the_seed_determines_the_order(file: TokenFile) -> None:
    """Prevents an order that depends on a global generator: equal seeds agree, others differ."""
    first, again, other = (PackedDataset([(file, 1.0)], 8, seed) for seed in (1, 1, 2))
    numbers = [*range(100), 10**9]
    assert [first.locate(n) for n in numbers] == [again.locate(n) for n in reversed(numbers)][::-1]
    assert [first.locate(n) for n in numbers] != [other.locate(n) for n in numbers]


def test_sources_are_drawn_by_weight(file: TokenFile) -> None:
    """Prevents a blend that underrepresents a source, at the start or in the long run."""
    dataset = PackedDataset([(file, 6.0), (file, 3.0), (file, 1.0)], 8, seed=0)
    for count in (10, 100, 1000, 70_000):
        drawn = Counter(dataset.locate(number)[0] for number in range(count))
        for source, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(drawn[source] - share * count) <= 3


def test_each_source_of_a_blend_goes_through_its_own_epochs(file: TokenFile) -> None:
    """Prevents a blend in which a source repeats samples before the end of its epoch, also when the pattern repeats."""
    dataset = PackedDataset([(file, 2.0), (file, 1.0)], 100, seed=3)
    count = dataset.samples_per_epoch[1]
    for first in (0, 65_536 - 30):
        seen = [start for source, start in map(dataset.locate, range(first, first + 100)) if source == 1]
        index = sum(dataset.locate(number)[0] == 1 for number in range(first))
        seen = seen[-index % count :]
        for epoch in range(len(seen) // count):
            assert len(set(seen[epoch * count : (epoch + 1) * count])) == count


def test_two_sources_of_one_file_are_shuffled_independently(file: TokenFile) -> None:
    """Prevents sources from having the same order because they share a key."""
    dataset = PackedDataset([(file, 1.0), (file, 1.0)], 8, seed=0)
    starts: tuple[list[int], list[int]] = ([], [])
    for number in range(60):
        source, start = dataset.locate(number)
        starts[source].append(start)
    assert starts[0] != starts[1]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_weights_that_select_no_sample(file: TokenFile, weight: float) -> None:
    """Prevents a configured source that is never read."""
    with pytest.raises(DataError, match=r"the weight of .* is"):
        PackedDataset([(file, 1.0), (file, weight)], 8, seed=0)


def test_too_few_tokens(file: TokenFile) -> None:
    """Prevents a loader that hangs or crashes on a corpus shorter than one sample."""
    message = f"has {file.tokens} tokens, one sample of seq_length {file.tokens} needs {file.tokens + 1}"
    with pytest.raises(DataError, match=message):
        PackedDataset([(file, 1.0)], file.tokens, seed=0)
    dataset = PackedDataset([(file, 1.0)], file.tokens - 1, seed=0)
    assert dataset.sample(17).tokens.tolist() == file.read(0, file.tokens)[0].tolist()
    with pytest.raises(DataError, match="needs at least one token file"):
        PackedDataset([], 8, seed=0)
    with pytest.raises(ValueError, match="start at 0"):
        dataset.sample(-1)


def test_opening_the_sources_of_a_configuration(file: TokenFile, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Prevents weights or tokenizer checks of the configuration from being ignored."""
    sources = [TokenSource(path=file.prefix, weight=3), TokenSource(path=file.prefix)]
    dataset = open_dataset(sources, tokenizer, seq_length=8, seed=0)
    assert Counter(dataset.locate(number)[0] for number in range(400)) == {0: 300, 1: 100}
    with pytest.raises(DataError, match="another tokenizer"):
        open_dataset(sources, Tokenizer.train(texts, 500), seq_length=8, seed=0)
    with pytest.raises(DataError, match="no such token file"):
        open_dataset([TokenSource(path=str(Path(file.prefix) / "none"))], tokenizer, seq_length=8, seed=0)
