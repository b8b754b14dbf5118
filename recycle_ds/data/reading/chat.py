"""Rows of chat messages, rendered by a tokenizer's chat template.

The template writes special tokens, such as the ones that start and end a message. The same tokens written by a user inside a
message are text: a rendered chat keeps the two apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import InvalidRow
from recycle_ds.data.reading.rows import checked_text
from recycle_ds.data.special_text import paired_tags, pattern_of, private_characters, tokens_of_template
from recycle_ds.data.tokenizer import Tokenizer

RENDERER = "transformers.utils.chat_template_utils"
"""Module that renders templates. It is imported with the first chat, which takes a while."""
# The roles of ShareGPT's {"from": ..., "value": ...}, a common layout of chats.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class RenderedChat(str):
    """A rendered chat. `parts` alternates between text, in which special tokens are text, and special tokens.

    roles: tokens that the template writes and that tokenizer.json does not mark as special. They are special in this chat.
    """

    parts: tuple[str, ...]
    roles: tuple[str, ...]

    def __new__(cls, parts: tuple[str, ...], roles: tuple[str, ...] = ()) -> RenderedChat:
        chat = super().__new__(cls, "".join(parts))
        chat.parts, chat.roles = parts, roles
        return chat

    def __reduce__(self) -> tuple[type[RenderedChat], tuple[tuple[str, ...], tuple[str, ...]]]:
        return RenderedChat, (self.parts, self.roles)  # sent to the processes that tokenise


class ChatTemplate:
    """Renders lists of messages like `apply_chat_template` of transformers, whose renderer it calls."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        """template: in Jinja, as in chat_template.jinja. tokenizer: names the special tokens that it may write."""
        self._template = template
        self.special_tokens = tokenizer.special_tokens | tokens_of_template(tokenizer.added_tokens, template)
        """Tokens, and their ids, that only the template may write: those of the tokenizer and those of the template itself."""
        self._roles = tuple(sorted(self.special_tokens.keys() - tokenizer.special_tokens.keys()))
        self._special = pattern_of(self.special_tokens)
        # Models write tags into their answers, and templates look for them in an answer (to leave out its reasoning).
        self._not_in_answers = pattern_of(self.special_tokens.keys() - paired_tags(self._roles))
        names = {key: _content(value) for key, value in tokenizer.config.items() if key.endswith("_token")}
        self._tokens = {key: value for key, value in names.items() if value is not None}

    @classmethod
    def load(cls, path: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
        """The template beside a tokenizer.json (chat_template.jinja), or in its tokenizer_config.json.

        Raises DataError if there is none.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), tokenizer)
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {file}: {error}; repair it") from error
        found = tokenizer.config.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        if not isinstance(found, str):
            raise DataError(
                f"{tokenizer.name} has no chat template: put a chat_template.jinja beside it, or render the chats to a text "
                "column yourself"
            )
        return cls(found, tokenizer)

    def render(
        self, messages: Any, where: str, column: str, *, add_generation_prompt: bool = False
    ) -> RenderedChat | None:
        """One chat, None without messages. add_generation_prompt: end it with the start of the assistant's next message.

        messages: a list of {"role": ..., "content": ...}, or of {"from": ..., "value": ...}. Raises InvalidRow for other
        values and for chats that the template refuses.
        """
        if messages == []:
            return None
        read = [_message(message) for message in messages] if isinstance(messages, list) else [None]
        chat = [message for message in read if message is not None]
        if len(chat) < len(read):
            raise InvalidRow(
                f"{where}: column {column!r} is no list of messages, such as "
                '[{"role": "user", "content": "TEXT"}]; name another column'
            )
        try:
            rendered = self.apply(chat, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # of Jinja, or of a template that expects other messages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRow(f"{where}: the chat template refuses the messages: {reason}; repair the row") from error
        checked_text(rendered, where, column)
        return rendered

    def apply(self, chat: list[dict[str, Any]], **options: Any) -> RenderedChat:
        """Renders a chat of messages as templates expect them. options: arguments of the renderer (`add_generation_prompt`,
        `continue_final_message`) and further variables of the template, in which special tokens are text too.

        Raises whatever Jinja or the template raises.
        """
        hidden = _Hidden(json.dumps([chat, options], ensure_ascii=False, default=str))
        safe = [
            hidden.hide(message, self._not_in_answers if message.get("role") == "assistant" else self._special)
            for message in chat
        ]
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered, *_), _ = render_jinja_template(
            [safe], chat_template=self._template, **hidden.hide(options, self._special), **self._tokens
        )
        parts = self._special.split(rendered)
        shown = tuple(part if number % 2 else hidden.show(part) for number, part in enumerate(parts))
        return RenderedChat(shown, self._roles)


def encode_chat(tokenizer: Tokenizer, chat: RenderedChat) -> list[int]:
    """Ids of a rendered chat: special tokens of the template stand for themselves, those inside messages are text."""
    special = tokenizer.special_tokens | {token: tokenizer.added_tokens[token] for token in chat.roles}
    ids, numbers = tokenizer.encode(chat), frozenset(special.values())
    # Not by a search for the tokens in the messages: the tokenizer's normalizer may make one of other characters.
    if [one for one in ids if one in numbers] == [special[token] for token in chat.parts[1::2]]:
        return ids
    return tokenizer.encode_parts(chat.parts, chat.roles)


class _Hidden:
    """Replaces special tokens inside messages by private characters that occur nowhere in the chat, and back."""

    def __init__(self, content: str) -> None:
        self._characters: dict[str, str] = {}
        self._free = private_characters(frozenset(content))

    def hide(self, value: Any, special: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return special.sub(self._character, value)
        if isinstance(value, list):
            return [self.hide(item, special) for item in value]
        return {key: self.hide(item, special) for key, item in value.items()} if isinstance(value, Mapping) else value

    def show(self, text: str) -> str:
        for token, character in self._characters.items():
            text = text.replace(character, token)
        return text

    def _character(self, match: re.Match[str]) -> str:
        token = match.group()
        if token not in self._characters:
            self._characters[token] = next(self._free)
        return self._characters[token]


def _message(message: Any) -> dict[str, Any] | None:
    """A message as templates expect it; None if it is none. Null keys, which tables have for other rows' sake, are dropped."""
    if not isinstance(message, Mapping):
        return None
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and isinstance(given.get("from"), str):
        role = given.pop("from")
        given = {"role": _ROLES.get(role, role), "content": given.pop("value", ""), **given}
    return given if isinstance(given.get("role"), str) else None


def _content(entry: Any) -> str | None:
    found = entry.get("content") if isinstance(entry, Mapping) else entry
    return found if isinstance(found, str) else None
