"""Which tokens make sample n: packed samples, shuffled and blended by pure functions of (seed, n).

Nothing is held per sample, and any sample is found without visiting those before it, so a run resumes at any number and
every layout of ranks sees the same samples. Shapes: S positions; a sample has S + 1 tokens, the last only a target.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import TokenArray, TokenFile

_MASK = (1 << 64) - 1
_ROUNDS = 6
_BLEND_PERIOD = 1 << 16  # samples after which the pattern of sources repeats


@dataclass(frozen=True)
class Sample:
    """One training sequence, cut from the token stream without regard to documents."""

    tokens: TokenArray
    """[S+1] int64 token ids."""
    documents: TokenArray
    """[S+1] int64 number of the document within the sample, from 0."""
    positions: TokenArray
    """[S+1] int64 position, from 0 at the sample's first token and at each document's."""


class PackedDataset:
    """An endless, weighted, shuffled sequence of samples over one or more token files.

    Epoch e of a source cuts its stream into consecutive samples from a shift that is drawn per epoch, so that document
    boundaries fall elsewhere each time, and visits them in an order drawn per epoch.
    """

    def __init__(self, sources: Sequence[tuple[TokenFile, float]], seq_length: int, seed: int) -> None:
        """Args:
            sources: token files and their weights, relative to each other.
            seq_length: S, tokens in a sequence.
            seed: with a sample's number, determines the sample.

        Raises:
            DataError: no source, a source too short for one sample, or a weight that is not positive or vanishes.
        """
        if not sources:
            raise DataError("a dataset needs at least one token file; name one in data.train")
        for file, _ in sources:
            if file.tokens < seq_length + 1:
                raise DataError(
                    f"{file.prefix} has {file.tokens} tokens, one sample of seq_length {seq_length} needs "
                    f"{seq_length + 1}; give more text or a shorter training.seq_length"
                )
        self.seq_length = seq_length
        self.seed = seed
        self._files = tuple(file for file, _ in sources)
        self._blend = _Blend([(file.prefix, weight) for file, weight in sources])
        # As many whole samples as fit wherever the shift falls in [0, S).
        self.samples_per_epoch = tuple(max(1, file.tokens // seq_length - 1) for file in self._files)
        """Samples of each source before it repeats in another order."""

    def locate(self, number: int) -> tuple[int, int]:
        """Source of a sample, and its first token in that source's stream.

        Args:
            number: global sample number, from 0 and without end.
        """
        if number < 0:
            raise ValueError(f"sample numbers begin at 0, got {number}")
        source, index = self._blend.assign(number)
        count, tokens = self.samples_per_epoch[source], self._files[source].tokens
        epoch, index = divmod(index, count)
        shift_key, *round_keys = _epoch_keys(self.seed, source, epoch)
        shift = shift_key % min(self.seq_length, tokens - count * self.seq_length)
        return source, shift + permute(index, count, round_keys) * self.seq_length

    def sample(self, number: int) -> Sample:
        """The sample with this global number, from 0 and without end: epochs follow each other."""
        source, start = self.locate(number)
        length = self.seq_length + 1
        tokens, starts = self._files[source].read(start, length)
        begins = np.zeros(length, dtype=np.int64)
        begins[starts] = 1
        begins[0] = 0  # a document that begins with the sample is number 0 like one that began before it
        steps = np.arange(length)
        return Sample(
            tokens=tokens,
            documents=np.cumsum(begins),
            positions=steps - np.maximum.accumulate(begins * steps),
        )


class _Blend:
    """Which source gives sample n, and how many samples it gave before: a fixed pattern, repeated.

    Within a period each sample goes to the source that is furthest behind its share (Megatron's rule). The pattern
    knows nothing of a run's length, so longer runs begin with the same samples.
    """

    def __init__(self, weights: Sequence[tuple[str, float]]) -> None:
        self._single = len(weights) == 1
        values = np.array([weight for _, weight in weights], dtype=np.float64)
        for name, weight in weights:
            if not (np.isfinite(weight) and weight > 0):
                raise DataError(f"the weight of {name} is {weight}; it must be a number above 0")
        if self._single:
            return
        from megatron.core.datasets import helpers_cpp

        self._sources: NDArray[np.int16] = np.zeros(_BLEND_PERIOD, dtype=np.int16)
        self._ranks: NDArray[np.int64] = np.zeros(_BLEND_PERIOD, dtype=np.int64)
        shares = values / values.sum()
        helpers_cpp.build_blending_indices(self._sources, self._ranks, shares, len(weights), _BLEND_PERIOD, False)
        self._per_period = np.bincount(self._sources, minlength=len(weights))
        for (name, weight), share in zip(weights, shares, strict=True):
            if share * _BLEND_PERIOD < 1:
                raise DataError(
                    f"the weight of {name} is {weight} of {values.sum()} in all, below the smallest share that can be "
                    f"drawn, 1/{_BLEND_PERIOD}; raise it or drop the source"
                )

    def assign(self, number: int) -> tuple[int, int]:
        """Source of sample `number`, and how many earlier samples came from that source."""
        if self._single:
            return 0, number
        period, place = divmod(number, _BLEND_PERIOD)
        source = int(self._sources[place])
        return source, period * int(self._per_period[source]) + int(self._ranks[place])


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed pseudo-random permutation of 0 .. size-1 sends `index`.

    A generalised Feistel network on a rows x columns rectangle just larger than `size` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): each round shifts one coordinate by a hash of the other, which is invertible.
    A value that lands beyond `size` is sent through again until it does not, which keeps the whole a permutation.

    Args:
        index: in [0, size).
        size: elements permuted.
        keys: 64-bit integers, one per round.
    """
    rows = _ceil_sqrt(size)
    columns = -(-size // rows)
    while True:
        column, row = divmod(index, rows)
        for number, key in enumerate(keys):
            if number % 2:
                column = (column + _mix(row ^ key)) % columns
            else:
                row = (row + _mix(column ^ key)) % rows
        index = column * rows + row
        if index < size:
            return index


def _ceil_sqrt(value: int) -> int:
    return isqrt(value - 1) + 1 if value > 1 else 1


def _mix(value: int) -> int:
    """The finalizer of splitmix64: a bijection of 64-bit integers in which every bit depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _epoch_keys(seed: int, source: int, epoch: int) -> tuple[int, ...]:
    """64-bit keys of one epoch of one source: the first for the shift, the others for the permutation's rounds."""
    digest = hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return struct.unpack(f"<{_ROUNDS + 1}Q", digest)
