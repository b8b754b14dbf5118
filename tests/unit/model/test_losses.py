"""The chunked output head against a plain implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.model.losses import HeadShard, head_losses, head_predictions
from recycle_ds.parallel.mesh import Axis
from recycle_ds.training.benchmark.live_memory import PeakMemory


def plain(
    hiddens: list[Tensor], weight: Tensor, targets: Tensor, scales: Tensor, train_head: list[bool], valid: int
) -> Tensor:
    """The reference: all logits at once through torch's cross entropy."""
    total = torch.zeros(())
    for index, hidden in enumerate(hiddens):
        head = weight if train_head[index] else weight.detach()
        logits = (hidden @ head.t()).float()[:, :valid]
        total = total + scales[index] * F.cross_entropy(logits, targets[index], ignore_index=-100, reduction="sum")
    return total


def problem(
    rows: int, width: int, vocab: int, dtype: torch.dtype, masked: bool = True
) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hiddens = [torch.randn(rows, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    weight = (torch.randn(vocab, width, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab - 5, (2, rows), generator=generator)
    if masked:
        targets[0, ::7] = -100
        targets[1, -3:] = -100
    return hiddens, weight, targets


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("train_head", [[True, True], [True, False]])
def test_equals_plain_cross_entropy(chunk: int, train_head: list[bool]) -> None:
    """Prevents losses or gradients that change with chunks, masked rows, vocabulary padding or a detached head."""
    hiddens, weight, targets = problem(23, 8, 40, torch.float32)
    scales = torch.tensor([0.7, 0.2])
    shard = HeadShard(0, 35, Axis())
    total, sums = head_losses(hiddens, weight, targets, scales, shard, chunk=chunk, train_head=train_head)
    (total * 3).backward()
    gradients = [tensor.grad.clone() for tensor in (*hiddens, weight) if tensor.grad is not None]
    for tensor in (*hiddens, weight):
        tensor.grad = None
    reference = plain(hiddens, weight, targets, scales, train_head, 35)
    (reference * 3).backward()
    assert torch.allclose(total, reference, rtol=1e-6)
    assert torch.allclose(torch.dot(sums, scales), reference, rtol=1e-6)
    for gradient, tensor in zip(gradients, (*hiddens, weight), strict=True):
        assert torch.allclose(gradient, tensor.grad, atol=1e-5, rtol=1e-5)


def test_a_batch_without_targets_is_zero() -> None:
    """Prevents a NaN loss or gradient for a row or a batch without targets."""
    hiddens, weight, targets = problem(6, 8, 40, torch.float32)
    targets[:] = -100
    total, _ = head_losses(
        hiddens, weight, targets, torch.ones(2), HeadShard(0, 40, Axis()), chunk=4, train_head=[True, True]
    )
    total.backward()
    assert total.item() == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (*hiddens, weight))


def test_padding_is_never_predicted() -> None:
    """Prevents an evaluation that predicts padding rows of the vocabulary, for example if other logits are negative."""
    hiddens, weight, targets = problem(23, 8, 40, torch.float32)
    with torch.no_grad():
        weight[35:] *= 100
    loss, best = head_predictions(hiddens[0].detach(), weight, targets[0], HeadShard(0, 35, Axis()), chunk=4)
    logits = (hiddens[0] @ weight.t())[:, :35]
    assert torch.equal(best, logits.argmax(1))
    assert torch.allclose(loss, F.cross_entropy(logits, targets[0], ignore_index=-100, reduction="sum"), rtol=1e-6)


def test_bf16_stays_within_its_rounding() -> None:
    """Prevents head gradients of many chunks from being summed in bf16, which loses small gradients."""
    hiddens, weight, targets = problem(512, 16, 64, torch.bfloat16, masked=False)
    scales = torch.tensor([1.0, 0.5])
    total, _ = head_losses(hiddens, weight, targets, scales, HeadShard(0, 64, Axis()), chunk=8, train_head=[True, True])
    total.backward()
    exact = weight.detach().float().requires_grad_()
    plain([h.detach().float() for h in hiddens], exact, targets, scales, [True, True], 64).backward()
    assert weight.grad is not None and exact.grad is not None
    error = (weight.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.01


def test_peak_memory_is_at_most_a_quarter() -> None:
    """Prevents logits of all rows in memory at once: 8 x 512 rows, vocabulary 49,152, two losses, both passes."""
    rows, width, vocab = 8 * 512, 32, 49_152
    hiddens, weight, targets = problem(rows, width, vocab, torch.float32, masked=False)
    scales = torch.ones(2)
    excluded = 2 * weight.numel() * 4  # the head's weight and its gradient
    with PeakMemory() as chunked:
        total, _ = head_losses(
            hiddens, weight, targets, scales, HeadShard(0, vocab, Axis()), chunk=512, train_head=[True, True]
        )
        total.backward()
    gradients = [tensor.grad for tensor in (*hiddens, weight)]
    for tensor in (*hiddens, weight):
        tensor.grad = None
    with PeakMemory() as full:
        reference = plain(hiddens, weight, targets, scales, [True, True], vocab)
        reference.backward()
    for gradient, tensor in zip(gradients, (*hiddens, weight), strict=True):
        assert torch.allclose(gradient, tensor.grad, atol=1e-4)
    ratio = (full.peak - excluded / 2) / (chunked.peak - excluded / 2)
    print(f"peak of the loss: plain {full.peak / 2**20:.0f} MiB, chunked {chunked.peak / 2**20:.0f} MiB, {ratio:.1f}x")
    assert ratio >= 4
