"""Compares ZeRO 0-3 on two ranks with the single process: losses and gradient norms of five steps, to five digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint.portable.manifest import read_manifest
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.config import parse_config
from recycle_ds.model.initialisation import initial_tensor
from tests.distributed import run_in_sets
from tests.parallel.parity import assert_equal, assert_rounded
from tests.parallel.ranks import run_all
from tests.runs import figures, make_corpus, tiny_run, zero

Cases = list[tuple[str, dict[str, Any]]]

STAGES: Cases = [
    (f"zero{stage}", {"deepspeed": zero(stage)}) for stage in (0, 1, 2, 3, "1_offload", "2_offload", "3_offload")
]
# Twelve micro-batches on each of two ranks: enough to be accumulated in fp32 at ZeRO 1 too.
MANY = {"training__micro_batch_size": 1, "training__global_batch_size": 24}
CASES: Cases = [
    *STAGES,
    ("untied", {"model__tied_embeddings": False, "deepspeed": zero(3)}),
    ("micro1", {"training__micro_batch_size": 1}),
    ("micro4", {"training__micro_batch_size": 4}),
    ("detached", {"recycle__gradient": "detached", "deepspeed": zero(2)}),
    ("frozen", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(2)}),
    ("frozen3", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(3)}),
    ("frozen_bf16", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(3), "training__dtype": "bf16"}),
    ("checkpointed", {"training__activation_checkpointing": "full"}),
    ("tensor2", {"parallel__tensor": 2, "deepspeed": zero(1)}),
    ("tensor2_untied", {"parallel__tensor": 2, "deepspeed": zero(0), "model__tied_embeddings": False}),
    ("no_dry_run", {"training__dry_run": False, "deepspeed": zero(3)}),
    (
        "tensor2_zero3_bf16",
        {
            "parallel__tensor": 2,
            "deepspeed": zero(3),
            "training__dtype": "bf16",
            "training__activation_checkpointing": "full",
        },
    ),
    *[(f"bf16_{name}", change | {"training__dtype": "bf16"}) for name, change in STAGES[:4]],
    *[
        (f"many_bf16_{name}", change | MANY | {"training__dtype": "bf16"})
        for name, change in [
            *STAGES[1:5],
            ("detached", {"recycle__gradient": "detached"}),
            ("tensor2", {"parallel__tensor": 2}),
        ]
    ],
]
# 200 norm weights per group over three replicas: DeepSpeed pads the last partition with zeros.
UNEVEN_SHAPE = {"model__hidden": 40, "training__global_batch_size": 12}
UNEVEN: Cases = [(f"uneven_zero{stage}", UNEVEN_SHAPE | {"deepspeed": zero(stage)}) for stage in (1, 2, "2_offload", 3)]
UNEVEN.append(("uneven_bf16", UNEVEN_SHAPE | {"deepspeed": zero(2), "training__dtype": "bf16"}))
# Runs of the single process: one reference for all cases that differ only in layout.
REFERENCES: Cases = [
    ("plain", {"deepspeed": zero(0)}),
    ("untied", {"model__tied_embeddings": False, "deepspeed": zero(0)}),
    ("detached", {"recycle__gradient": "detached", "deepspeed": zero(0)}),
    ("frozen", {"recycle__gradient": "frozen_backbone", "deepspeed": zero(0)}),
    ("bf16", {"training__dtype": "bf16", "deepspeed": zero(0)}),
    ("no_module", {"recycle__layers": 0, "deepspeed": zero(0)}),
    ("uneven", UNEVEN_SHAPE | {"deepspeed": zero(0)}),
    # all sequences in one micro-batch: nothing to accumulate
    *[
        (name, MANY | change | {"training__micro_batch_size": 24, "training__dtype": "bf16", "deepspeed": zero(0)})
        for name, change in (("many_bf16", {}), ("many_bf16_detached", {"recycle__gradient": "detached"}))
    ],
]


REFERENCE_OF = {
    "untied": "untied",
    "tensor2_untied": "untied",
    "detached": "detached",
    "frozen": "frozen",
    "frozen3": "frozen",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def curves(root: Path) -> Iterator[dict[str, list[list[float]]]]:
    """Metrics by step of every case ("2/name": two ranks, "1/name": one, "3/name": three)."""
    corpus = make_corpus(root / "corpus")
    found = {}
    for world_size, cases in ((1, REFERENCES), (2, CASES), (3, UNEVEN)):
        runs = [tiny_run(corpus, root / f"{world_size}" / name, **change) for name, change in cases]
        endings = run_in_sets(run_all, world_size, runs)
        assert endings == [["finished"] * len(runs)] * world_size
        found.update({f"{world_size}/{name}": figures(root / f"{world_size}" / name) for name, _ in cases})
    yield found


@pytest.mark.parametrize("name", [name for name, _ in CASES if "bf16" not in name])
def test_equals_the_single_process(curves: dict[str, list[list[float]]], name: str) -> None:
    """Prevents a stage, micro-batch size or gradient mode that silently averages, clips or partitions wrongly."""
    assert_equal(curves[f"2/{name}"], curves[f"1/{REFERENCE_OF.get(name, 'plain')}"])


@pytest.mark.parametrize("name", ["bf16_zero0", "bf16_zero1", "bf16_zero2", "bf16_zero3", "tensor2_zero3_bf16"])
def test_bf16_stays_within_its_rounding(curves: dict[str, list[list[float]]], name: str) -> None:
    """Prevents a stage whose bf16 gradients or fp32 master weights are wrong by more than bf16's rounding."""
    assert_rounded(curves[f"2/{name}"], curves["1/bf16"])


