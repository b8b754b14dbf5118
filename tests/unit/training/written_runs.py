"""Run folders for tests of the report, as pretraining writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recycle_ds.training.reporting.sessions import Session, summarise

STARTED = 1_790_000_000.0


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    """A logged step with a module of depth 2, whose losses are 0.5 and 1 above the backbone's."""
    return {
        "step": number, "loss": 2 * loss + 1, "backbone_loss": loss, "recycle_loss": [loss + 0.5, loss + 1],
        "grad_norm": 1 + loss / 10, "learning_rate": 1e-3 / number, "tokens": 64 * number, "tokens_per_second": 2000.0 + number,
        "mfu": 0.25 + number / 10_000, "memory_gib": 1.5, "time": STARTED + number,
        "rank_seconds": {"median": 0.2, "slowest": 0.3, "slowest_rank": 1},
    } | more  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    """An evaluation with a module of depth 2."""
    return {
        "step": number, "eval_loss": loss, "eval_recycle_loss": [loss + 0.25, loss + 0.75], "eval_acceptance": [0.5, 0.125],
        "eval_tokens_per_full_call": 1.5625,
    }  # fmt: skip


def write_run(
    folder: Path,
    records: Iterable[dict[str, Any]],
    *,
    config: str = "",
    sessions: list[Session] | None = None,
    end: str = "",
) -> Path:
    """Writes a run folder with all its files but checkpoints; returns it. end: text after the last line of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + end, encoding="utf-8")
    layout = {"world_size": 4, "tensor": 2, "pipeline": 1, "data": 2, "sequence": True, "ulysses": 1, "zero_stage": 1}
    layout |= {"dtype": "bf16", "parameters": 2_000_448, "parameters_per_rank": [1_000_224, 1_000_224]}
    (folder / "run.json").write_text(json.dumps(layout), encoding="utf-8")
    starts = sessions or [Session(STARTED, 0, 100, "finished", STARTED + 200, checkpoints=2, saving_seconds=10.0)]
    (folder / "summary.json").write_text(json.dumps(summarise(starts, 64, 100)), encoding="utf-8")
    (folder / "config.yaml").write_text(config or "training: {steps: 100, learning_rate: 0.001}\n", encoding="utf-8")
    return folder
