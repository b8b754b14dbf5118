"""Compares every layout with the single process: losses, gradient norms and evaluation of five steps.

Several cases of a world size share a set of processes. The runs train, evaluate and save like users' runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.config import ConfigError
from tests.distributed import run_ranks
from tests.parallel.parity import PIPELINE, Change, Curve, assert_equal, assert_rounded, curves_of, run_cases
from tests.parallel.ranks import BREAKAGES, run_broken
from tests.runs import make_corpus, read_metrics, tiny_run, zero

# An odd number of layers makes pipeline stages uneven. Of the two key/value heads, each of two tensor ranks has one.
BASE: Change = {
    "model__layers": 3, "training__eval_every": 5, "training__eval_batches": 1, "training__micro_batch_size": 4,
    "training__learning_rate": 2e-3, "training__dry_run": False,
}  # fmt: skip
SHAPES: dict[str, Change] = {
    "tied1": {"recycle__depth": 1},
    "tied3": {"recycle__depth": 3},
    "untied1": {"recycle__depth": 1, "model__tied_embeddings": False, "model__qkv_bias": True},
    "untied3": {"recycle__depth": 3, "model__tied_embeddings": False, "model__qkv_bias": True},
}
LAYOUTS: dict[int, dict[str, Change]] = {
    2: {
        "tp2": {"parallel__tensor": 2},
        "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
        "tp2_sp_zero3": {"parallel__tensor": 2, "parallel__sequence": True, "deepspeed": zero(3)},
        "pp2": {"parallel__pipeline": 2, "deepspeed": PIPELINE},
        "pp2_zero0": {"parallel__pipeline": 2, "deepspeed": zero(0)},
        "ulysses2": {"parallel__ulysses": 2},
        "ulysses2_zero3": {"parallel__ulysses": 2, "deepspeed": zero(3)},
    },
    4: {
        "pp2_tp2": {"parallel__pipeline": 2, "parallel__tensor": 2, "deepspeed": PIPELINE},
        "pp2_tp2_sp": {
            "parallel__pipeline": 2, "parallel__tensor": 2, "parallel__sequence": True, "deepspeed": PIPELINE,
        },
        "pp2_dp2": {"parallel__pipeline": 2, "deepspeed": PIPELINE},
        "tp2_dp2_zero1": {"parallel__tensor": 2, "deepspeed": zero(1)},
        "tp2_dp2_zero2": {"parallel__tensor": 2, "parallel__sequence": True, "deepspeed": zero(2)},
        "tp2_dp2_zero3": {"parallel__tensor": 2, "deepspeed": zero(3)},
        "ulysses2_dp2_zero2": {"parallel__ulysses": 2, "deepspeed": zero(2)},
    },
}  # fmt: skip
# Additional cases outside the product of layouts and shapes.
SPECIAL: dict[int, dict[str, tuple[str, Change]]] = {
    2: {
        "pp2_detached": ("detached", {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
        "pp2_untied_detached": ("untied_detached", {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
        "tp2_sp_detached": ("detached", {"parallel__tensor": 2, "parallel__sequence": True}),
        "pp2_plain_lm": ("plain_lm", {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
        "pp2_recompute": (
            "tied3",
            {"parallel__pipeline": 2, "deepspeed": PIPELINE, "training__activation_checkpointing": "full"},
        ),
        "pp2_micro1": ("tied3", {"parallel__pipeline": 2, "deepspeed": PIPELINE, "training__micro_batch_size": 1}),
        "pp2_micro2": ("tied3", {"parallel__pipeline": 2, "deepspeed": PIPELINE, "training__micro_batch_size": 2}),
        "pp2_one_micro_batch": (
            "tied3", {"parallel__pipeline": 2, "deepspeed": PIPELINE, "training__micro_batch_size": 8},
        ),
        "tp2_offload": ("tied3", {"parallel__tensor": 2, "deepspeed": zero("3_offload")}),
        "ulysses2_recompute": ("tied3", {"parallel__ulysses": 2, "training__activation_checkpointing": "full"}),
        "tp2_sp_small_chunk": (
            "tied3", {"parallel__tensor": 2, "parallel__sequence": True, "training__loss_chunk": 50},
        ),
        "tp2_head_norms": ("head_norms", {"parallel__tensor": 2}),
        "tp2_sp_head_norms_zero3": (
            "head_norms", {"parallel__tensor": 2, "parallel__sequence": True, "deepspeed": zero(3)},
        ),
        "pp2_head_norms": ("head_norms", {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
        "ulysses2_head_norms": ("head_norms", {"parallel__ulysses": 2}),
        "tp2_odd_hidden": ("odd_hidden", {"parallel__tensor": 2}),
        "tp2_sp_frozen": (
            "frozen", {"parallel__tensor": 2, "parallel__sequence": True, "deepspeed": zero(3)},
        ),
    },
    4: {
        "pp4": (
            "four_layers", {"parallel__pipeline": 4, "deepspeed": PIPELINE, "training__micro_batch_size": 1},
        ),
        "tp2_dp2_head_norms": ("head_norms", {"parallel__tensor": 2, "deepspeed": zero(2)}),
        "pp2_tp2_head_norms": (
            "head_norms", {"parallel__pipeline": 2, "parallel__tensor": 2, "deepspeed": PIPELINE},
        ),
        "tp2_dp2_micro1": ("tied3", {"parallel__tensor": 2, "deepspeed": zero(2), "training__micro_batch_size": 1}),
        "tp2_dp2_micro2": ("tied3", {"parallel__tensor": 2, "deepspeed": zero(3), "training__micro_batch_size": 2}),
        # every tensor rank has one key/value head, and one rank has only vocabulary padding
        "tp4_sp": ("four_kv_heads", {"parallel__tensor": 4, "parallel__sequence": True, "deepspeed": zero(3)}),
        "pp4_untied": (
            "four_layers_untied", {"parallel__pipeline": 4, "deepspeed": PIPELINE, "training__micro_batch_size": 1},
        ),
        "pp2_tp2_zero0": ("tied3", {"parallel__pipeline": 2, "parallel__tensor": 2, "deepspeed": zero(0)}),
        "pp2_dp2_zero0": ("untied1", {"parallel__pipeline": 2, "deepspeed": zero(0)}),
        "tp2_dp2_zero0": ("tied3", {"parallel__tensor": 2, "deepspeed": zero(0)}),
        "tp2_dp2_offload2": ("tied3", {"parallel__tensor": 2, "deepspeed": zero("2_offload")}),
        "tp2_dp2_offload3": ("untied3", {"parallel__tensor": 2, "deepspeed": zero("3_offload")}),
        "ulysses2_dp2_micro1": ("tied3", {"parallel__ulysses": 2, "training__micro_batch_size": 1}),
        "ulysses2_dp2_micro2": ("tied3", {"parallel__ulysses": 2, "training__micro_batch_size": 2}),
        "pp2_dp2_micro1": (
            "tied3", {"parallel__pipeline": 2, "deepspeed": PIPELINE, "training__micro_batch_size": 1},
        ),
    },
}  # fmt: skip
EXTRA_SHAPES: dict[str, Change] = {
    "detached": {"recycle__depth": 2, "recycle__gradient": "detached"},
    "untied_detached": {"recycle__depth": 2, "recycle__gradient": "detached", "model__tied_embeddings": False},
    "plain_lm": {"recycle__layers": 0},
    # Qwen3's norms of queries and keys, wide heads, and a layer without rotary embedding
    "head_norms": {
        "recycle__depth": 2, "model__qk_norm": True, "model__head_dim": 16, "model__rope__unrotated_layers": [1],
        "training__activation_checkpointing": "full",
    },
    "frozen": {"recycle__depth": 2, "recycle__gradient": "frozen_backbone"},
    # without a recycle module, the hidden width is not split
    "odd_hidden": {"recycle__layers": 0, "model__hidden": 45, "model__head_dim": 12},
    "four_layers": {"recycle__depth": 2, "model__layers": 4},
    "four_layers_untied": {"recycle__depth": 2, "model__layers": 4, "model__tied_embeddings": False},
    "four_kv_heads": {"recycle__depth": 2, "model__kv_heads": 4},
}  # fmt: skip
BF16: Change = {"training__dtype": "bf16"}
# The shape and the layout in which each breakage occurs.
BROKEN: dict[str, tuple[str, Change]] = {
    "norm_gradients": ("tied3", {"parallel__tensor": 2, "parallel__sequence": True}),
    "head_norm_gradients": ("head_norms", {"parallel__tensor": 2}),
    "tied_embedding": ("tied3", {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
    "recycle_scale": ("tied3", {"parallel__ulysses": 2}),
}


def cases(world_size: int) -> dict[str, tuple[str, Change]]:
    """Every case of a world size: its name, the reference that it must equal, and its changes."""
    found: dict[str, tuple[str, Change]] = {}
    for layout, change in LAYOUTS[world_size].items():
        for shape, model in SHAPES.items():
            found[f"{layout}/{shape}"] = (shape, BASE | model | change)
        if "zero0" not in layout:
            found[f"{layout}/bf16"] = ("bf16", BASE | SHAPES["tied3"] | change | BF16)
    for name, (shape, change) in SPECIAL[world_size].items():
        found[name] = (shape, BASE | (SHAPES | EXTRA_SHAPES)[shape] | change)
    return found


REFERENCES: dict[str, Change] = {
    **{name: BASE | change | {"deepspeed": zero(0)} for name, change in (SHAPES | EXTRA_SHAPES).items()},
    "bf16": BASE | SHAPES["tied3"] | BF16 | {"deepspeed": zero(0)},
}
ALL = {name: (shape, size) for size in LAYOUTS for name, (shape, _) in cases(size).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    return make_corpus(root / "corpus")


@pytest.fixture(scope="module")
def curves(root: Path, corpus: Path) -> dict[str, Curve]:
    """Metrics by step of every reference and case."""
    run_cases(corpus, root, 1, REFERENCES)
    for world_size in LAYOUTS:
        run_cases(corpus, root, world_size, {name: change for name, (_, change) in cases(world_size).items()})
    return curves_of(root, [*REFERENCES, *ALL])


@pytest.mark.parametrize("name", ALL)
def test_equals_the_single_process(curves: dict[str, Curve], name: str) -> None:
    """Prevents a layout that silently shards, reduces, averages or clips wrongly."""
    shape, _ = ALL[name]
    (assert_rounded if shape == "bf16" else assert_equal)(curves[name], curves[shape])


@pytest.mark.parametrize("name", ALL)
def test_evaluation_equals_the_single_process(curves: dict[str, Curve], root: Path, name: str) -> None:
    """Prevents validation figures that count a rank twice, or that omit those of another stage or sequence part."""
    shape, _ = ALL[name]
    own, reference = ([r for r in read_metrics(root / run) if "eval_loss" in r][-1] for run in (name, shape))
    close = 5e-3 if shape == "bf16" else 1e-5
    assert own["eval_loss"] == pytest.approx(reference["eval_loss"], rel=close)
    assert own["eval_recycle_loss"] == pytest.approx(reference["eval_recycle_loss"], rel=close)
    # measured over some hundred positions; in bf16, rounding may decide a near tie differently
    assert own["eval_acceptance"] == pytest.approx(reference["eval_acceptance"], abs=0.1 if shape == "bf16" else 1e-9)
    assert len(own["eval_acceptance"]) == len(reference["eval_acceptance"])


@pytest.mark.parametrize(("name", "expected"), [
    ("pp2_tp2_sp/tied3", {"tensor": 2, "pipeline": 2, "data": 1, "sequence": True, "ulysses": 1, "zero_stage": 1}),
    ("ulysses2_dp2_zero2/tied3", {"tensor": 1, "pipeline": 1, "data": 2, "sequence": False, "ulysses": 2, "zero_stage": 2}),
    ("tp2_dp2_zero3/untied1", {"tensor": 2, "pipeline": 1, "data": 2, "sequence": False, "ulysses": 1, "zero_stage": 3}),
])  # fmt: skip
def test_run_json_has_the_layout(curves: dict[str, Curve], root: Path, name: str, expected: dict[str, int]) -> None:
    """Prevents a layout that was requested but not built, and complete weights on every rank instead of shards."""
    record = json.loads((root / name / "run.json").read_text())
    assert {key: record[key] for key in expected} == expected
    assert record["world_size"] == len(record["parameters_per_rank"]) == 4
    share = max(record["parameters_per_rank"]) / record["parameters"]
    # more than an even share: the padded vocabulary, norms and the copy of the tied embedding
    limit = {"pp2_tp2_sp/tied3": 0.45, "ulysses2_dp2_zero2/tied3": 1.2, "tp2_dp2_zero3/untied1": 0.32}[name]
    assert share < limit


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_reduction_fails_the_suite(curves: dict[str, Curve], corpus: Path, root: Path, breakage: str) -> None:
    """Prevents parity tests that pass with a wrong reduction."""
    shape, change = BROKEN[breakage]
    config = tiny_run(corpus, root / f"broken_{breakage}", **(BASE | (SHAPES | EXTRA_SHAPES)[shape] | change))
    assert run_ranks(run_broken, 2, config, breakage) == ["finished"] * 2
    broken = curves_of(root, [f"broken_{breakage}"])[f"broken_{breakage}"]
    with pytest.raises(AssertionError, match="step"):
        assert_equal(broken, curves[shape])


@pytest.mark.parametrize("breakage", ["tied_embedding", "recycle_scale"])
def test_a_broken_reduction_fails_in_bf16_too(
    curves: dict[str, Curve], corpus: Path, root: Path, breakage: str
) -> None:
    """Prevents a rounding tolerance so wide that a missing reduction passes.

    The norms' gradients are checked in fp32 only, because they change the total norm by 0.2 %, like bf16's rounding.
    """
    config = tiny_run(corpus, root / f"bf16_{breakage}", **(BASE | SHAPES["tied3"] | BF16 | BROKEN[breakage][1]))
    assert run_ranks(run_broken, 2, config, breakage) == ["finished"] * 2
    with pytest.raises(AssertionError):
        assert_rounded(curves_of(root, [f"bf16_{breakage}"])[f"bf16_{breakage}"], curves["bf16"])


def test_more_stages_than_layers_is_one_line(corpus: Path, root: Path) -> None:
    """Prevents a stage without blocks from failing with a traceback on some ranks after the data have been prepared."""
    with pytest.raises(ConfigError) as caught:
        tiny_run(corpus, root / "too_many", parallel__pipeline=4, deepspeed=PIPELINE, training__micro_batch_size=1)
    expected = "parallel.pipeline (4) exceeds model.layers (2): a stage would have no block; lower it"
    assert str(caught.value) == expected
