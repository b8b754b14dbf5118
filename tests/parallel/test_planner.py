"""Compares the bytes that the planner predicts with those of real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import RunConfig
from recycle_ds.config.deepspeed_json import load_deepspeed_json, zero_stage
from recycle_ds.parallel.layout import layout_of
from recycle_ds.planning import memory
from recycle_ds.planning.activations import CPU
from recycle_ds.planning.candidates import Candidate
from tests.distributed import run_in_sets
from tests.parallel.planner_reality import measure
from tests.runs import make_corpus, tiny_run, zero

BF16 = {"training__dtype": "bf16"}
PP2, TP2, SP = {"parallel__pipeline": 2}, {"parallel__tensor": 2}, {"parallel__sequence": True}
FROZEN = {"recycle__gradient": "frozen_backbone", "recycle__taps": [1, 8], "recycle__depth": 2}
FULL = {"training__activation_checkpointing": "full"}
# Sizes of buffers that ZeRO allocates even for a small model, and of weights that it keeps gathered. They are reduced
# to almost zero here.
BUCKETS = {
    "reduce_bucket_size": 1000,
    "stage3_param_persistence_threshold": 200,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
# name: (ranks, ZeRO stage, changes)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ZeRO 0, DP 2": (2, 0, {}),
    "ZeRO 1, DP 2": (2, 1, {}),
    "ZeRO 1, DP 2, bf16": (2, 1, BF16),
    "ZeRO 1, DP 2, bf16, 12 micro-batches": (
        2, 1, BF16 | {"training__micro_batch_size": 1, "training__global_batch_size": 24},
    ),
    "ZeRO 2, DP 2, bf16, depth 3": (2, 2, BF16 | {"recycle__depth": 3}),
    "ZeRO 3, DP 2": (2, 3, {"model__tied_embeddings": False}),
    "ZeRO 3, DP 2, bf16, recompute": (2, 3, BF16 | FULL | {"recycle__depth": 3}),
    "ZeRO 3, DP 2, frozen": (2, 3, FROZEN),
    "TP 2": (2, 1, TP2),
    "TP 2 + SP, recompute, depth 3": (2, 1, TP2 | SP | FULL | {"recycle__depth": 3}),
    "TP 2 + SP, bf16": (2, 1, TP2 | SP | BF16),
    "TP 2, norms of queries and keys": (2, 1, TP2 | {"model__qk_norm": True, "recycle__depth": 2}),
    "Ulysses 2, norms of queries and keys, bf16": (2, 1, BF16 | {"parallel__ulysses": 2, "model__qk_norm": True}),
    "PP 2": (2, 1, PP2),
    "PP 2, bf16, untied": (2, 1, PP2 | BF16 | {"model__tied_embeddings": False}),
    "Ulysses 2": (2, 1, {"parallel__ulysses": 2}),
    "PP 2 x TP 2 + SP": (4, 1, PP2 | TP2 | SP),
    "PP 2 x DP 2": (4, 1, PP2),
    "TP 2 x DP 2, ZeRO 2": (4, 2, TP2),
}  # fmt: skip


def make_runs(root: Path) -> dict[str, RunConfig]:
    """Runs of a model whose weights are larger than its batches, with bucket sizes and thresholds for this model."""
    corpus = make_corpus(root / "corpus")
    base = {
        "model__layers": 10, "model__hidden": 96, "model__ffn": 192, "model__vocab_size": 320, "recycle__depth": 1,
        "training__micro_batch_size": 2,
    }  # fmt: skip
    found = {}
    for name, (_, stage, change) in LAYOUTS.items():
        tree = load_deepspeed_json(zero(stage))
        tree["zero_optimization"] |= BUCKETS
        path = root / f"zero{stage}.json"
        path.write_text(json.dumps(tree))
        found[name] = tiny_run(corpus, root / name, **(base | change | {"deepspeed": str(path)}))
    return found


def predicted(config: RunConfig, world_size: int) -> list[tuple[float, float]]:
    """Per rank: bytes of states and of activations."""
    layout = layout_of(config.parallel, world_size)
    training = config.training
    candidate = Candidate(
        layout,
        zero_stage(load_deepspeed_json(config.deepspeed)),
        training.micro_batch_size,
        training.activation_checkpointing,
        offload=False,
        sequence=config.parallel.sequence,
    )
    by_stage = [memory.stage_memory(config, candidate, stage, CPU) for stage in range(layout.pipeline)]
    stages = [layout.coordinates(rank).pipeline for rank in range(world_size)]
    return [(by_stage[stage].states, by_stage[stage].activations) for stage in stages]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float, float, float]]]:
    return compare(tmp_path_factory.mktemp("planner"))


def compare(root: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """Per layout and rank: states predicted and held, activations predicted and held."""
    runs = make_runs(root)
    found = {}
    for world_size in (2, 4):
        names = [name for name, (size, _, _) in LAYOUTS.items() if size == world_size]
        held = run_in_sets(measure, world_size, [runs[name] for name in names])
        for index, name in enumerate(names):
            rows = zip(predicted(runs[name], world_size), (rank[index] for rank in held), strict=True)
            found[name] = [(planned[0], real[0], planned[1], real[1]) for planned, real in rows]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_states_are_those_that_a_run_holds(comparison: dict[str, Any], name: str) -> None:
    """Prevents wrong predictions of weights, gradients and optimizer state, and with them plans that do not fit."""
    for states, held, _, _ in comparison[name]:
        assert states == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_activations_are_those_that_a_run_holds(comparison: dict[str, Any], name: str) -> None:
    """Prevents wrong predictions of the activations kept for the backward pass."""
    for _, _, activations, held in comparison[name]:
        assert activations == pytest.approx(held, rel=0.10)


def test_layouts_differ(comparison: dict[str, Any]) -> None:
    """Prevents layouts so similar that any formula would pass."""
    assert len(comparison) >= 8
    assert len({round(rows[0][1], -4) for rows in comparison.values()}) >= 8
    assert len({round(rows[0][3], -4) for rows in comparison.values()}) >= 8


def main() -> None:
    """Prints the table of docs/planner.md."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = compare(Path(folder))
    print("| layout | rank | states, MiB: predicted | held | activations, MiB: predicted | held |")
    print("|---|---|---|---|---|---|")
    for name, rows in table.items():
        for rank, row in enumerate(rows):
            if rank == 0 or row != rows[rank - 1]:
                print(f"| {name} | {rank} | " + " | ".join(f"{value / 2**20:.2f}" for value in row) + " |")


if __name__ == "__main__":
    main()
