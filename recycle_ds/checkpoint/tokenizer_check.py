"""Whether a model's tokenizer and the files beside it can be used with it, for `convert` and `inspect`."""

from __future__ import annotations

from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG
from recycle_ds.checkpoint.sources import Source
from recycle_ds.data.errors import DataError
from recycle_ds.data.other_tokenizers import advice
from recycle_ds.data.special_ids import GENERATION_CONFIG, TOKEN_MAP, read_special_ids, read_tree
from recycle_ds.data.token_ranking import RANKING, read_ranking
from recycle_ds.data.tokenizer import Tokenizer


def tokenizer_notes(source: Source) -> list[str]:
    """Notes on a tokenizer that `--model` would refuse or that names tokens which the model does not have.

    Raises CheckpointError for a file beside the weights that is damaged.
    """
    folder = source.folder if source.tokenizer is None else source.tokenizer.parent
    try:
        for name in (TOKENIZER, TOKENIZER_CONFIG, TOKEN_MAP, GENERATION_CONFIG):
            read_tree(folder / name)
        named = read_special_ids(folder)
        _check_ranking(source, folder)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    size = source.model.vocab_size or 0
    notes = []
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
        return [*notes, str(error)]
    if tokenizer.vocab_size > size:
        notes.append(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {size:,}: to decode with it, copy its own "
            "tokenizer into the folder"
        )
    return notes


def _check_ranking(source: Source, folder: Path) -> None:
    path, size, drafts = folder / RANKING, source.model.vocab_size or 0, source.recycle.draft_vocabulary
    if path.is_file():
        read_ranking(path, size, drafts or 0)
