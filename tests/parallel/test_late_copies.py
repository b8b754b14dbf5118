"""Checkpoints whose tensors are copied to host memory while training goes on, as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.parallel.late_copies import run_with_copies
from tests.parallel.parity import PIPELINE
from tests.runs import make_corpus, tensors, tiny_run, zero

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": zero(0)},
    "zero0_bf16": {"deepspeed": zero(0), "training__dtype": "bf16"},
    "zero1": {"deepspeed": zero(1)},
    "zero2_bf16": {"deepspeed": zero(2), "training__dtype": "bf16"},
    "zero3": {"deepspeed": zero(3)},
    "zero3_bf16": {"deepspeed": zero(3), "training__dtype": "bf16"},
    "many_micro_batches": {
        "deepspeed": zero(1), "training__dtype": "bf16", "training__micro_batch_size": 1, "training__global_batch_size": 24,
    },
    "pipeline": {"deepspeed": PIPELINE, "parallel__pipeline": 2},
}  # fmt: skip
KINDS = ("now", "late", "too late")


LIVE = ("zero0", "zero0_bf16")
"""Layouts in which a checkpoint is copied from the tensors that the optimizer updates."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each layout for each kind of copies, which saves at steps 4 and 6."""
    root = tmp_path_factory.mktemp("copies")
    corpus = make_corpus(root / "corpus")
    names = [(layout, kind) for layout in LAYOUTS for kind in KINDS]
    configs = [
        tiny_run(corpus, root / layout / kind, **LAYOUTS[layout], training__steps=6, training__save_every=4)
        for layout, kind in names
    ]
    ended = run_ranks(run_with_copies, 2, [kind for _, kind in names], configs, timeout=300)
    assert ended == [["finished"] * len(names)] * 2
    return root


def differing(runs: Path, layout: str, kind: str, step: int) -> int:
    """How many tensors differ from those that were copied at once."""
    one, other = (tensors(runs / layout / name / f"checkpoints/step-{step:08d}") for name in ("now", kind))
    assert one.keys() == other.keys()
    return sum(not one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_has_the_state_of_its_step(runs: Path, layout: str) -> None:
    """Prevents a checkpoint with weights or moments of a later step: a GPU copies them while training continues."""
    assert [differing(runs, layout, "late", step) for step in (4, 6)] == [0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_wait_for_copies_of_what_they_change_and_for_no_others(runs: Path, layout: str) -> None:
    """Prevents the test above from passing because nothing changes in the meantime, and an update that waits for nothing: at
    stages 1 to 3 copies that no update waits for must not differ."""
    assert (differing(runs, layout, "too late", 4) > 10) == (layout in LIVE)
    assert differing(runs, layout, "too late", 6) == 0
