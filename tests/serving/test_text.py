"""Text of answers, token by token: split characters, stop strings, which token added what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.answers import text_of
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.speculation.stopping import StopCondition, TextFilter
from recycle_ds.inference.text_stream import TextStream
from recycle_ds.serving.answers.text import AnswerText, TokenText
from recycle_ds.serving.answers.tokens import TokenNames
from recycle_ds.serving.events import TokenEvent
from tests.serving.servers import TEXT, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sentencepiece() -> Tokenizer:
    """A vocabulary as LLaMA's: spaces are part of tokens, and characters that are no tokens are bytes."""
    characters = ["\u2581", "t", "h", "e", "\u2581t", "\u2581the"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = [("\u2581", "t")]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    built = tokenizers.Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(built.to_str())


def answer_of(tokenizer: Tokenizer, stop: tuple[str, ...], **options: Any) -> AnswerText:
    return AnswerText(TextStream(tokenizer), stop, tokenizer.end_ids, **options)


def events(ids: list[int]) -> list[TokenEvent]:
    return [TokenEvent(token, False) for token in ids]


def kept_by_engine(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], least: int = 0) -> list[int]:
    """The ids up to where the engine ends the answer."""
    text = TextFilter(TextStream(tokenizer), stop, least) if stop else None
    condition = StopCondition(tokenizer.end_ids, len(ids), "length", text)
    return ids[: condition.take(ids)]


PIECES = st.lists(st.integers(1, 5), min_size=1, max_size=60)
STOPS = st.lists(st.sampled_from(["at", "the cat", "\uc774", "\U0001f642 the", " ", "caf\u00e9", "tt"]), max_size=2)
LEAST = st.integers(0, 20)
"""Tokens within which no stop string ends the text."""


@given(st.lists(st.integers(0, 282), min_size=1, max_size=60), PIECES, STOPS, st.booleans(), LEAST)
@example([275], [1], [], True, 0)
def test_any_tokens_give_the_engines_text(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], stops: list[str], by_token: bool, least: int
) -> None:
    """Prevents streamed text that differs from the complete one: lost or repeated characters, leaked stop strings, tokens
    that do not add up, with tokens of any kind in pieces of any size."""
    check(tokenizer, ids, sizes, tuple(stops), by_token, least)


@given(st.integers(0, 40), st.integers(1, 60), PIECES, STOPS, st.booleans(), LEAST)
def test_real_texts_give_the_engines_text(
    tokenizer: Tokenizer, start: int, count: int, sizes: list[int], stops: list[str], by_token: bool, least: int
) -> None:
    """The same for real text, in which the stop strings occur, over one token or several."""
    ids = tokenizer.encode(TEXT * 2)[start : start + count]
    check(tokenizer, ids, sizes, tuple(stops), by_token, least)


def check(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], stop: tuple[str, ...], by_token: bool, least: int
) -> None:
    ids = kept_by_engine(tokenizer, ids, stop, least)
    expected = text_of(tokenizer, SamplingParams(stop=stop, min_new_tokens=least), ids)
    answer, source = answer_of(tokenizer, stop, by_token=by_token, least=least), TextStream(tokenizer)
    released, decoded, done = "", "", 0
    tokens: list[TokenText] = []
    while done < len(ids):
        size = sizes[done % len(sizes)]
        part = ids[done : done + size]
        done += len(part)
        text, ready = answer.feed(events(part))
        released += text
        tokens += ready
        decoded += "".join(source.feed(one) for one in part if one not in tokenizer.end_ids)
        assert expected.startswith(released)
        if not by_token and done < len(ids):
            held = decoded[len(released) :]
            assert held == "" or any(one.startswith(held) for one in stop), "more is held back than must be"
        if by_token:
            assert text == "".join(one.text for one in ready)
    text, ready = answer.finish()
    released, tokens = released + text, tokens + ready
    assert released == expected
    assert "".join(one.text for one in tokens) == expected, "each token's text is what it adds"
    assert [one.event.token_id for one in tokens] == ids[: len(tokens)], "tokens are lost or reordered"
    assert [one.offset for one in tokens] == [len("".join(o.text for o in tokens[:n])) for n in range(len(tokens))]
    if not stop:
        assert len(tokens) == len(ids)
    elif any(one in decoded for one in stop) and tokens and not least:
        assert tokens[-1].text, "tokens behind the stop string are returned"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_split_characters_are_whole(tokenizer: Tokenizer, size: int) -> None:
    """Prevents U+FFFD, and characters twice, for characters of several tokens (Korean, emoji) in chunks of any size."""
    ids = tokenizer.encode(TEXT)
    assert sum(len(tokenizer.decode([one])) == 1 and "\ufffd" in tokenizer.decode([one]) for one in ids) > 10
    answer, pieces = answer_of(tokenizer, ()), []
    for start in range(0, len(ids), size):
        pieces.append(answer.feed(events(ids[start : start + size]))[0])
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) + answer.finish()[0] == TEXT


