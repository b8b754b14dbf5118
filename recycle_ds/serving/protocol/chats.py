"""Body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recycle_ds.serving.protocol.fields import MAX_LOGPROBS, GenerationFields
from recycle_ds.serving.protocol.parsing import Body, shown

ROLES = ("system", "developer", "user", "assistant")
_MAX_MESSAGES = 2048
_MAX_PARTS = 2048
_MAX_NAME = 256
# Fields of the messages that OpenAI's servers and this one answer with: empty, they say nothing.
_EMPTY: dict[str, list[Any] | None] = {
    "refusal": None,
    "tool_calls": [],
    "function_call": None,
    "audio": None,
    "annotations": [],
}
# Names of what the renderer itself passes to a template, or takes as an option.
_RESERVED = {
    *("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask"),
}


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    """Of an assistant it may be null, as OpenAI writes an empty message."""
    name: str | None = Field(None, max_length=_MAX_NAME)
    """Who speaks: for templates that show it."""

    @property
    def text(self) -> str:
        """The content; its parts are joined by line ends."""
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(part.text for part in content)

    @property
    def for_template(self) -> dict[str, str]:
        """The message as templates expect it; they know OpenAI's `developer` by its earlier name."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text} | ({} if self.name is None else {"name": self.name})


class ChatFields(Body):
    """The chat itself, and how the model's template renders it."""

    messages: list[Message] = Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    add_generation_prompt: bool | None = None
    """End with the start of the assistant's message: the default, unless the final message is continued."""
    continue_final_message: bool | None = None
    """The answer continues the last message, the assistant's own."""
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64)
    """Further variables of the template."""

    @model_validator(mode="before")
    @classmethod
    def _check_messages(cls, tree: Any) -> Any:
        """Clear messages for what OpenAI's chats may contain and this server does not have."""
        messages = tree.get("messages") if isinstance(tree, dict) else None
        if not isinstance(messages, list) or len(messages) > _MAX_MESSAGES:
            return tree
        return {**tree, "messages": [_checked(one, f"messages.{number}") for number, one in enumerate(messages)]}

    @model_validator(mode="after")
    def _check_end(self) -> ChatFields:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError("continue_final_message: not together with add_generation_prompt; set one of them")
            if not self.messages or self.messages[-1].role != "assistant" or not self.messages[-1].text:
                raise ValueError("continue_final_message: the last message must be the assistant's, with some text")
        for name in self.chat_template_kwargs or {}:
            if name in _RESERVED or name.endswith("_token") or not name.isidentifier():
                raise ValueError(f"chat_template_kwargs: {shown(name)} cannot be set; leave it out")
        return self

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as templates expect them."""
        return [message.for_template for message in self.messages]

    @property
    def template_options(self) -> dict[str, Any]:
        """Arguments of the template."""
        continued = bool(self.continue_final_message)
        prompted = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        return {
            **(self.chat_template_kwargs or {}),
            "add_generation_prompt": prompted,
            "continue_final_message": continued,
        }


class ChatRequest(ChatFields, GenerationFields):
    """Answers a chat."""

    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_numbers(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens=0: must be at least 1")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(f"max_tokens={both[0]} and max_completion_tokens={both[1]} differ: give one of them")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the new tokens, and its value if it was given."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


def _checked(message: Any, path: str) -> dict[str, Any]:
    """A message without its empty fields. Raises ValueError for roles and contents that other servers may have."""
    if not isinstance(message, dict):
        raise ValueError(f'{path}={shown(message)}: must be a message, such as {{"role": "user", "content": "TEXT"}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{path}.role={shown(role)}: must be one of {', '.join(ROLES)}")
    for name, value in message.items():
        empty = name in _EMPTY and (value is None or value == _EMPTY[name])
        if name not in ("role", "content", "name") and not empty:
            raise ValueError(f"{path}.{str(name)[:60]}: not supported: a message has role, content and name only")
    if isinstance(content, list):
        if len(content) > _MAX_PARTS:
            raise ValueError(f"{path}.content: {len(content)} parts, at most {_MAX_PARTS} are possible; join them")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"{path}.content: parts of type {shown(kind)} are not supported: send text")
            if not isinstance(part.get("text"), str) or len(part) > 2:
                raise ValueError(f"{path}.content: a part has a type and a text, not {shown(part)}")
        if not content:
            raise ValueError(f"{path}.content: the list of parts is empty; send text")
    elif not isinstance(content, str) and not (content is None and role == "assistant"):
        raise ValueError(f"{path}.content={shown(content)}: must be a string, or a list of parts of type text")
    return {name: value for name, value in message.items() if name not in _EMPTY}
