"""ZeRO-3 makes the model in partitions: no rank ever holds all of it, and its initial weights are those of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recycle_ds.model import build_model
from tests.distributed import run_ranks
from tests.parallel.partitioned import build
from tests.runs import make_corpus, tiny_run, zero


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_rank_holds_the_whole_model(tmp_path: Path, dtype: str) -> None:
    """A 70 B model made whole on every rank before it is partitioned; weights, or rotary tables, made in another type."""
    config = tiny_run(
        make_corpus(tmp_path / "corpus"), tmp_path / "run", deepspeed=zero(3), model__layers=24, model__hidden=96,
        model__ffn=192, model__vocab_size=320, training__dtype=dtype,
    )  # fmt: skip
    whole = build_model(config.model, config.recycle, seed=config.training.seed)
    size = sum(p.numel() * 4 for p in whole.parameters())
    tables = sum(b.numel() * b.element_size() for b in whole.buffers())
    for peak, held, largest, weights, buffers in run_ranks(build, 2, config):
        assert held < 0.51 * size
        # a parameter is drawn whole, cut and then partitioned: one at a time
        assert peak < held + 4 * largest + 4 * tables < 0.75 * size
        expected = dict(whole.named_parameters())
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name].to(weight.dtype)), name
        for name, table in whole.named_buffers():
            assert torch.equal(buffers[name], table), name
