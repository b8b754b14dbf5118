"""Special tokens that are written in a text: how they are found, and how they are encoded as the text that they are.

A tokenizer recognises its special tokens (end of text, roles of a chat) wherever their characters occur. In a document or in a
user's message they are text: else whoever writes `<|endoftext|>` there ends the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import tokenizers

from recycle_ds.data.errors import DataError

_PRIVATE = range(0xF0000, 0x110000)  # code points without characters


def special_tokens(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], more: Iterable[int | None] = ()
) -> dict[str, int]:
    """The special tokens of a vocabulary and their ids: those that tokenizer.json marks as special, and those that
    tokenizer_config.json names (`eos_token` and the like, `additional_special_tokens`, `added_tokens_decoder`).

    more: further ids of special tokens; those that have no token are ignored.
    """
    found = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(key)
        named += several.values() if isinstance(several, Mapping) else several if isinstance(several, list) else []
    added = config.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        named += [entry for entry in added.values() if isinstance(entry, Mapping) and entry.get("special")]
    for entry in named:
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(token, str) and token:
            number = tokenizer.token_to_id(token)
            if number is not None:
                found[token] = number
    for number in more:
        token = None if number is None else tokenizer.id_to_token(number)
        if number is not None and token is not None:
            found[token] = number
    return found


def tokens_of_template(added: Mapping[str, int], template: str) -> dict[str, int]:
    """The added tokens of a vocabulary that a chat template writes, and their ids: roles need not be marked as special.

    Words and spaces, which some vocabularies have as added tokens, are not meant where a template contains them.
    """
    return {
        token: i for token, i in added.items() if re.search(r"[^\w\s]", token) and len(token) > 2 and token in template
    }


def paired_tags(tokens: Iterable[str]) -> set[str]:
    """Those that open and close a part of a text, such as `<think>` and `</think>`."""
    known = set(tokens)
    opening = {token for token in known if token.startswith("<") and f"</{token[1:]}" in known}
    return opening | {f"</{token[1:]}" for token in opening}


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest one first, as one group; nothing if there are none."""
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    if not ordered:
        return re.compile("((?!))")
    # there may be hundreds of tokens: few places of a text have one of the few ways in which they begin
    starts = "|".join(sorted({re.escape(token[:2]) for token in ordered}))
    return re.compile(f"(?={starts})({'|'.join(map(re.escape, ordered))})")


def private_characters(used: Set[str]) -> Iterator[str]:
    """Characters that no text has a meaning for, without those that are used: they can stand for special tokens.

    used: a set of characters. Raises DataError when there are no more.
    """
    yield from (chr(code) for code in _PRIVATE if chr(code) not in used)
    raise DataError(
        "a text contains every private character (U+F0000 to U+10FFFF), and one must stand for each special token: remove some"
    )


class TextEncoder:
    """Encodes text with a vocabulary whose special tokens it never produces, except for that of unknown characters."""

    def __init__(self, tokenizer_json: str, special: Mapping[str, int], name: str) -> None:
        """special: as `special_tokens` gives them. name: of the tokenizer, in error messages."""
        content = json.loads(tokenizer_json)
        for token in content.get("added_tokens") or ():
            token["special"] = token["special"] or token["content"] in special
        self._name = name
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._tokens = dict(special)
        self._special = frozenset(special.values()) - {_unknown(content, self._tokenizer)}
        self._spelled: dict[int, list[int]] = {}
        self._stand_ins: _StandIns | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order. Raises the library's exceptions, and DataError for a token that cannot be spelled."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._without_special(encoding.ids) for encoding in encodings]

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Ids of a text, a special token, a text and so on, encoded in one call; only these tokens are special.

        A vocabulary may encode the start of a text differently, and remove the spaces beside a special token. Raises as
        `encode_batch`.
        """
        written = frozenset("".join(parts[::2]))
        stand_ins = (
            self._stand_ins
        )  # read once: another thread may replace it by one whose characters this text contains
        if stand_ins is None or not written.isdisjoint(stand_ins.characters.values()):
            stand_ins = self._stand_ins = _StandIns(self._tokenizer, self._tokens, written)
        ids: list[int] = []
        for number, token in stand_ins.encode(parts):
            ids += [self._tokens[token]] if token else self._without_special([number])
        return ids

    def _without_special(self, ids: list[int]) -> list[int]:
        """Replaces special tokens by their characters: models that know whole words (WordLevel, Unigram) find them there."""
        if self._special.isdisjoint(ids):
            return ids
        return [part for number in ids for part in (self._spell(number) if number in self._special else (number,))]

    def _spell(self, number: int) -> list[int]:
        if number not in self._spelled:
            token = self._tokenizer.id_to_token(number) or ""
            spelled = [part.id for character in token for part in self._tokenizer.model.tokenize(character)]
            if not spelled or not self._special.isdisjoint(spelled):
                raise DataError(
                    f"{self._name} cannot encode {token!r} as text, only as the special token: remove it from the text, or let "
                    "special tokens stand for themselves (parse_special=True in Python, `prepare --parse-special`)"
                )
            self._spelled[number] = spelled
        return self._spelled[number]


class _StandIns:
    """A copy of an encoder of text in which private characters stand for its special tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: Iterable[str], written: frozenset[str]) -> None:
        """written: the characters of the texts between the special tokens."""
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        used = written.union(*self._tokenizer.get_vocab(with_added_tokens=True))
        # not strict: there are more characters than tokens, or the iterator raises
        self.characters = dict(zip(special, private_characters(used), strict=False))
        """Of each special token."""
        self._tokens = {character: token for token, character in self.characters.items()}
        added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        normalizer = self._tokenizer.normalizer
        stand_ins = []
        for token, character in self.characters.items():
            known = added.get(token) or tokenizers.AddedToken(token, normalized=False)
            kept = normalizer is None or normalizer.normalize_str(character) == character
            stripping = {"lstrip": known.lstrip, "rstrip": known.rstrip}
            stand_ins.append(tokenizers.AddedToken(character, **stripping, normalized=known.normalized and kept))
        self._tokenizer.add_tokens(stand_ins)

    def encode(self, parts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Id of each token, and the special token for which it stands; the id of such a one means nothing."""
        text = "".join(self.characters[part] if number % 2 else part for number, part in enumerate(parts))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        # not by id: the library may give a stand-in the id of another token if ids of the vocabulary are not consecutive
        for number, token in zip(encoding.ids, encoding.tokens, strict=True):
            yield number, self._tokens.get(max(token, default=""))  # beside it are only spaces that it removes


def _unknown(content: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> int | None:
    """Id of the unknown token, or None."""
    model = content.get("model") or {}
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None
