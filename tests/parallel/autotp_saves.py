"""Functions that test_autotp_native runs on every rank: training of Hugging Face models split by DeepSpeed AutoTP."""

from __future__ import annotations

from typing import Any

import torch

from tests.parallel.native_saves import TheirRun, train_each


def train_autotp(rank: int, world_size: int, runs: list[TheirRun]) -> None:
    """Trains each run for three steps. The ranks of a tensor group use the same tokens."""
    train_each(rank, runs, 0, _gathered)


def _gathered(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    weights = {}
    for module in engine.module.modules():
        own = list(module.parameters(recurse=False))
        with GatherReplacedLayerParams(own, module, enabled=True):
            for parameter in own:
                name = next(name for name, value in engine.module.named_parameters() if value is parameter)
                weights[name] = parameter.detach().clone()
    return weights
