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
from recycle_ds.checkpoint.huggingface.tensors import HEAD, Place, locate, resolve_head
from recycle_ds.checkpoint.sequence_length import default_window
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.model.build import whole_shapes

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")


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
        self.seq_length = default_window(self.model)
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self._files = ShardFiles(folder)
        self._places, tensor_notes = self._locate()
        self.notes = (*notes, *tensor_notes)
        self.shapes: Mapping[str, tuple[int, ...]] = whole_shapes(self.model, self.recycle)
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
        place = self._places[self._name(name)]
        return self._files.dtype(place.file, place.key)

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        assert self.has(name, kind), f"{kind} of {name}"
        place = self._places[self._name(name)]
        return self._files.read(place.file, place.key, axis, start, length)

    def _locate(self) -> tuple[dict[str, Place], list[str]]:
        """Returns the place of every stored tensor, by its Hugging Face name, and notes. Unties a head that differs."""
        names = self._weight_files()
        places, notes = locate(self._files, names)
        if names == [SINGLE] and self._index_differs():
            notes.append(f"{SINGLE} is read, and {INDEX} ignored, as transformers does")
        if self.model.tied_embeddings:
            places, tied = resolve_head(self._files, places)
            if not tied:
                self.model = self.model.model_copy(update={"tied_embeddings": False})
                notes.append(f"{HEAD} differs from the embedding: kept, although {CONFIG} has tie_word_embeddings=true")
        module, _ = locate(self._files, self._module_files)
        twice = sorted(places.keys() & module.keys())
        if twice:
            raise CheckpointError(
                f"{self.folder}: {twice[0]} is in both {places[twice[0]].file} and {module[twice[0]].file}"
            )
        return places | module, notes

    def _index_differs(self) -> bool:
        """Whether there is an index that lists another file than the single one."""
        if not (self.folder / INDEX).is_file():
            return False
        try:
            table = read_json(self.folder / INDEX).get("weight_map")
        except CheckpointError:
            return True
        return not isinstance(table, dict) or {str(file) for file in table.values()} != {SINGLE}

    def _weight_files(self) -> list[str]:
        """Names of the weight files; as in transformers, a single file counts before an index. Raises CheckpointError."""
        if (self.folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{self.folder}: {ADAPTER}: the folder has an adapter (LoRA), which is not applied: merge it into its base "
                "model with peft (merge_and_unload) and save the result"
            )
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
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
        raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}{self._advice()}")

    def _advice(self) -> str:
        """How to make safetensors of the weights that the folder has in another format."""
        pickled = sorted(path.name for kind in ("*.bin", "*.pth", "*.pt") for path in self.folder.glob(kind))
        if "pytorch_model.bin" in pickled or "pytorch_model.bin.index.json" in {p.name for p in self.folder.iterdir()}:
            return (
                "; pytorch_model.bin is a pickle, which is never loaded here; transformers 5 reads it without running code and "
                'writes safetensors: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained({str(self.folder)!r}, dtype='auto').save_pretrained('NEW_FOLDER')\", then copy the "
                "tokenizer's files"
            )
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if others:
            return f"; {others[0]} is not a name that transformers reads"
        return f"; {pickled[0]} is a pickle, which is never loaded: save the model as safetensors" if pickled else ""

    def _check(self) -> None:
        """Raises CheckpointError unless the folder has exactly the model's tensors, in their shapes."""
        expected = {self._name(name): shape for name, shape in (*self.shapes.items(), *self._zero.items())}
        missing = sorted(expected.keys() - self._places.keys())
        extra = sorted(self._places.keys() - expected.keys())
        wrong = []
        for key in sorted(expected.keys() & self._places.keys()):
            place = self._places[key]
            self._files.dtype(place.file, place.key)
            found = self._files.shape(place.file, place.key)
            if found != tuple(expected[key]):
                wrong.append(f"{key} {list(found)} instead of {list(expected[key])}")
        problems = [
            f"{title}: {shorten(names)}"
            for title, names in (("missing", missing), ("not supported", extra), ("wrong shape", wrong))
            if names
        ]
        if missing == [HEAD]:
            problems.append("if the head is the embedding, set tie_word_embeddings to true")
        if problems:
            raise CheckpointError(f"{self.folder}: tensors do not match {CONFIG}: {'; '.join(problems)}")
        for key in map(self._name, self._zero):
            if self._files.read(self._places[key].file, self._places[key].key, 0, 0, None).any():
                raise CheckpointError(f"{self.folder}: {key} is not zero, but recycle.json says qkv_bias=false")
