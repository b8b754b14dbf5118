"""What test_autotp_native runs on every rank: a Hugging Face model whose linear layers DeepSpeed splits by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class AutoTPRun:
    """A Hugging Face model under DeepSpeed's automatic tensor parallelism, saved as transformers' trainer lays it out."""

    family: str
    """See tests.unit.checkpoint.families."""
    folder: Path
    """Gets config.json, DeepSpeed's folder and, in whole.pt, the weights as DeepSpeed itself gathers them."""
    deepspeed: dict[str, Any]


def train_autotp(rank: int, world_size: int, runs: list[AutoTPRun]) -> None:
    """Three steps of each run."""
    import deepspeed
    from deepspeed.utils import logger

    from recycle_ds.parallel import rendezvous

    logger.setLevel("ERROR")
    rendezvous.start(rendezvous.detect_launch(os.environ))
    for run in runs:
        _train(run, rank, deepspeed)


def _train(run: AutoTPRun, rank: int, deepspeed: Any) -> None:
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    from tests.unit.checkpoint.families import make

    model = make(run.family).train()
    if rank == 0:
        model.config.save_pretrained(run.folder)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **run.deepspeed}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    generator = torch.Generator().manual_seed(7)  # ranks of one tensor group take the same tokens
    for _ in range(3):
        tokens = torch.randint(300, (1, 12), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(run.folder), tag="global_step3")
    whole = {}
    for module in engine.module.modules():
        own = list(module.parameters(recurse=False))
        with GatherReplacedLayerParams(own, module, enabled=True):
            for parameter in own:
                name = next(name for name, value in engine.module.named_parameters() if value is parameter)
                whole[name] = parameter.detach().clone()
    if rank == 0:
        torch.save(whole, run.folder / "whole.pt")
