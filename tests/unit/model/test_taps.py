"""Taps: states after some of the backbone's blocks in the recycle module's input."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import build_model
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.flops import parameters
from tests.unit.inference.models import spread_added

CONFIG = ModelConfig(layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=20, max_positions=32, init_std=0.3)


def batch(depth: int) -> Batch:
    """Two rows of 12 tokens, the second one of two documents."""
    tokens_BT = torch.randint(0, 20, (2, 13), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[1, 7:] = 1
    positions_BT = torch.arange(13).repeat(2, 1)
    positions_BT[1, 7:] -= 7
    targets = make_targets(tokens_BT, documents_BT, depth)
    return Batch(tokens_BT[:, :-1], positions_BT[:, :-1], documents_BT[:, :-1], targets.inputs, targets.targets)


def test_new_taps_do_not_change_a_module() -> None:
    """Prevents a trained module from losing what it learned when it is given taps."""
    plain = build_model(CONFIG, RecycleConfig(layers=1, depth=3), seed=4)
    tapped = build_model(CONFIG, RecycleConfig(layers=1, depth=3, taps=(0, 2)), seed=9)
    absent = tapped.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert absent and all(name.startswith("recycle.tap_") for name in absent)
    for left, right in zip(plain.states(batch(3)), tapped.states(batch(3)), strict=True):
        assert torch.equal(left, right)


def test_taps_are_joined_as_one_projection() -> None:
    """Prevents states of another block, unnormed states, and tapped states in steps whose position has none."""
    model = build_model(CONFIG, RecycleConfig(layers=1, depth=2, taps=(0, 2)), seed=4)
    spread_added(model)
    assert model.recycle is not None and model.recycle.tap_projection is not None
    seen: dict[str, torch.Tensor] = {}
    for index, block in model.blocks.items():
        block.register_forward_hook(lambda _, __, output, index=index: seen.__setitem__(index, output[0]))
    joined: list[tuple[torch.Tensor, ...]] = []
    model.recycle.blocks[0].register_forward_hook(lambda _, given, __: joined.append(given))
    hidden, first, _ = model.states(batch(2))
    assert model.embedding is not None
    wide = torch.cat((model.recycle.projection.weight, model.recycle.tap_projection.weight), dim=1)
    for step, (state, taps) in enumerate([(hidden, (seen["0"], seen["2"])), (first, ())], start=1):
        parts = [state, model.embedding(batch(2).inputs_KBS[step].t()), *taps]
        normed = [part * (part.square().mean(-1, keepdim=True) + CONFIG.norm_epsilon).rsqrt() for part in parts]
        pair = torch.cat(normed, dim=-1)
        expected = pair @ wide[:, : pair.shape[-1]].t()
        assert torch.allclose(joined[step - 1][0], expected, atol=1e-5), step


@pytest.mark.parametrize(("gradient", "reaches"), [("joint", True), ("detached", False), ("frozen_backbone", False)])
def test_the_gradient_through_taps(gradient: str, reaches: bool) -> None:
    """Prevents a detached or frozen backbone that learns through its tapped states, and a joint one that does not."""
    recycle = RecycleConfig(layers=1, taps=(1,), gradient=gradient)  # type: ignore[arg-type]
    model = build_model(CONFIG, recycle, seed=4)
    spread_added(model)
    found, _ = model.train_losses(batch(1), torch.tensor([0.0, 1.0]))
    found.backward()
    assert model.recycle is not None and model.recycle.tap_projection is not None
    assert model.recycle.tap_projection.weight.grad is not None
    grad = model.get_parameter("blocks.1.mlp.down.weight").grad
    assert (grad is not None and bool(grad.any())) is reaches


def test_taps_are_counted_and_checked() -> None:
    """Prevents a plan of a smaller model than is trained, and taps that do not exist."""
    recycle = RecycleConfig(layers=1, taps=(0, 1, 2))
    shapes = whole_shapes(CONFIG, recycle)
    assert parameters(CONFIG, recycle) == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert shapes["recycle.tap_projection.weight"] == (16, 48)
    with pytest.raises(ConfigError, match=r"recycle\.taps: 3: must be below model\.layers \(3\)"):
        build_model(CONFIG, RecycleConfig(layers=1, taps=(3,)))
    for taps, layers in (((1, 0), 1), ((1, 1), 1), ((1,), 0)):
        with pytest.raises(ValueError, match=r"taps \(\["):
            RecycleConfig(layers=layers, taps=taps)
