"""The demo with fewer steps: prepare, pretrain on two ranks, decode in three modes, plot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, steps_of


def run_demo(folder: Path) -> str:
    """Runs the demo with few steps and all files under `folder`. Returns its stdout."""
    data = folder / "data"
    overrides = [
        f"run_dir={folder / 'run'}", f"data.prepare.output={data}", f"data.tokenizer={data / 'tokenizer.json'}",
        f"data.train.0.path={data / 'train'}", f"data.validation.0.path={data / 'validation'}",
        "training.steps=12", "training.eval_every=6", "training.eval_batches=1", "model.layers=3",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "recycle_ds.demo", *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=420, check=False, env=os.environ | {"COLUMNS": "140"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo_writes_all_results(tmp_path: Path) -> None:
    """Prevents a demo without its table, plots or files, and a lossless mode that changes the generated text."""
    printed = run_demo(tmp_path)
    run_dir = tmp_path / "run"
    assert [record["step"] for record in steps_of(run_dir)] == [1, 10, 12]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000012\n"
    for plot in ("loss.png", "decoding.png"):
        assert (run_dir / plot).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads((run_dir / "decoding.json").read_text())
    assert set(report) == {"modes", "model", "dtype", "threads", "machine"} and report["dtype"] == "fp32"
    assert set(report["modes"]) == {"autoregressive", "alternate", "verified"}
    for mode, figures in report["modes"].items():
        assert figures["prompts"] == 12 and figures["tokens_per_second"] > 0
        assert mode in printed
    assert report["modes"]["verified"]["identical_to_autoregressive"] is True
    assert report["modes"]["alternate"]["tokens_per_full_call"] > 1.9
    assert len((run_dir / "prompts.jsonl").read_text().splitlines()) == 12
    assert "pretraining: already complete" in run_demo(tmp_path)
