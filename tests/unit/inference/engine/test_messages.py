"""What ranks tell each other, as numbers."""

from __future__ import annotations

import math
from array import array

import pytest

from recycle_ds.inference.engine.distributed import decode_outcome, encode_outcome
from recycle_ds.inference.engine.plan import Chosen

_SCORES = ((-0.25, ((7, -0.25), (9, -1.5))), (-math.inf, ()), (-3.0, ((2**31, -0.1),)))
OUTCOME = (
    Chosen(3, (5,)),
    Chosen(2**40, (11, 12, 13), (4, 5, 6), (0.9, 1 / 3, 0.0), _SCORES, (), (0, 0, 2), 4),
    Chosen(0, (), scored=_SCORES[:1]),
    Chosen(1, (1,), logprobs=_SCORES[1:], scored=_SCORES),
)


@pytest.mark.parametrize("outcome", [OUTCOME, (), OUTCOME[::-1]])
def test_an_outcome_arrives_as_it_was(outcome: tuple[Chosen, ...]) -> None:
    """Prevents a log probability, a draft or a tree's parent that is another sequence's, or lost on the way."""
    found = decode_outcome(array("d", encode_outcome(outcome)).tolist())
    assert found == outcome
    assert all(type(token) is int for one in found for token in (*one.tokens, *one.drafts, *one.parents))


def test_a_cut_outcome_is_no_outcome() -> None:
    """Prevents a shorter answer in silence where a message lacks its end."""
    numbers = encode_outcome(OUTCOME)
    for count in range(1, len(numbers)):
        with pytest.raises((AssertionError, ValueError)):
            decode_outcome(numbers[:count])
