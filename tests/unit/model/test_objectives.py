"""The recycle module's objectives against plain implementations with all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import build_model
from recycle_ds.model.losses import DraftColumns, HeadShard, LossSettings, training_losses
from recycle_ds.parallel.mesh import Axis, Mesh
from recycle_ds.training.batches import assemble
from recycle_ds.training.benchmark.live_memory import PeakMemory

OBJECTIVES = ("cross_entropy", "kl", "acceptance")
VOCAB, PADDED, DEPTH = 35, 40, 3
DRAFTED = [0, 3, 4, 9, 11, 17, 18, 30, 34]


def plain(
    states: list[Tensor],
    targets_KBS: Tensor,
    scales: Tensor,
    weight: Tensor,
    recycle: RecycleConfig,
    ids: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The losses by their definitions, one row at a time."""
    joint, frozen = recycle.gradient == "joint", recycle.gradient == "frozen_backbone"
    sums = [torch.zeros((), dtype=weight.dtype) for _ in states]
    total = torch.zeros((), dtype=weight.dtype)
    head = weight[:VOCAB]
    for depth, state in enumerate(states):
        trained = head if depth == 0 or joint else head.detach()
        for s in range(state.shape[0]):
            for b in range(state.shape[1]):
                target = int(targets_KBS[depth, b, s])
                if target < 0:
                    continue
                if depth == 0:
                    loss = F.cross_entropy((trained @ state[s, b])[None], torch.tensor([target]))
                else:
                    own = list(range(VOCAB)) if ids is None else ids
                    q = (trained[own] @ state[s, b]).softmax(0)
                    p = (head @ states[0][s + depth, b]).detach().softmax(0)[own]
                    if recycle.objective == "cross_entropy":
                        loss = -q[own.index(target)].log() if target in own else torch.zeros(())
                    elif recycle.objective == "kl":
                        p = p / p.sum()
                        loss = (p * (p / q).log()).sum()
                    else:
                        loss = -torch.minimum(p, q).sum().log()
                sums[depth] = sums[depth] + loss.detach()
                if not (depth == 0 and frozen):
                    total = total + scales[depth] * loss
    return total, torch.stack(sums)


