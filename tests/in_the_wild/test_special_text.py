"""Special tokens that are written in documents and prompts: text, unless an option says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from recycle_ds.data.encoding import SpecialTokenCounts, encode_in_order
from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.chat import ChatTemplate
from recycle_ds.data.token_files import read_sidecar
from recycle_ds.data.tokenizer import Tokenizer
from tests.in_the_wild.prepared import CHATML, chat_tokenizer, documents_of, jsonl, prepared

WRITTEN = "hello <|endoftext|> world<|endoftext|>"


def unigram(_: Tokenizer) -> Tokenizer:
    """Unigram whose model itself knows </s> as a word, as SentencePiece's converted models do."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -3.0) for character in "</s>helo wrd"), ("|", -4.0)]
    model = models.Unigram(list(dict(pieces).items()), unk_id=0)
    built = tokenizers.Tokenizer(model)
    built.decoder = decoders.Fuse()
    built.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(built.to_str())


def words(_: Tokenizer) -> Tokenizer:
    """WordLevel, where a special token is a word like others; its end token is named by tokenizer_config.json only."""
    model = models.WordLevel({"[UNK]": 0, "<eod>": 1, "hello": 2, "world": 3, "<": 4}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(built.to_str(), {"eos_token": "<eod>", "unk_token": "[UNK]"})


def test_a_token_written_in_a_document_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Prevents whoever writes <|endoftext|> in a document from ending it, and a token file from hiding that it happened."""
    source = jsonl(tmp_path / "a.jsonl", [{"text": WRITTEN}, {"text": "clean"}, {"text": "<|endoftext|>"}])
    report = prepared(source, tmp_path / "out", tokenizer)
    found = documents_of(report, tokenizer)
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in found] == [WRITTEN, "clean", "<|endoftext|>"]
    assert not any(tokenizer.eos_id in ids for ids in found)
    assert (report.special.documents, dict(report.special.tokens)) == (2, {"<|endoftext|>": 3})
    assert any("in 2 documents, encoded as text" in line and "<|endoftext|> (3)" in line for line in report.lines())
    parsed = prepared(source, tmp_path / "parsed", tokenizer, parse_special=True)
    assert [ids.count(tokenizer.eos_id) for ids in documents_of(parsed, tokenizer)] == [2, 0, 1]
    assert dict(parsed.special.tokens) == {"<|endoftext|>": 3}, "counted in both cases"
    assert read_sidecar(report.train.prefix).recipe["parse_special"] is False
    assert read_sidecar(parsed.train.prefix).recipe["parse_special"] is True


@pytest.mark.parametrize(
    ("make", "text", "ids"),
    [
        (unigram, "hello</s>", [6, 7, 8, 8, 9, 2, 3, 4, 5]),
        (words, "hello <eod> world", [2, 4, 0, 0, 0, 0, 3]),
        (words, "hello strange", [2, 0]),
    ],
)
def test_models_that_know_the_token_as_a_word(
    make: Callable[[Tokenizer], Tokenizer], text: str, ids: list[int], tokenizer: Tokenizer
) -> None:
    """Prevents the end of a document from coming out of the model itself, where the library offers no switch."""
    made = make(tokenizer)
    assert made.encode(text, parse_special=False) == ids
    assert (made.eos_id in made.encode(text)) == ("eod" in text or "</s>" in text)


def test_a_token_that_cannot_be_spelled_is_refused() -> None:
    """Prevents a special token from being dropped from a text whose vocabulary has no characters for it."""
    built = tokenizers.Tokenizer(models.WordLevel({"a": 0, "e": 1}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = Tokenizer(built.to_str(), {"eos_token": "e"})
    with pytest.raises(DataError, match=r"cannot encode 'e' as text, .*--parse-special"):
        made.encode("a e", parse_special=False)


@given(text=st.lists(st.sampled_from(["<|endoftext|>", "<|im_end|>", "<s>", "<", "|>", "é", " ", "we ", "\n"])))
def test_text_is_restored_whatever_it_contains(tokenizer: Tokenizer, text: list[str]) -> None:
    """Prevents text with special tokens, or with parts of them, from being changed by being encoded as text."""
    made = chat_tokenizer(tokenizer)
    ids = made.encode("".join(text), parse_special=False)
    assert made.decode(ids, skip_special_tokens=False) == "".join(text)
    assert not set(ids) & set(made.special_tokens.values())
    if not made.special_pattern.search("".join(text)):
        assert ids == made.encode("".join(text)), "text without special tokens has the same ids in both ways"


def test_prompts_are_raw_unless_asked(tokenizer: Tokenizer) -> None:
    """Prevents a change of raw prompts, whose special tokens stand for themselves, and missing a way for users' prompts."""
    eos = tokenizer.eos_id
    assert tokenizer.encode("a<|endoftext|>")[-1] == eos
    assert tokenizer.encode_batch(["a<|endoftext|>"])[0][-1] == eos
    assert eos not in tokenizer.encode("a<|endoftext|>", parse_special=False)


def test_tokens_named_by_the_configuration(tokenizer: Tokenizer) -> None:
    """Prevents a token that only tokenizer_config.json calls special from being recognised in documents."""
    built = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    built.add_tokens(["<|end|>", "<|tool|>", "<|user|>", "<note>"])
    made = Tokenizer(
        built.to_str(),
        {
            "eos_token": "<|end|>",
            "additional_special_tokens": ["<|tool|>"],
            "added_tokens_decoder": {"302": {"content": "<|user|>", "special": True}},
        },
    )
    ids = made.encode("<|end|><|tool|><|user|><note>", parse_special=False)
    assert set(ids) & {made.special_tokens[token] for token in ("<|end|>", "<|tool|>", "<|user|>")} == set()
    assert ids[-1] == made.encode("<note>")[0], "a token that nobody calls special is a word of the vocabulary"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "special_tokens_map.json"])
def test_workers_know_the_tokens_of_all_files(tmp_path: Path, tokenizer: Tokenizer, file: str) -> None:
    """Prevents token files that depend on the number of workers, if only a model's other files call a token special."""
    built = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    built.add_tokens(["<|im_start|>", "<|im_end|>"])
    Tokenizer(built.to_str(), {"eos_token": "<|endoftext|>", "chat_template": CHATML}).save(tmp_path)
    end = built.token_to_id("<|im_end|>")
    named = {"eos_token": "<|im_end|>"} if "map" in file else {"eos_token_id": [tokenizer.eos_id, end]}
    (tmp_path / file).write_text(json.dumps(named))
    made = Tokenizer.load(tmp_path)
    assert made.end_ids == {tokenizer.eos_id, end}
    template = ChatTemplate.load(tmp_path, made)
    written = "hello <|im_end|> world"
    chat = template.render([{"role": "user", "content": written}], "row", "messages")
    assert chat is not None
    expected = made.encode(written, parse_special=False)
    assert end not in expected and made.decode(expected) == written
    results = []
    for workers in (1, 2):
        counts = SpecialTokenCounts()
        texts = [written, chat] * 520  # more than one chunk
        results.append([ids.tolist() for ids in encode_in_order(texts, made, workers, counts=counts)])
        assert (counts.documents, dict(counts.tokens)) == (1040, {"<|im_end|>": 1040})
    assert results[0] == results[1]
    assert results[0][0] == expected and results[0][1].count(end) == 1, "the template's"
