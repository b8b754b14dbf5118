"""Prompts that could not be continued: their lines in the output, and the file beside it that lists them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.inference.errors import DecodingError

ERROR = "error"
"""Key of the error in the line of a failed prompt. No other line has it."""
GENERATED_BY = "generated_by"
"""Key of every output line: which prompts and settings (as a hash), which --model and which checkpoint it comes
from."""
ANSWER = (
    *(
        "text",
        "token_ids",
        "others",
        "logprobs",
        "recycled",
        "mode",
        "dtype",
        "finish_reason",
        "prompt_tokens",
        "new_tokens",
    ),
    *(
        "recycled_tokens",
        "full_calls",
        "module_calls",
        "tokens_per_full_call",
        "drafted",
        "tested",
        "accepted",
        "acceptance",
    ),
    *("prefill_seconds", "decode_seconds", "tokens_per_second"),
)
"""Keys of an answer, of which not every one has all."""
_LONGEST_NAME = 200
"""Bytes of the output's name: those of unfinished and further files beside it are longer, and end at 255."""


def check_name(output: Path) -> None:
    """Raises DecodingError for an output's name that is too long for the names beside it. Needs no file."""
    size = len(os.fsencode(output.name))
    if size > _LONGEST_NAME:
        raise DecodingError(
            f"--output ...{output.name[-40:]}: its name has {size} bytes, at most {_LONGEST_NAME} are possible: further files "
            "beside it have longer ones"
        )


def own_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of the output has of its prompt's record: no key of an answer, since the prompts may come from an earlier
    output."""
    return {key: value for key, value in record.items() if key not in (*ANSWER, ERROR, "index", GENERATED_BY)}


def failures_path(output: Path) -> Path:
    """The list of an output's failed prompts: `OUT.jsonl.errors.jsonl` for `OUT.jsonl`."""
    return output.with_name(f"{output.name}.errors.jsonl")


def part_line(index: int, answer: Mapping[str, Any] | Exception) -> dict[str, Any]:
    """A completed prompt: the fields of its answer, or `error`, and `index`."""
    return ({ERROR: str(answer)} if isinstance(answer, Exception) else dict(answer)) | {"index": index}


def output_line(record: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's line in the output: its record's own keys, as they are now, and those of its line in the parts."""
    if "prompt" in line:  # of an earlier release, which wrote the record's keys, as they were then, into the parts
        line = {key: value for key, value in line.items() if key in (*ANSWER, ERROR, "index")}
    return own_keys(record) | dict(line)


def has_failed(line: Mapping[str, Any]) -> bool:
    """Whether an output line is that of a failed prompt. Earlier releases copied an `error` of the record to any line."""
    return ERROR in line and "text" not in line


def failures_of(output: Path) -> dict[int, str]:
    """The errors of a finished output, by prompt index. Raises DecodingError for a damaged line."""
    found: dict[int, str] = {}
    with output.open(encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(file, 1):
            if f'"{ERROR}"' not in text:  # of many prompts, most were continued: their lines need not be parsed
                continue
            try:
                line = json.loads(text)
                if has_failed(line):
                    found[int(line["index"])] = str(line[ERROR])
            except (ValueError, TypeError, KeyError):
                raise DecodingError(
                    f"{output}:{number}: not a line of an output; restore the file, or remove it to start over"
                ) from None
    return found


def list_failures(path: Path, lines: Mapping[int, Mapping[str, Any]], errors: Mapping[int, str]) -> None:
    """Writes the list of failed prompts atomically, or removes an older one if no prompt failed.

    lines: records of all prompts by line number (from 1), in order. errors: by prompt index (from 0). A line of the list
    has the keys of the record, `index`, `line` and `error`, so that the list is a file of prompts too.
    """
    if not errors:
        remove_list(path)
        return
    text = "".join(
        json.dumps({**record, "index": index, "line": number, ERROR: errors[index]}, ensure_ascii=False) + "\n"
        for index, (number, record) in enumerate(lines.items())
        if index in errors
    )
    if not (path.exists() and path.read_bytes() == text.encode("utf-8")):
        write_atomically(path, text)


def remove_list(path: Path) -> None:
    """Removes the list of an output that no longer exists."""
    if path.exists():  # on a read-only file system even the removal of no file is an error
        path.unlink(missing_ok=True)


def check_list(path: Path, prompts: Path) -> None:
    """Raises DecodingError for a file that must not be replaced by the list: the prompts, or an unrelated file."""
    if not path.exists():
        return
    if prompts.exists() and path.samefile(prompts):
        raise DecodingError(
            f"{prompts}: the list of failed prompts of this --output, which would replace it; name another --output, or "
            "give a copy of the list"
        )
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        if isinstance(first["index"], int) and isinstance(first["line"], int) and isinstance(first[ERROR], str):
            return
    except FileNotFoundError:  # another process has removed it
        return
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise DecodingError(
        f"{path}: is where failed prompts are listed, and exists with other contents; move it, or name another --output"
    )
