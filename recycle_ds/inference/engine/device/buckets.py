"""Sizes that steps are padded to, so that few CUDA graphs serve all of them."""

from __future__ import annotations

from bisect import bisect_left

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows: tokens that are read, rows with logits, slots that the module reads, sequences."""


def rows_bucket(count: int) -> int:
    """The smallest number in `ROWS` that is at least `count`, which is at most the largest one."""
    return ROWS[bisect_left(ROWS, count)]


def width_bucket(blocks: int, most: int) -> int:
    """Columns of the block tables: the smallest power of two that is at least `blocks`, but at most `most`."""
    return min(1 << max(blocks - 1, 0).bit_length(), most)
