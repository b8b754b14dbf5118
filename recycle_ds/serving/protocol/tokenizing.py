"""Bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from recycle_ds.serving.protocol.chats import ChatFields, Message
from recycle_ds.serving.protocol.fields import TokenId
from recycle_ds.serving.protocol.parsing import Body


class TokenizeRequest(ChatFields):
    """Token ids of a text (`prompt`) or of a rendered chat (`messages`)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default=[], max_length=2048, fail_fast=True)
    parse_special: bool | None = None
    """Whether special tokens written in the prompt stand for themselves, as in /v1/completions: the default."""
    return_token_strs: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_source(cls, tree: Any) -> Any:
        """Exactly one source of text."""
        if isinstance(tree, dict) and (tree.get("prompt") is None) == (tree.get("messages") in (None, [])):
            raise ValueError("prompt, messages: give one of them")
        return tree


class DetokenizeRequest(Body):
    """Text of token ids, special tokens included."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**20, fail_fast=True)
