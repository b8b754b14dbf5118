"""metrics.jsonl and TensorBoard: what rank 0 leaves on disk while a run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to run_dir/metrics.jsonl, each flushed, and mirrors numbers to TensorBoard."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, resumed_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        trim(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = _board(run_dir, resumed_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """One line: floats unrounded. Non-finite numbers are written as JSON's extension NaN, as Python reads it back."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._board is not None and "step" in record and "event" not in record:
                self._mirror(record)
        except OSError as error:  # a log is no reason to lose the run
            print(f"warning: {self._path}: this line is lost: {error}", flush=True)

    def rewind(self, step: int) -> None:
        """Forgets everything after `step`: the run goes on from there."""
        try:
            self._file.flush()
            trim(self._path, step)
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:  # a log is no reason to lose the run
            print(f"warning: {self._path}: lines after step {step} stay: {error}", flush=True)
        if self._board is not None:
            self._board.close()
            self._board = _board(self._path.parent, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _mirror(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key in ("step", "time"):
                continue
            values = value if isinstance(value, list) else [value]
            for depth, number in enumerate(values, start=1):
                tag = f"{key}/{depth}" if isinstance(value, list) else key
                if isinstance(number, int | float):
                    self._board.add_scalar(tag, number, record["step"])


def _board(run_dir: Path, step: int) -> Any:
    """TensorBoard's writer, which hides what an earlier one wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def trim(path: Path, step: int) -> None:
    """Drops a partial last line and everything after `step`, so that a resumed run's log reads like one run's."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
