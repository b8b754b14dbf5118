"""Ids of the tokens that start, end and pad a text, as a model's own files name them besides its tokenizer.

Chat models have several end tokens, each in another file: decoding stops at all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.data.errors import DataError

MODEL_CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKEN_MAP = "special_tokens_map.json"


@dataclass(frozen=True)
class SpecialIds:
    """Ids in config.json and generation_config.json, which may have no token, and the end token of another file."""

    eos: tuple[int, ...] = ()
    """Tokens that end a text, without repeats, those of config.json first."""
    bos: int | None = None
    pad: int | None = None
    eos_token: str | None = None
    """Token that special_tokens_map.json names as the end of a text. It may not be in the vocabulary."""


def read_special_ids(folder: Path) -> SpecialIds:
    """Reads config.json, generation_config.json and special_tokens_map.json of a folder; a missing file names nothing.

    bos and pad are those of config.json if it names them. Negative ids, which LLaMA's first files have, count as none.

    Raises:
        DataError: a file is unreadable, or an id is not a whole number.
    """
    eos: list[int] = []
    single: dict[str, int] = {}
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        tree = read_tree(folder / name)
        eos += _ids(tree.get("eos_token_id"), folder / name, "eos_token_id")
        for key in ("bos_token_id", "pad_token_id"):
            for found in _ids(tree.get(key), folder / name, key)[:1]:
                single.setdefault(key, found)
    mapped = token_named(read_tree(folder / TOKEN_MAP), "eos_token")
    return SpecialIds(tuple(dict.fromkeys(eos)), single.get("bos_token_id"), single.get("pad_token_id"), mapped)


def merge_into(tree: dict[str, Any], ids: SpecialIds, more: Iterable[int] = ()) -> dict[str, Any]:
    """Returns a generation_config.json, or a part of config.json, that names all these ids, its own end tokens first.

    more: further end tokens. A single end token is written as a number, as in most models.
    """
    own = tree.get("eos_token_id")
    listed = own if isinstance(own, list) else [] if own is None else [own]
    eos = list(dict.fromkeys((*listed, *ids.eos, *more)))
    written = eos[0] if len(eos) == 1 else eos or None
    found = {**tree, "eos_token_id": own if listed and eos == listed else written}
    for key, value in (("bos_token_id", ids.bos), ("pad_token_id", ids.pad)):
        if value is not None and found.get(key) is None:
            found[key] = value
    return found


def token_named(tree: dict[str, Any], key: str) -> str | None:
    """The token that a tokenizer_config.json or special_tokens_map.json names, as text or with its properties."""
    entry = tree.get(key)
    token = entry.get("content") if isinstance(entry, dict) else entry
    return None if token is None else str(token)


def read_tree(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no such file.

    Raises:
        DataError: the file cannot be read, or is not an object.
    """
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} must contain a JSON object, not a {type(tree).__name__}")
    return tree


def _ids(value: Any, path: Path, key: str) -> list[int]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(one) is not int for one in listed) or (isinstance(value, list) and key != "eos_token_id"):
        raise DataError(f"{path}: {key}={str(value)[:60]}: must be the id of a token, or null")
    return [one for one in listed if one >= 0]
