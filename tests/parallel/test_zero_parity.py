"""ZeRO 0-3 over two ranks against the single process: losses and gradient norms of five steps, to five digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import figures, make_corpus, tiny_run, zero

Cases = list[tuple[str, dict[str, Any]]]

STAGES: Cases = [(f"zero{stage}", {"deepspeed": zero(stage)}) for stage in (0, 1, 2, 3, "3_offload")]
CASES: Cases = [
    *STAGES,
    ("untied", {"model__tied_embeddings": False, "deepspeed": zero(3)}),
    ("micro1", {"training__micro_batch_size": 1}),
    ("micro4", {"training__micro_batch_size": 4}),
    ("detached", {"recycle__gradient": "detached", "deepspeed": zero(2)}),
    ("frozen", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(2)}),
    ("frozen3", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(3)}),
    ("checkpointed", {"training__activation_checkpointing": "full"}),
    ("tensor2", {"parallel__tensor": 2, "deepspeed": zero(1)}),
    ("tensor2_untied", {"parallel__tensor": 2, "deepspeed": zero(0), "model__tied_embeddings": False}),
    ("no_dry_run", {"training__dry_run": False, "deepspeed": zero(3)}),
    *[(f"bf16_{name}", change | {"training__dtype": "bf16"}) for name, change in STAGES[:4]],
]
# What the single process runs: one reference for every case that differs in layout only.
REFERENCES: Cases = [
    ("plain", {"deepspeed": zero(0)}),
    ("untied", {"model__tied_embeddings": False, "deepspeed": zero(0)}),
    ("detached", {"recycle__gradient": "detached", "deepspeed": zero(0)}),
    ("frozen", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(0)}),
    ("bf16", {"training__dtype": "bf16", "deepspeed": zero(0)}),
    ("no_module", {"recycle__layers": 0, "deepspeed": zero(0)}),
]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[list[float]]]]:
    """Figures by step of every case ("2/name": two ranks, "1/name": one)."""
    root = tmp_path_factory.mktemp("zero")
    corpus = make_corpus(root / "corpus")
    found = {}
    for world_size, cases in ((1, REFERENCES), (2, CASES)):
        runs = [tiny_run(corpus, root / f"{world_size}" / name, **change) for name, change in cases]
        run_ranks(run_all, world_size, runs, timeout=400)
        found.update({f"{world_size}/{name}": figures(root / f"{world_size}" / name) for name, _ in cases})
    yield found


def assert_equal(mine: list[list[float]], reference: list[list[float]], relative: float = 1e-5) -> None:
    assert len(mine) == len(reference) == 5
    for step, (left, right) in enumerate(zip(mine, reference, strict=True), start=1):
        assert left == pytest.approx(right, rel=relative), f"step {step}: {left} instead of {right}"


@pytest.mark.parametrize("name", [name for name, _ in CASES if not name.startswith("bf16")])
def test_equals_the_single_process(curves: dict[str, list[list[float]]], name: str) -> None:
    """A stage, micro-batch size or gradient mode that silently averages, clips or partitions wrongly."""
    reference = {"frozen3": "frozen", "tensor2_untied": "untied"}.get(name, name)
    assert_equal(curves[f"2/{name}"], curves.get(f"1/{reference}", curves["1/plain"]))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_within_its_rounding(curves: dict[str, list[list[float]]], stage: int) -> None:
    """A stage whose bf16 gradients or fp32 masters go wrong by more than bf16 rounds."""
    assert_equal(curves[f"2/bf16_zero{stage}"], curves["1/bf16"], relative=2e-2)


def test_losses_fall(curves: dict[str, list[list[float]]]) -> None:
    """Parity between runs none of which learns anything."""
    first, last = curves["1/plain"][0], curves["1/plain"][-1]
    assert all(after < before - 0.1 for before, after in zip(first[1:-1], last[1:-1], strict=True))


def test_detached_leaves_the_backbone_alone(curves: dict[str, list[list[float]]]) -> None:
    """A recycle loss that reaches the backbone through states, embedding, head or a shared clipping norm: bit for bit."""
    detached = [row[1] for row in curves["1/detached"]]
    plain = [row[1] for row in curves["1/no_module"]]
    assert detached == plain
    assert curves["1/plain"][-1][1] != plain[-1], "the joint run must differ, or this test shows nothing"


def test_frozen_backbone_stays(curves: dict[str, list[list[float]]], tmp_path: Path) -> None:
    """A frozen backbone that moves: its loss on the same data would differ from that of its initial weights."""
    trained = curves["1/frozen"]
    assert trained[0][1] == pytest.approx(curves["1/plain"][0][1], rel=1e-6)
    assert trained[-1][2] < trained[0][2] - 0.05
