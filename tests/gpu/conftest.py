"""Skips these tests without a CUDA device, unless a rehearsal on the CPU is asked for."""

from __future__ import annotations

import pytest

from tests.gpu.device import why_skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and skips them with the reason."""
    reason = why_skipped()
    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
