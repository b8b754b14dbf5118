"""The files of a tokenizer, which every format stores next to the weights under the same names."""

from __future__ import annotations

import shutil
from pathlib import Path

from recycle_ds.config.atomic_files import fsync
from recycle_ds.data.errors import DataError
from recycle_ds.data.token_ranking import RANKING
from recycle_ds.data.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", RANKING)


def copy_tokenizer(source_tokenizer: Path, folder: Path) -> list[str]:
    """Copies those files of a tokenizer that exist into a folder and forces them to disk; returns their names there.

    source_tokenizer: path of its tokenizer.json, under any file name; the copy is named tokenizer.json and has the same bytes.
    If no tokenizer_config.json names the end-of-text token, one is written: transformers reads the token only from there.
    Raises OSError if the folder cannot be written.
    """
    if not source_tokenizer.is_file():
        return []
    copied = {TOKENIZER: source_tokenizer}
    copied |= {name: path for name in _BESIDE if (path := source_tokenizer.with_name(name)).is_file()}
    names = list(copied)
    if _save_config(source_tokenizer, folder):
        copied.pop(TOKENIZER_CONFIG, None)
        names = list(dict.fromkeys((*names, TOKENIZER_CONFIG)))
    for name, path in copied.items():
        shutil.copyfile(path, folder / name)
        fsync(folder / name)
    fsync(folder)
    return names


def _save_config(path: Path, folder: Path) -> bool:
    """Writes a tokenizer_config.json that names the end token, unless the tokenizer has one. Returns whether it was written."""
    try:
        tokenizer = Tokenizer.load(path)
    except DataError:
        return False  # no end token, or unreadable: copied unchanged, and loading it reports the error
    if "eos_token" in tokenizer.config:
        return False
    tokenizer.save(folder)
    return True
