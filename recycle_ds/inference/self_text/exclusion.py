"""Texts that must not be among the prompts, such as the questions of a benchmark that the model will be measured with."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recycle_ds.inference.self_text.lines import numbered_lines, parse_object

_LONG = 13
"""Words in a row that two texts share only if one quotes the other (as in GPT-3's check of its training data, arXiv
2005.14165, appendix C)."""
_SHORT = 4
# Scripts that are written without spaces, or whose words are short: CJK, kana, bopomofo, Hangul, Thai, Lao, Burmese, Khmer.
_CHARACTERS = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3041-\u3096\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u31f0-\u31ff\u3105-\u312f\u31a0-\u31bf\u1100-\u11ff\uac00-\ud7af\u0e01-\u0e3a\u0e40-\u0e4e"
    "\u0e50-\u0e59\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


class Exclusion:
    """Recognises texts that quote an excluded one, whatever their case, spaces and punctuation.

    A text matches if it shares 13 consecutive words with an excluded text, or contains a shorter one of at least four words
    completely, or equals a still shorter one. A character of a script without spaces, such as Chinese, Japanese or Thai, is a
    word; so is a syllable of Hangul.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        self._equal: set[tuple[str, ...]] = set()
        distinct = {_words(text) for text in texts} - {()}
        self.texts = len(distinct)
        """Number of different excluded texts."""
        for words in distinct:
            if len(words) < _SHORT:
                self._equal.add(words)
            else:
                length = min(len(words), _LONG)
                self._runs.setdefault(length, set()).update(_runs(words, length))

    @property
    def digest(self) -> str:
        """SHA-256 of what is excluded."""
        found = [sorted(self._equal), *([length, sorted(runs)] for length, runs in sorted(self._runs.items()))]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def matches(self, text: str) -> bool:
        """Whether a text quotes an excluded one."""
        if not self.texts:
            return False
        words = _words(text)
        return words in self._equal or any(
            run in known for length, known in self._runs.items() for run in _runs(words, length)
        )


def texts_of(value: Any) -> list[str]:
    """All texts inside a JSON value, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in texts_of(one)]


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of a .jsonl file all strings in its objects, of any other file its lines. Raises
    DecodingError."""
    lines = numbered_lines(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [line for _, line in lines]
    return [text for number, line in lines for text in texts_of(parse_object(line, f"{path}:{number}"))]


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _runs(words: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (words[start : start + length] for start in range(len(words) - length + 1))
