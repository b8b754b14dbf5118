"""AdamW's groups: weight decay, clipping, and held steps."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig, TrainingConfig
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.training.engine.optimizer import AdamW, parameter_groups


@pytest.fixture
def model() -> RecycleGPT:
    config = ModelConfig(
        layers=1, hidden=32, heads=2, kv_heads=1, ffn=48, vocab_size=60, max_positions=64, qkv_bias=True
    )
    return build_model(config, RecycleConfig(), seed=1)


@pytest.fixture
def training() -> TrainingConfig:
    return TrainingConfig(steps=10, micro_batch_size=1, global_batch_size=1, seq_length=8, learning_rate=0.1)


def test_norms_and_biases_do_not_decay(model: RecycleGPT) -> None:
    """Prevents decay of norms or biases, a matrix without decay, and a parameter in two groups or in none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["part"] == "recycle") == name.startswith("recycle.")
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith(".bias") else 0.1)


def test_a_divisor_acts_on_its_part_alone(model: RecycleGPT, training: TrainingConfig) -> None:
    """Prevents clipping that is logged but not applied, or applied to the other part as well."""
    optimizer = AdamW(parameter_groups(model, 0.0), training)
    optimizer.hold = False
    optimizer.divisors = {"recycle": torch.tensor(4.0)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        expected = (1 - training.beta1) * (0.25 if group["part"] == "recycle" else 1.0)
        for parameter in group["params"]:
            moment = optimizer.state[parameter]["exp_avg"]
            assert torch.allclose(moment, torch.full_like(moment, expected))


def test_a_held_step_changes_nothing(model: RecycleGPT, training: TrainingConfig) -> None:
    """Prevents DeepSpeed's call of step() at construction from decaying the initial weights and counting as a step."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AdamW(parameter_groups(model, 0.5), training)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}


def test_the_device_can_hold_a_step(model: RecycleGPT, training: TrainingConfig) -> None:
    """Prevents gradients that are not finite from reaching weights, moments or Adam's count of steps where the host does not
    wait for their norm, and a step that stays held."""
    optimizer = AdamW(parameter_groups(model, 0.5), training)
    optimizer.hold = False
    optimizer.divisors = {"recycle": torch.tensor(torch.nan), "backbone": torch.tensor(torch.nan)}

    def step(gradient: float, held: float) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.held = torch.tensor(held)
        optimizer.step()
        moments = [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]

    optimizer.allocate(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    after = step(torch.nan, 1.0)
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=False))
    assert not any(moment.any() for moment in after[len(before) :])
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}
    optimizer.divisors = {}
    assert all(new.isfinite().all() for new in step(1.0, 0.0))
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
