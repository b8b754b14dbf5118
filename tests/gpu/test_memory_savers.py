"""What saves memory changes no loss, and a run that was interrupted continues as if it had not been."""

from __future__ import annotations

from pathlib import Path

import torch

from recycle_ds.checkpoint.run.host_copies import HostCopies
from tests.gpu.device import device
from tests.gpu.runs import STEPS, assert_close, corpus, stage, train
from tests.runs import figures, tensors


def test_offloaded_optimizers_are_equal(tmp_path: Path) -> None:
    """Prevents moments or master weights that are lost or late on the way to the host and back."""
    corpus(tmp_path)
    expected = train(tmp_path, "zero1")
    for name in ("2_offload", "3_offload"):
        assert_close(train(tmp_path, name, **stage(name)), expected, 1e-4)


def test_checkpointed_activations_are_equal(tmp_path: Path) -> None:
    """Prevents a recomputed block that differs from the first pass."""
    corpus(tmp_path)
    expected = train(tmp_path, "kept")
    found = train(tmp_path, "recomputed", training__activation_checkpointing="full")
    assert_close(found, expected, 1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Prevents weights, moments, random numbers or the place in the data from being lost in a checkpoint of a GPU."""
    corpus(tmp_path)
    for dtype in ("fp32", "bf16"):
        expected = train(tmp_path, f"{dtype}-whole", training__dtype=dtype)
        train(tmp_path, f"{dtype}-parts", training__dtype=dtype, training__stop_at=STEPS // 2)
        found = train(tmp_path, f"{dtype}-parts", training__dtype=dtype)
        assert_close(found, expected, 1e-7)
        assert figures(tmp_path / f"{dtype}-parts") == found


def test_a_checkpoint_has_the_state_of_its_step(tmp_path: Path) -> None:
    """Prevents a checkpoint with weights or moments of a later step: they are copied to the host while training continues."""
    corpus(tmp_path)
    checkpoint = f"checkpoints/step-{STEPS // 2:08d}"
    for name, changes in {
        "zero0": stage("0"), "zero0-bf16": stage("0") | {"training__dtype": "bf16"}, "zero1": {"training__dtype": "bf16"},
        "zero3": stage("3"),
    }.items():  # fmt: skip
        train(tmp_path, f"{name}-whole", **changes, training__save_every=STEPS // 2)
        train(tmp_path, f"{name}-part", **changes, training__stop_at=STEPS // 2)
        found, expected = (tensors(tmp_path / f"{name}-{run}" / checkpoint) for run in ("whole", "part"))
        assert found.keys() == expected.keys()
        assert [key for key in found if not found[key].equal(expected[key])] == []


def test_a_copy_has_the_value_of_its_moment() -> None:
    """Prevents an update that overtakes the copy of what it changes, and memory that is used again before it is copied: the
    copies are delayed here, which the small models of the other tests do not show."""
    for live in (True, False):
        copies, value = HostCopies(device(), live=live), torch.arange(2**20, device=device())
        expected = value.tolist()
        if copies.stream is not None:
            with torch.cuda.stream(copies.stream):
                torch.cuda._sleep(10**9)
        copied = copies.copy(value)
        if live:
            copies.before_update()
            value.zero_()
        else:
            del value
            torch.full((2**20,), -1, device=device())
        copies.completion()()
        assert copied.tolist() == expected


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    """Prevents bf16 training that diverges from the first steps on."""
    corpus(tmp_path)
    expected = train(tmp_path, "fp32")
    found = train(tmp_path, "bf16", training__dtype="bf16")
    assert_close([row[:-1] for row in found], [row[:-1] for row in expected], 0.03)
