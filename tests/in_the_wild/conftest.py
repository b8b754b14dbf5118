"""A small tokenizer for the tests of this folder."""

from __future__ import annotations

import pytest

from recycle_ds.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens that ends documents with <|endoftext|>."""
    return Tokenizer.train(["the people of the united states, in order to form a more perfect union " * 20], 300)
