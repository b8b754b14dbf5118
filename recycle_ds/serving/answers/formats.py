"""Answers in the shapes of /v1/completions and /v1/chat/completions: complete, or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from recycle_ds.serving.answers.answering import Answering, Step
from recycle_ds.serving.answers.choices import ChoiceParts
from recycle_ds.serving.answers.prompts import EchoedPrompt
from recycle_ds.serving.answers.text import TokenText


@dataclass
class Answer:
    """A choice with all its steps."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    last: Step | None = None

    def add(self, step: Step) -> None:
        """Adds a step."""
        self.texts.append(step.text)
        self.tokens += step.tokens
        if step.reason is not None:
            self.last = step

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(self.texts)


class Format(Protocol):
    """The shape of an answer. Choices are dictionaries without their index."""

    prefix: str
    kind: str
    chunk_kind: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before an answer's first text in a stream."""

    def piece(self, step: Step) -> dict[str, Any]:
        """A step's text and tokens."""

    def closing(self, reason: str) -> dict[str, Any]:
        """What ends an answer in a stream."""

    def choice(self, index: int, answer: Answer, first: Answer) -> dict[str, Any]:
        """A complete answer. first: the first one to the same prompt."""


class CompletionFormat:
    """Shape of /v1/completions. echoed: prompts that come before their answers, by prompt."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, parts: ChoiceParts, n: int, echoed: Sequence[EchoedPrompt] = (), drop_answer: bool = False):
        """drop_answer: only the prompt was asked for."""
        self._parts, self._n, self._echoed, self._drops = parts, n, echoed, drop_answer

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echoed prompt."""
        echoed = self._echo(index)
        return None if echoed is None else {"text": echoed.text, "logprobs": None, "finish_reason": None}

    def piece(self, step: Step) -> dict[str, Any]:
        """A step's text and tokens."""
        if self._drops:
            return {"text": "", "logprobs": None, "finish_reason": None}
        echoed = self._echo(step.index)
        logprobs = self._parts.old_logprobs(step.tokens, 0 if echoed is None else len(echoed.text))
        return {"text": step.text, "logprobs": logprobs, "finish_reason": None} | self._parts.details(step.tokens)

    def closing(self, reason: str) -> dict[str, Any]:
        """The reason of the end."""
        return {"text": "", "logprobs": None, "finish_reason": reason} | self._parts.details(())

    def choice(self, index: int, answer: Answer, first: Answer) -> dict[str, Any]:
        """A complete answer, after its prompt if that is echoed."""
        assert answer.last is not None and first.last is not None and first.last.generation is not None
        echoed, tokens, text = self._echo(index), answer.tokens, answer.text
        if self._drops:
            tokens, text = [], ""
        logprobs = self._parts.old_logprobs(tokens, 0 if echoed is None else len(echoed.text))
        if echoed is not None:
            text = echoed.text + text
            if logprobs is not None:
                before = echoed.logprobs(self._parts, first.last.generation)
                logprobs = {name: before[name] + values for name, values in logprobs.items()}
        reason = answer.last.reason
        return {"text": text, "logprobs": logprobs, "finish_reason": reason} | self._parts.details(tokens)

    def _echo(self, index: int) -> EchoedPrompt | None:
        return self._echoed[index // self._n] if self._echoed else None


class ChatFormat:
    """Shape of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, parts: ChoiceParts) -> None:
        self._parts = parts

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, step: Step) -> dict[str, Any]:
        """A step's text and tokens."""
        logprobs = self._parts.chat_logprobs(step.tokens)
        choice = {"delta": {"content": step.text}, "logprobs": logprobs, "finish_reason": None}
        return choice | self._parts.details(step.tokens)

    def closing(self, reason: str) -> dict[str, Any]:
        """The reason of the end."""
        return {"delta": {}, "logprobs": None, "finish_reason": reason} | self._parts.details(())

    def choice(self, index: int, answer: Answer, first: Answer) -> dict[str, Any]:
        """A complete answer."""
        assert answer.last is not None
        return {
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._parts.chat_logprobs(answer.tokens),
            "finish_reason": answer.last.reason,
        } | self._parts.details(answer.tokens)


class Reply:
    """The reply to a request: an object, or the chunks of a stream."""

    def __init__(self, answering: Answering, shape: Format, model: str) -> None:
        self._answering, self._shape = answering, shape
        self._identity = {
            "id": f"{shape.prefix}{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
        }

    async def complete(self) -> dict[str, Any]:
        """The complete reply. Raises ApiError if it cannot be completed."""
        answers: dict[int, Answer] = {}
        async for step in self._answering.steps():
            answers.setdefault(step.index, Answer()).add(step)
        n = self._answering.task.params.n
        choices = [
            {"index": index} | self._shape.choice(index, answer, answers[index - index % n])
            for index, answer in sorted(answers.items())
        ]
        head = self._identity | {"object": self._shape.kind}
        return head | {"choices": choices, "usage": self._answering.usage.figures()}

    async def chunks(self, usage: bool, running_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream: one for each step of the engine that completes some text.

        usage: with a last chunk that has the usage of the request. running_usage: every chunk has the usage so far.
        """
        head = self._identity | {"object": self._shape.chunk_kind}
        opened: set[int] = set()

        def chunk(index: int, choice: dict[str, Any]) -> dict[str, Any]:
            found = head | {"choices": [{"index": index} | choice]}
            if running_usage:
                return found | {"usage": self._answering.usage.figures()}
            return found | ({"usage": None} if usage else {})

        steps = self._answering.steps()
        try:
            async for step in steps:
                if step.index not in opened:
                    opened.add(step.index)
                    opening = self._shape.opening(step.index)
                    if opening is not None:
                        yield chunk(step.index, opening)
                if step.text or step.tokens:
                    yield chunk(step.index, self._shape.piece(step))
                if step.reason is not None:
                    yield chunk(step.index, self._shape.closing(step.reason))
            if usage:
                yield head | {"choices": [], "usage": self._answering.usage.figures()}
        finally:
            await steps.aclose()
