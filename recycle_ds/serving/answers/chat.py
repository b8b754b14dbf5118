"""Chats: rendered by the model's own template, and encoded so that nothing a user writes is a special token."""

from __future__ import annotations

import importlib
from typing import Any

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.chat import RENDERER, ChatTemplate, RenderedChat, encode_chat
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.serving.protocol.chats import ChatFields
from recycle_ds.serving.protocol.errors import invalid


class Chats:
    """Renders and encodes chats for one model, which may have no template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._problem = ""
        try:
            # a tokenizer is named after its file; the template is beside it
            self._template: ChatTemplate | None = ChatTemplate.load(tokenizer.name, tokenizer)
        except DataError as error:
            self._template, self._problem = None, str(error)
        if self._template is not None:  # takes seconds: not during the first request
            importlib.import_module(RENDERER)

    @property
    def available(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def encode(self, request: ChatFields) -> list[int]:
        """Token ids of a chat. Only special tokens that the template itself writes are special: the start of a text too,
        so that it is never doubled.

        Raises ApiError (400) for a model without a template, and for a chat that the template refuses.
        """
        rendered = self._render(request.chat, request.template_options)
        return encode_chat(self._tokenizer, rendered)

    def _render(self, chat: list[dict[str, str]], options: dict[str, Any]) -> RenderedChat:
        if self._template is None:
            raise invalid(
                f"the model has no chat template ({self._problem}): use /v1/completions, or restart the server with a template",
                "messages",
                "no_chat_template",
            )
        try:
            return self._template.apply(chat, **options)
        except Exception as error:  # of Jinja, or of a template that expects other messages
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise invalid(
                f"messages: the chat template refuses them: {reason}", "messages", "chat_template_error"
            ) from error
