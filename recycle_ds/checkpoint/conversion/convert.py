"""Conversion between formats: any source to any target, tensor by tensor, verified after writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from recycle_ds.checkpoint.conversion.before_norm import BeforeNorm
from recycle_ds.checkpoint.conversion.draft_vocabulary import check_draft_vocabulary, set_draft_vocabulary
from recycle_ds.checkpoint.conversion.fresh_module import FreshModule
from recycle_ds.checkpoint.conversion.options import DTYPES, Conversion
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.new_folder import check_target, new_folder
from recycle_ds.checkpoint.huggingface.reading import HuggingFaceSource
from recycle_ds.checkpoint.huggingface.writing import write_hugging_face, write_mimo
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.checkpoint.tensor_equality import canonical_nan, same_bits
from recycle_ds.checkpoint.tokenizer_check import tokenizer_notes
from recycle_ds.config import RecycleConfig, TrainingConfig

_DTYPES = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def convert(
    source_path: str,
    target_path: str,
    conversion: Conversion,
    step: Callable[[str, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Source:
    """Converts into a new folder, which is written under a temporary name and renamed once it is complete.

    step: called for each tensor written or checked, with the name of the phase and the number of tensors. note: called
    with each note on the source and on the options. Returns the result, opened. Raises CheckpointError; nothing is left
    at the target then."""
    conversion.check()
    target = check_target(target_path)
    source = _open(source_path, conversion)
    for text in (*source.notes, *tokenizer_notes(source), *conversion.notes):
        if note is not None:
            note(text)
    count = len(source.shapes)
    progress = step or (lambda *_: None)
    with TemporaryDirectory() as staging, new_folder(target_path) as folder:
        if conversion.draft_vocabulary is None:
            check_draft_vocabulary(source)
        else:
            set_draft_vocabulary(source, conversion.draft_vocabulary, conversion.rank_tokens, Path(staging))
        _write(source, folder, conversion, lambda _: progress("writing", count))
        if conversion.verify:
            _verify(source, _reopen(folder, conversion), conversion, lambda _: progress("checking", count))
    return _reopen(target, conversion)


def _open(path: str, conversion: Conversion) -> Source:
    """Opens the source, and adds or changes a recycle module if requested."""
    source = open_source(path, config=conversion.config)
    if conversion.recycle_layers:
        recycle = RecycleConfig(layers=conversion.recycle_layers, depth=conversion.recycle_depth or 1)
        seed = TrainingConfig.model_fields["seed"].default if conversion.seed is None else conversion.seed
        source = FreshModule(source, recycle, seed)
    return BeforeNorm(source) if conversion.before_norm else source


def _reopen(folder: Path, conversion: Conversion) -> Source:
    if conversion.target == "vllm":
        return HuggingFaceSource(folder, before_norm=conversion.before_norm)
    return open_source(str(folder))


def _write(source: Source, folder: Path, conversion: Conversion, step: Callable[[str], None]) -> None:
    dtype = None if conversion.dtype is None else _DTYPES[conversion.dtype]
    if conversion.target == "portable":
        write_portable(source, folder, dtype, conversion.shard_bytes, step)
    elif conversion.target == "megatron":
        write_megatron(source, folder, dtype, conversion.tensor, conversion.pipeline, step)
    elif conversion.target == "vllm":
        write_mimo(source, folder, dtype, conversion.shard_bytes, step, before_norm=conversion.before_norm)
    else:
        write_hugging_face(source, folder, dtype, conversion.shard_bytes, step)


def _verify(source: Source, result: Source, conversion: Conversion, step: Callable[[str], None]) -> None:
    """Compares every tensor of the result with the source's, rounded as requested. Raises CheckpointError if one
    differs."""
    if dict(result.shapes) != {name: tuple(shape) for name, shape in source.shapes.items()}:
        raise CheckpointError(
            f"{source.folder}: the result has other tensors than the source: nothing is left at the target"
        )
    for name in source.shapes:
        wanted, found = source.read(name), result.read(name)
        if conversion.dtype is not None:
            wanted, found = canonical_nan(wanted.to(_DTYPES[conversion.dtype])), canonical_nan(found)
        if not same_bits(wanted, found):
            raise CheckpointError(
                f"{source.folder}: {name} in the result differs from the source: nothing is left at the target"
            )
        step(name)
