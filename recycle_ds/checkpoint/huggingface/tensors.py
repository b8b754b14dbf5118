"""The tensors in the weight files of a Hugging Face folder: their files, wrapped names, buffers, and a head that is tied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.safetensors_reader import ShardFiles
from recycle_ds.checkpoint.sources import shorten

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Prefixes of torch.compile and of data-parallel wrappers.
_WRAPPERS = ("_orig_mod.", "module.")
# Buffers that transformers recomputes. Old releases saved those of every layer.
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$")
_ROWS = 4096


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored."""

    file: str
    key: str


def locate(files: ShardFiles, names: Iterable[str]) -> tuple[dict[str, Place], list[str]]:
    """Returns the place of every tensor in the weight files `names`, and notes. Buffers that are no weights are left out.

    Raises CheckpointError for a tensor that is in two files.
    """
    found: dict[str, Place] = {}
    for file in names:
        for key in files.keys(file):
            if key in found:
                raise CheckpointError(f"{files.folder}: {key} is in both {found[key].file} and {file}")
            found[key] = Place(file, key)
    notes = []
    prefix = _shared_prefix(found)
    if prefix:
        notes.append(f"all tensor names begin with {prefix!r}, which is removed")
        found = {key.removeprefix(prefix): place for key, place in found.items()}
    buffers = sorted(key for key in found if _BUFFERS.search(key))
    if buffers:
        notes.append(f"buffers that are no weights are ignored and recomputed: {shorten(buffers)}")
    return {key: place for key, place in found.items() if key not in buffers}, notes


def _shared_prefix(keys: Iterable[str]) -> str:
    """Returns the wrappers' prefixes that all names share."""
    prefix, rest = "", list(keys)
    while wrapper := next((one for one in _WRAPPERS if rest and all(key.startswith(one) for key in rest)), None):
        prefix += wrapper
        rest = [key.removeprefix(wrapper) for key in rest]
    return prefix


def resolve_head(files: ShardFiles, found: Mapping[str, Place]) -> tuple[dict[str, Place], bool]:
    """For a config that ties the head to the embedding: returns the places without a redundant head, and whether it is tied.

    As in transformers 5, a head that differs from the embedding is kept, and a head without an embedding is both.
    """
    places = dict(found)
    if HEAD not in places:
        return places, True
    if EMBEDDING not in places:
        places[EMBEDDING] = places.pop(HEAD)
        return places, True
    if not _equal(files, places[EMBEDDING], places[HEAD]):
        return places, False
    del places[HEAD]
    return places, True


def _equal(files: ShardFiles, one: Place, other: Place) -> bool:
    shape = files.shape(one.file, one.key)
    if shape != files.shape(other.file, other.key):
        return False
    if not shape:
        return True
    for start in range(0, shape[0], _ROWS):  # in parts: both may have gigabytes
        length = min(_ROWS, shape[0] - start)
        left, right = (files.read(place.file, place.key, 0, start, length) for place in (one, other))
        if not torch.equal(left.double(), right.double()):
            return False
    return True
