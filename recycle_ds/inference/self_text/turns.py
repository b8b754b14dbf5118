"""The frame of a chat: the tokens between the turns, as the model's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recycle_ds.data.reading.chat import ChatTemplate, RenderedChat, encode_chat
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.prompts import MESSAGES, Prompt

_MARKS = ("FIRSTQUESTION", "FIRSTANSWER", "SECONDQUESTION")


@dataclass(frozen=True)
class Frame:
    """Token ids around the turns of a chat. An end is a special token that the model itself writes at the end of a turn."""

    opening: list[int]
    """Before a user's first message."""
    question_end: int | None
    """Ends a user's turn; None if the template writes no special token there: the model cannot write such a turn."""
    to_answer: list[int]
    """Between `question_end` and an answer."""
    answer_end: int | None
    """Ends an answer, before a further turn; None if the template writes no special token there: rows have one answer."""
    to_question: list[int]
    """Between `answer_end` and a user's next message."""


class ChatFrame:
    """Encodes prompts and what comes between turns with a chat template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Raises DataError for a template that refuses a chat of two turns, DecodingError for one that hides messages."""
        self._template, self._tokenizer = template, tokenizer
        first, answer, second = _MARKS
        chat = template.render(
            [
                {"role": "user", "content": first},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": second},
            ],
            tokenizer.name,
            "messages",
            add_generation_prompt=True,
        )
        assert chat is not None
        segments = _split(chat.parts)
        if len(segments) != len(_MARKS) + 1:
            raise DecodingError(f"{tokenizer.name}: its chat template does not show all messages of a chat; use --raw")
        self._to_question, self._to_answer = segments[2], segments[3]
        question_end, to_answer = self._after_end(self._to_answer)
        answer_end, to_question = self._after_end(self._to_question)
        start = tokenizer.encode_parts(segments[0], template.special_tokens)
        self.frame = Frame(start, question_end, to_answer, answer_end, to_question)

    def first(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, up to where the answer begins. Raises InvalidRow if the template refuses it."""
        return encode_chat(self._tokenizer, self.render(prompt))

    def render(self, prompt: Prompt) -> RenderedChat:
        """A prompt, up to where the answer begins. Raises InvalidRow if the template refuses it."""
        content = prompt.content
        messages = content if prompt.form == MESSAGES else [{"role": "user", "content": content}]
        chat = self._template.render(messages, prompt.where, prompt.form, add_generation_prompt=True)
        assert chat is not None, "a prompt has messages"
        return chat

    def follow_up(self, text: str) -> list[int]:
        """Ids after the token that ends an answer: the user's next message, up to where the next answer begins."""
        *start, last = self._to_question
        head, *rest = self._to_answer
        ids = self._tokenizer.encode_parts((*start, f"{last}{text}{head}", *rest), self._template.special_tokens)
        assert self.frame.answer_end is not None
        return ids[ids.index(self.frame.answer_end) + 1 :]

    def _after_end(self, segment: tuple[str, ...]) -> tuple[int | None, list[int]]:
        """The special token with which a segment begins, and the ids after it."""
        if len(segment) == 1 or segment[0].strip():
            return None, []
        end = self._template.special_tokens[segment[1]]
        ids = self._tokenizer.encode_parts(segment, self._template.special_tokens)
        return end, ids[ids.index(end) + 1 :]


def _split(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Divides a rendered chat at the marks. Each segment alternates between text and special tokens, like the chat."""
    segments: list[tuple[str, ...]] = []
    current: list[str] = []
    left = list(_MARKS)
    for number, part in enumerate(parts):
        text = part
        while number % 2 == 0 and left and left[0] in text:
            before, text = text.split(left.pop(0), 1)
            segments.append((*current, before))
            current = []
        current.append(text)
    return [*segments, tuple(current)]