def test_a_stop_string_is_cut_wherever_chunks_end(tokenizer: Tokenizer) -> None:
    """Prevents the first part of a stop string from being sent, tokens behind it from being returned, and text before it from
    being held back until the end."""
    ids = tokenizer.encode("the cat sat on the mat")
    for cut in range(1, len(ids)):
        answer = answer_of(tokenizer, ("sat on",), by_token=True)
        text, tokens = "", []
        for part in (ids[:cut], ids[cut:]):
            more, ready = answer.feed(events(part))
            text, tokens = text + more, tokens + ready
        assert text == "the cat " and answer.finish() == ("", [])
        assert "".join(one.text for one in tokens) == "the cat " and len(tokens) < len(ids) - 4
    answer = answer_of(tokenizer, ("sat on",))
    assert answer.feed(events(tokenizer.encode("the cat s")))[0] == "the cat "
    assert answer.feed(events(tokenizer.encode("illy")))[0] == "silly", (
        "what is no stop string after all is released at once"
    )


def test_sentencepiece_keeps_spaces_and_bytes() -> None:
    """Prevents lost spaces between the tokens of such vocabularies, and bytes shown as `<0xED>`."""
    tokenizer = sentencepiece()
    ids = tokenizer.encode("the the \ud558")
    answer = answer_of(tokenizer, (), by_token=True)
    pieces = [answer.feed(events([one]))[0] for one in ids]
    assert "".join(pieces) + answer.finish()[0] == "the the \ud558"
    names = TokenNames(tokenizer)
    assert b"".join(names.bytes_of(one) for one in ids) == " the the \ud558".encode()


def test_names_of_tokens_are_their_bytes(tokenizer: Tokenizer) -> None:
    """Prevents U+FFFD as the name of parts of characters, of which several would then have the same one, and bytes that do not
    add up to the text."""
    names = TokenNames(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(names.bytes_of(one) for one in ids) == TEXT.encode()
    everything = [names.name_of(one) for one in sorted(tokenizer.token_ids)]
    assert len(set(everything)) == len(everything) and not any("\ufffd" in name for name in everything)
    assert names.name_of(tokenizer.eos_id) == "<|im_end|>" and names.bytes_of(10**6) == b""
    assert any(name.startswith("bytes:\\x") for name in everything)


class Measured(Tokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The tokens of single bytes, by byte."""
    names = TokenNames(tokenizer)
    return {names.bytes_of(one)[0]: one for one in sorted(tokenizer.token_ids) if len(names.bytes_of(one)) == 1}


def test_bytes_that_are_no_characters_take_linear_time(tokenizer: Tokenizer) -> None:
    """Prevents an echoed prompt or an answer of invalid bytes from decoding all of them again with each one: 64 KB of them
    stopped the server for 24 s."""
    for original in (tokenizer, sentencepiece()):
        measured = Measured(original.to_json(), original.config)
        for byte in (0x80, 0xED):
            measured.decoded, stream, count = 0, TextStream(measured), 2000
            token = byte_ids(original)[byte]
            text = "".join(stream.feed(token) for _ in range(count))
            assert len(text) >= count - 4 and text + stream.flush() == "\ufffd" * count
            assert measured.decoded < 150 * count


BYTES = st.sampled_from([0x80, 0x98, 0x95, 0xED, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9])


@given(
    st.lists(st.lists(BYTES, min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(BYTES, max_size=150),
    st.booleans(),
)
@example([[0x80, 0xED, 0x95, 0x98]], [], True)
@example([[0xED, 0xF0], [0x9F, 0x99, 0x82]], [], False)
def test_long_runs_of_invalid_bytes(
    tokenizer: Tokenizer, parts: list[list[int]], end: list[int], sentence: bool
) -> None:
    """Prevents characters from being lost, doubled or made up where many bytes wait for the rest of a character."""
    chosen = sentencepiece() if sentence else tokenizer
    known = byte_ids(chosen)
    invalid = [0x80] if sentence else []  # its decoder shows bytes as characters only if all of them in a row are
    run = [*invalid, *(byte for part in parts for byte in part * 20), *end]
    letter = chosen.encode("t")[-1]
    for ids in ([known[byte] for byte in run], [known[byte] for byte in run] + [letter, known[0x80], letter]):
        stream, pieces = TextStream(chosen), []
        for number, one in enumerate(ids, start=1):
            pieces.append(stream.feed(one))
            if number % 7 == 0:
                assert chosen.decode(ids[:number]).startswith("".join(pieces))
        assert "".join(pieces) + stream.flush() == chosen.decode(ids)


def test_an_answer_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    """Prevents the token of an incomplete character from losing its text, or the text from being sent twice."""
    ids = tokenizer.encode("a\U0001f642")[:-1]
    for by_token in (False, True):
        answer = answer_of(tokenizer, (), by_token=by_token)
        first, tokens = answer.feed(events(ids))
        rest, more = answer.finish()
        assert first + rest == tokenizer.decode(ids) == "a\ufffd"
        assert "".join(one.text for one in (*tokens, *more)) == "a\ufffd"
