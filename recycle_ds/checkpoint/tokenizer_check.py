"""Whether a model's tokenizer and the files beside it can be used with it, for `convert` and `inspect`."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
from recycle_ds.checkpoint.sources import Source
from recycle_ds.data.errors import DataError
from recycle_ds.data.other_tokenizers import advice
from recycle_ds.data.special_ids import GENERATION_CONFIG, TOKEN_MAP, read_special_ids, read_tree
from recycle_ds.data.token_ranking import RANKING, read_ranking
from recycle_ds.data.tokenizer import Tokenizer


def tokenizer_notes(source: Source) -> list[str]:
    """Notes on a tokenizer that `--model` would refuse or that names tokens which the model does not have, and on a ranking of
    tokens that is not one of this model.

    Raises CheckpointError for a file beside the weights that is damaged.
    """
    folder, size = source.folder if source.tokenizer is None else source.tokenizer.parent, source.model.vocab_size or 0
    try:
        for name in (TOKENIZER, TOKENIZER_CONFIG, TOKEN_MAP, GENERATION_CONFIG):
            read_tree(folder / name)
        named = read_special_ids(folder)
        notes = _ranking_notes(source, folder / RANKING)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    beyond = [str(one) for one in (*named.eos, named.bos, named.pad) if one is not None and one >= size]
    if beyond:
        notes.append(
            f"special tokens {', '.join(beyond)} are named beside the weights, but the model has {size:,} tokens"
        )
    if source.tokenizer is None:
        notes.append(advice(folder) or f"no {TOKENIZER}: to decode with the model, copy its own file into the folder")
        return notes
    try:
        tokenizer = Tokenizer.load(source.tokenizer)
    except DataError as error:
        if not _is_tokenizer(source.tokenizer):
            raise CheckpointError(str(error)) from None
        return [*notes, str(error)]
    if tokenizer.vocab_size > size:
        notes.append(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {size:,}: to decode with it, copy its own "
            "tokenizer into the folder"
        )
    return notes


def _ranking_notes(source: Source, path: Path) -> list[str]:
    """Raises DataError for a ranking that a draft vocabulary needs; any other is only of use for one that is made later."""
    if not path.is_file():
        return []
    drafts = source.recycle.draft_vocabulary
    try:
        read_ranking(path, source.model.vocab_size or 0, drafts or 0)
    except DataError as error:
        if drafts:
            raise
        return [str(error)]
    return []


def _is_tokenizer(path: Path) -> bool:
    """Whether a file is a tokenizer at all: one may lack only what this software needs."""
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # the library raises plain Exception for everything that it cannot read
        return False
    return True