def problem(dtype: torch.dtype, requires_hidden: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """States of 11 positions x 2 rows, a padded head, and targets with two documents and a masked end."""
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(11, 2, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(DEPTH + 1)]
    for index, state in enumerate(states):
        state.requires_grad_(index > 0 or requires_hidden)
    weight = (torch.randn(PADDED, 8, generator=generator, dtype=torch.float64) * 0.4).to(dtype).requires_grad_()
    tokens_BT = torch.randint(0, VOCAB, (2, 12), generator=generator)
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[0, 6:] = 1
    return states, weight, make_targets(tokens_BT, documents_BT, DEPTH).targets


def columns(ids: list[int] | None) -> DraftColumns | None:
    if ids is None:
        return None
    return DraftColumns.of(torch.tensor(ids), VOCAB, HeadShard(0, VOCAB, Axis()))


@pytest.mark.parametrize("ids", [None, DRAFTED], ids=["complete", "drafted"])
@pytest.mark.parametrize("gradient", ["joint", "detached", "frozen_backbone"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_definition(objective: Any, gradient: Any, ids: list[int] | None) -> None:
    """Prevents a wrong loss or gradient: of padding, masks, document ends, chunks, a detached head, a draft vocabulary."""
    recycle = RecycleConfig(layers=1, depth=DEPTH, objective=objective, gradient=gradient)
    # the chunked cross entropy of the backbone is in fp32
    frozen = gradient == "frozen_backbone"
    exact = frozen and (objective != "cross_entropy" or ids is not None)
    dtype = torch.float64 if exact else torch.float32
    scales = torch.tensor([0.0 if frozen else 0.7, 0.5, 0.3, 0.2], dtype=dtype)
    found: list[list[Tensor | None]] = []
    for chunk in (0, 1, 5, 64):  # 0: the definition
        states, weight, targets = problem(dtype, not frozen)
        weight.requires_grad_(not frozen)
        if chunk == 0:
            total, sums = plain(states, targets, scales, weight, recycle, ids)
        else:
            settings = LossSettings(recycle, HeadShard(0, VOCAB, Axis()), Axis(), chunk, columns(ids))
            total, sums = training_losses(states, targets, scales, weight, settings)
        (total * 3).backward()
        found.append([total.detach(), sums.detach(), weight.grad, *(state.grad for state in states)])
    close = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for other in found[1:]:
        for number, (left, right) in enumerate(zip(found[0], other, strict=True)):
            assert (left is None) == (right is None), number
            if left is not None and right is not None:
                assert torch.allclose(left.double(), right.double(), **close), number


@pytest.mark.parametrize("objective", ["kl", "acceptance"])
def test_a_module_that_equals_the_backbone_has_no_loss(objective: Any) -> None:
    """Prevents a loss with another minimum than the backbone's own distribution."""
    states, weight, targets = problem(torch.float64, False)
    shifted = [F.pad(states[0][k:], (0, 0, 0, 0, 0, k)).detach().requires_grad_() for k in range(1, DEPTH + 1)]
    recycle = RecycleConfig(layers=1, depth=DEPTH, objective=objective, gradient="frozen_backbone")
    settings = LossSettings(recycle, HeadShard(0, VOCAB, Axis()), Axis(), chunk=7)
    total, sums = training_losses([states[0], *shifted], targets, torch.ones(4), weight.detach(), settings)
    total.backward()
    assert sums[0] > 1 and sums[1:].abs().max() < 1e-12
    if objective == "kl":  # min(p, q) has a kink there
        assert all(state.grad is not None and state.grad.abs().max() < 1e-9 for state in shifted)


@pytest.mark.parametrize("objective", ["kl", "acceptance"])
def test_bf16_states_and_far_distributions(objective: Any) -> None:
    """Prevents losses that are not numbers where the module gives the backbone's token no probability at all."""
    states, weight, targets = problem(torch.bfloat16, False)
    far = [(state * 300).detach().requires_grad_() for state in states[1:]]
    recycle = RecycleConfig(layers=1, depth=DEPTH, objective=objective, gradient="frozen_backbone")
    settings = LossSettings(recycle, HeadShard(0, VOCAB, Axis()), Axis(), chunk=7)
    total, sums = training_losses([states[0] * 300, *far], targets, torch.ones(4), weight.detach(), settings)
    total.backward()
    assert bool(torch.isfinite(sums).all()) and sums[1] > 10
    assert all(state.grad is not None and bool(torch.isfinite(state.grad).all()) for state in far)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_module_learns_to_be_accepted(objective: Any) -> None:
    """Prevents an objective that lowers its loss without raising the acceptance."""
    config = ModelConfig(
        layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab_size=24, max_positions=64, init_std=0.3
    )
    recycle = RecycleConfig(layers=1, depth=2, objective=objective, gradient="frozen_backbone", taps=(0, 1))
    model = build_model(config, recycle, seed=2)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 24, (4, 33), generator=generator)
    targets = make_targets(tokens_BT, torch.zeros_like(tokens_BT), 2)
    # the text is what the backbone takes, so that all objectives have the same aim
    positions = torch.arange(32).expand(4, -1)
    batch = Batch(tokens_BT[:, :-1], positions, torch.zeros_like(tokens_BT)[:, :-1], targets.inputs, targets.targets)
    best = model.logits(model.states(batch)[0]).argmax(-1).t()
    wanted = targets.targets.clone()
    for depth in range(3):
        ahead = torch.full_like(best, -100)
        ahead[:, : 32 - depth] = best[:, depth:]
        wanted[depth] = torch.where(wanted[depth] >= 0, ahead, wanted[depth])
    batch = Batch(batch.tokens_BS, positions, batch.documents_BS, targets.inputs, wanted)
    counts = (wanted >= 0).flatten(1).sum(1)
    optimizer = torch.optim.AdamW(model.recycle.parameters(), lr=1e-2, weight_decay=0.0)  # type: ignore[union-attr]
    before = model.evaluate(batch)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model.train_losses(batch, torch.tensor([0.0, 0.5, 0.5]) / counts)
        loss.backward()
        optimizer.step()
    after = model.evaluate(batch)
    assert after.agreed[1] > before.agreed[1] + 30 and after.agreed[1] / after.judged[1] > 0.8


def test_peak_memory_is_below_the_logits_of_one_depth() -> None:
    """Prevents logits of all rows in memory at once: 2 x 1,024 rows, vocabulary 8,192, three depths."""
    rows, vocab = 1024, 8192
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(rows, 2, 32, generator=generator).requires_grad_(index > 0) for index in range(4)]
    weight = torch.randn(vocab, 32, generator=generator)
    tokens_BT = torch.randint(0, vocab, (2, rows + 1), generator=generator)
    targets = make_targets(tokens_BT, torch.zeros_like(tokens_BT), 3).targets
    recycle = RecycleConfig(layers=1, depth=3, objective="acceptance", gradient="frozen_backbone")
    settings = LossSettings(recycle, HeadShard(0, vocab, Axis()), Axis(), chunk=128)
    with PeakMemory() as chunked:
        total, _ = training_losses(states, targets, torch.ones(4), weight, settings)
        total.backward()
    one_depth = rows * 2 * vocab * 4
    assert chunked.peak < one_depth


def test_evaluation_over_the_draft_vocabulary() -> None:
    """Prevents an evaluation of a head that the module was not trained on, and counts of targets that have no loss."""
    config = ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=VOCAB, max_positions=32, init_std=0.5
    )
    recycle = RecycleConfig(layers=1, depth=2, draft_vocabulary=9, draft_vocabulary_in_training=True)
    model = build_model(config, recycle, seed=2)
    model.train_on_drafts(torch.tensor(DRAFTED))
    tokens_BT = torch.randint(0, VOCAB, (3, 29), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.zeros_like(tokens_BT)
    targets = make_targets(tokens_BT, documents_BT, 2)
    positions = torch.arange(28).expand(3, -1)
    batch = Batch(tokens_BT[:, :-1], positions, documents_BT[:, :-1], targets.inputs, targets.targets)
    found, counts = (
        model.evaluate(batch),
        assemble([batch], 3, Mesh(), model.loss_settings.counted_tokens).counts,
    )
    states = model.states(batch)
    best = model.logits(states[0]).argmax(-1)
    drafts = torch.tensor(DRAFTED)[model.logits(states[1])[..., DRAFTED].argmax(-1)]
    number = torch.full((VOCAB,), -100)
    number[DRAFTED] = torch.arange(len(DRAFTED))
    for depth in (1, 2):
        wanted = targets.targets[depth].t()
        inside = (wanted >= 0) & (number[wanted.clamp_min(0)] >= 0)
        logits = model.logits(states[depth])[..., DRAFTED]
        loss = F.cross_entropy(logits[inside], number[wanted[inside]], reduction="sum")
        assert found.loss[depth].item() == pytest.approx(loss.item(), rel=1e-5)
        assert found.count[depth] == counts[depth] == inside.sum() < (wanted >= 0).sum()
    assert found.count[0] == counts[0] == 3 * 28
    assert found.judged[1] == 3 * 27, "a token outside the draft vocabulary is a rejected draft"
    assert found.agreed[1] == (drafts[:-1] == best[1:]).sum()
