"""Offsets between inputs and targets at every depth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.data.targets import IGNORE, make_targets

A, B, C, D, E, F = 11, 12, 13, 14, 15, 16


def test_six_tokens_by_hand() -> None:
    """Prevents an off-by-one between backbone, module input and target: the table of the definition, row by row."""
    made = make_targets(torch.tensor([[A, B, C, D, E, F]]), torch.zeros(1, 6, dtype=torch.int64), depth=2)
    assert made.inputs[0, 0].tolist() == [A, B, C, D, E]
    assert made.targets[0, 0].tolist() == [B, C, D, E, F]
    assert made.inputs[1, 0].tolist() == [B, C, D, E, F]
    assert made.targets[1, 0].tolist() == [C, D, E, F, IGNORE]
    assert made.inputs[2, 0, :4].tolist() == [C, D, E, F]
    assert made.targets[2, 0].tolist() == [D, E, F, IGNORE, IGNORE]


def test_nothing_is_predicted_across_a_boundary() -> None:
    """Prevents training the end of one document to predict the start of an unrelated one, at any depth."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    made = make_targets(torch.tensor([[A, B, C, D, E, F]]), documents, depth=2)
    assert made.targets[0, 0].tolist() == [B, C, IGNORE, E, F]
    assert made.targets[1, 0].tolist() == [C, IGNORE, IGNORE, F, IGNORE]
    assert made.targets[2, 0].tolist() == [IGNORE] * 5


def test_nothing_is_predicted_through_a_document() -> None:
    """Prevents comparing only the two ends: a document number that recurs later is not the same document."""
    made = make_targets(torch.tensor([[A, B, C, D]]), torch.tensor([[0, 1, 0, 0]]), depth=1)
    assert made.targets[0, 0].tolist() == [IGNORE, IGNORE, D]
    assert made.targets[1, 0].tolist() == [IGNORE, IGNORE, IGNORE]


def test_documents_of_one_token() -> None:
    """Prevents a target when every token is its own document."""
    made = make_targets(torch.tensor([[A, B, C]]), torch.tensor([[0, 1, 2]]), depth=1)
    assert (made.targets == IGNORE).all()


def test_depth_beyond_the_sequence() -> None:
    """Prevents a crash, or an invalid target, if the depth exceeds the positions."""
    made = make_targets(torch.tensor([[A, B, C]]), torch.zeros(1, 3, dtype=torch.int64), depth=4)
    assert made.inputs.shape == made.targets.shape == (5, 1, 2)
    assert (made.targets[2:] == IGNORE).all()


@given(st.data())
def test_every_entry_follows_the_definition(data: st.DataObject) -> None:
    """Prevents a vectorisation that disagrees with the definition anywhere: each entry is recomputed with a loop."""
    batch, length, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12)), data.draw(st.integers(0, 4))
    rows = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    documents = data.draw(st.lists(rows, min_size=batch, max_size=batch))
    tokens = torch.arange(1, batch * length + 1).reshape(batch, length)
    made = make_targets(tokens, torch.tensor(documents), depth)
    assert made.inputs.shape == made.targets.shape == (depth + 1, batch, length - 1)
    assert made.inputs.dtype == made.targets.dtype == torch.int64
    for k in range(depth + 1):
        for b in range(batch):
            for t in range(length - 1):
                exists = t + k + 1 < length
                counts = exists and len(set(documents[b][t : t + k + 2])) == 1
                assert made.targets[k, b, t] == (tokens[b, t + k + 1] if counts else IGNORE)
                assert made.inputs[k, b, t] == (tokens[b, t + k] if t + k < length else 0)


@pytest.mark.parametrize(
    ("tokens", "documents", "depth"), [((2, 5), (2, 4), 1), ((2, 1), (2, 1), 1), ((5,), (5,), 1), ((2, 5), (2, 5), -1)]
)
def test_invalid_shapes(tokens: tuple[int, ...], documents: tuple[int, ...], depth: int) -> None:
    """Prevents silent broadcasting of documents that belong to other tokens."""
    with pytest.raises(ValueError, match=r"need at least|must both be"):
        make_targets(torch.zeros(tokens, dtype=torch.int64), torch.zeros(documents, dtype=torch.int64), depth)
