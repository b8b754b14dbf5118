"""What the package uses of DeepSpeed beyond its public interface: the reason why its version is pinned."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recycle_ds.config import RunConfig, resolve_deepspeed
from recycle_ds.training.engine.zero.choice import ADAPTERS
from recycle_ds.training.engine.zero.internals import FUNCTIONS, changed_parameters, moved
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.run_context import RunContext
from tests.distributed import run_ranks
from tests.runs import tiny_run, zero

BF16 = {"training__dtype": "bf16"}
# By the adapter's class: settings that lead to it on one rank. Sixteen micro-batches are accumulated in fp32.
LEADING_TO: dict[str, dict[str, Any]] = {
    "Stage0": {"deepspeed": zero(0)},
    "Stage0Bf16": {"deepspeed": zero(0)} | BF16,
    "Stage1Fp32Accumulation": {"deepspeed": zero(1), "training__micro_batch_size": 1, "training__global_batch_size": 16}
    | BF16,
    "Stages12": {"deepspeed": zero(2)},
    "Stages12Offloaded": {"deepspeed": zero("2_offload")},
    "Stage3": {"deepspeed": zero(3)},
    "Stage3Offloaded": {"deepspeed": zero("3_offload")} | BF16,
}


def _configs(folder: Path) -> list[RunConfig]:
    return [tiny_run(folder, folder / name, model__vocab_size=64, **change) for name, change in LEADING_TO.items()]


def _step_each(rank: int, world_size: int, runs: list[RunConfig]) -> list[tuple[str, list[float]]]:
    """Per run: the adapter's class, and the norms that a step asked to accept."""
    from recycle_ds.training.benchmark.subjects import OurSubject

    found = []
    for context in _set_up(runs):
        subject = OurSubject(context)
        engine, norms = subject.engine, []
        engine.passes.train(subject._batches.micro, subject._scales)
        engine.gradients.step(accept=lambda norm, norms=norms: not norms.append(norm))
        found.append((type(engine.zero).__name__, norms))
    return found


def _build_without(rank: int, world_size: int, config: RunConfig) -> str:
    """The error of a build with a DeepSpeed in which a method that stages 1 and 2 rely on has another name."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from recycle_ds.training.engine.build import build_engine

    method = DeepSpeedZeroOptimizer.update_lp_params
    del DeepSpeedZeroOptimizer.update_lp_params
    try:
        (context,) = _set_up([config])
        build_engine(context)
    except TrainingError as error:
        return str(error)
    finally:
        DeepSpeedZeroOptimizer.update_lp_params = method
    return ""


def _set_up(runs: list[RunConfig]) -> list[RunContext]:
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.start(rendezvous.detect_launch(os.environ))
    meshes = [build_mesh(config.parallel, torch.device("cpu")) for config in runs]
    return [RunContext(one, resolve_deepspeed(one, 1), mesh) for one, mesh in zip(runs, meshes, strict=True)]


def test_every_optimizer_is_the_one_that_its_adapter_was_written_for(tmp_path: Path) -> None:
    """Prevents another DeepSpeed from choosing another optimizer, or from no longer calling what replaces its norm."""
    assert {adapter.__name__ for adapter in ADAPTERS.values()} == set(LEADING_TO)
    (found,) = run_ranks(_step_each, 1, _configs(tmp_path))
    assert [name for name, _ in found] == list(LEADING_TO)
    assert all(len(norms) == 1 and norms[0] > 0 for _, norms in found), found


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_take_the_parameters_that_they_are_called_with(function: Any) -> None:
    """Prevents a DeepSpeed whose functions take other parameters from being found out at the first save."""
    assert changed_parameters(function.__name__, function, FUNCTIONS[function]) == []


def test_a_build_names_what_has_moved(tmp_path: Path) -> None:
    """Prevents an AttributeError in the middle of a run, or a check that finds nothing, after DeepSpeed renames a method."""
    (message,) = run_ranks(_build_without, 1, _configs(tmp_path)[3])
    assert "DeepSpeedZeroOptimizer.update_lp_params is gone" in message
    assert message.startswith("deepspeed 0.") and message.endswith("install the version in requirements.txt")


def test_another_signature_and_a_lost_call_are_named() -> None:
    """Prevents a check that looks at names only: if DeepSpeed no longer called the replaced method, it would clip by itself."""

    class Optimizer:
        lists = None

        def norm(self, norm_type: int, groups: list[int]) -> float:
            return 0.0

        def step(self) -> None:
            self.lists = None

    uses = {"lists": None, "norm": ("norm_type",), "gone": None}
    assert moved(Optimizer(), uses, {"step": ("norm",)}) == [
        "Optimizer.norm takes (self, norm_type: 'int', groups: 'list[int]') instead of (self, norm_type)",
        "Optimizer.gone is gone",
        "Optimizer.step does not use norm",
    ]
    assert moved(SimpleNamespace(lists=1), {"lists": None}) == []
