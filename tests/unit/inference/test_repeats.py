"""Drafts from repetition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from recycle_ds.inference.speculation.repeats import LEAST, MOST, Repeat, Repeats


def _by_search(tokens: list[int], most: int) -> Repeat | None:
    """The same by comparing every place of the text: the longest match, then the latest; places beyond the four latest ones
    with the same last tokens do not count."""
    places = [end for end in range(LEAST, len(tokens)) if tokens[end - LEAST : end] == tokens[-LEAST:]][-4:]
    if not places or most < 1:
        return None

    def matched(end: int) -> int:
        count = 0
        while count < min(MOST, end) and tokens[end - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    longest, end = max((matched(end), end) for end in places)
    text = list(tokens)
    while len(text) < len(tokens) + most:
        text.append(text[end + len(text) - len(tokens)])
    return Repeat(tuple(text[len(tokens) :]), longest)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 7), max_size=20), st.integers(0, 9))
def test_finds_what_a_search_finds(tokens: list[int], steps: list[int], most: int) -> None:
    """The index, which follows a growing text, missed a place or named a stale one: drafts were worse than they could be."""
    repeats, length = Repeats(), 0
    for step in (*steps, 60):
        length = min(length + step, len(tokens))
        assert repeats.find(tokens[:length], most) == _by_search(tokens[:length], most)


def test_goes_on_with_itself() -> None:
    """In a text that goes round in circles, drafts ended where the text ends: one token for each call instead of eight."""
    found = Repeats().find([9, 1, 2, 3, 1, 2, 3, 1, 2], 8)
    assert found == Repeat((3, 1, 2, 3, 1, 2, 3, 1), 5)


def test_the_longest_match_counts_and_confidence_grows() -> None:
    """The latest occurrence was taken although an earlier one fits better, or its continuation was trusted more."""
    text = [5, 6, 7, 8, 40, 1, 7, 8, 50, 5, 6, 7, 8]
    found = Repeats().find(text, 2)
    assert found == Repeat((40, 1), 4)
    assert found is not None and found.confidences == (0.75, 0.8)
    assert Repeat((1, 2), 16).confidences == (1 - 1 / 16, 1 - 1 / 16)


def test_nothing_to_repeat() -> None:
    """A text without repetition, or a short one, gave drafts or failed."""
    assert Repeats().find([], 4) is None
    assert Repeats().find([1], 4) is None
    assert Repeats().find([1, 2], 4) is None
    assert Repeats().find([1, 2, 3, 2, 1], 4) is None
    assert Repeats().find([1, 1, 1], 3) == Repeat((1, 1, 1), 2)
