"""Runs with training.compile=true: equal to eager ones, hooks and collectives included, and the log says what was compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import RunConfig
from tests.distributed import run_ranks
from tests.parallel.ranks import run_quietly
from tests.runs import make_corpus, read_metrics, tiny_run, zero


def _run(rank: int, world_size: int, runs: list[RunConfig]) -> list[tuple[str, str]]:
    """Runs them with the compiler's front end, which finds graph breaks, but without generated code, which takes minutes."""
    from recycle_ds.training.engine import compiling

    compiling.compile_regions.__defaults__ = ("aot_eager",)
    return run_quietly(rank, world_size, runs)


def test_compiled_runs_equal_eager_ones(tmp_path: Path) -> None:
    """Prevents a compiled run that fails at DeepSpeed's hooks (ZeRO 3) or Megatron's asynchronous collectives (tensor
    parallelism), that trains otherwise, or that leaves its start-up time unexplained."""
    corpus = make_corpus(tmp_path / "corpus")
    layouts: dict[str, dict[str, Any]] = {
        "zero1": {},
        "zero3": {"deepspeed": zero(3)},
        "tensor": {"parallel__tensor": 2, "parallel__sequence": True},
    }
    runs = [
        tiny_run(corpus, tmp_path / f"{name}-{compiled}", training__compile=compiled, training__steps=2, **changes)
        for name, changes in layouts.items()
        for compiled in (False, True)
    ]
    first = run_ranks(_run, 2, runs)[0]
    assert [ending for ending, _ in first] == ["finished"] * len(runs)
    for name, (_, eager), (_, compiled) in zip(layouts, first[::2], first[1::2], strict=True):
        assert "graphs in" not in eager
        assert f"compiled {'blocks' if name == 'zero1' else 'functions'}: " in compiled
        expected, actual = (
            [line for line in read_metrics(tmp_path / f"{name}-{flag}") if "loss" in line] for flag in (False, True)
        )
        assert len(actual) == 2
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in actual] == pytest.approx([line[key] for line in expected], rel=2e-5)
