"""A run under torch.compile has the losses of an eager one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch._dynamo.utils import counters

from tests.gpu.device import rehearsal
from tests.gpu.runs import assert_close, corpus, stage, train


def test_a_compiled_run_equals_an_eager_one(tmp_path: Path) -> None:
    """Prevents a compiled model that computes something else, or a hook that fails inside it, as the timer's events did."""
    corpus(tmp_path)
    expected = train(tmp_path, "eager")
    assert_close(train(tmp_path, "compiled", training__compile=True), expected, 1e-3)


def test_a_compiled_bf16_run_follows_an_eager_one(tmp_path: Path) -> None:
    """Prevents fused kernels that round more than the eager ones."""
    corpus(tmp_path)
    expected = train(tmp_path, "eager", training__dtype="bf16")
    found = train(tmp_path, "compiled", training__dtype="bf16", training__compile=True)
    assert_close([row[:-1] for row in found], [row[:-1] for row in expected], 0.03)


def test_the_default_compiles_whatever_a_run_uses(tmp_path: Path) -> None:
    """Prevents a default that leaves a run uncompiled without a word, or that fails under ZeRO 3, with checkpointed activations
    or where rows are single documents, which take another kernel."""
    corpus(tmp_path)
    setting = True if rehearsal() else "auto"  # on a CPU the default compiles nothing
    kinds: dict[str, dict[str, Any]] = {
        "zero3": stage("3"),
        "checkpointed": {"training__activation_checkpointing": "full"},
        "single": {"training__seq_length": 16, "training__micro_batch_size": 1},
    }
    for name, changes in kinds.items():
        expected = train(tmp_path, f"{name}-eager", **changes)
        counters.clear()
        found = train(tmp_path, f"{name}-compiled", **changes, training__compile=setting)
        assert counters["stats"]["unique_graphs"] > 0, f"{name}: nothing was compiled"
        assert_close(found, expected, 1e-3)
