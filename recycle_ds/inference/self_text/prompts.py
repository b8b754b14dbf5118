"""The prompts of a file: messages of users, chats, and raw texts to be continued."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.exclusion import Exclusion
from recycle_ds.inference.self_text.lines import numbered_lines, parse_object

PROMPT, MESSAGES, RAW = "prompt", "messages", "raw"
"""Forms of a prompt: a user's message, a list of messages, a text to be continued as it is."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. where: file and line. form: PROMPT, MESSAGES or RAW. content: a text, or a list of messages. follow_ups:
    the user's next messages; after them the model writes the user's turns itself."""

    where: str
    form: str
    content: Any
    follow_ups: tuple[str, ...] = ()
    kind: str = ""

    @property
    def texts(self) -> list[str]:
        """All texts of the prompt that are not the model's own."""
        texts = [self.content] if isinstance(self.content, str) else [one["content"] for one in self.content]
        return [*texts, *self.follow_ups]

    @property
    def opening(self) -> str:
        """The user's first message, or the raw text, in lower case and without superfluous spaces: prompts with one opening
        ask the same at first, whatever their form and follow-ups."""
        if isinstance(self.content, str):
            first = self.content
        else:
            first = next(one["content"] for one in self.content if one["role"] == "user")
        return " ".join(unicodedata.normalize("NFKC", first).casefold().split())

    @property
    def identity(self) -> str:
        """Equal for equal prompts of any place and kind."""
        return json.dumps([self.form, self.content, self.follow_ups], sort_keys=True)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, without repeats and excluded ones, divided between training and evaluation."""

    train: tuple[Prompt, ...] = ()
    held_out: tuple[Prompt, ...] = ()
    repeated: int = 0
    """Prompts that were left out because they occur twice."""
    excluded: int = 0
    """Prompts that were left out because they contain an excluded text."""
    beside_held_out: int = 0
    """Prompts that were left out because they have the opening of a held-out one."""

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts in their order."""
        total = hashlib.sha256()
        for prompt in (*self.train, *self.held_out):
            total.update(f"{prompt.identity}{prompt.kind}\n".encode())
        return total.hexdigest()


def select(prompts: Iterable[Prompt], exclusion: Exclusion, held_out: int, seed: int) -> PromptSet:
    """Leaves out repeats and excluded prompts, and holds out `held_out` prompts, drawn by seed and opening.

    Of the prompts that share a held-out opening one is held out, and the others are left out. Raises
    DecodingError if none remains, or none to train on.
    """
    known: dict[str, Prompt] = {}
    repeated = excluded = 0
    for prompt in prompts:
        if any(exclusion.matches(text) for text in prompt.texts):
            excluded += 1
        elif prompt.identity in known:
            repeated += 1
        else:
            known[prompt.identity] = prompt
    if not known and excluded:
        raise DecodingError(f"all {excluded} prompts contain a text of --exclude; give others")
    # of each opening, the prompt that can be held out: the draw does not depend on the order of the file
    openings: dict[str, str] = {}
    for identity, prompt in known.items():
        openings[prompt.opening] = min(identity, openings.get(prompt.opening, identity))
    if held_out >= len(openings) > 0:
        raise DecodingError(
            f"--held-out needs {held_out} prompts that are not trained on, of {len(openings)} in all with different first "
            "messages: give more prompts, or hold out fewer rows"
        )
    drawn = sorted(openings, key=lambda opening: hashlib.blake2b(f"{seed}/{opening}".encode()).digest())[:held_out]
    held = set(drawn)
    left = tuple(prompt for prompt in known.values() if prompt.opening not in held)
    beside = len(known) - len(left) - len(drawn)
    return PromptSet(left, tuple(known[openings[opening]] for opening in drawn), repeated, excluded, beside)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .jsonl file (one object a line) or a .txt file (one message a line). Raises DecodingError."""
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    if not jsonl and path.suffix.lower() != ".txt":
        raise DecodingError(
            f"{path}: must be a .jsonl file of objects with a prompt, or a .txt file of one prompt a line"
        )
    found = []
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        found.append(_from_object(parse_object(line, where), where) if jsonl else Prompt(where, PROMPT, line.strip()))
    if not found:
        raise DecodingError(f"{path}: no prompts; write one on each line")
    return found


def _from_object(record: dict[str, Any], where: str) -> Prompt:
    forms = [key for key in (PROMPT, MESSAGES) if record.get(key) is not None]
    if len(forms) != 1:
        raise DecodingError(f"{where}: give a prompt or messages, not {'both' if forms else 'neither'}")
    content, raw = record[forms[0]], record.get("raw", False)
    if not isinstance(raw, bool) or (raw and forms == [MESSAGES]):
        raise DecodingError(f"{where}: raw must be true or false, and true only for a prompt")
    if forms == [MESSAGES]:
        if not _is_chat(content):
            raise DecodingError(
                f'{where}: messages must be a list of {{"role": ..., "content": ...}} with texts, the last one a user\'s'
            )
    elif not (isinstance(content, str) and content.strip()):
        raise DecodingError(f"{where}: the prompt must be a text that is not blank")
    follow_ups = record.get("follow_ups") or []
    if not _are_texts(follow_ups) or (follow_ups and raw):
        raise DecodingError(f"{where}: follow_ups must be a list of texts, the user's next messages after a prompt")
    return Prompt(where, RAW if raw else forms[0], content, tuple(follow_ups), str(record.get("kind") or ""))


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    texts = [one.get(key) for one in value for key in ("role", "content")]
    return _are_texts(texts) and value[-1]["role"] == "user"


def _are_texts(values: Sequence[Any]) -> bool:
    return isinstance(values, list) and all(isinstance(one, str) and one.strip() for one in values)