@pytest.mark.parametrize("name", [name for name, _ in UNEVEN])
def test_replicas_that_do_not_divide_the_weights(curves: dict[str, list[list[float]]], name: str) -> None:
    """Prevents a crash at some numbers of ranks because padding of a partition was used as a parameter's gradient."""
    (assert_rounded if "bf16" in name else assert_equal)(curves[f"3/{name}"], curves["1/uneven"])


@pytest.mark.parametrize("name", [name for name, _ in CASES if name.startswith("many_bf16")])
def test_many_micro_batches_in_bf16(curves: dict[str, list[list[float]]], root: Path, name: str) -> None:
    """Prevents norms of partial sums, and missing clipping, in the optimizer for ZeRO 1 that accumulates in fp32."""
    reference = curves["1/many_bf16_detached" if "detached" in name else "1/many_bf16"]
    assert_rounded(curves[f"2/{name}"], reference)
    assert all(row[-1] != pytest.approx(1.0, rel=1e-3) for row in reference), "a norm after clipping would pass"


def test_losses_fall(curves: dict[str, list[list[float]]]) -> None:
    """Prevents parity between runs that learn nothing."""
    first, last = curves["1/plain"][0], curves["1/plain"][-1]
    assert all(after < before - 0.1 for before, after in zip(first[1:-1], last[1:-1], strict=True))


def test_detached_leaves_the_backbone_alone(curves: dict[str, list[list[float]]]) -> None:
    """Prevents a recycle loss that reaches the backbone through states, embedding, head or a shared clipping norm."""
    detached = [row[1] for row in curves["1/detached"]]
    plain = [row[1] for row in curves["1/no_module"]]
    assert detached == plain
    assert curves["1/plain"][-1][1] != plain[-1], "the joint run must differ, or this test proves nothing"


@pytest.mark.parametrize("name", ["frozen", "frozen3", "frozen_bf16"])
def test_frozen_backbone_stays(curves: dict[str, list[list[float]]], root: Path, name: str) -> None:
    """Prevents a frozen backbone that decays or is saved from the model's bf16 copy: it must stay bit-identical."""
    folder = root / "2" / name / "checkpoints" / "step-00000005"
    manifest = read_manifest(folder)
    config = parse_config(manifest.config)
    reader = PortableSource(folder, manifest)
    moved = []
    for tensor, entry in manifest.tensors.items():
        initial = initial_tensor(tensor, tuple(entry.shape), config.model, config.training.seed)
        if not torch.equal(reader.read(tensor, "weight"), initial):
            moved.append(tensor)
    assert moved and all(tensor.startswith("recycle.") for tensor in moved)
    assert curves[f"2/{name}"][-1][2] < curves[f"2/{name}"][0][2] - 0.05
