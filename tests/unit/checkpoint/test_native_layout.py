"""The layout recorded in a DeepSpeed folder, with the key names of our manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.deepspeed_native.autotp import split
from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.config import save_config
from recycle_ds.model import build_model
from tests.runs import tiny_run
from tests.unit.checkpoint.native_folder import change, write_folder


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_at_save(tmp_path: Path, stage: int) -> None:
    """Prevents an inspection that reports wrong rank counts, or guesses those that no file records."""
    config = tiny_run(tmp_path / "corpus", tmp_path / "run", model__vocab_size=30, model__layers=1)
    model = build_model(config.model, config.recycle, seed=3)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    tag = write_folder(tmp_path / "native", weights, stage=stage, ranks=3)
    save_config(config, tmp_path / "config.yaml")
    assert DeepSpeedSource(tag).layout == {"world_size": 3, "tensor": 1, "pipeline": 1, "data": 3}
    if stage == 2:
        for path in tag.glob("*optim_states.pt"):
            path.unlink()
        assert DeepSpeedSource(tag).layout == {"world_size": 3, "tensor": 1, "pipeline": 1, "data": 3}
        for value in ("many", 0, ...):
            change(tag / "mp_rank_00_model_states.pt", ("dp_world_size",), value)
            assert DeepSpeedSource(tag).layout == {"tensor": 1, "pipeline": 1}


@pytest.mark.parametrize(
    ("name", "shape", "local", "splits"),
    [
        ("blocks.0.attention.query.weight", (8, 6), [(5, 6), (3, 6)], [(0, 0, 5), (0, 5, 3)]),
        ("blocks.0.attention.output.weight", (6, 8), [(6, 5), (6, 3)], [(1, 0, 5), (1, 5, 3)]),
        ("final_norm.weight", (6,), [(6,), (6,)], None),
        ("blocks.0.attention.output.weight", (6, 8), [(6,), (6,)], None),
        ("blocks.0.attention.output.weight", (6, 6), [(3, 6), (3, 6)], None),
        ("blocks.0.attention.query.weight", (8, 6), [(4, 6), None], None),
        ("blocks.0.attention.query.weight", (8, 6), [(4, 6), (3, 6)], None),
        ("blocks.0.attention.query.weight", (8, 6), [(8, 6)], None),
    ],
)
def test_splits_over_tensor_ranks(
    name: str, shape: tuple[int, ...], local: list[Any], splits: list[tuple[int, int, int]] | None
) -> None:
    """Prevents parts that do not add up to a tensor from being joined, and a stack trace for a part with fewer axes."""
    shards, expected = split(name, shape, local)
    if splits is None:
        assert [(shard.rank, shard.piece.whole) for shard in shards] == [(0, True)] and expected == [shape] * len(local)
    else:
        assert [(one.piece.axis, one.piece.start, one.piece.length) for one in shards] == splits and expected == local
