"""Reading a .jsonl file of prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recycle_ds.inference.errors import DecodingError


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a text under "prompt"; blank lines are skipped. Raises DecodingError
    naming file and line, also for an empty text."""
    records = read_lines(path)
    for number, record in records.items():
        if not record["prompt"]:
            raise DecodingError(f"{path}:{number}: the prompt is empty: give at least one character")
    return list(records.values())


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The objects by line number, from 1. A text under "prompt" may be empty. Raises DecodingError."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DecodingError(
            f"{path}: is a pipe or a device, and prompts are read at every start and by every rank: write them "
            "to a file"
        )
    try:
        # not splitlines: it also cuts at separators that may occur inside a JSON string
        lines = [line.lstrip("\ufeff") for line in path.read_text(encoding="utf-8").split("\n")]  # of joined files
    except OSError as error:
        raise DecodingError(f"prompts {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DecodingError(
            f"{path}:{line}: cannot be read: not valid UTF-8; convert it first (iconv -t utf-8)"
        ) from None
    records = {number: _read_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()}
    if not records:
        raise DecodingError(f'{path}: no prompts; write one JSON object with a "prompt" per line')
    return records


def _number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is larger than any number: write it as text")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON: write null or a number")


def _read_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse, parse_float=_number)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if isinstance(prompt, str):
            # fails here rather than when the output is written
            json.dumps(record, ensure_ascii=False).encode("utf-8")
            return record
    except json.JSONDecodeError as error:
        raise DecodingError(f"{where}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DecodingError(f"{where}: nested too deeply: give the prompt in a flat object") from None
    except UnicodeEncodeError as error:
        raise DecodingError(
            f"{where}: contains an unpaired surrogate ({error.object[error.start]!r}), which is not a character: write "
            "the complete pair, or the character itself in UTF-8"
        ) from None
    except ValueError as error:  # for example a number with thousands of digits
        raise DecodingError(f"{where}: cannot be read: {error}") from None
    raise DecodingError(f'{where}: expected an object with a text under "prompt": {{"prompt": "Once upon"}}')
