"""The device of the tests in this folder, the one place that knows it."""

from __future__ import annotations

import os

import torch

VARIABLE = "RECYCLE_GPU_DEVICE"


def rehearsal() -> bool:
    """Whether the tests run on the CPU, to show that they run."""
    return os.environ.get(VARIABLE, "cuda") == "cpu"


def device() -> torch.device:
    """The GPU; in a rehearsal the CPU."""
    return torch.device("cpu") if rehearsal() else torch.device("cuda", 0)


def why_skipped() -> str | None:
    """Why these tests cannot run here; None if they can."""
    if rehearsal() or torch.cuda.is_available():
        return None
    return f"needs a CUDA device; {VARIABLE}=cpu rehearses on the CPU"


def cpu_environment() -> dict[str, str]:
    """The environment of a process that is to find no GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
