"""Steps whose loss or gradients are not finite on one of two ranks, at every ZeRO stage and in bf16."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.portable.manifest import read_manifest
from recycle_ds.config import RunConfig
from tests.distributed import run_in_sets
from tests.parallel.ranks import run_poisoned
from tests.runs import make_corpus, read_metrics, steps_of, tensors, tiny_run, zero


def test_non_finite_steps(tmp_path: Path) -> None:
    """Prevents a NaN on one rank that stops only that rank, reaches the weights, or is skipped by only one rank."""
    corpus = make_corpus(tmp_path / "corpus")

    def config(name: str, **changes: Any) -> RunConfig:
        return tiny_run(corpus, tmp_path / name, **({"training__steps": 6} | changes))

    cases = []
    for stage in (0, 1, 3):
        skip = config(f"nan{stage}_skip", deepspeed=zero(stage), training__nonfinite="skip")
        stop = config(f"nan{stage}_stop", deepspeed=zero(stage))
        cases += [(skip, 3, 1), (stop, 3, 1)]
    for stage in (0, 1, 2, 3):
        bf16 = config(f"nan{stage}_bf16", deepspeed=zero(stage), training__nonfinite="skip", training__dtype="bf16")
        cases.append((bf16, 3, 0))
    summing = {"data_types": {"grad_accum_dtype": "fp32"}} | json.loads(Path(zero(1)).read_text())
    (tmp_path / "zero1_fp32_sums.json").write_text(json.dumps(summing))
    sums = config(
        "nan1s_bf16", deepspeed=str(tmp_path / "zero1_fp32_sums.json"), training__nonfinite="skip",
        training__dtype="bf16",
    )  # fmt: skip
    cases.append((sums, 3, 0))
    endings = run_in_sets(run_poisoned, 2, cases)
    assert endings[0] == endings[1]
    assert endings[0][6:] == ["finished"] * 5
    for name in ("0", "1", "2", "3", "1s"):
        manifest = read_manifest(tmp_path / f"nan{name}_bf16/checkpoints/step-00000006")
        assert (manifest.adam_step, manifest.skipped) == (5, 1)
        figure = steps_of(tmp_path / f"nan{name}_bf16")
        weights = tensors(tmp_path / f"nan{name}_bf16/checkpoints/step-00000006")
        assert all(value.isfinite().all() for value in weights.values())
        assert not math.isfinite(figure[2]["loss"]) and math.isfinite(figure[3]["loss"])
    for stage, skipped, stopped in zip((0, 1, 3), endings[0][:6:2], endings[0][1:6:2], strict=True):
        assert skipped == "finished"
        assert "step 3" in stopped and "not finite" in stopped and "training.nonfinite=skip" in stopped
        kept = read_manifest(tmp_path / f"nan{stage}_stop/checkpoints/step-00000002")
        assert (kept.step, kept.adam_step) == (2, 2), "the steps before the bad one must not be lost"
        events = [r for r in read_metrics(tmp_path / f"nan{stage}_skip") if r.get("event") == "nonfinite"]
        assert [(event["step"], event["action"]) for event in events] == [(3, "skip")]
        manifest = read_manifest(tmp_path / f"nan{stage}_skip/checkpoints/step-00000006")
        assert (manifest.step, manifest.adam_step, manifest.skipped) == (6, 5, 1)
        weights = tensors(tmp_path / f"nan{stage}_skip/checkpoints/step-00000006")
        assert all(value.isfinite().all() for value in weights.values())
