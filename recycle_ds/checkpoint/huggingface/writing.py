"""Writes a folder that transformers' AutoModelForCausalLM loads as the plain base model, with the module next to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from recycle_ds.checkpoint.files.safetensors_writer import Named, split, write_shards
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.huggingface.families import write_model
from recycle_ds.checkpoint.huggingface.module import MODULE_CONFIG, describe_module, module_file
from recycle_ds.checkpoint.huggingface.names import RECYCLE, hugging_face_name
from recycle_ds.checkpoint.huggingface.reading import CONFIG, INDEX, SINGLE
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.data.special_ids import merge_into, read_special_ids
from recycle_ds.data.tokenizer import Tokenizer


def write_hugging_face(
    source: Source, folder: Path, dtype: torch.dtype | None, shard_bytes: int, step: Callable[[str], None]
) -> None:
    """Fills an empty folder. dtype None keeps each tensor's dtype. `step` is called with the name of each tensor written."""

    def named(name: str) -> Named:
        return hugging_face_name(name), source.shapes[name], dtype or source.dtype(name), lambda: source.read(name)

    base = [named(name) for name in source.shapes if not name.startswith(RECYCLE)]
    module = [named(name) for name in source.shapes if name.startswith(RECYCLE)]
    shards = split(base, shard_bytes)
    if len(shards) == 1:
        write_shards(folder, shards, lambda *_: SINGLE, step)
    else:
        files = write_shards(folder, shards, lambda n, of: f"model-{n:05d}-of-{of:05d}.safetensors", step)
        size = sum(torch.Size(shape).numel() * stored.itemsize for _, shape, stored, _ in base)
        table = {key: file for file, keys in files.items() for key in keys}
        write_json_atomically(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": table})
    tree = write_model(source.model, str(base[0][2]).removeprefix("torch."))
    tree |= _write_tokenizer(source, folder)
    write_json_atomically(folder / CONFIG, tree)
    if module:
        shards = split(module, shard_bytes)
        files = write_shards(folder, shards, module_file, step)
        write_json_atomically(
            folder / MODULE_CONFIG, describe_module(source.recycle, folder, list(files), provenance())
        )


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
