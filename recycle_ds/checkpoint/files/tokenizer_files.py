"""The files of a tokenizer and of generation, which every format stores next to the weights under the same names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config.atomic_files import fsync, write_json_atomically
from recycle_ds.data.errors import DataError
from recycle_ds.data.other_tokenizers import OTHER_FILES
from recycle_ds.data.special_ids import GENERATION_CONFIG, TOKEN_MAP, merge_into, read_special_ids, read_tree
from recycle_ds.data.token_ranking import RANKING
from recycle_ds.data.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_BESIDE = (TOKENIZER_CONFIG, TOKEN_MAP, _TEMPLATE, "chat_template.json", GENERATION_CONFIG, RANKING, *OTHER_FILES)


def copy_tokenizer(source_tokenizer: Path, folder: Path, *, name_ids: bool = True) -> list[str]:
    """Copies those files of a tokenizer that exist into a folder and forces them to disk; returns their names there.

    source_tokenizer: path of its tokenizer.json, under any file name; the copy is named tokenizer.json and has the same bytes.
    The files beside it are copied even if it does not exist. If no tokenizer_config.json names the end-of-text token, one is
    written: transformers reads the token only from there. name_ids: whether generation_config.json must name the ids that
    config.json beside it names, for a folder without a config.json.

    Raises CheckpointError for an unreadable file, OSError if the folder cannot be written.
    """
    parent = source_tokenizer.parent
    copied = {name: path for name in _BESIDE if (path := parent / name).is_file()}
    if source_tokenizer.is_file():
        copied = {TOKENIZER: source_tokenizer} | copied
    names = list(copied)
    written: dict[str, Any] = {}
    try:
        if source_tokenizer.is_file() and _save_config(source_tokenizer, folder):
            copied.pop(TOKENIZER_CONFIG, None)
            names = list(dict.fromkeys((*names, TOKENIZER_CONFIG)))
        templates = _templates(parent)
        if templates:  # one file instead of a folder of them
            settings = folder if TOKENIZER_CONFIG not in copied and TOKENIZER_CONFIG in names else parent
            written[TOKENIZER_CONFIG] = read_tree(settings / TOKENIZER_CONFIG) | {"chat_template": templates}
            names = [name for name in dict.fromkeys((*names, TOKENIZER_CONFIG)) if name != _TEMPLATE]
        if name_ids:
            stored = read_tree(parent / GENERATION_CONFIG)
            merged = merge_into(stored, read_special_ids(parent))
            if merged != ({"eos_token_id": None} | stored):
                written[GENERATION_CONFIG] = merged
                names = list(dict.fromkeys((*names, GENERATION_CONFIG)))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    for name, path in copied.items():
        if name in names and name not in written:
            shutil.copyfile(path, folder / name)
            fsync(folder / name)
    for name, tree in written.items():
        write_json_atomically(folder / name, tree)
    fsync(folder)
    return names


def _save_config(path: Path, folder: Path) -> bool:
    """Writes a tokenizer_config.json that names the end token, unless the tokenizer has one. Returns whether it was written."""
    try:
        if "eos_token" in read_tree(path.with_name(TOKENIZER_CONFIG)):
            return False
        tokenizer = Tokenizer.load(path)
    except DataError:
        return False  # no end token, or unreadable: copied unchanged, and loading it reports the error
    tokenizer.save(folder)
    return True


def _templates(folder: Path) -> list[dict[str, str]]:
    """All chat templates of a folder that has several, as tokenizer_config.json stores them; empty for one template or none."""
    try:
        more = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
        files = {path.stem: path for path in more}
        if files and (folder / _TEMPLATE).is_file():
            files = {"default": folder / _TEMPLATE} | files
        return [{"name": name, "template": path.read_text(encoding="utf-8")} for name, path in files.items()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / _MORE_TEMPLATES}: cannot be read ({error})") from None
