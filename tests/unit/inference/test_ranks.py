"""The device that a rank of a decoding job uses."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.inference import ranks
from recycle_ds.parallel.rendezvous import Launch


def test_a_rank_with_a_model_of_its_own_selects_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents kernels that run on GPU 0 with the memory of another one, and page-locked memory of every rank there."""
    selected: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    joined = ranks.join(Launch("single", 0, 1, 0), 1, 1)
    assert (selected, joined.device_index) == ([], 0)
    monkeypatch.setattr(ranks, "own_device", lambda _: torch.device("cuda", 1))
    joined = ranks.join(Launch("single", 0, 1, 1), 1, 1)
    assert (selected, joined.device_index) == ([torch.device("cuda", 1)], 1)
