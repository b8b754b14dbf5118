"""The files of a tokenizer, which every format keeps beside the weights under the same names."""

from __future__ import annotations

import shutil
from pathlib import Path

from recycle_ds.config.atomic_files import flush as fsync
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")


def copy_tokenizer(source_tokenizer: Path, folder: Path) -> list[str]:
    """Copies a tokenizer's files that exist into a folder, forced to disk; returns their names there.

    source_tokenizer: its tokenizer.json, whatever it is called; it arrives under that name, bit for bit. Where no
    tokenizer_config.json says which token ends a document, one is written: transformers knows it from there alone. Raises
    OSError where the folder cannot be written.
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
    """Writes a tokenizer_config.json that names the end token, unless the tokenizer's own does; returns whether it did."""
    try:
        tokenizer = Tokenizer.load(path)
    except DataError:
        return False  # no end token, or not for us to read: it is copied as it is, and whoever loads it is told
    if "eos_token" in tokenizer.config:
        return False
    tokenizer.save(folder)
    return True
