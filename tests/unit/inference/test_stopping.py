"""Where generations end, and which part of their text is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.speculation.stopping import StopCondition, TextFilter
from recycle_ds.inference.text_stream import TextStream


class Pieces:
    """A detokeniser over a list of pieces. `flush` returns `tail`, like an incomplete character."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self._pieces = pieces
        self._tail = tail

    def feed(self, token_id: int) -> str:
        """The piece with this index."""
        return self._pieces[token_id]

    def flush(self) -> str:
        """The tail."""
        return self._tail


def _stream(pieces: list[str], stop: list[str], tail: str = "", least: int = 0) -> tuple[list[str], bool]:
    """The text shown after each token and at the end, and whether a stop string ended it."""
    text = TextFilter(Pieces(pieces, tail), stop, least)
    shown = ["".join(piece for piece, _ in text.feed(token)) for token in range(len(pieces))]
    shown.append("".join(piece for piece, _ in text.flush()))
    return shown, text.stopped


def test_a_stop_string_may_span_several_tokens() -> None:
    """Prevents stop strings that are found only inside a single token."""
    assert _stream(["one", " E", "N", "D two"], ["END"]) == (["one", " ", "", "", ""], True)


def test_an_incomplete_stop_string_is_shown_as_text() -> None:
    """Prevents text that is held back permanently, or dropped at the end."""
    assert _stream(["a E", "N", "x", " EN"], ["END"]) == (["a ", "", "ENx", " ", "EN"], False)


def test_a_short_stop_string_inside_the_prefix_of_a_longer_one() -> None:
    """Prevents losing text before a stop string that was held back for another stop string."""
    assert _stream(["ab", "c", "d"], ["bcde", "c"]) == (["a", "b", "", ""], True)


def test_the_cut_is_before_the_first_of_several_stop_strings() -> None:
    """Prevents a cut at the stop string listed first rather than found first."""
    assert _stream(["x two one"], ["one", "two"]) == (["x ", ""], True)


def test_the_end_of_the_text_can_complete_a_stop_string() -> None:
    """Prevents missing a stop string in characters that the tokenizer returns only at the end."""
    assert _stream(["a", "b!"], ["!?"], tail="?") == (["a", "b", ""], True)


def test_pieces_keep_the_tag_of_their_token() -> None:
    """Prevents held-back text from being shown in the colour of a later token."""
    text = TextFilter(Pieces(["xE", "N", "y"]), ["END"])
    assert text.feed(0, True) == [("x", True)]
    assert text.feed(1, False) == []
    assert text.feed(2, True) == [("E", True), ("N", False), ("y", True)]


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_the_final_text(pieces: list[str], stop: list[str]) -> None:
    """Prevents showing a part of a stop string, showing text twice, and never showing it."""
    shown, stopped = _stream(pieces, stop)
    so_far, expected, found = "", None, False
    for piece in pieces:
        so_far += piece
        starts = [so_far.find(one) for one in stop if one in so_far]
        if starts:
            expected, found = so_far[: min(starts)], True
            break
    assert "".join(shown) == (so_far if expected is None else expected)
    assert stopped is found


@given(st.lists(st.text("ab", min_size=1, max_size=2), max_size=8))
def test_nothing_is_held_back_without_need(pieces: list[str]) -> None:
    """Prevents a stream that lags behind: only a possible start of a stop string may be held back."""
    text = TextFilter(Pieces(pieces), ["aab"])
    shown = full = ""
    for token, piece in enumerate(pieces):
        full += piece
        shown += "".join(part for part, _ in text.feed(token))
        if text.stopped:
            break
        assert full[len(shown) :] == next(end for end in ("aa", "a", "") if full.endswith(end))


def test_with_a_real_tokenizer_and_characters_of_several_tokens() -> None:
    """Prevents stop strings outside ASCII from being missed, or printed in part."""
    tokenizer = Tokenizer.train(["plain text"], 257)  # bytes only: every character beyond ASCII is several tokens
    ids = tokenizer.encode("naïve → “stop” here")
    text = TextFilter(TextStream(tokenizer), ["→ “st"])
    shown = []
    for token in ids:
        shown += [piece for piece, _ in text.feed(token)]
    assert text.stopped
    assert "".join(shown) == "naïve "


def test_an_empty_stop_string_is_refused() -> None:
    """Prevents a generation that ends before its first token for no visible reason."""
    with pytest.raises(DecodingError, match="must not be empty"):
        TextFilter(Pieces([]), ["x", ""])


@pytest.mark.parametrize(
    ("cycles", "kept", "reason"),
    [
        ([[0, 1], [2, 3, 4]], [2, 3], "length"),
        ([[0, 9, 1]], [2], "eos"),
        ([[0, 1, 2, 3, 9]], [5], "eos"),  # the last allowed token is also an end of sequence
        ([[0], [1], [2], [3], [5, 0]], [1, 1, 1, 1, 1], "stop"),
    ],
)
def test_conditions_are_checked_token_by_token(cycles: list[list[int]], kept: list[int], reason: str) -> None:
    """Prevents an end that depends on how many tokens a cycle produced."""
    text = TextFilter(Pieces(["a", "b", "c", "d", "e", "END", "", "", "", ""]), ["END"])
    condition = StopCondition(frozenset({9}), 5, "length", text)
    found = []
    for ids in cycles:
        assert condition.reason is None
        found.append(condition.take(ids))
    assert (found, condition.reason) == (kept, reason)


def test_text_flushed_at_the_last_token_can_still_be_a_stop() -> None:
    """Prevents a finish reason other than `stop` for text that was cut at a stop string."""
    condition = StopCondition(frozenset(), 2, "length", TextFilter(Pieces(["a", "!"], tail="?"), ["!?"]))
    assert condition.take([0, 1]) == 2
    assert condition.reason == "stop"


def test_the_first_tokens_complete_no_stop_string() -> None:
    """Prevents a text that a stop string ends within `min_new_tokens`, and one that goes on because of such a stop string."""
    assert _stream(["a", "b", "a", "b"], ["b"], least=2) == (["a", "b", "a", "", ""], True)
    assert _stream(["xE", "ND", "END"], ["END"], least=2) == (["x", "END", "", ""], True)
    assert _stream(["xE", "ND"], ["END"], least=1) == (["x", "", ""], True), "its last character comes behind them"
    assert _stream(["xE", "ND"], ["END"], least=2) == (["x", "END", ""], False)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.sampled_from(["a", "ab", "aab", "bb"]), st.integers(0, 12))
def test_a_text_ends_at_the_first_stop_string_behind_the_first_tokens(pieces: list[str], stop: str, least: int) -> None:
    """Prevents a stop string from being found or passed by where the text that is held back begins."""
    first, text = len("".join(pieces[:least])), "".join(pieces)
    at = text.find(stop, max(first - len(stop) + 1, 0))
    shown, stopped = _stream(pieces, [stop], least=least)
    assert ("".join(shown), stopped) == (text if at < 0 else text[:at], at >= 0)
