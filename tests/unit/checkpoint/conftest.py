"""Checkpoint folders that several test modules damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from recycle_ds.config import save_config
from tests.unit.checkpoint.native_folder import small_run, weights_of, write_folder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """run/native of three ranks at ZeRO 2, run/config.yaml next to it, and the parameters."""
    config = small_run(tmp_path / "run")
    weights = weights_of(config)
    write_folder(tmp_path / "run" / "native", weights, align=4)
    save_config(config, tmp_path / "run" / "config.yaml")
    return tmp_path / "run" / "native", weights
