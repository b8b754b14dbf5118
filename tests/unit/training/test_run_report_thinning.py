"""The report of a long run: thinned curves, running means, a file of bounded size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from recycle_ds.training.reporting.run_report.drawing import draw
from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.run_report.thinning import smooth, thin
from tests.unit.training.report_reading import panel, read, titles, values
from tests.unit.training.written_runs import STARTED, step, write_run


def test_thinning_keeps_the_least_and_the_greatest_values() -> None:
    """Prevents a report of a long run without its spike, its best step, its first or its last one."""
    steps = np.arange(1.0, 100_001.0)
    curve = np.sin(steps / 900)
    curve[[31_415, 77_777]] = 40.0, -30.0
    kept_steps, kept = thin(steps, curve)
    assert 400 < len(kept) <= 500 and np.all(np.diff(kept_steps) > 0)
    assert (kept_steps[0], kept_steps[-1]) == (1, 100_000)
    assert {31_416.0: 40.0, 77_778.0: -30.0}.items() <= dict(
        zip(kept_steps.tolist(), kept.tolist(), strict=True)
    ).items()
    for start in range(0, 100_000, 5000):  # also of every part; a stretch is 402 steps long
        part = curve[start : start + 5000]
        around = kept[(kept_steps > start - 402) & (kept_steps <= start + 5402)]
        assert around.max() >= part.max() and around.min() <= part.min()


def test_a_loss_that_diverged_leaves_its_curve_readable(tmp_path: Path) -> None:
    """Prevents a curve that is flat because its last values are a thousand times the others."""
    losses = [5 - number / 10 for number in range(1, 21)] + [1e3, 1e9, 3e38]
    records = [step(number, loss) for number, loss in enumerate(losses, start=1)]
    runs = read(write_run(tmp_path / "run", records))
    loss = panel(runs, "Loss")
    assert loss.logarithmic and values(loss, "backbone") == losses
    assert draw(loss, 1).y_limits[1] > 3e38 and "3e+38" in render(runs)


def test_thinning_keeps_gaps() -> None:
    """Prevents a line that is drawn through a stretch without finite values, and an extreme that a NaN hides."""
    curve = np.ones(10_000)
    curve[2000:4000] = np.nan
    curve[7000], curve[7001] = np.nan, 5.0
    steps, kept = thin(np.arange(10_000.0), curve)
    assert np.isnan(kept[(steps >= 2100) & (steps < 3900)]).all() and np.nanmax(kept) == 5.0
    assert not np.isnan(kept[(steps < 1900) | (steps > 4100)]).any()


def test_the_running_mean_is_centred_and_skips_what_is_not_finite() -> None:
    """Prevents a mean that lags behind its curve, or that one NaN ends."""
    curve = np.arange(1000.0)
    curve[500] = np.nan
    smoothed = smooth(np.arange(1000.0), curve)
    assert smoothed is not None
    inner = (smoothed[0] > 20) & (smoothed[0] < 980)
    assert np.abs(smoothed[1] - smoothed[0])[inner].max() < 0.6 and np.isfinite(smoothed[1]).all()
    assert smooth(np.arange(50.0), np.arange(50.0)) is None


def test_a_long_run_gives_a_file_of_bounded_size(tmp_path: Path) -> None:
    """Prevents reports that grow with the run, and thinning or running means that the page does not mention."""
    sizes = []
    for length in (2000, 10_000):
        records: list[dict[str, Any]] = []
        for number in range(1, length + 1):
            records.append(step(number, 3 + math.sin(number * number), grad_norm=900.0 if number == 1111 else 1.0))
            if number % 3 == 0:
                records.append(
                    {"event": "straggler", "step": number, "time": STARTED, "rank": 1, "host": "n", "ratio": 2.0}
                )
        runs = read(write_run(tmp_path / str(length), records))
        page = render(runs)
        sizes.append(len(page))
        assert "reduced to 500 points" in page and "running mean over 3 %" in page
        assert max(values(panel(runs, "Gradient norm"), "gradient norm")) == 900.0
        assert page.count("mark-anomaly") <= 151 * len(titles(page)), "marks at one place are drawn once"
        assert f"{length // 3 - 200:,} left out" in page
    assert sizes[1] < 1.1 * sizes[0] < 1_000_000


def test_a_short_run_is_complete() -> None:
    """Prevents a short run from being thinned."""
    steps, curve = np.arange(1.0, 501.0), np.arange(500.0)
    assert all(np.array_equal(*pair) for pair in zip(thin(steps, curve), (steps, curve), strict=True))
