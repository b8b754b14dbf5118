"""A frozen backbone costs its bf16 weights and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_in_sets
from tests.parallel.frozen import Held, hold
from tests.parallel.parity import PIPELINE
from tests.runs import make_corpus, tiny_run, zero

BASE = {
    "model__layers": 10, "model__hidden": 96, "model__ffn": 192, "model__vocab_size": 320, "recycle__depth": 2,
    "recycle__taps": [1, 8], "recycle__objective": "acceptance", "recycle__gradient": "frozen_backbone",
    "training__dtype": "bf16", "training__micro_batch_size": 4,
}  # fmt: skip
# name: ranks, changes, replicas among which a rank's optimizer state is divided
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "zero0": (1, {"deepspeed": zero(0)}, 1),
    "zero1": (2, {"deepspeed": zero(1)}, 2),
    "zero2": (2, {"deepspeed": zero(2)}, 2),
    "zero3": (2, {"deepspeed": zero(3)}, 2),
    "tp2": (2, {"deepspeed": zero(1), "parallel__tensor": 2}, 1),
    "pp2": (2, {"deepspeed": PIPELINE, "parallel__pipeline": 2}, 1),
}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Held]]:
    """By layout and rank."""
    root = tmp_path_factory.mktemp("frozen")
    corpus = make_corpus(root / "corpus")
    found = {}
    for size in (1, 2):
        names = [name for name, (ranks, _, _) in LAYOUTS.items() if ranks == size]
        runs = [tiny_run(corpus, root / name, **(BASE | LAYOUTS[name][1])) for name in names]
        results = run_in_sets(hold, size, runs)
        found |= {name: [rank[index] for rank in results] for index, name in enumerate(names)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_module_is_optimized(held: dict[str, list[Held]], layout: str) -> None:
    """Prevents gradients, fp32 masters, moments, host copies and graphs of weights that never change."""
    replicas = LAYOUTS[layout][2]
    for rank in held[layout]:
        assert rank.gradients == [] and not rank.outputs
        assert rank.module / replicas <= rank.optimized <= rank.module / replicas + 200, "padding of partitions"
        assert rank.moments == rank.optimized
        # masters, two moments, and gradients that are summed in fp32 or were just reduced
        assert rank.backbone > 6 * rank.module or (layout, rank.module > 0) == ("pp2", True)
        assert rank.fp32 < 5 * rank.module + 20_000, (rank.fp32 / rank.module, "the backbone has an fp32 copy")
