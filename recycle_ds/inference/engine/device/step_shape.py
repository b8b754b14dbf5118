"""What of a step decides which work is launched: the key of its graphs, together with the piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """Padded sizes and variants of a step. Sizes are those of buckets.py, so that few shapes occur."""

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
