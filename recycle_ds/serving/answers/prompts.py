"""Prompts that an answer repeats (`echo`), with the place of each of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.text_stream import TextStream
from recycle_ds.serving.answers.choices import ChoiceParts, finite
from recycle_ds.serving.answers.tokens import TokenNames


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt's text and tokens. offsets: characters before each token."""

    text: str
    ids: list[int]
    offsets: list[int]
    names: TokenNames

    @classmethod
    def of(cls, tokenizer: Tokenizer, names: TokenNames, ids: list[int], text: str | None) -> EchoedPrompt:
        """text: as it was given; None for a prompt of token ids."""
        shown = tokenizer.decode(ids, skip_special_tokens=False) if text is None else text
        stream = TextStream(tokenizer, skip_special_tokens=False)
        offsets, length = [], 0
        for token_id in ids:
            offsets.append(min(length, len(shown)))  # a tokenizer may change the text (normalise it)
            length += len(stream.feed(token_id))
        return cls(shown, ids, offsets, names)

    def logprobs(self, parts: ChoiceParts, generation: Generation) -> dict[str, list[Any]]:
        """Its part of `logprobs`. The first token has none: nothing predicts it."""
        scored = generation.prompt_logprobs
        best = [parts.by_name(one, value, top) for one, (value, top) in zip(self.ids[1:], scored, strict=True)]
        return {
            "tokens": [self.names.name_of(one) for one in self.ids],
            "token_logprobs": [None, *(finite(value) for value, _ in scored)],
            "top_logprobs": [None, *best],
            "text_offset": list(self.offsets),
        }
