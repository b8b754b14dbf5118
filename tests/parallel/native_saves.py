"""Functions that test_deepspeed_native runs on every rank: training with checkpoints in DeepSpeed's own format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recycle_ds.config import RunConfig
from tests.parallel.ranks import run_all


def run_and_save(rank: int, world_size: int, runs: list[RunConfig]) -> list[str]:
    """Like `run_all`, but DeepSpeed also saves every checkpoint, to run_dir/native."""
    from recycle_ds.checkpoint.run.saving import PortableCheckpointer

    original = PortableCheckpointer.begin

    def both(self: Any, state: Any) -> bool:
        self._engine.engine.save_checkpoint(str(self._run_dir / "native"), tag=f"global_step{state.step}")
        return original(self, state)

    PortableCheckpointer.begin = both  # type: ignore[method-assign]
    try:
        return run_all(rank, world_size, runs)
    finally:
        PortableCheckpointer.begin = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class TheirRun:
    """A Hugging Face model trained with plain DeepSpeed, saved in the layout of transformers' trainer."""

    family: str
    """See tests.unit.checkpoint.families."""
    folder: Path
    """Output folder: config.json, DeepSpeed's folder and, in whole.pt, the weights as DeepSpeed itself gathers them."""
    deepspeed: dict[str, Any]


def train_theirs(rank: int, world_size: int, runs: list[TheirRun]) -> None:
    """Trains each run for three steps; whole.pt has fp32 master weights."""
    train_each(rank, runs, rank, _masters)


def train_each(rank: int, runs: list[TheirRun], share: int, gather: Callable[[Any], dict[str, torch.Tensor]]) -> None:
    """Trains each run for three steps. share: seed of this rank's tokens. gather: collective; full weights by name."""
    import deepspeed
    from deepspeed.utils import logger

    from recycle_ds.parallel import rendezvous
    from tests.unit.checkpoint.families import make

    logger.setLevel("ERROR")
    rendezvous.start(rendezvous.detect_launch(os.environ))
    for run in runs:
        model = make(run.family).train()
        if rank == 0:
            model.config.save_pretrained(run.folder)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **run.deepspeed}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        generator = torch.Generator().manual_seed(7 + share)
        for _ in range(3):
            tokens = torch.randint(300, (1, 12), generator=generator)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        weights = gather(engine)
        if rank == 0:
            torch.save(weights, run.folder / "whole.pt")
        engine.save_checkpoint(str(run.folder), tag="global_step3")


def _masters(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = engine.module
    if engine.bfloat16_enabled():
        return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()}
    # safe_get_full_fp32_param is wrong with round_robin_gradients: it ignores the changed order of parameters
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
