"""Chooses the class for DeepSpeed's optimizer, and how weights are stored: the only branch on the ZeRO stage in training."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.engine.optimizer import AdamW
from recycle_ds.training.engine.zero.adapter import Weights, ZeroAdapter
from recycle_ds.training.engine.zero.internals import moved, other_version
from recycle_ds.training.engine.zero.stage0 import Stage0, Stage0Bf16
from recycle_ds.training.engine.zero.stage3 import PartitionedWeights, Stage3, Stage3Offloaded
from recycle_ds.training.engine.zero.stages12 import Stage1Fp32Accumulation, Stages12, Stages12Offloaded

ADAPTERS: dict[tuple[type, bool], type[ZeroAdapter]] = {
    (AdamW, False): Stage0,
    (FP16_UnfusedOptimizer, False): Stage0Bf16,
    (BF16_Optimizer, False): Stage1Fp32Accumulation,
    (DeepSpeedZeroOptimizer, False): Stages12,
    (DeepSpeedZeroOptimizer, True): Stages12Offloaded,
    (DeepSpeedZeroOptimizer_Stage3, False): Stage3,
    (DeepSpeedZeroOptimizer_Stage3, True): Stage3Offloaded,
}
"""By DeepSpeed's class and whether the optimizer is offloaded. At stage 0 in fp32 DeepSpeed does not wrap AdamW."""


def weights_at(stage: int, mesh: Mesh) -> Weights:
    """How replicas store weights at a ZeRO stage."""
    return PartitionedWeights(mesh) if stage == 3 else Weights(mesh)


def zero_adapter(engine: Any, optimizer: AdamW, mesh: Mesh, weights: Weights) -> ZeroAdapter:
    """The adapter of DeepSpeed's `engine`, which has wrapped `optimizer`. Raises TrainingError if the installed DeepSpeed is
    not the one that the adapter was written for."""
    zero = engine.optimizer
    chosen = ADAPTERS.get((type(zero), engine.zero_cpu_offload()))
    if chosen is None:
        raise other_version([f"no adapter for its {type(zero).__name__} with offload={engine.zero_cpu_offload()}"])
    trainable = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    faults = [*moved(zero, chosen.USES, chosen.CALLS), *moved(trainable, chosen.USES_OF_PARAMETER)]
    if faults:
        raise other_version(faults)
    return chosen(zero, optimizer, mesh, weights)
