"""A run under torch.compile has the losses of an eager one."""

from __future__ import annotations

from pathlib import Path

from tests.gpu.runs import assert_close, corpus, train


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
