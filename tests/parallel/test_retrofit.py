"""The retrofit's settings at every layout: losses, gradient norms and evaluations equal those of the single process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_in_sets
from tests.parallel.parity import PIPELINE, Change, Curve, assert_equal, curves_of, run_cases
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, read_metrics, steps_of, tiny_run, zero

BASE: Change = {
    "model__layers": 3, "training__eval_every": 5, "training__eval_batches": 1, "training__micro_batch_size": 4,
    "training__learning_rate": 2e-3, "training__dry_run": False,
}  # fmt: skip
# Several settings in one run: each changes the losses, so that none can be wrong unnoticed.
SHAPES: dict[str, Change] = {
    "joint": {
        "recycle__depth": 2, "recycle__taps": [0, 1], "recycle__objective": "kl", "recycle__confidence": True,
        "training__loss_chunk": 50,
    },
    "detached": {"recycle__depth": 3, "recycle__gradient": "detached", "recycle__objective": "acceptance"},
    "frozen": {
        "recycle__depth": 2, "recycle__taps": [1, 2], "recycle__gradient": "frozen_backbone",
        "recycle__objective": "acceptance", "recycle__draft_vocabulary": 40,
        "recycle__draft_vocabulary_in_training": True, "recycle__confidence": True,
    },
    "drafted": {
        "recycle__depth": 2, "recycle__draft_vocabulary": 100, "recycle__draft_vocabulary_in_training": True,
        "recycle__confidence": True,
    },
}  # fmt: skip
LAYOUTS: dict[int, dict[str, Change]] = {
    2: {
        "tp2": {"parallel__tensor": 2},
        "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
        "ulysses2_zero3": {"parallel__ulysses": 2, "deepspeed": zero(3)},
        "pp2": {"parallel__pipeline": 2, "deepspeed": PIPELINE},
    },
    4: {"pp2_tp2_sp": {
        "parallel__pipeline": 2, "parallel__tensor": 2, "parallel__sequence": True, "deepspeed": PIPELINE,
        "training__activation_checkpointing": "full",
    }},
}  # fmt: skip
# Not every shape at every layout: each run takes two seconds.
SHAPES_OF = {
    "tp2": ("frozen",),
    "tp2_sp": ("joint", "drafted", "frozen"),
    "ulysses2_zero3": ("joint", "frozen"),
    "pp2": ("joint", "detached", "frozen"),
    "pp2_tp2_sp": ("joint", "drafted"),
}
CASES = {
    size: {
        f"{layout}/{shape}": BASE | SHAPES[shape] | given
        for layout, given in layouts.items()
        for shape in SHAPES_OF[layout]
    }
    for size, layouts in LAYOUTS.items()
}
ALL = [name for cases in CASES.values() for name in cases]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrofit")


@pytest.fixture(scope="module")
def curves(root: Path) -> dict[str, Curve]:
    """Metrics by step of every reference and case."""
    corpus = make_corpus(root / "corpus")
    run_cases(corpus, root, 1, {name: BASE | change | {"deepspeed": zero(0)} for name, change in SHAPES.items()})
    for world_size, cases in CASES.items():
        run_cases(corpus, root, world_size, cases)
    return curves_of(root, [*SHAPES, *ALL])


@pytest.mark.parametrize("name", ALL)
def test_equals_the_single_process(curves: dict[str, Curve], root: Path, name: str) -> None:
    """Prevents tapped states and losses that are sharded, sent or reduced wrongly, in training and in evaluation."""
    shape = name.rpartition("/")[2]
    if SHAPES[shape].get("recycle__objective") == "acceptance":
        # its gradient jumps where q = p: rounding may put a token, of which hundreds are near, on the other side
        assert [one[-1] for one in curves[name]] == pytest.approx([one[-1] for one in curves[shape]], rel=2e-4)
        assert_equal(*([one[:-1] for one in curves[run]] for run in (name, shape)))
    else:
        assert_equal(curves[name], curves[shape])
    for left, right in zip(steps_of(root / name), steps_of(root / shape), strict=True):
        assert left.get("confidence_loss", []) == pytest.approx(right.get("confidence_loss", []), rel=1e-4)
    own, reference = ([r for r in read_metrics(root / run) if "eval_loss" in r][-1] for run in (name, shape))
    for key in set(reference) - {"step"}:
        assert own[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-9), key


def test_taps_count(curves: dict[str, Curve], root: Path) -> None:
    """Prevents parity of runs in which the tapped states have no influence."""
    untapped = {"joint": BASE | SHAPES["joint"] | {"recycle__taps": [], "deepspeed": zero(0)}}
    run_cases(root / "corpus", root / "untapped", 1, untapped)
    for name, curve in curves_of(root / "untapped", untapped).items():
        assert curve[0] != curves[name][0], "gradient norm of the first step"
        assert curve[4][0] != pytest.approx(curves[name][4][0], rel=1e-5)


def test_a_frozen_pipeline_resumes(curves: dict[str, Curve], root: Path) -> None:
    """Prevents a checkpoint that lacks the optimizer's state of the only stage that trains, at this and at other layouts."""
    changes = BASE | SHAPES["frozen"] | {"recycle__confidence": True}
    first, second = (changes | LAYOUTS[2]["pp2"] | {"training__stop_at": step} for step in (3, 5))
    halves = {"pp2_stopped": first, "pp2_moved": first}
    run_cases_until(root, 2, halves, "stop_at")
    run_cases_until(root, 2, {"pp2_stopped": second}, "finished")
    run_cases_until(root, 1, {"pp2_moved": changes | {"deepspeed": zero(0)}}, "finished")
    found = curves_of(root, halves)
    assert found["pp2_stopped"] == curves["pp2/frozen"]
    assert_equal(*([one[:-1] for one in curve] for curve in (found["pp2_moved"], curves["frozen"])))


def run_cases_until(root: Path, world_size: int, cases: dict[str, Change], ending: str) -> None:
    """Runs cases that end in a given way."""
    runs = [tiny_run(root / "corpus", root / name, **change) for name, change in cases.items()]
    assert run_in_sets(run_all, world_size, runs) == [[ending] * len(runs)] * world_size
