"""What of a step decides which work is launched: the key of its graphs, together with the piece. Sizes are padded to a few
buckets, so that few graphs serve all steps."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows: tokens that are read, rows with logits, slots that the module reads, sequences."""


def rows_bucket(count: int) -> int:
    """The smallest number in `ROWS` that is at least `count`, which is at most the largest one; 0 for none."""
    return ROWS[bisect_left(ROWS, count)] if count else 0


def width_bucket(blocks: int, most: int) -> int:
    """Columns of the block tables: the smallest power of two that is at least `blocks`, but at most `most`."""
    return min(1 << max(blocks - 1, 0).bit_length(), most)


@dataclass(frozen=True)
class StepShape:
    """Padded sizes and variants of a step."""

    rows: int
    """Tokens that the backbone reads."""
    choices: int
    """Rows with logits; 0 if nothing is chosen."""
    sequences: int
    reads: int
    """Slots that the recycle module reads; 0 for none."""
    width: int
    """Blocks of the longest sequence."""
    chain: int
    """Drafts of the longest chain that is made; 0 for none."""
    depth: int
    """Depth of the deepest tree that is grown; 0 for none."""
    beam: int
    """Most nodes of one depth of a tree that get children."""
    sampled: bool
    """Whether any token is chosen at random."""
    limited: bool
    """Whether top-k, top-p or min-p is used."""
    adjusted: bool
    """Whether logits are changed before the temperature."""
    trees_judged: bool
    """Whether any tree is verified, whose accepted nodes have to be moved."""
