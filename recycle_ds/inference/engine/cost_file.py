"""Measured costs on disk, so that not every start measures them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.model import RecycleGPT
from recycle_ds.parallel.device import machine_name


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

    def read(self) -> CostModel | None:
        """The costs; None if they were not measured yet, or the file is damaged."""
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            if tree["key"] != json.loads(json.dumps(self.key)):
                return None
            full, module = (tuple((int(size), float(cost)) for size, cost in tree[part]) for part in ("full", "module"))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        valid = len(full) > 1 and module and all(cost > 0 for _, cost in (*full, *module))
        ascending = all(list(points) == sorted(points, key=lambda point: point[0]) for points in (full, module))
        return CostModel(full, module) if valid and ascending else None

    def write(self, costs: CostModel) -> None:
        """Stores measured costs. Costs are only measured again without the file: a disk that refuses it is no error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomically(self.path, {"key": self.key, "full": costs.full, "module": costs.module})
        except OSError:
            return


def cost_file(model: RecycleGPT, max_batch: int, blocks: int, tensor: int, pipeline: int) -> CostFile | None:
    """The file for a model in the user's cache folder; None for a user without a home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recycle_ds"
    except RuntimeError:
        return None
    parameter = next(model.parameters())
    parts = [len(model.recycle_config.taps)] if model.recycle_config.taps else []
    key = {
        "machine": machine_name(parameter.device),
        "device": str(parameter.device.type),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(parameter.dtype),
        "model": model.config.model_dump(mode="json"),
        "recycle": [model.recycle_layers, None if model.draft_ids is None else len(model.draft_ids), *parts],
        "layout": [tensor, pipeline],
        "batch": [max_batch, blocks],
    }
    return CostFile(folder, key)
