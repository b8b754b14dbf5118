"""Tokenizers: loading, training, identity, and text that streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import TextStream, Tokenizer

TEXT = "The Congress — “café”, naïve 漢字, 👩‍🚀 and 🇺🇸.\n\nA second paragraph  with two spaces."


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """All pieces, the last one flushed."""
    text = TextStream(tokenizer)
    return [*(text.feed(token_id) for token_id in ids), text.flush()]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Prevents a byte-level vocabulary that lacks a byte, or a decoder that does not fit the encoder."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Prevents characters that are lost, doubled or torn while printing, for any ids, UTF-8 or not."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_piece_tears_a_character(tokenizer: Tokenizer) -> None:
    """Prevents replacement characters on the terminal while the bytes of a character are still arriving."""
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT) / 2
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10, "text must come in pieces, not at the end"


@pytest.mark.parametrize("text", ["the cat", "  two  spaces ", "漢字 and 👩‍🚀 too", "é", "t t t", " ", "a\nb"])
def test_streaming_with_leading_spaces(sentencepiece: Tokenizer, text: str) -> None:
    """Prevents lost spaces between words where the decoder strips the one in front of what it is given."""
    ids = sentencepiece.encode(text)
    pieces = stream(sentencepiece, ids)
    assert "".join(pieces) == sentencepiece.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_streaming_with_byte_fallback(sentencepiece: Tokenizer, text: str) -> None:
    """Prevents a character from staying back, or coming out as replacement characters, when bytes stand for it."""
    ids = sentencepiece.encode(text)
    assert "".join(stream(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_streaming_with_the_metaspace_decoder() -> None:
    """Prevents lost spaces with the other decoder that drops a leading one."""
    vocabulary = {"▁": 0, "a": 1, "▁a": 2, "</s>": 3}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    built.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(built.to_str())
    for ids in ([2, 2, 1, 2], [0, 2], [3, 2, 3, 2], [0, 0, 1], [2, 3, 2]):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_garbage_does_not_hold_text_back_for_ever(tokenizer: Tokenizer) -> None:
    """Prevents a model that emits broken bytes from showing nothing until its end, in quadratic time."""
    byte = tokenizer.encode("é")[-1]  # a continuation byte, never a character by itself
    assert len(tokenizer.encode("é")) == 2
    text = TextStream(tokenizer)
    shown = "".join(text.feed(byte) for _ in range(50))
    assert len(shown) >= 50 - 4
    assert len(shown + text.flush()) == 50


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    """Prevents the end-of-text mark from being printed, unless asked for."""
    ids = [*tokenizer.encode("peace"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "peace"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "peace<|endoftext|>"
    text = TextStream(tokenizer, skip_special_tokens=False)
    assert "".join(map(text.feed, ids)) + text.flush() == "peace<|endoftext|>"


def test_training_is_reproducible(texts: list[str], tokenizer: Tokenizer) -> None:
    """Prevents two preparations of one corpus from giving token files that do not fit each other's tokenizer."""
    again = Tokenizer.train(iter(texts), 600)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == 600
    assert Tokenizer.train(texts, 601).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(("vocab_size", "message"), [(256, "at least 257"), (5000, "tokens, not 5000; ask for fewer")])
def test_vocabulary_sizes_that_cannot_be(vocab_size: int, message: str) -> None:
    """Prevents a tokenizer without some bytes, or one smaller than the model's embedding was promised."""
    with pytest.raises(DataError, match=message):
        Tokenizer.train(["a short text, a short text"], vocab_size)


def test_an_error_of_the_source_survives_training() -> None:
    """Prevents the trainer from hiding which line of the corpus is broken."""

    def broken() -> Iterator[str]:
        yield "fine"
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match="line 2 is broken"):
        Tokenizer.train(broken(), 300)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents a saved tokenizer that encodes otherwise, lost its end token, or refuses its own token files."""
    tokenizer.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.bos_id, loaded.vocab_size) == (tokenizer.eos_id, None, 600)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.encode_batch([TEXT, ""]) == [tokenizer.encode(TEXT), []]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_fingerprint_ignores_layout_and_padding(tokenizer: Tokenizer) -> None:
    """Prevents a file that was only re-indented, or given a padding rule, from being taken for another tokenizer."""
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    other = Tokenizer(json.dumps(content, separators=(",", ":"), sort_keys=True))
    assert other.fingerprint == tokenizer.fingerprint
    assert other.encode(TEXT) == tokenizer.encode(TEXT), "truncation must not cut documents"


def test_the_configuration_names_the_end_token(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    """Prevents documents from ending in a well-known token when the tokenizer says it ends in another."""
    assert (sentencepiece.eos_id, sentencepiece.bos_id) == (2, 1)
    named = Tokenizer(sentencepiece.to_json(), {"eos_token": {"content": "<unk>"}, "bos_token": None})
    assert (named.eos_id, named.bos_id) == (0, None)
    named.save(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 0
    with pytest.raises(DataError, match="eos_token '<end>', not in the vocabulary"):
        Tokenizer(sentencepiece.to_json(), {"eos_token": "<end>"})


def test_added_tokens_count(tokenizer: Tokenizer) -> None:
    """Prevents an embedding that is too small for tokens added after training."""
    built = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    extended = Tokenizer(built.to_str())
    assert extended.vocab_size == 602
    assert extended.encode("<|im_end|>") == [601]


def test_a_tokenizer_without_an_end_token() -> None:
    """Prevents documents that run into each other unmarked."""
    built = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(DataError, match="no end-of-document token"):
        Tokenizer(built.to_str())


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (None, None, "no such tokenizer"),
        (b"{", None, "is not a tokenizer.json"),
        (b"{}", None, "is not a tokenizer.json"),
        (b"\xff\xfe", None, "cannot read the tokenizer"),
        (b"{}", b"[]", "must hold a JSON object"),
        (b"{}", b"{", "cannot read the tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes | None, config: bytes | None, message: str) -> None:
    """Prevents a library's traceback in place of a line that names the file."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
