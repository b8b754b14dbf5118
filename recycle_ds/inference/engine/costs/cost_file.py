"""Measured costs on disk, so that not every start measures them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.config.cache_folder import cache_folder
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.model import RecycleGPT
from recycle_ds.parallel.device import machine_name

_PARTS = ("full", "module", "first")
"""Fields of `CostModel` that are measured, in its order."""
_MOST_EXTENTS = 8
"""Measurements of one key that are kept, the latest ones."""
_VERSION = 7
"""Of what is measured: 2 has trees of drafts, 3 trees that grow in one call, 4 calls that take turns and read
the cache themselves, 5 other products of the module, 6 attention that prefetches into the second-level cache, 7 the extent
beside the key."""


@dataclass(frozen=True)
class Extent:
    """What a measurement covers. Costs do not depend on it, so that those of a larger one serve a smaller one."""

    context: int
    """Blocks of context that the timed sequences had."""
    tokens: int
    """Tokens of the largest call that is timed."""
    sequences: int
    """Sequences of the largest call that is timed with drafts; 0 without a module."""

    def covers(self, other: Extent) -> bool:
        """Whether the costs of this extent are also those of another."""
        return self.context == other.context and self.tokens >= other.tokens and self.sequences >= other.sequences


@dataclass(frozen=True)
class CostFile:
    """The costs of one model on one machine. key: everything that they depend on."""

    folder: Path
    key: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file, named by a hash of the key."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"costs-{digest[:24]}.json"

    def read(self, extent: Extent) -> CostModel | None:
        """The costs; None if they were not measured yet to this extent, or the file is damaged."""
        try:
            stored = self._stored()
            covering = [costs for known, costs in stored if known.covers(extent)]
            # its own, if there is one: another may be from a time at which the machine was faster or slower
            own = [costs for known, costs in stored if known == extent]
            if not covering:
                return None
            parts = [tuple((int(size), float(cost)) for size, cost in (own or covering)[0][part]) for part in _PARTS]
        except (ValueError, TypeError, KeyError):
            return None
        valid = len(parts[0]) > 1 and parts[1] and all(cost > 0 for points in parts for _, cost in points)
        ascending = all(list(points) == sorted(points, key=lambda point: point[0]) for points in parts)
        return CostModel(full=parts[0], module=parts[1], first=parts[2]) if valid and ascending else None

    def write(self, costs: CostModel, extent: Extent) -> None:
        """Stores measured costs and what they cover. Costs are only measured again without the file: a disk that refuses it
        is no error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            measured = [{"extent": asdict(extent), **{part: getattr(costs, part) for part in _PARTS}}]
            measured += [one for known, one in self._stored() if not extent.covers(known)]
            write_json_atomically(self.path, {"key": self.key, "measured": measured[:_MOST_EXTENTS]})
        except OSError:
            return

    def _stored(self) -> list[tuple[Extent, dict[str, Any]]]:
        """All measurements in the file, with their extents; none if it is damaged, or of another key."""
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            found = [(Extent(**one["extent"]), one) for one in tree["measured"]]
            is_valid = all(type(number) is int for known, _ in found for number in astuple(known))
            return found if is_valid and tree["key"] == json.loads(json.dumps(self.key)) else []
        except (OSError, ValueError, TypeError, KeyError):
            return []


def cost_file(model: RecycleGPT, tensor: int, pipeline: int, *, compiled: bool) -> CostFile | None:
    """The file for a model in the user's cache folder; None for a user without a home. compiled: whether its blocks run in
    the compiled kernels."""
    folder = cache_folder()
    if folder is None:
        return None
    parameter = next(model.parameters())
    parts = [len(model.recycle_config.taps)] if model.recycle_config.taps else []
    key = {
        "version": _VERSION,
        "machine": machine_name(parameter.device),
        "device": str(parameter.device.type),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(parameter.dtype),
        "products": ["int8" if model.int8 else "float", "compiled" if compiled else "torch"],
        "model": model.config.model_dump(mode="json"),
        "recycle": [model.recycle_layers, None if model.draft_ids is None else len(model.draft_ids), *parts],
        "layout": [tensor, pipeline],
    }
    return CostFile(folder, key)
