"""Unfinished files that killed processes leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from recycle_ds.config.atomic_files import remove_abandoned


def test_only_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    """Prevents hundreds of MB that stay for ever after a killed download, and the loss of what another process writes."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    long_ago = time.time() - 4000
    names = {
        "abandoned folder": f".tmp-{ended.pid}-0a1b-model",
        "abandoned file": f".tmp-{ended.pid}-0a_b-model",
        "recent": f".tmp-{ended.pid}-0a2b-model",
        "recent file inside": f".tmp-{ended.pid}-0a3b-model",
        "running": f".tmp-{os.getpid()}-0a1b-model",
        "of another path": f".tmp-{ended.pid}-0a1b-other",
        "of a longer name": f".tmp-{ended.pid}-0a1b-my-model",
        "published": "model",
    }
    for case, name in names.items():
        if case == "abandoned file":
            (tmp_path / name).write_text("x")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text("x")
            if case != "recent file inside":
                os.utime(tmp_path / name / "weights", (long_ago, long_ago))
        if case != "recent":
            os.utime(tmp_path / name, (long_ago, long_ago))
    remove_abandoned(tmp_path / "model")
    kept = {case for case, name in names.items() if (tmp_path / name).exists()}
    assert kept == set(names) - {"abandoned folder", "abandoned file"}
    remove_abandoned(tmp_path / "missing" / "model")
