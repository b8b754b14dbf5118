"""Short runs with faults, which several test modules compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ds.config import RunConfig
from tests.runs import make_corpus, read_metrics, tiny_run

ROLLBACK = {"training__nonfinite": "rollback", "training__save_every": 4, "training__keep_checkpoints": 9}
"""Changes of a run that goes back to its newest checkpoint after a bad step."""


class Runs:
    """Configurations of runs of twelve steps, in one folder and on one corpus."""

    def __init__(self, root: Path) -> None:
        self.root, self.corpus = root, make_corpus(root / "corpus")

    def config(self, name: str, **changes: Any) -> RunConfig:
        return tiny_run(
            self.corpus, self.root / name, **({"training__steps": 12, "training__learning_rate": 1e-3} | changes)
        )

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        return [record for record in read_metrics(self.root / name) if record.get("event") == event]
