"""What single tokens are: their bytes, and a name for each that is unique.

The text of an answer is not made of these, but of all its tokens together (text.py).
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import tokenizers

from recycle_ds.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's


class TokenNames:
    """Bytes and names of a vocabulary's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = tokenizer.to_json()
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        kinds = set(_decoders(json.loads(content).get("decoder")))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._continues = "##" if "WordPiece" in kinds else None
        self._added = {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        self._bytes = functools.lru_cache(maxsize=65536)(self._read)

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for; of a special token, those of its name. Empty for an id without a token."""
        return self._bytes(token_id)

    def name_of(self, token_id: int) -> str:
        """The token's text, or `bytes:\\xe4\\xb8` (as OpenAI writes it) for a part of a character."""
        found = self.bytes_of(token_id)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{one:02x}" for one in found)

    def token_of(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an id without a token."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def _read(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        token = self.token_of(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            table = _byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
        elif self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._continues and token.startswith(self._continues):
            token = token.removeprefix(self._continues)
        return token.replace(_SPACE, " ").encode("utf-8")


def _decoders(tree: Any) -> list[str]:
    """Names of a decoder of tokenizer.json and of those inside it."""
    if not isinstance(tree, dict):
        return []
    return [str(tree.get("type")), *(name for part in tree.get("decoders") or () for name in _decoders(part))]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes stand for themselves, the others for characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}
