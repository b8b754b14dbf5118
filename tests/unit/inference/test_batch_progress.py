"""Progress of a file of prompts in a log."""

from __future__ import annotations

import pytest

from recycle_ds.inference.batch import progress
from recycle_ds.inference.batch.progress import Progress


def test_a_log_has_few_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a line for each of a million prompts in the log of a job, and a log without the first or the last one, or in
    which nothing appears for minutes. The text for the job's shell always says how far it is."""
    now, notes = 100.0, []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress("rank 0", notes.append)
    for done in range(1, 101):
        now += 0.7
        shown.add({"new_tokens": 7, "tested": [2], "accepted": [1]})
        shown.show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[2]) for line in lines] == [1, 16, 31, 46, 61, 76, 91, 100]
    assert lines[-1] == "rank 0: 100 of 100 prompts, 10.0 tokens/s, acceptance 0.50"
    assert notes == [f"rank 0: {done}" for done in range(1, 101)]
