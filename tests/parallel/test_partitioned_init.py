"""ZeRO-3 builds the model in partitions: no rank has the full model, and weights equal those of other layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recycle_ds.config import load_deepspeed_json, resolve_deepspeed
from recycle_ds.model import build_model
from recycle_ds.model.flops import parameters
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.engine.build import _build_model
from recycle_ds.training.engine.zero.choice import weights_at
from recycle_ds.training.run_context import RunContext
from tests.distributed import run_ranks
from tests.parallel.partitioned import build, memory_after_steps
from tests.runs import make_corpus, tiny_run, zero


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_rank_holds_the_full_model(tmp_path: Path, dtype: str) -> None:
    """Prevents a 70 B model from being built in full on every rank, and weights or rotary tables of the wrong dtype."""
    config = tiny_run(
        make_corpus(tmp_path / "corpus"), tmp_path / "run", deepspeed=zero(3), model__layers=24, model__hidden=96,
        model__ffn=192, model__vocab_size=320, training__dtype=dtype,
    )  # fmt: skip
    full = build_model(config.model, config.recycle, seed=config.training.seed)
    size = sum(p.numel() * 4 for p in full.parameters())
    tables = sum(b.numel() * b.element_size() for b in full.buffers())
    for peak, held, largest, weights, buffers in run_ranks(build, 2, config):
        assert held < 0.51 * size
        # each parameter in turn is initialised in full, sharded and then partitioned
        assert peak < held + 4 * largest + 4 * tables < 0.75 * size
        expected = dict(full.named_parameters())
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name].to(weight.dtype)), name
        for name, table in full.named_buffers():
            assert torch.equal(buffers[name], table), name


@pytest.mark.parametrize(("stage", "dtype", "element"), [(0, "fp32", 4), (1, "bf16", 2), (2, "bf16", 2)])
def test_unpartitioned_weights_are_built_in_their_dtype(tmp_path: Path, stage: int, dtype: str, element: int) -> None:
    """Prevents the construction of a bf16 model from needing twice its memory, more than a ZeRO-2 rank needs later."""
    change = {"deepspeed": zero(stage), "training__dtype": dtype, "model__vocab_size": 320}
    config = tiny_run(tmp_path / "corpus", tmp_path / "run", **change)  # the data are not read
    context = RunContext(config, resolve_deepspeed(config, 1), Mesh())
    model, kept = _build_model(context, weights_at(stage, context.mesh), initial=True)
    full = build_model(config.model, config.recycle, seed=config.training.seed)
    assert {parameter.element_size() for parameter in model.parameters()} == {element}
    for (name, actual), reference in zip(model.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(actual, reference.to(actual.dtype)), name
    for table, expected in zip(model.buffers(), full.buffers(), strict=True):
        assert torch.equal(table, expected)
    assert not kept, "nothing is frozen"


@pytest.mark.parametrize(("stage", "dtype"), [(2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_the_benchmark_counts_persistent_state(tmp_path: Path, stage: int, dtype: str) -> None:
    """Prevents a benchmark that counts ZeRO-3's empty parameters: zero weights, no partitions and no masters."""
    tree = load_deepspeed_json(zero(stage))
    tree["zero_optimization"]["reduce_bucket_size"] = 300_000
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    config = tiny_run(
        tmp_path / "corpus", tmp_path / "run", deepspeed=str(tmp_path / "ds.json"), training__dtype=dtype,
        model__vocab_size=1024, model__hidden=256, model__ffn=512,
    )  # fmt: skip
    total = parameters(config.model, config.recycle)
    sizes = [p.numel() for p in build_model(config.model, config.recycle).parameters()]
    # weights of up to 1e5 elements stay gathered, in addition to their partitions
    persistent = sum(size for size in sizes if size <= 1e5)
    assert 0 < persistent < total / 3
    element = 2 if dtype == "bf16" else 4
    weights = element * (total / 2 + persistent if stage == 3 else total)
    for counted, state, beside, live in run_ranks(memory_after_steps, 2, config):
        assert counted == total
        assert state == pytest.approx(weights + 12 * total / 2, rel=0.01)
        assert state + beside == pytest.approx(live, rel=0.01)
