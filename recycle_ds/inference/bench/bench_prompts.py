"""The prompts of a comparison: token ids, and what kind of text each asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.chat import ChatTemplate, encode_chat
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.batch.prompts import read_prompt_file
from recycle_ds.inference.bench.held_out import HELD_OUT
from recycle_ds.inference.errors import DecodingError


@dataclass(frozen=True)
class BenchPrompt:
    """ids: tokens to be continued. kind: as in the file ("chat", "code", ...); empty if it names none."""

    ids: list[int]
    kind: str = ""


def read_bench_prompts(
    path: Path | None, tokenizer: Tokenizer, *, template: bool | None = None, per_kind: int | None = None
) -> list[BenchPrompt]:
    """The prompts of a .jsonl file; by default those that ship with the package.

    template: whether prompts without `raw` are messages of a user, rendered by the model's chat template. None: those that
    ship with the package are, if the model has a template; all others are texts to be continued as they are. per_kind: only
    the first so many prompts of each kind. Raises DecodingError for an invalid file, DataError for a prompt that the
    template refuses, and for template=True without a template.
    """
    if per_kind is not None and per_kind < 1:
        raise DecodingError(f"per_kind={per_kind}: must be at least 1")
    shipped = path is None or (path.exists() and path.samefile(HELD_OUT))
    records = read_prompt_file(HELD_OUT if path is None else path)
    if per_kind is not None:
        records = first_of_each_kind(records, per_kind)
    chat = _template(tokenizer, template, shipped)
    return [
        BenchPrompt(_encode(record, tokenizer, chat, f"{path or HELD_OUT}:{number}"), str(record.get("kind") or ""))
        for number, record in enumerate(records, start=1)
    ]


def first_of_each_kind(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` records of each `kind`, in the order of the file."""
    seen: dict[str, int] = {}
    kept = []
    for record in records:
        kind = str(record.get("kind") or "")
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= count:
            kept.append(record)
    return kept


def numbers_by_kind(prompts: Sequence[BenchPrompt]) -> dict[str, list[int]]:
    """The numbers of the prompts of each kind, in the order in which kinds first occur; empty if no prompt has a kind."""
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        if prompt.kind:
            found.setdefault(prompt.kind, []).append(number)
    return found


def _template(tokenizer: Tokenizer, wanted: bool | None, shipped: bool) -> ChatTemplate | None:
    if wanted is False or (wanted is None and not shipped):
        return None
    try:
        return ChatTemplate.load(tokenizer.name, tokenizer)
    except DataError:
        if wanted:
            raise
        return None


def _encode(record: dict[str, Any], tokenizer: Tokenizer, chat: ChatTemplate | None, where: str) -> list[int]:
    if chat is None or record.get("raw"):
        return tokenizer.encode(record["prompt"])
    messages = [{"role": "user", "content": record["prompt"]}]
    rendered = chat.render(messages, where, "prompt", add_generation_prompt=True)
    assert rendered is not None, "a prompt has a message"
    return encode_chat(tokenizer, rendered)
