"""The lines of a text file, and the JSON objects in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recycle_ds.inference.errors import DecodingError


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, by number from 1. Raises DecodingError."""
    try:
        # not splitlines: it also cuts at separators that may occur inside a JSON string
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DecodingError(f"{path}: cannot be read ({reason})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises DecodingError."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DecodingError(f"{where}: contains an unpaired surrogate, which is not a character; repair it") from None
    except (ValueError, RecursionError) as error:
        raise DecodingError(f"{where}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise DecodingError(f'{where}: expected an object, such as {{"prompt": "TEXT"}}')
    return record
