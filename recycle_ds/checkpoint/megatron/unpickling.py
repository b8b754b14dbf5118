"""Reads the two pickles of a Megatron checkpoint as plain data: `.metadata`, which lists where tensors are, and common.pt.

A pickle can name any function and have it called. In `.metadata`, only the few classes that the format needs can be named, and
each is replaced by a placeholder that only stores its arguments. common.pt is read by torch's restricted unpickler, with
placeholders for the classes that Megatron-LM saves there. Any other class raises a CheckpointError that names it.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.torch_archives import archive_fault

METADATA, COMMON = ".metadata", "common.pt"
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.distcp$")
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath",),
}  # fmt: skip
# Allowed in common.pt in addition to torch's list; their values are not used.
_IGNORED = (
    "types.SimpleNamespace", "signal.Signals", "pathlib.PosixPath", "pathlib._local.PosixPath",
    "_io.BytesIO", "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope", "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
)  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and the range of bytes in a file that contains it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    bytes: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class _Refused(Exception):
    """A pickle names a class that is not allowed."""


class _Placeholder:
    """Placeholder for a class: stores arguments and state, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        """Returns a field of a dataclass's state; None if there is none."""
        state = getattr(self, "state", None)
        return state.get(field) if isinstance(state, dict) else None


class _Reader(pickle.Unpickler):
    """Resolves classes to placeholders. Every file gets new ones, so that no file can change them for the next."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], Any] = {("torch", "Size"): type("Size", (tuple,), {})}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._made:
            return self._made[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _RECORDS.get(module, ()):
            raise _Refused(f"{module}.{name}")
        return self._made.setdefault((module, name), type(name, (_Placeholder,), {}))


def read_table(folder: Path) -> dict[str, Stored]:
    """Returns the tensors that `.metadata` lists, by key. Raises CheckpointError for damaged files and other classes."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Reader(file).load()
    except _Refused as error:
        raise CheckpointError(
            f"{path}: names {error}, which is not a class of this format: the file was not read"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    try:
        return _tabulate(metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: invalid metadata ({' '.join(str(error).split())})") from None


def _tabulate(metadata: Any) -> dict[str, Stored]:
    """Returns the tensors by key. Raises ValueError, AttributeError, KeyError or TypeError for malformed records."""
    where = {}
    for index, info in metadata.get("storage_data").items():
        if info.get("transform_descriptors"):
            raise ValueError(f"{index.get('fqn')} is compressed")
        offsets = index.get("offset")
        where[index.get("fqn"), None if offsets is None else _sizes(offsets)] = info
    table = {}
    for key, entry in metadata.get("state_dict_metadata").items():
        if entry.get("chunks") is None:  # bytes: extra states, states of random generators
            continue
        shape = _sizes(entry.get("size"))
        dtype = entry.get("properties").state[0]
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key!r}: name or dtype is missing")
        chunks = []
        for chunk in entry.get("chunks"):
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            if (key, offsets) not in where:
                raise ValueError(f"{key}: no file is listed for its chunk at {list(offsets)}")
            chunks.append(_chunk(key, offsets, sizes, where[key, offsets]))
        table[key] = Stored(key, dtype, shape, tuple(chunks))
    return table


def _chunk(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Chunk:
    file, position, count = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(file, str) or not _PLAIN_NAME.match(file):
        raise ValueError(f"{key}: {file!r}: must be the name of a .distcp file in the same folder")
    _sizes((position, count))
    return Chunk(offsets, sizes, file, position, count)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r}: must be sizes")
    return tuple(values)


def read_common(folder: Path) -> dict[str, Any]:
    """Returns the content of common.pt, which is not sharded. Raises CheckpointError for a file that names other classes."""
    path = folder / COMMON
    placeholders: list[Any] = [(type("Inert", (_Placeholder,), {}), name) for name in _IGNORED]
    try:
        with torch.serialization.safe_globals([Namespace, *placeholders]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {COMMON}, and so no args that describe the model") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"names {named.group(1)}, which is not a class of this format" if named else "not a valid pickle of weights"
        )
        raise CheckpointError(f"{path}: {why}: the file was not read") from None
    except Exception as error:  # a damaged archive can raise any exception
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    fault = archive_fault(path)
    if fault is not None:
        raise CheckpointError(f"{path}: damaged ({fault}); copy it again")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must contain a dictionary, not a {type(found).__name__}")
    return found


def arguments(common: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns `args` of common.pt, None if there are none. Values that are not plain data are replaced by their type's name."""
    args = common.get("args")
    if not isinstance(args, Namespace):
        return None
    plain = str | int | float | list | tuple | None
    return {
        str(key): value if isinstance(value, plain) else f"<{type(value).__name__}>"
        for key, value in vars(args).items()
    }
