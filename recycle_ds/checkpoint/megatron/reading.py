"""Reads a checkpoint of megatron.core.dist_checkpointing (torch_dist) as a source of canonical tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import read_json
from recycle_ds.checkpoint.files.safetensors_reader import DTYPES
from recycle_ds.checkpoint.megatron.arguments import SEPARATE_DEPTHS, read_arguments, unrestored
from recycle_ds.checkpoint.megatron.blocks import BlockFiles
from recycle_ds.checkpoint.megatron.fusing import Box, take
from recycle_ds.checkpoint.megatron.names import RENAMED, Entry, entries
from recycle_ds.checkpoint.megatron.unpickling import METADATA, Stored, arguments, read_common, read_table
from recycle_ds.checkpoint.size_limits import check_sizes
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, build_section
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model.build import whole_shapes

BACKEND, TRACKER, OURS = "metadata.json", "latest_checkpointed_iteration.txt", "recycle_ds.json"
FORMAT, VERSION = "recycle_ds in Megatron's format", 1
_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.")
_DEEPER = re.compile(r"^mtp\.layers\.([1-9]\d*)\.")
# Upper limit of the evaluation length if the training's sequence length is unknown: evaluating a long context is expensive.
_WINDOW = 2048


@dataclass(frozen=True)
class _Location:
    """Where an entry is stored, or one of its canonical tensors that has a separate key."""

    entry: Entry
    stored: Stored
    layer: int | None
    """Index in a stack of layers; None if the tensor is not stacked."""


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron checkpoint, or contains some."""
    return (folder / TRACKER).is_file() or (folder / METADATA).is_file()


class MegatronSource:
    """See `Source`. Names, shapes and locations are checked on opening; no code named in a file is run."""

    kind = "megatron"

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Opens a checkpoint, or the latest one in a folder of them. verify: whether to compare all checksums first; if not,
        call `verify` before using the weights. Raises CheckpointError that lists all mismatches.
        """
        self.folder = _find(folder)
        if not (self.folder / BACKEND).is_file():
            raise CheckpointError(f"{self.folder}: no {BACKEND}: not saved by megatron.core.dist_checkpointing")
        backend = read_json(self.folder / BACKEND).get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{self.folder}: format {backend!r} is not supported, only 'torch_dist': save with --ckpt-format torch_dist"
            )
        table = read_table(self.folder)
        folders = [self.folder, *([folder] if folder != self.folder else [])]
        tokenizers = [path / "tokenizer.json" for path in folders if (path / "tokenizer.json").is_file()]
        self.tokenizer = tokenizers[0] if tokenizers else None
        self.notes: tuple[str, ...] = ()
        self.layout: dict[str, Any] = {}
        self._configure()
        deeper = sorted({int(match.group(1)) for key in table if (match := _DEEPER.match(key))})
        if deeper:
            raise CheckpointError(f"{self.folder}: MTP layers 0 to {deeper[-1]}: {SEPARATE_DEPTHS}")
        self.shapes: Mapping[str, tuple[int, ...]] = whole_shapes(self.model, self.recycle)
        self._files = BlockFiles(self.folder)
        self._locations = self._locate(table)
        if verify:
            self.verify()

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compares the checksums of this rank's share of the weights. Raises CheckpointError that names the damaged files."""
        self._files.verify((location.stored for location in self._locations.values()), rank, world_size)

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return kind == "weight" and name in self.shapes

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return self._locations[name].stored.dtype

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        assert self.has(name, kind), f"{kind} of {name}"
        location = self._locations[name]
        count = self.shapes[name][axis] - start if length is None else length

        def read(box: Box) -> Tensor:
            if location.layer is None:
                return self._files.read(location.stored, box)
            return self._files.read(location.stored, ((location.layer, 1), *box)).squeeze(0)

        return take(location.entry, name, axis, start, count, self.model, read)

    def _configure(self) -> None:
        """Reads the configuration from recycle_ds.json if there is one, else from Megatron-LM's arguments."""
        path = self.folder / OURS
        if path.is_file():
            tree = read_json(path)
            if tree.get("format") != FORMAT or tree.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: format {tree.get('format')!r}, version {tree.get('version')!r}; must be {FORMAT!r} and {VERSION}"
                )
            try:
                self.model = build_section(ModelConfig, tree.get("model") or {})
                self.recycle = build_section(RecycleConfig, tree.get("recycle") or {})
            except ConfigError as error:
                raise CheckpointError(f"{path}: {error}") from None
            if self.model.vocab_size is None:
                raise CheckpointError(f"{path}: model.vocab_size is not set")
            check_sizes(self.model, str(path))
            self.step, self.seq_length = _count(tree, "step", path), _count(tree, "seq_length", path)
            self.layout = tree["layout"] if isinstance(tree.get("layout"), dict) else {}
            self.notes = tuple(_own_notes(self.model, self.recycle))
            return
        common = read_common(self.folder)
        args = arguments(common)
        if args is None:
            raise CheckpointError(
                f"{self.folder}: common.pt has no args that describe the model; add a {OURS} with "
                f'"format": "{FORMAT}", "version": {VERSION}, "step", "seq_length", "model" and "recycle"'
            )
        self.model, self.recycle, notes = read_arguments(args, str(self.folder / "common.pt"), self._tokens())
        step, length = common.get("iteration"), args.get("seq_length")
        self.step = step if type(step) is int and step >= 0 else 0
        limit = self.model.max_positions
        self.seq_length = min(length if type(length) is int and length > 0 else _WINDOW, limit)
        ranks = {name: args.get(f"{name}_model_parallel_size") for name in ("tensor", "pipeline")}
        self.layout = {name: size for name, size in ranks.items() if type(size) is int}
        self.notes = tuple(notes)

    def _tokens(self) -> int | None:
        if self.tokenizer is None:
            return None
        try:
            return Tokenizer.load(self.tokenizer).vocab_size
        except DataError as error:
            raise CheckpointError(str(error)) from None

    def _locate(self, table: Mapping[str, Stored]) -> dict[str, _Location]:
        """Returns the location of every canonical tensor. Raises CheckpointError that lists all mismatches."""
        locations: dict[str, _Location] = {}
        missing: list[str] = []
        for entry in entries(self.model, self.recycle):
            found = _find_entry(entry, table)
            missing += [] if found else [entry.key]
            locations |= found
        used = {location.stored.key for location in locations.values()}
        extra = sorted(key for key in table.keys() - used if not _OPTIMIZER.match(key))
        unique = {(location.stored.key, location.entry.shape): location for location in locations.values()}.values()
        wrong = [fault for location in unique if (fault := _shape_fault(location, self.model.layers)) is not None]
        types = sorted(
            {
                f"{location.stored.key} {location.stored.dtype}"
                for location in unique
                if location.stored.dtype not in DTYPES.values()
            }
        )
        problems = [
            f"{title}: {shorten(names)}"
            for title, names in (
                ("missing", missing), ("not supported", extra), ("wrong shape", wrong), ("unsupported dtype", types),
            )
            if names
        ]  # fmt: skip
        if not problems:
            stored = {location.stored.key: location.stored for location in unique}.values()
            problems = [fault for tensor in stored if (fault := self._files.fault(tensor)) is not None][:1]
        if problems:
            raise CheckpointError(f"{self.folder}: tensors do not match the model: {'; '.join(problems)}")
        return locations


