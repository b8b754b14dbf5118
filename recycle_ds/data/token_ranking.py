"""The tokens of a vocabulary by frequency: the first N of them are the draft vocabulary of a model (FR-Spec, arXiv
2502.14856).

The ranking lies next to the tokenizer, in every format, so that a draft vocabulary of any size can be taken from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recycle_ds.config import RunConfig
from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import TokenFile, open_token_file

RANKING = "token_ranking.json"
_FORMAT = "recycle_ds token ranking"
# Tokens that are counted, over all files: more would change only the rarest ones' places.
_MOST_COUNTED = 2**26
_PIECE = 2**22


def rank_tokens(files: Iterable[TokenFile], vocab_size: int) -> list[int]:
    """All token ids of a vocabulary, the most frequent first; of equally frequent ones the lowest id first.

    Counts at most 67 million tokens, an equal share from the start of each file. Raises DataError for damaged files.
    """
    files = list(files)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for file in files:
        end = min(file.tokens, _MOST_COUNTED // len(files))
        for start in range(0, end, _PIECE):
            ids, _ = file.read(start, min(_PIECE, end - start))
            counts += np.bincount(ids, minlength=vocab_size)
    return [int(token) for token in np.argsort(-counts, kind="stable")]


def write_ranking(folder: Path, ranking: list[int]) -> None:
    """Writes a ranking to RANKING in a folder. Raises OSError."""
    write_atomically(folder / RANKING, json.dumps({"format": _FORMAT, "version": 1, "tokens": ranking}) + "\n")


def ranking_of_run(config: RunConfig) -> list[int] | None:
    """The ranking of a run's training data, for a run with a draft vocabulary. Raises DataError for damaged files."""
    if config.recycle.draft_vocabulary is None or not config.recycle.layers:
        return None
    assert config.model.vocab_size is not None, "the vocabulary is known once the data are opened"
    return rank_tokens([open_token_file(source.path, None) for source in config.data.train], config.model.vocab_size)


def read_ranking(path: Path, vocab_size: int, least: int) -> list[int]:
    """Returns the ranking in a file. Raises DataError if it is missing, not a ranking for this vocabulary, or has fewer tokens
    than `least` (all of a smaller vocabulary)."""
    least = min(least, vocab_size)
    fix = "copy the model's own file there, or count tokens again: convert_checkpoint --draft-vocabulary N --rank-tokens PREFIX"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing, but the model has a draft vocabulary; {fix}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {fix}") from None
    ranking = tree.get("tokens") if isinstance(tree, dict) else None
    if not isinstance(ranking, list) or tree.get("format") != _FORMAT or tree.get("version") != 1:
        raise DataError(f"{path}: must be a {_FORMAT}, version 1; {fix}")
    if not all(type(token) is int and 0 <= token < vocab_size for token in ranking) or len(set(ranking)) < len(ranking):
        raise DataError(f"{path}: must list different token ids below {vocab_size}; {fix}")
    if len(ranking) < least:
        raise DataError(f"{path}: has {len(ranking)} tokens, the draft vocabulary {least}; {fix}")
    return ranking
