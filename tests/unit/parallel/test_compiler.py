"""What torch.compile is told."""

from __future__ import annotations

import os

import pytest
import torch._inductor.config as inductor

from recycle_ds.parallel.compiler import share_compile_processes


@pytest.mark.parametrize(
    ("ranks", "own", "variable", "expected"),
    [
        pytest.param(8, 32, None, 16, id="a share of the host's cores"),
        pytest.param(8, 4, None, 4, id="bound to few cores"),
        pytest.param(200, 32, None, 1, id="more ranks than cores"),
        pytest.param(1, 32, None, 32, id="alone"),
        pytest.param(0, 32, None, 32, id="unknown"),
        pytest.param(8, 24, "24", 24, id="the user's variable"),
    ],
)
def test_ranks_share_the_processes_that_compile(
    ranks: int, own: int, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents 256 compiling processes on a host with eight ranks: each rank would start as many as a single one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", variable)
    with inductor.patch(compile_threads=own):
        share_compile_processes(ranks)
        assert inductor.compile_threads == expected
