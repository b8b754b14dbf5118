"""Perplexity over complete documents: every token is counted once, including those of a shorter last sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.evaluation.perplexity import EvaluationError, evaluate_documents
from recycle_ds.model import RecycleGPT, build_model


@pytest.fixture(scope="module")
def model() -> RecycleGPT:
    config = ModelConfig(
        layers=1, hidden=32, heads=2, kv_heads=1, ffn=48, vocab_size=60, max_positions=64, init_std=0.2
    )
    return build_model(config, RecycleConfig(depth=3), seed=1).eval()


@pytest.mark.parametrize("length", range(1, 12))
def test_a_last_sequence_of_any_length(model: RecycleGPT, length: int) -> None:
    """Prevents a last sequence shorter than the module's depth from crashing, or from not being counted."""
    result = evaluate_documents(model, [list(range(1, length + 1))], 0, seq_length=8, batch_size=2)
    assert result.tokens == length
    assert len(result.recycle_loss) == len(result.acceptance) == 3


def test_loss_equals_the_plain_one(model: RecycleGPT) -> None:
    """Prevents attention between documents, and a loss averaged over sequences instead of tokens."""
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(1, 60, (size,), generator=generator).tolist() for size in (5, 9, 3, 6)]
    result = evaluate_documents(model, documents, 0, seq_length=40, batch_size=2)
    losses = []
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([[*document, 0]])
            logits = model.logits(model.hidden_states(ids))[:-1, 0]
            losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.cat(losses)
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-5)


def test_nothing_to_predict(model: RecycleGPT) -> None:
    """Prevents a perplexity from being reported for an empty text."""
    with pytest.raises(EvaluationError, match="nothing to predict"):
        evaluate_documents(model, [], 0, seq_length=8, batch_size=2)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    """Prevents a report of a model whose weights are not finite: its drafts would all be accepted, since none is compared."""
    config = ModelConfig(layers=1, hidden=32, heads=2, kv_heads=1, ffn=48, vocab_size=60, max_positions=64)
    broken = build_model(config, RecycleConfig(depth=1), seed=1).eval()
    with torch.no_grad():
        next(iter(broken.blocks.values())).mlp.down.weight[3, 2] = torch.nan
    with pytest.raises(EvaluationError, match=r"loss is not a finite number: .* take an earlier checkpoint"):
        evaluate_documents(broken, [[1, 2, 3, 4]], 0, seq_length=8, batch_size=2)


@pytest.mark.parametrize(("length", "predicted"), [(1, 0), (2, 1), (3, 2), (4, 3)])
def test_a_depth_without_a_token_to_predict_has_no_figures(model: RecycleGPT, length: int, predicted: int) -> None:
    """Prevents a perfect loss of 0 and an acceptance of 0 % where nothing was predicted or judged."""
    result = evaluate_documents(model, [list(range(1, length + 1))], 0, seq_length=8, batch_size=2)
    assert [loss is None for loss in result.recycle_loss] == [depth >= predicted for depth in range(3)]
    assert result.acceptance[predicted:] == [None] * (3 - predicted)
