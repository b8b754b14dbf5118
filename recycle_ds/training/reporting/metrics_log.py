"""metrics.jsonl and TensorBoard, written by rank 0 during a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically


class MetricsLog:
    """Appends lines to run_dir/metrics.jsonl, each flushed, and copies numbers to TensorBoard."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, resumed_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        trim(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = _board(run_dir, resumed_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Writes one line, floats unrounded. Non-finite numbers are written as NaN and Infinity, which Python reads back."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._board is not None and "step" in record and "event" not in record:
                self._mirror(record)
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: a line could not be written: {error}", flush=True)

    def rewind(self, step: int) -> None:
        """Drops everything after `step`: the run continues from there."""
        try:
            self._file.flush()
            trim(self._path, step)
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: lines after step {step} cannot be removed: {error}", flush=True)
        if self._board is not None:
            self._board.close()
            self._board = _board(self._path.parent, step)

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self._file.close()
            if self._board is not None:
                self._board.close()
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: the last lines could not be written: {error}", flush=True)

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
    """A TensorBoard writer that hides what earlier ones wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def trim(path: Path, step: int) -> None:
    """Drops a partial last line and everything after `step`, so that a resumed run's log reads like that of one run."""
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
    write_atomically(path, "".join(kept))
