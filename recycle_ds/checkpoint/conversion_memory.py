"""How much host memory conversions take: each in a process of its own, beside one that only imports what they need."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.recognition import open_source

_IDLE = "import recycle_ds.checkpoint.convert_command"
_CONVERT = (
    "import sys\n"
    "from recycle_ds.checkpoint.convert import Conversion, convert\n"
    "source, target, to, shard, stages = sys.argv[1:]\n"
    "convert(source, target, Conversion(to, shard_gib=float(shard), pipeline=int(stages)))"
)


@dataclass(frozen=True)
class Peak:
    """One conversion. Memory in MiB: the process's largest resident set, beyond that of one that converts nothing."""

    source: str
    target: str
    peak_mib: float
    share: float
    """Of the weights' size in the type that they are stored in."""


def measure(model: str, shard_gib: float) -> dict[str, object]:
    """Converts a model to portable, to Hugging Face, to Megatron (two stages) and back, each result the next one's source.

    Returns the model's size and the idle process's memory in MiB, and a `Peak` for every conversion. Raises CheckpointError
    for a model that cannot be opened, and for a conversion that fails. Needs a system that tells a process's peak (Linux).
    """
    source = open_source(model)
    size = sum(torch.Size(shape).numel() * source.dtype(name).itemsize for name, shape in source.shapes.items()) / 2**20
    idle = _peak([_IDLE])
    peaks = []
    with tempfile.TemporaryDirectory(prefix="recycle-ds-conversions-") as name:
        here, kind = model, source.kind
        for number, target in enumerate(("portable", "hf", "megatron", "hf")):
            there = str(Path(name) / f"{number}")
            stages = "2" if target == "megatron" else "1"
            used = _peak([_CONVERT, here, there, target, str(shard_gib), stages]) - idle
            peaks.append(Peak(kind, target, used, used / size))
            here, kind = there, target
    return {"model_mib": size, "idle_mib": idle, "shard_gib": shard_gib, "conversions": [asdict(one) for one in peaks]}


def _peak(program: list[str]) -> float:
    """Largest resident set of a Python process, in MiB. Raises CheckpointError where it fails."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", *program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        last = said.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise CheckpointError(f"the conversion of {' '.join(program[1:4])} failed: {last[0]}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
