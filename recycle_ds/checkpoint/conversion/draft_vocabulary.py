"""Gives a model with a recycle module a draft vocabulary, or another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.sources import Source
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.token_ranking import RANKING, rank_tokens, read_ranking, write_ranking
from recycle_ds.data.tokenizer import Tokenizer


def set_draft_vocabulary(source: Source, count: int, ranked_by: Sequence[str], staging: Path) -> None:
    """Changes a source that was just opened. No weight depends on it.

    count: tokens of the draft vocabulary; 0 removes it. ranked_by: prefixes of token files whose tokens are counted; by
    default the model's own ranking is used. staging: an empty folder that must exist while the source is used; it gets the
    tokenizer's files and the ranking, because the ranking lies next to the tokenizer. Raises CheckpointError for a model
    without a recycle module, tokenizer or ranking, and DataError for token files that cannot be read.
    """
    if not source.recycle.layers:
        raise CheckpointError(f"{source.folder}: has no recycle module: omit --draft-vocabulary {count}")
    if not count:
        removed = {"draft_vocabulary": None, "draft_vocabulary_in_training": False}
        source.recycle = source.recycle.model_copy(update=removed)
        return
    source.recycle = source.recycle.model_copy(update={"draft_vocabulary": count})
    vocab_size = source.model.vocab_size
    assert vocab_size is not None, "a source knows its vocabulary"
    if count > vocab_size:
        raise CheckpointError(f"--draft-vocabulary {count}: the model's vocabulary has {vocab_size} tokens")
    if source.tokenizer is None:
        raise CheckpointError(f"{source.folder}: no tokenizer.json; copy the model's own file into this folder")
    if ranked_by:
        tokenizer = Tokenizer.load(source.tokenizer)
        ranking = rank_tokens([open_token_file(prefix, tokenizer) for prefix in ranked_by], vocab_size)
    else:
        if not source.tokenizer.with_name(RANKING).exists():
            raise CheckpointError(
                f"--draft-vocabulary {count}: {source.folder} has no {RANKING}, which says which tokens are frequent; "
                "give --rank-tokens PREFIX, a token file in which they are counted"
            )
        ranking = read_ranking(source.tokenizer.with_name(RANKING), vocab_size, count)
    copy_tokenizer(source.tokenizer, staging)
    write_ranking(staging, ranking)
    source.tokenizer = staging / TOKENIZER


def check_draft_vocabulary(source: Source) -> None:
    """Raises CheckpointError or DataError for a source with a draft vocabulary whose ranking is missing or damaged: the result
    could not be loaded."""
    count, vocab_size = source.recycle.draft_vocabulary, source.model.vocab_size
    if count is None or not source.recycle.layers or source.tokenizer is None:
        return
    assert vocab_size is not None, "a source knows its vocabulary"
    read_ranking(source.tokenizer.with_name(RANKING), vocab_size, count)
