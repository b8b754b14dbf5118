"""The two pickles of a Megatron checkpoint, read as data: `.metadata`, which says where tensors lie, and common.pt.

A pickle may name any function and have it called. `.metadata` finds the few classes that such a file needs, and these not
themselves but stand-ins that only hold what they are given; common.pt goes through torch's own restricted reader, with
stand-ins for what Megatron-LM puts there. Whatever else they name is refused, and told.
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
# Of common.pt, besides what torch lets through: none of their values is looked at.
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
    """A block of a tensor, and the bytes of a file that hold it."""

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
    """A pickle asks for what it does not get."""


class _Stand:
    """Stands in for a class: keeps arguments and state, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        """A field of a dataclass's state; None where there is none."""
        state = getattr(self, "state", None)
        return state.get(field) if isinstance(state, dict) else None


class _Reader(pickle.Unpickler):
    """Finds stand-ins, made anew for every file so that none can change them for the next."""

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
        return self._made.setdefault((module, name), type(name, (_Stand,), {}))


def read_table(folder: Path) -> dict[str, Stored]:
    """The tensors that `.metadata` lists, by key. Raises CheckpointError for a damaged file, or one that asks for more."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Reader(file).load()
    except _Refused as error:
        raise CheckpointError(f"{path}: asks for {error}, which is none of this format's classes: not read") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    try:
        return _tabulate(metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not such metadata ({' '.join(str(error).split())})") from None


def _tabulate(metadata: Any) -> dict[str, Stored]:
    """Raises ValueError, or AttributeError and the like, for records that are not what they should be."""
    where = {}
    for index, info in metadata.get("storage_data").items():
        if info.get("transform_descriptors"):
            raise ValueError(f"{index.get('fqn')} is compressed")
        offsets = index.get("offset")
        where[index.get("fqn"), None if offsets is None else _sizes(offsets)] = info
    table = {}
    for key, entry in metadata.get("state_dict_metadata").items():
        if entry.get("chunks") is None:  # bytes: extra states, random generators
            continue
        shape = _sizes(entry.get("size"))
        dtype = entry.get("properties").state[0]
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key!r}: no name and type")
        chunks = []
        for chunk in entry.get("chunks"):
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            if (key, offsets) not in where:
                raise ValueError(f"{key}: where its part from {list(offsets)} lies is not said")
            chunks.append(_chunk(key, offsets, sizes, where[key, offsets]))
        table[key] = Stored(key, dtype, shape, tuple(chunks))
    return table


def _chunk(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Chunk:
    file, position, count = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(file, str) or not _PLAIN_NAME.match(file):
        raise ValueError(f"{key}: {file!r} is not the name of a .distcp file beside it")
    _sizes((position, count))
    return Chunk(offsets, sizes, file, position, count)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values!r}: not sizes")
    return tuple(values)


def read_common(folder: Path) -> dict[str, Any]:
    """common.pt: what is not sharded, `args` as a dictionary. Raises CheckpointError for a file that asks for other classes."""
    path = folder / COMMON
    stands: list[Any] = [(type("Inert", (_Stand,), {}), name) for name in _IGNORED]
    try:
        with torch.serialization.safe_globals([Namespace, *stands]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {COMMON} and so no args that describe the model") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"asks for {asked.group(1)}, which is none of this format's classes" if asked else "not such a file"
        raise CheckpointError(f"{path}: {why}: not read") from None
    except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    fault = archive_fault(path)
    if fault is not None:
        raise CheckpointError(f"{path}: damaged ({fault}); copy it anew")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must hold a dictionary, not a {type(found).__name__}")
    return found


def arguments(common: Mapping[str, Any]) -> dict[str, Any] | None:
    """`args` of common.pt, None where there are none; values that are not plain are told by their type only."""
    args = common.get("args")
    if not isinstance(args, Namespace):
        return None
    plain = str | int | float | list | tuple | None
    return {
        str(key): value if isinstance(value, plain) else f"<{type(value).__name__}>"
        for key, value in vars(args).items()
    }
