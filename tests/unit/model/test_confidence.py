"""The confidence layer: trained on whether drafts are accepted, without a gradient into the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.inference.models import spread_added

CONFIG = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=7, max_positions=64, init_std=0.5)
DRAFTED = [0, 2, 3, 5]


def batch_of(depth: int, rows: int = 4, length: int = 40) -> Batch:
    tokens_BT = torch.randint(0, 7, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[0, 13:] = 1
    targets = make_targets(tokens_BT, documents_BT, depth)
    positions = torch.arange(length).expand(rows, -1)
    return Batch(tokens_BT[:, :-1], positions, documents_BT[:, :-1], targets.inputs, targets.targets)


def gradients(model: RecycleGPT, batch: Batch, scales: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The sums, and the gradients by name."""
    total, sums = model.train_losses(batch, scales)
    total.backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gradient", ["joint", "frozen_backbone"])
def test_the_layer_does_not_change_the_module(gradient: Any) -> None:
    """Prevents a confidence loss that reaches the module or the backbone."""
    found = []
    for confidence in (False, True):
        recycle = RecycleConfig(layers=1, depth=2, gradient=gradient, objective="kl", confidence=confidence)
        model = spread_added(build_model(CONFIG, recycle, seed=3))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(gradient == "joint" or name.startswith("recycle."))
        found.append(gradients(model, batch_of(2), torch.tensor([0.2, 0.5, 0.3])))
    (sums, plain), (longer, others) = found
    assert torch.equal(sums, longer[:3]) and len(longer) == 5
    for name, grad in plain.items():
        assert (grad is None) == (others[name] is None)
        assert grad is None or torch.equal(grad, others[name]), name
    assert others["recycle.confidence.weight"].any() and others["recycle.confidence.bias"].any()


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("objective", ["cross_entropy", "acceptance"])
def test_what_the_layer_learns(objective: Any, drafted: bool) -> None:
    """Prevents labels of the text or of another position, and rows whose earlier drafts were rejected."""
    recycle = RecycleConfig(layers=1, depth=3, objective=objective, confidence=True, gradient="detached")
    model = spread_added(build_model(CONFIG, recycle, seed=3))
    if drafted:
        model.train_on_drafts(torch.tensor(DRAFTED))
    batch, scales = batch_of(3), torch.tensor([1.0, 0.5, 0.3, 0.2])
    sums, grads = gradients(model, batch, scales)
    hidden, *states = model.states(batch)
    best = model.logits(hidden).argmax(-1)
    weight, bias = model.get_parameter("recycle.confidence.weight"), model.get_parameter("recycle.confidence.bias")
    weight.grad = bias.grad = None
    total = torch.zeros(())
    for b in range(4):
        for t in range(40):
            for depth, state in enumerate(states, start=1):
                if batch.targets_KBS[depth, b, t] < 0:
                    break
                logits = model.logits(state[t, b][None, None])[0, 0]
                draft = DRAFTED[int(logits[DRAFTED].argmax())] if drafted else int(logits.argmax())
                accepted = torch.tensor([float(draft == best[t + depth, b])])
                loss = F.binary_cross_entropy_with_logits(F.linear(state[t, b].detach(), weight, bias), accepted)
                total = total + scales[depth] * loss
                sums[3 + depth] -= loss.detach()
                if not accepted:
                    break
    total.backward()
    assert sums[4:].abs().max() < 1e-3
    for parameter, name in ((weight, "weight"), (bias, "bias")):
        assert torch.allclose(parameter.grad, grads[f"recycle.confidence.{name}"], atol=1e-4)  # type: ignore[arg-type]


def test_a_trained_layer_is_calibrated() -> None:
    """Prevents confidences that have nothing to do with acceptance."""
    recycle = RecycleConfig(layers=1, depth=2, objective="kl", confidence=True, gradient="frozen_backbone")
    model = build_model(CONFIG, recycle, seed=3)
    batch = batch_of(2, rows=8)
    counts = (batch.targets_KBS >= 0).flatten(1).sum(1)
    assert model.recycle is not None and model.recycle.confidence is not None
    optimizer = torch.optim.AdamW(model.recycle.confidence.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss, sums = model.train_losses(batch, torch.tensor([0.0, 0.5, 0.5]) / counts)
        loss.backward()
        optimizer.step()
        losses.append(float(sums[3] + sums[4]))
    assert losses[-1] < 0.9 * losses[0]
    result = model.evaluate(batch)
    found = torch.sigmoid(model.recycle.confidence(model.states(batch)[1]))[..., 0].t()[batch.targets_KBS[1] >= 0]
    assert found.mean().item() == pytest.approx(float(result.agreed[1] / result.judged[1]), abs=0.03)
