"""Ulysses' all-to-all, compared with DeepSpeed's DistributedAttention and with the full sequence on one rank."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks
from tests.parallel.exchange import inverse, run


@pytest.mark.parametrize("world_size", [2, 4])
def test_attention_equals_deepspeeds_and_the_full_sequence(world_size: int) -> None:
    """Prevents query heads that attend to another group's keys, wrong positions, or a gradient on the wrong rank."""
    for results in run_ranks(run, world_size):
        output, gradients = results["ours"]
        for other in ("deepspeed", "full"):
            expected, expected_gradients = results[other]
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
            for actual, gradient in zip(gradients, expected_gradients, strict=True):
                assert gradient.abs().max() > 0.01, "gradients that are zero would always agree"
                torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-6)


def test_the_inverse_restores_the_sequence() -> None:
    """Prevents an all-to-all that swaps heads or positions."""
    assert run_ranks(inverse, 2) == [True, True]
