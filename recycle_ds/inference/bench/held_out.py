"""Prompts for benches that ship with the package: 15 each of chat, code, maths and prose, written for this purpose.

They are in no benchmark and are not to be trained on (`self_generate --exclude` leaves them out). A prompt with `raw` is a
text to be continued as it is, any other one a user's message, to be rendered by a model's chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ds.inference.batch.prompts import read_prompt_file

HELD_OUT = Path(__file__).with_name("prompts.jsonl")
"""The file, in the form that every command with `--prompts` reads."""


def held_out_prompts() -> list[dict[str, Any]]:
    """The prompts in order: objects with `kind` (chat, code, maths or prose), `prompt` and, if it is true, `raw`."""
    return read_prompt_file(HELD_OUT)
