"""Reads a Hugging Face folder of the LLaMA family as a source of canonical tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import read_json, verify_all
from recycle_ds.checkpoint.files.safetensors_reader import ShardFiles
from recycle_ds.checkpoint.huggingface.families import read_model
from recycle_ds.checkpoint.huggingface.mimo import mimo_name, read_head, zero_biases
from recycle_ds.checkpoint.huggingface.module import read_module
from recycle_ds.checkpoint.huggingface.names import hugging_face_name
from recycle_ds.checkpoint.sequence_length import default_window
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.model.build import whole_shapes

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")
# Buffers that old releases of transformers saved; they are recomputed.
_IGNORED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")


class HuggingFaceSource:
    """See `Source`. Nothing is unpickled and no code from the folder is run; names and shapes are checked on opening."""

    kind = "huggingface"
    step = 0

    def __init__(self, folder: Path, *, verify: bool = True, before_norm: bool = False) -> None:
        """Opens a folder with config.json and safetensors, plain or in the MiMo layout.

        verify: whether to compare the module's checksums; the model's files have none. before_norm: whether to open a
        folder converted with --before-norm, whose module is not ours. Raises CheckpointError that lists all mismatches.
        """
        self.folder = folder
        tree = read_json(folder / CONFIG)
        self.model, notes = read_model(tree, str(folder / CONFIG))
        head = read_head(folder, tree)
        self._name = hugging_face_name if head is None else mimo_name
        self._zero: Mapping[str, tuple[int, ...]] = {}
        if head is None:
            self.recycle, self._module_files = read_module(folder)
        else:
            if head.before_norm and not before_norm:
                raise CheckpointError(
                    f"{folder}: converted with --before-norm, only for vLLM: use the folder that it was converted from"
                )
            self.recycle, self._module_files = head.recycle, {}
            self.model = self.model.model_copy(update={"qkv_bias": head.qkv_bias})
            self._zero = zero_biases(self.model, self.recycle)
        if verify:
            self.verify()
        self.notes = tuple(notes)
        self.seq_length = default_window(self.model)
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.shapes: Mapping[str, tuple[int, ...]] = whole_shapes(self.model, self.recycle)
        self._files = ShardFiles(folder)
        self._file_of = self._locate()
        self._check()

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """See `Source`."""
        files = self._module_files
        verify_all(self.folder, {name: files[name] for name in sorted(files)[rank::world_size]})

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return kind == "weight" and name in self.shapes

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        key = self._name(name)
        return self._files.dtype(self._file_of[key], key)

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        assert self.has(name, kind), f"{kind} of {name}"
        key = self._name(name)
        return self._files.read(self._file_of[key], key, axis, start, length)

    def _locate(self) -> dict[str, str]:
        """Returns the file of every stored tensor, by its Hugging Face name."""
        file_of: dict[str, str] = {}
        for file in (*self._weight_files(), *self._module_files):
            for key in self._files.keys(file):
                if key in file_of:
                    raise CheckpointError(f"{self.folder}: {key} is in both {file_of[key]} and {file}")
                file_of[key] = file
        return file_of

    def _weight_files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            table = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise CheckpointError(f"{self.folder / INDEX}: no weight_map")
            files = sorted({str(file) for file in table.values()})
            for file in files:
                if not _PLAIN_NAME.match(file):
                    raise CheckpointError(
                        f"{self.folder / INDEX}: {file!r}: must be the name of a safetensors file in the same folder"
                    )
            absent = [file for file in files if not (self.folder / file).is_file()]
            if absent:
                raise CheckpointError(f"{self.folder}: missing: {shorten(absent)}")
            return files
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        why = (
            f"; {pickled[0]} is a pickle, which is never loaded: save it with safe_serialization=True"
            if pickled
            else ""
        )
        raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}{why}")

    def _check(self) -> None:
        """Raises CheckpointError unless the folder has exactly the model's tensors, in their shapes."""
        expected = {self._name(name): shape for name, shape in (*self.shapes.items(), *self._zero.items())}
        redundant = {"lm_head.weight"} if self.model.tied_embeddings else set()
        missing = sorted(expected.keys() - self._file_of.keys())
        extra = sorted(key for key in self._file_of.keys() - expected.keys() - redundant if not _IGNORED.match(key))
        wrong = []
        for key in sorted(expected.keys() & self._file_of.keys()):
            self._files.dtype(self._file_of[key], key)
            found = self._files.shape(self._file_of[key], key)
            if found != tuple(expected[key]):
                wrong.append(f"{key} {list(found)} instead of {list(expected[key])}")
        problems = [
            f"{title}: {shorten(names)}"
            for title, names in (("missing", missing), ("not supported", extra), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: tensors do not match {CONFIG}: {'; '.join(problems)}")
        for key in map(self._name, self._zero):
            if self._files.read(self._file_of[key], key, 0, 0, None).any():
                raise CheckpointError(f"{self.folder}: {key} is not zero, but recycle.json says qkv_bias=false")
