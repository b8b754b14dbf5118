"""Host memory of conversions: each runs in a process of its own, compared with one that only imports the same modules."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.recognition import open_source

_IDLE = "import recycle_ds.checkpoint.conversion.convert"
_CONVERT = (
    "import sys\n"
    "from recycle_ds.checkpoint.conversion.convert import Conversion, convert\n"
    "source, target, to, shard, stages = sys.argv[1:]\n"
    "shard_gib = None if to == 'megatron' else float(shard)\n"
    "convert(source, target, Conversion(to, shard_gib=shard_gib, pipeline=int(stages)))"
)


@dataclass(frozen=True)
class Peak:
    """One conversion. Memory in MiB: the peak of its process, beyond that of a process that converts nothing. Memory-mapped
    files are not counted: the kernel drops their pages when it needs the memory."""

    source: str
    target: str
    peak_mib: float
    share: float
    """The peak as a fraction of the size of the weights in their stored dtype."""


def measure(model: str, shard_gib: float) -> dict[str, object]:
    """Converts a model to portable, to Hugging Face, to Megatron (two stages) and back; each result is the next source.

    Returns the model's size and the idle process's memory in MiB, and a `Peak` for every conversion. Raises CheckpointError
    for a model that cannot be opened, and for a conversion that fails. Linux only.
    """
    source = open_source(model)
    size = sum(torch.Size(shape).numel() * source.dtype(name).itemsize for name, shape in source.shapes.items()) / 2**20
    idle = _peak([_IDLE])
    peaks = []
    with tempfile.TemporaryDirectory(prefix="recycle-ds-conversions-") as name:
        current, kind = model, source.kind
        for number, target in enumerate(("portable", "hf", "megatron", "hf")):
            result = str(Path(name) / f"{number}")
            stages = "2" if target == "megatron" else "1"
            used = _peak([_CONVERT, current, result, target, str(shard_gib), stages]) - idle
            peaks.append(Peak(kind, target, used, used / size))
            current, kind = result, target
    return {
        "model_mib": size,
        "idle_mib": idle,
        "shard_gib": shard_gib,
        "conversions": [asdict(peak) for peak in peaks],
    }


def _peak(program: list[str]) -> float:
    """Peak of the anonymous memory of a Python process in MiB, sampled every few milliseconds. Raises CheckpointError if the
    process fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", *program], stdout=subprocess.DEVNULL, stderr=errors
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _anonymous_mib(process.pid))
            time.sleep(0.005)
        errors.seek(0)
        output = errors.read().strip().splitlines()
    if process.returncode:
        reason = output[-1] if output else f"exit code {process.returncode}"
        raise CheckpointError(f"the conversion of {' '.join(program[1:4])} failed: {reason}")
    return peak


def _anonymous_mib(pid: int) -> float:
    """Anonymous (not file-backed) resident memory in MiB; 0 for a process that has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        if not Path("/proc/self/status").exists():
            raise CheckpointError("memory is measured through /proc, which only Linux has") from None
        return 0.0
    except ProcessLookupError:
        return 0.0
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) / 2**10 if found else 0.0
