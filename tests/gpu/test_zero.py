"""fp32 training on the GPU has the losses and gradient norms of the CPU, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recycle_ds.training import loop
from tests.gpu.device import rehearsal
from tests.gpu.runs import STEPS, assert_close, corpus, on_cpu, stage, train
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


def test_no_step_waits_inside(tmp_path: Path) -> None:
    """Prevents an operation of a training step that waits for the device, which PyTorch reports as an error here, but for
    steps that are logged."""
    # set_sync_debug_mode raises inside the step: that is the assertion
    corpus(tmp_path)
    original = loop.Trainer._step
    strict = 0
    seldom = {"training__dtype": "bf16", "training__log_every": 100, "training__steps": STEPS + 2}

    def watched(trainer: Any, stop: Any) -> str:
        nonlocal strict
        if rehearsal() or not 2 < trainer.state.step + 1 < STEPS + 2:  # the first and the last one are logged
            return original(trainer, stop)
        strict += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(trainer, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop.Trainer._step = watched  # type: ignore[method-assign]
    try:
        for name in ("1", "2"):  # at stage 3 DeepSpeed waits in every backward pass
            train(tmp_path, f"strict{name}", **stage(name), **seldom)
    finally:
        loop.Trainer._step = original  # type: ignore[method-assign]
    assert rehearsal() or strict == 2 * (STEPS - 1)
