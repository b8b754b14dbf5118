"""Where a row that repeats itself is cut."""

from __future__ import annotations

import pytest

from recycle_ds.inference.self_text.loops import Repetition

PERIOD = list(range(100, 110))


def followed(limit: int, *spans: tuple[list[int], bool], ngram: int = 4) -> Repetition:
    """The repetition of a row of spans of tokens, each of them a turn: its tokens, and whether they are the model's own."""
    repetition = Repetition(ngram, limit)
    for tokens, own in spans:
        repetition.start_turn()
        repetition.feed(tokens, own)
    return repetition


def test_a_row_is_cut_where_it_begins_to_repeat() -> None:
    """Prevents loops in the training text, and a cut that takes text before the loop or leaves several rounds of it."""
    start = [1, 2, 3]
    assert followed(2, (start + PERIOD * 2, True)).cut is None, "two occurrences are allowed"
    assert followed(2, (start + PERIOD * 9, True)).cut == len(start + PERIOD)
    assert followed(1, (start + PERIOD * 9, True)).cut == len(start + PERIOD)
    assert followed(3, (start + PERIOD * 3, True)).cut is None
    assert followed(0, (PERIOD * 9, True)).cut is None, "nothing is to be cut"


def test_copies_of_a_prompt_are_counted_but_the_prompt_is_not_cut() -> None:
    """Prevents a cut inside text that is not the model's, and a row of endless copies of its prompt."""
    assert followed(2, (PERIOD, False), (PERIOD, True)).cut is None
    assert followed(2, (PERIOD * 5, False)).cut is None
    assert followed(2, (PERIOD, False), (PERIOD * 2, True)).cut == len(PERIOD)
    assert followed(2, (PERIOD * 2, False), (PERIOD, True)).cut == 2 * len(PERIOD)


def test_ngrams_do_not_reach_over_turns_and_do_not_overlap() -> None:
    """Prevents cuts because of the tokens between turns, and at the first line of dashes."""
    turn = ([1, 2, 3], True)
    assert followed(1, turn, turn, turn, turn).cut is None
    assert followed(2, ([7] * 11, True)).cut is None, "the 4-gram occurs twice without overlap"
    assert followed(2, ([7] * 12, True)).cut == 4


@pytest.mark.parametrize("at_once", [True, False])
def test_the_repeated_share_is_that_of_8grams(at_once: bool) -> None:
    """Prevents shares that depend on the length of the n-grams by which rows are cut, or on how many tokens a step has."""
    repetition = Repetition(16, 0)
    repetition.feed([1, 2], own=False)
    text = PERIOD * 2
    for part in [text] if at_once else [[token] for token in text]:
        repetition.feed(part, own=True)
    # an 8-gram ends at every token from the eighth on; those that end in the second round, from its eighth token on, repeat
    assert (repetition.own_tokens(), repetition.repeated(), repetition.repeated(2 + 18)) == (20, 3, 1)
