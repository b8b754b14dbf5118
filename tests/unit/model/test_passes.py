"""The passes of a model: training, evaluation and a pipeline stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.parallel.layout import Layout
from recycle_ds.parallel.mesh import virtual_mesh

CONFIG = ModelConfig(layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=24, max_positions=32)
DEPTH = 2


def batch() -> Batch:
    tokens_BT = torch.randint(0, 24, (2, 21), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[0, 13:] = 1
    targets = make_targets(tokens_BT, documents_BT, DEPTH)
    positions = torch.arange(20).expand(2, -1)
    return Batch(targets.inputs[0], positions, documents_BT[:, :-1], targets.inputs, targets.targets)


def stages(recycle: RecycleConfig) -> tuple[RecycleGPT, RecycleGPT]:
    """The two stages of a pipeline."""
    layout = Layout(pipeline=2)
    blocks = (range(2), range(2, 3))
    first, last = (
        build_model(CONFIG, recycle, virtual_mesh(layout, rank), seed=3, blocks=own) for rank, own in enumerate(blocks)
    )
    return first, last


@pytest.mark.parametrize("gradient", ["joint", "frozen_backbone"])
@pytest.mark.parametrize("taps", [(), (0, 2)])
def test_stages_compute_what_the_full_model_does(gradient: str, taps: tuple[int, ...]) -> None:
    """Prevents a stage that sends too little, losses or figures of an evaluation that depend on the number of stages, and a
    graph through a frozen stage."""
    recycle = RecycleConfig(layers=1, depth=DEPTH, gradient=gradient, taps=taps)  # type: ignore[arg-type]
    full, (first, last) = build_model(CONFIG, recycle, seed=3), stages(recycle)
    scales = torch.tensor([1.0, 0.5, 0.3])
    sent = first.run_stage(batch())
    assert sent.shape == (20, 2, 16 * (1 + min(len(taps), 1))) and sent.requires_grad is (gradient == "joint")
    (total, sums), (expected_total, expected) = (
        last.train_losses(batch(), scales, sent),
        full.train_losses(batch(), scales),
    )
    assert torch.equal(total, expected_total) and torch.equal(sums, expected)
    assert len(sums) == full.loss_count == last.loss_count
    assert torch.equal(last.evaluate(batch(), sent).stacked(), full.evaluate(batch()).stacked())


def test_every_pass_is_a_call_of_the_root_module() -> None:
    """Prevents a pass without the hooks of the root module: ZeRO 3 would not gather the head's weight for it."""
    model, scales = build_model(CONFIG, RecycleConfig(layers=1, depth=DEPTH), seed=3), torch.ones(3)
    first, _ = stages(model.recycle_config)
    calls: list[str] = []
    for one in (model, first):
        one.register_forward_pre_hook(lambda *_: calls.append("before"))
        one.register_forward_hook(lambda *_: calls.append("after"))
    passes: list[Callable[[], object]] = [
        lambda: model.train_losses(batch(), scales),
        lambda: model.evaluate(batch()),
        lambda: first.run_stage(batch()),
    ]
    for run in passes:
        calls.clear()
        run()
        assert calls == ["before", "after"]


def test_a_training_pass_goes_through_what_wraps_the_model() -> None:
    """Prevents a training pass that DeepSpeed's engine does not see: it would neither scale nor reduce its gradients."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *inputs: object) -> object:
            self.calls += 1
            return self.module(*inputs)

    model, scales = build_model(CONFIG, RecycleConfig(layers=1, depth=DEPTH), seed=3), torch.ones(3)
    wrapper = Wrapper(model)
    total, sums = model.train_losses(batch(), scales, through=wrapper)
    expected_total, expected = model.train_losses(batch(), scales)
    assert wrapper.calls == 1 and torch.equal(total, expected_total) and torch.equal(sums, expected)
    total.backward()
    assert model.head_weight.grad is not None


def test_an_evaluation_has_no_graph() -> None:
    """Prevents an evaluation that keeps the activations of all blocks for a backward pass."""
    model = build_model(CONFIG, RecycleConfig(layers=1, depth=DEPTH), seed=3)
    states: list[bool] = []
    assert model.final_norm is not None
    model.final_norm.register_forward_hook(lambda *values: states.append(values[2].requires_grad))
    assert torch.is_grad_enabled() and not model.evaluate(batch()).loss.requires_grad and states == [False]
