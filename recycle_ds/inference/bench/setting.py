"""What a comparison ran on, as tables and plots print it: from the report of what ran."""

from __future__ import annotations

from typing import Any

import torch


def host_threads(device: torch.device) -> int | None:
    """The report's "threads": those that compute on a CPU; None on a GPU, whose speed does not depend on them."""
    return torch.get_num_threads() if device.type == "cpu" else None


def described(report: dict[str, Any], separator: str = ", ") -> str:
    """Arithmetic, threads if a CPU ran it, and machine: "fp32, one thread, AMD EPYC, 2 cores", "fp32, NVIDIA H100"."""
    threads = report["threads"]
    counted = {None: "", 1: ", one thread"}.get(threads, f", {threads} threads")
    return f"{report['dtype']}{counted}{separator}{report['machine']}"
