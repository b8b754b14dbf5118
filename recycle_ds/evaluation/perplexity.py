"""Perplexity of the backbone, and losses and acceptance of the recycle module by depth, over complete documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from recycle_ds.config import RecycleError
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import RecycleGPT
from recycle_ds.model.acceptance import EvaluationResult


class EvaluationError(RecycleError):
    """Text that cannot be evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per predicted token. recycle_loss and acceptance: by depth; acceptance is agreement with the backbone's
    argmax, conditional on all earlier depths having agreed. None where a depth had nothing to predict or to judge."""

    tokens: int
    loss: float
    recycle_loss: list[float | None]
    acceptance: list[float | None]
    tokens_per_full_call: float | None
    """Tokens that a call of the backbone would yield on this text with chains of K drafts; None without a module."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_documents(
    model: RecycleGPT, documents: Iterable[list[int]], eos: int, seq_length: int, batch_size: int
) -> Evaluation:
    """Evaluates documents (token ids), each terminated by `eos` and packed as in training.

    Every token except the first of a document is predicted exactly once: packed sequences overlap by one token.
    Raises EvaluationError when there is nothing to predict, or a loss is not a finite number.
    """
    device = next(model.parameters()).device
    totals: Tensor | None = None
    for batch in _batches(_sequences(documents, eos, seq_length), batch_size, model.depth):
        sums = model.evaluate(batch.to(device))
        stacked = sums.stacked()
        totals = stacked if totals is None else totals + stacked
    if totals is None or totals[1, 0] == 0:
        raise EvaluationError("the text has fewer than two tokens: there is nothing to predict")
    result = EvaluationResult.of(totals)
    if not all(map(math.isfinite, (result.loss, *result.recycle_loss))):
        raise EvaluationError(
            "the model's loss is not a finite number: its weights are not, or its numbers overflow; take an earlier "
            "checkpoint, or another --dtype"
        )
    count, judged = totals[1, 1:], totals[3, 1:]
    return Evaluation(
        int(totals[1, 0]),
        result.loss,
        _where(count, result.recycle_loss),
        _where(judged, result.acceptance),
        result.tokens_per_full_call,
    )


def _where(count: Tensor, means: list[float]) -> list[float | None]:
    return [mean if number else None for number, mean in zip(count.tolist(), means, strict=True)]


def _sequences(documents: Iterable[list[int]], eos: int, seq_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (tokens, document indices) of S + 1 tokens each; the last pair may be shorter."""
    tokens: list[int] = []
    numbers: list[int] = []
    for number, document in enumerate(documents):
        tokens += [*document, eos]
        numbers += [number] * (len(document) + 1)
        while len(tokens) > seq_length:
            yield tokens[: seq_length + 1], numbers[: seq_length + 1]
            tokens, numbers = tokens[seq_length:], numbers[seq_length:]
    if len(tokens) > 1:
        yield tokens, numbers


def _batches(sequences: Iterator[tuple[list[int], list[int]]], size: int, depth: int) -> Iterator[Batch]:
    """Batches of full sequences; a shorter last sequence gets its own batch."""
    while chunk := list(islice(sequences, size)):
        full = [pair for pair in chunk if len(pair[0]) == len(chunk[0][0])]
        for rows in (full, chunk[len(full) :]):
            if rows:
                yield _batch(rows, depth)


def _batch(rows: list[tuple[list[int], list[int]]], depth: int) -> Batch:
    tokens = torch.tensor([pair[0] for pair in rows])
    numbers = torch.tensor([pair[1] for pair in rows])
    numbers = numbers - numbers[:, :1]
    indices = torch.arange(tokens.shape[1])
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(numbers[:, 1:] != numbers[:, :-1], indices[1:], 0)
    positions = indices - starts.cummax(dim=1).values
    targets = make_targets(tokens, numbers, depth)
    return Batch(
        tokens_BS=targets.inputs[0],
        positions_BS=positions[:, :-1],
        documents_BS=numbers[:, :-1],
        inputs_KBS=targets.inputs,
        targets_KBS=targets.targets,
        single=not numbers.any(),
    )
