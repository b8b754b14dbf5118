"""Body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from recycle_ds.serving.protocol.fields import MAX_LOGPROBS, GenerationFields, TokenId
from recycle_ds.serving.protocol.parsing import shown
from recycle_ds.serving.settings import MOST_PROMPTS

_FORMS = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"
_DEFAULT_MAX_TOKENS = 16
_Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationFields):
    """Continues one prompt or several, in any of OpenAI's four forms."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)]
    )
    echo: bool | None = None
    """The prompt comes before each answer; with logprobs, with the log probabilities of its tokens."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    parse_special: bool | None = None
    """Whether special tokens that are written in a text stand for themselves: the default. False makes them text."""

    @model_validator(mode="before")
    @classmethod
    def _check_prompt(cls, tree: Any) -> Any:
        """One message for a wrong prompt, not one for every form and element."""
        if not isinstance(tree, dict) or "prompt" not in tree:
            return tree
        prompt = tree["prompt"]
        if isinstance(prompt, list) and len(prompt) > MOST_PROMPTS and not isinstance(prompt[0], int):
            raise ValueError(f"prompt: {len(prompt)} prompts, at most {MOST_PROMPTS} are possible; send fewer")
        if not _is_prompt(prompt):
            raise ValueError(f"prompt={shown(prompt)}: {_FORMS}")
        return tree

    @model_validator(mode="after")
    def _check_counts(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of={self.best_of}: must equal n; ask for n answers and choose yourself")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0: must be at least 1; 0 is possible with echo=true only")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts: texts, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def default_tokens(self) -> int | None:
        """OpenAI's."""
        return _DEFAULT_MAX_TOKENS


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(one, str) for one in value) or _are_ids(value):
        return True
    return all(isinstance(one, list) and one and _are_ids(one) for one in value)


def _are_ids(value: list[Any]) -> bool:
    return all(type(one) is int and 0 <= one < 2**31 for one in value)
