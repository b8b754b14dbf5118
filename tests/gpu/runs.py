"""Small training runs in this process on the GPU, and as a process of their own on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recycle_ds.config import RunConfig
from recycle_ds.parallel import rendezvous
from tests.gpu.device import cpu_environment, rehearsal
from tests.runs import ROOT, figures, make_corpus, tiny_run, zero

STEPS = 4


def corpus(folder: Path) -> Path:
    """Token files of random words."""
    return make_corpus(folder / "corpus")


def run_config(folder: Path, name: str, **changes: Any) -> RunConfig:
    """A run `name` of a model whose heads are wide enough for FlexAttention's kernels, over several documents a row."""
    settings: dict[str, Any] = {
        "model__hidden": 64, "model__max_positions": 256, "training__seq_length": 48 if rehearsal() else 160,
        "training__steps": STEPS, "training__global_batch_size": 4, "training__compile": False,
    }  # fmt: skip
    return tiny_run(folder / "corpus", folder / name, **(settings | changes))


def train(folder: Path, name: str, **changes: Any) -> list[list[float]]:
    """Runs it in this process. Returns losses and gradient norm by step, see `tests.runs.figures`."""
    from recycle_ds.pretrain import run

    config = run_config(folder, name, **changes)
    try:
        run(config)
    finally:
        rendezvous.stop()
    return figures(config.run_dir)


@contextmanager
def on_cpu(folder: Path, name: str, **changes: Any) -> Iterator[Path]:
    """Starts the run as a process that sees no GPU, which works beside the block. Yields its run folder."""
    config = run_config(folder, name, **changes)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "recycle_ds.pretrain", "--config", str(file)]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=cpu_environment(), stdout=out, stderr=out)
        try:
            yield Path(config.run_dir)
            code = process.wait(150)
        finally:
            process.kill()
            process.wait()
    assert code == 0, log.read_text(encoding="utf-8")[-2000:]


def assert_close(found: list[list[float]], expected: list[list[float]], relative: float) -> None:
    """Raises AssertionError with the step, unless all losses and norms agree."""
    assert len(found) == len(expected) > 0, (len(found), len(expected))
    for step, (own, other) in enumerate(zip(found, expected, strict=True), start=1):
        near = [math.isclose(a, b, rel_tol=relative) for a, b in zip(own, other, strict=True)]
        assert all(near), f"step {step}: {own} instead of {other}"


def stage(name: str) -> dict[str, str]:
    """The setting of a shipped ZeRO file: 1, 2, 3, 2_offload, 3_offload."""
    return {"deepspeed": zero(name)}