def _find_entry(entry: Entry, table: Mapping[str, Stored]) -> dict[str, _Location]:
    """Returns the locations of an entry's canonical tensors; empty if it is missing."""
    for key in (entry.key, entry.key.replace(*RENAMED)):
        if key in table:
            return dict.fromkeys(entry.parts, _Location(entry, table[key], None))
        # gate and up have separate keys with `singleton_local_shards`
        separate = [f"{key}_w", f"{key}_v"]
        if entry.kind == "gate_up" and all(name in table for name in separate):
            shape = (entry.shape[0] // 2, *entry.shape[1:])
            halves = [replace(entry, parts=(part,), shape=shape, kind="plain") for part in entry.parts]
            return {one.parts[0]: _Location(one, table[name], None) for one, name in zip(halves, separate, strict=True)}
    if entry.stacked is not None and entry.stacked in table:
        return dict.fromkeys(entry.parts, _Location(entry, table[entry.stacked], entry.layer))
    return {}


def _shape_fault(location: _Location, layers: int) -> str | None:
    """Returns how a stored shape differs from the expected one, or None. Rows beyond the vocabulary are padding."""
    expected = location.entry.shape if location.layer is None else (layers, *location.entry.shape)
    found = location.stored.shape
    if found == expected:
        return None
    if location.entry.kind == "vocabulary" and found[1:] == expected[1:] and found[:1] > expected[:1]:
        return None
    return f"{location.stored.key} {list(found)} instead of {list(expected)}"


def _own_notes(model: ModelConfig, recycle: RecycleConfig) -> list[str]:
    notes = []
    if recycle.layers and recycle.depth > 1:
        notes.append(
            f"recycle.depth={recycle.depth}: one MTP layer holds the module that all depths share; "
            "Megatron has separate weights for every depth and uses it for the first one only"
        )
    options = unrestored(model)
    if options:
        notes.append(
            f"Megatron-LM reads these options from its command line only, not from the checkpoint: {' '.join(options)}"
        )
    return notes


def _find(folder: Path) -> Path:
    """Returns the checkpoint folder: `folder`, or the one that its tracker file names. Raises CheckpointError."""
    if (folder / METADATA).is_file():
        return folder
    try:
        text = (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / TRACKER}: cannot be read ({error})") from None
    if not re.fullmatch(r"release|\d{1,18}", text):
        raise CheckpointError(f"{folder / TRACKER}: {text[:40]!r} is neither an iteration nor 'release'")
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if (found / METADATA).is_file():
        return found
    why = f"no such folder, but {TRACKER} names it"
    if found.is_dir():
        why = f"no {METADATA} in it; only the torch_dist format is supported: save with --ckpt-format torch_dist"
    raise CheckpointError(f"{found}: {why}")


def _count(tree: Mapping[str, Any], key: str, path: Path) -> int:
    value = tree.get(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {key}={value!r}: must be a whole number, 0 or more")
    return value
