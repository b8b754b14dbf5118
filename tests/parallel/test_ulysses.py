"""Ulysses' exchange beside DeepSpeed's DistributedAttention and beside the whole sequence on one rank, and its inverse."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks
from tests.parallel.exchange import inverse, run


@pytest.mark.parametrize("world_size", [2, 4])
def test_attention_equals_deepspeeds_and_the_whole_sequence(world_size: int) -> None:
    """Query heads that meet another group's keys, positions out of order, or a gradient that stays on the wrong rank."""
    for results in run_ranks(run, world_size):
        output, gradients = results["ours"]
        for other in ("deepspeed", "whole"):
            expected, expected_gradients = results[other]
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
            for mine, theirs in zip(gradients, expected_gradients, strict=True):
                assert theirs.abs().max() > 0.01, "gradients that are zero would always agree"
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_exchange_is_undone_by_its_inverse() -> None:
    """Heads or positions that change places on the way."""
    assert run_ranks(inverse, 2) == [True, True]
