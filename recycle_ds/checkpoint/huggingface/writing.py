"""Writes a folder that transformers loads as the plain base model, with the recycle module beside it or in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from recycle_ds.checkpoint.files.safetensors_writer import Named, split, write_shards
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.huggingface.families import write_model
from recycle_ds.checkpoint.huggingface.mimo import check_fits, describe_head, mimo_name, write_config, zero_biases
from recycle_ds.checkpoint.huggingface.module import MODULE_CONFIG, describe_module, module_file
from recycle_ds.checkpoint.huggingface.names import RECYCLE, hugging_face_name
from recycle_ds.checkpoint.huggingface.reading import CONFIG, INDEX, SINGLE
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.data.special_ids import merge_into, read_special_ids
from recycle_ds.data.tokenizer import Tokenizer

_HEAD = "lm_head.weight"


def write_hugging_face(
    source: Source, folder: Path, dtype: torch.dtype | None, shard_bytes: int, step: Callable[[str], None]
) -> None:
    """Fills an empty folder. dtype None keeps each tensor's dtype. `step` is called with the name of each tensor written."""

    def named(name: str) -> Named:
        return hugging_face_name(name), source.shapes[name], dtype or source.dtype(name), lambda: source.read(name)

    base = [named(name) for name in source.shapes if not name.startswith(RECYCLE)]
    module = [named(name) for name in source.shapes if name.startswith(RECYCLE)]
    # without an index, vLLM and SGLang would read every *.safetensors, the module's too, and fail on its names
    _write_weights(folder, base, shard_bytes, step, index=bool(module))
    tree = write_model(source.model, _dtype_name(base))
    write_json_atomically(folder / CONFIG, tree | _write_tokenizer(source, folder))
    if module:
        shards = split(module, shard_bytes)
        files = write_shards(folder, shards, module_file, step)
        write_json_atomically(
            folder / MODULE_CONFIG, describe_module(source.recycle, folder, list(files), provenance())
        )


def write_mimo(
    source: Source,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    step: Callable[[str], None],
    *,
    before_norm: bool,
) -> None:
    """Fills an empty folder in the MiMo layout; the arguments are those of `write_hugging_face`.

    before_norm: whether the source is a `conversion.before_norm.BeforeNorm`. Raises CheckpointError for a source that
    the layout cannot express.
    """
    check_fits(source)
    model = source.model

    def named(name: str) -> Named:
        return mimo_name(name), source.shapes[name], dtype or source.dtype(name), lambda: source.read(name)

    tensors = [named(name) for name in source.shapes]
    for name, shape in zero_biases(model, source.recycle).items():
        kind = dtype or source.dtype(name.removesuffix("bias") + "weight")
        tensors.append((mimo_name(name), shape, kind, partial(torch.zeros, shape)))
    if model.tied_embeddings:  # vLLM's head does not tie: it fails without a tensor of this name
        _, rows, kind, embedding = named("embedding.weight")
        # safetensors refuses two tensors with the same memory, which a source may return
        tensors.append((_HEAD, rows, kind, lambda: embedding().clone()))
    read = {mimo_name(name) for name in source.shapes}  # tensors that the layout adds are not counted as steps
    _write_weights(folder, tensors, shard_bytes, lambda key: step(key) if key in read else None, index=False)
    tree = write_config(model, _dtype_name(tensors))
    write_json_atomically(folder / CONFIG, tree | _write_tokenizer(source, folder))
    write_json_atomically(folder / MODULE_CONFIG, describe_head(source, before_norm))


def _write_weights(
    folder: Path, tensors: list[Named], shard_bytes: int, step: Callable[[str], None], *, index: bool
) -> None:
    """Writes the model's files, and an index if there are several or if `index`."""
    shards = split(tensors, shard_bytes)
    single = len(shards) == 1
    files = write_shards(
        folder, shards, lambda n, of: SINGLE if single else f"model-{n:05d}-of-{of:05d}.safetensors", step
    )
    if single and not index:
        return
    size = sum(torch.Size(shape).numel() * stored.itemsize for _, shape, stored, _ in tensors)
    table = {key: file for file, keys in files.items() for key in keys}
    write_json_atomically(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": table})


def _dtype_name(tensors: list[Named]) -> str:
    return str(tensors[0][2]).removeprefix("torch.")


def _write_tokenizer(source: Source, folder: Path) -> dict[str, int | list[int] | None]:
    """Copies the files of the tokenizer and of generation; returns the special-token ids for config.json.

    Ids that nothing names are null: transformers would take the family's defaults, which are ids of another vocabulary.
    """
    path = source.tokenizer or source.folder / TOKENIZER
    copy_tokenizer(path, folder, name_ids=False)
    ids = read_special_ids(path.parent)
    found = {"bos_token_id": ids.bos, "eos_token_id": None, "pad_token_id": ids.pad}
    if source.tokenizer is None:
        return found | merge_into({}, ids)
    tokenizer = Tokenizer.load(path)
    bos = tokenizer.bos_id if ids.bos is None else ids.bos
    return found | {"bos_token_id": bos} | merge_into({}, replace(ids, bos=bos), sorted(tokenizer.end_ids))
