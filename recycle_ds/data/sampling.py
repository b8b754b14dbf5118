"""Packed training samples, shuffled and blended: sample n is a pure function of (seed, n).

No state is stored per sample, and any sample is computed without those before it, so a run can resume at any sample and
every layout of ranks gets the same samples. Shapes: S positions; a sample has S + 1 tokens, the last one only a target.
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
    """One training sequence, cut from the token stream regardless of document boundaries."""

    tokens: TokenArray
    """[S+1] int64 token ids."""
    documents: TokenArray
    """[S+1] int64 number of the document within the sample, from 0."""
    positions: TokenArray
    """[S+1] int64 position, from 0 at the sample's first token and at each document's first token."""


class PackedDataset:
    """An endless, weighted, shuffled sequence of samples over one or more token files.

    Each epoch of a source cuts its stream into consecutive samples, starting at a random shift, so that sample boundaries
    differ between epochs, and visits the samples in a random order.
    """

    def __init__(self, sources: Sequence[tuple[TokenFile, float]], seq_length: int, seed: int) -> None:
        """Args:
            sources: token files and their weights, relative to each other.
            seq_length: S, tokens in a sequence.
            seed: with a sample's number, determines the sample.

        Raises:
            DataError: no source, a source too short for one sample, or a weight that is not positive or too small.
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
        # The number of complete samples that fit for every shift in [0, S).
        self.samples_per_epoch = tuple(max(1, file.tokens // seq_length - 1) for file in self._files)
        """Samples per epoch of each source."""

    def locate(self, number: int) -> tuple[int, int]:
        """Source of a sample, and the position of its first token in that source's stream.

        Args:
            number: global sample number, from 0, unbounded.
        """
        if number < 0:
            raise ValueError(f"sample numbers start at 0, got {number}")
        source, index = self._blend.assign(number)
        count, tokens = self.samples_per_epoch[source], self._files[source].tokens
        epoch, index = divmod(index, count)
        shift_key, *round_keys = _epoch_keys(self.seed, source, epoch)
        shift = shift_key % min(self.seq_length, tokens - count * self.seq_length)
        return source, shift + permute(index, count, round_keys) * self.seq_length

    def sample(self, number: int) -> Sample:
        """The sample with this global number, from 0, unbounded: epochs follow each other."""
        source, start = self.locate(number)
        length = self.seq_length + 1
        tokens, starts = self._files[source].read(start, length)
        is_start = np.zeros(length, dtype=np.int64)
        is_start[starts] = 1
        is_start[0] = 0  # the first document is number 0, whether or not it starts with the sample
        steps = np.arange(length)
        return Sample(
            tokens=tokens,
            documents=np.cumsum(is_start),
            positions=steps - np.maximum.accumulate(is_start * steps),
        )


class _Blend:
    """Assigns samples to sources by a fixed pattern that repeats every `_BLEND_PERIOD` samples.

    Within a period each sample is assigned to the source that is furthest below its share (Megatron's rule). The pattern
    does not depend on a run's length, so longer runs start with the same samples.
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
        self._earlier: NDArray[np.int64] = np.zeros(_BLEND_PERIOD, dtype=np.int64)
        shares = values / values.sum()
        helpers_cpp.build_blending_indices(self._sources, self._earlier, shares, len(weights), _BLEND_PERIOD, False)
        self._per_period = np.bincount(self._sources, minlength=len(weights))
        for (name, weight), share in zip(weights, shares, strict=True):
            if share * _BLEND_PERIOD < 1:
                raise DataError(
                    f"the weight of {name} is {weight} of {values.sum()} in total, below the smallest possible share, "
                    f"1/{_BLEND_PERIOD}; increase it or remove the source"
                )

    def assign(self, number: int) -> tuple[int, int]:
        """Source of sample `number`, and how many earlier samples came from that source."""
        if self._single:
            return 0, number
        period, offset = divmod(number, _BLEND_PERIOD)
        source = int(self._sources[offset])
        return source, period * int(self._per_period[source]) + int(self._earlier[offset])


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Image of `index` under a keyed pseudo-random permutation of 0 .. size-1.

    A generalised Feistel network on a rows x columns rectangle just larger than `size` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): each round shifts one coordinate by a hash of the other, which is invertible.
    A value outside [0, size) is permuted again until it is inside, so the result is still a permutation.

    Args:
        index: in [0, size).
        size: number of elements.
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
