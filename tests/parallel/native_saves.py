"""Functions that test_deepspeed_native runs on every rank: runs that save in DeepSpeed's own format too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from recycle_ds.config import RunConfig
from tests.parallel.ranks import run_all


def run_and_save(rank: int, world_size: int, runs: list[RunConfig]) -> list[str]:
    """Like `run_all`; every checkpoint is saved by DeepSpeed as well, under run_dir/native."""
    from recycle_ds.checkpoint.writing import PortableCheckpointer

    original = PortableCheckpointer.begin

    def both(self: Any, state: Any) -> bool:
        self._engine.engine.save_checkpoint(str(self._run_dir / "native"), tag=f"global_step{state.step}")
        return original(self, state)

    PortableCheckpointer.begin = both  # type: ignore[method-assign]
    try:
        return run_all(rank, world_size, runs)
    finally:
        PortableCheckpointer.begin = original  # type: ignore[method-assign]
