"""fp32 training on the GPU has the losses and gradient norms of the CPU, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

from tests.gpu.device import rehearsal
from tests.gpu.runs import assert_close, corpus, on_cpu, stage, train
from tests.runs import figures


def test_losses_and_norms_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Prevents kernels, masks or reductions of the GPU that compute something else than the CPU's."""
    corpus(tmp_path)
    with on_cpu(tmp_path, "cpu") as reference:
        found = train(tmp_path, "gpu")
    assert_close(found, figures(reference), 1e-3)


def test_zero_stages_are_equal(tmp_path: Path) -> None:
    """Prevents a stage that reduces, partitions or gathers wrongly on CUDA."""
    corpus(tmp_path)
    expected = train(tmp_path, "zero0", **stage("0"))
    for name in ("1", "2", "3"):
        assert_close(train(tmp_path, f"zero{name}", **stage(name)), expected, 1e-4)


def test_tf32_changes_little(tmp_path: Path) -> None:
    """Prevents a TF32 that is something coarser, or that is never switched on, and a setting that stays on for later runs."""
    corpus(tmp_path)
    expected = train(tmp_path, "exact")
    found = train(tmp_path, "tf32", training__tf32=True)
    assert_close(found, expected, 0.05)
    if not rehearsal():
        assert found != expected, "training.tf32=true changed nothing"
    assert_close(train(tmp_path, "again"), expected, 1e-5)
