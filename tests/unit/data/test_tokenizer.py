"""Tokenizers: loading, training, fingerprints and incremental decoding."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.text_stream import TextStream

TEXT = "The Congress — “café”, naïve 漢字, 👩‍🚀 and 🇺🇸.\n\nA second paragraph  with two spaces."


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """All pieces, including the flushed one."""
    text = TextStream(tokenizer)
    return [*(text.feed(token_id) for token_id in ids), text.flush()]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_restored(tokenizer: Tokenizer, text: str) -> None:
    """Prevents a byte-level vocabulary without some byte, or a decoder that does not match the encoder."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Prevents characters that are lost, duplicated or split while streaming, for any ids, UTF-8 or not."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_piece_splits_a_character(tokenizer: Tokenizer) -> None:
    """Prevents replacement characters on the terminal while the bytes of a character are still arriving."""
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT) / 2
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10, "text must be returned in pieces, not at the end"


@pytest.mark.parametrize("text", ["the cat", "  two  spaces ", "漢字 and 👩‍🚀 too", "é", "t t t", " ", "a\nb"])
def test_streaming_with_leading_spaces(sentencepiece: Tokenizer, text: str) -> None:
    """Prevents lost spaces between words if the decoder strips the leading one of its input."""
    ids = sentencepiece.encode(text)
    pieces = stream(sentencepiece, ids)
    assert "".join(pieces) == sentencepiece.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_streaming_with_byte_fallback(sentencepiece: Tokenizer, text: str) -> None:
    """Prevents a character encoded as bytes from being held back, or returned as replacement characters."""
    ids = sentencepiece.encode(text)
    assert "".join(stream(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_streaming_with_the_metaspace_decoder() -> None:
    """Prevents lost spaces with the other decoder that drops a leading space."""
    vocabulary = {"▁": 0, "a": 1, "▁a": 2, "</s>": 3}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    built.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(built.to_str())
    for ids in ([2, 2, 1, 2], [0, 2], [3, 2, 3, 2], [0, 0, 1], [2, 3, 2]):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_invalid_bytes_do_not_hold_text_back(tokenizer: Tokenizer) -> None:
    """Prevents a model that emits invalid bytes from showing no text until its end, and from taking quadratic time."""
    byte = tokenizer.encode("é")[-1]  # a continuation byte, never a complete character
    assert len(tokenizer.encode("é")) == 2
    text = TextStream(tokenizer)
    shown = "".join(text.feed(byte) for _ in range(50))
    assert len(shown) >= 50 - 4
    assert len(shown + text.flush()) == 50


def test_a_continued_text_is_that_of_all_tokens(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    """Prevents the space between a prompt and its continuation from being dropped, and a character whose first bytes are the
    prompt's from being lost, or shown as U+FFFD."""
    for made, words in ((tokenizer, "the cat é 🙂 ht"), (sentencepiece, "t th 🙂 h h")):
        ids = made.encode(words)
        for cut in range(1, len(ids)):
            before = made.decode(ids[:cut]).rstrip("\ufffd")
            text = TextStream(made, after=ids[:cut])
            pieces = [text.feed(one) for one in ids[cut:]]
            assert before + "".join(pieces) + text.flush() == words
            assert TextStream(made, after=ids[:cut]).flush() == "", "nothing of the prompt is returned"
            other = TextStream(made, after=ids[:cut])  # what follows does not complete the prompt's last character
            letter = made.encode("h")[-1]
            assert other.feed(letter) + other.flush() == "h"
    first = TextStream(sentencepiece, after=[*sentencepiece.encode("t"), sentencepiece.eos_id])
    assert first.feed(sentencepiece.encode("t")[-1]) == "t", "a new text begins behind a special token"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    """Prevents the end-of-text token from being printed, unless requested."""
    ids = [*tokenizer.encode("peace"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "peace"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "peace<|endoftext|>"
    text = TextStream(tokenizer, skip_special_tokens=False)
    assert "".join(map(text.feed, ids)) + text.flush() == "peace<|endoftext|>"


def test_training_is_reproducible(texts: list[str], tokenizer: Tokenizer) -> None:
    """Prevents two preparations of one corpus from producing token files of different tokenizers."""
    again = Tokenizer.train(iter(texts), 600)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == 600
    assert Tokenizer.train(texts, 601).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(256, "at least 257"), (5000, "tokens, not 5000; reduce the vocabulary size"), (10**25, "at most 4,000,000")],
)
def test_invalid_vocabulary_sizes(vocab_size: int, message: str) -> None:
    """Prevents a tokenizer without some bytes, or one smaller than the model's embedding expects."""
    with pytest.raises(DataError, match=message):
        Tokenizer.train(["a short text, a short text"], vocab_size)


def test_an_error_of_the_source_is_raised_by_training() -> None:
    """Prevents the trainer from hiding which line of the corpus is invalid."""

    def broken() -> Iterator[str]:
        yield "fine"
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match="line 2 is broken"):
        Tokenizer.train(broken(), 300)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents a saved tokenizer that encodes differently, has lost its end token, or rejects its own token files."""
    tokenizer.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.bos_id, loaded.vocab_size) == (tokenizer.eos_id, None, 600)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.encode_batch([TEXT, ""]) == [tokenizer.encode(TEXT), []]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_fingerprint_ignores_layout_and_padding(tokenizer: Tokenizer) -> None:
    """Prevents a file that was only re-indented, or given a padding rule, from being treated as another tokenizer."""
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    other = Tokenizer(json.dumps(content, separators=(",", ":"), sort_keys=True))
    assert other.fingerprint == tokenizer.fingerprint
    assert other.encode(TEXT) == tokenizer.encode(TEXT), "truncation must not cut documents"


def test_the_configuration_names_the_end_token(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    """Prevents documents from ending in a well-known token if the configuration names another one."""
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
    """Prevents documents without a boundary between them."""
    built = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(DataError, match="no end-of-document token"):
        Tokenizer(built.to_str())


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (None, None, "no such tokenizer"),
        (b"{", None, "is not a valid tokenizer.json"),
        (b"{}", None, "is not a valid tokenizer.json"),
        (b"\xff\xfe", None, "cannot read the tokenizer"),
        (b"{}", b"[]", "must contain a JSON object"),
        (b"{}", b"{", "tokenizer_config.json: cannot be read"),
    ],
)
def test_files_that_are_not_a_tokenizer(
    tmp_path: Path, content: bytes | None, config: bytes | None, message: str
) -> None:
    """Prevents a library's traceback in place of a one-line error that names the file."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_part_of_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a traceback and a lone tokenizer_config.json if the disk is full."""
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if path.name.endswith("-tokenizer.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"cannot write to .*new: No space left on device; free space there"):
        tokenizer.save(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
