"""The prompts that ship with the package."""

from __future__ import annotations

from collections import Counter

import pytest

from recycle_ds.inference.bench.held_out import HELD_OUT, held_out_prompts
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.exclusion import Exclusion, read_texts
from recycle_ds.inference.self_text.prompts import RAW, read_prompts, select


def test_the_shipped_prompts_are_complete() -> None:
    """Prevents a bench of too few or repeated prompts, or of one kind, and a file that some commands cannot read."""
    prompts = held_out_prompts()
    assert Counter(prompt["kind"] for prompt in prompts) == dict.fromkeys(("chat", "code", "maths", "prose"), 15)
    assert len({prompt["prompt"] for prompt in prompts}) == 60 and HELD_OUT.stat().st_size <= 30_000
    assert set().union(*prompts) == {"kind", "prompt", "raw"}
    forms = {prompt.content: prompt.form for prompt in read_prompts(HELD_OUT)}
    assert [forms[prompt["prompt"]] == RAW for prompt in prompts] == [prompt.get("raw", False) for prompt in prompts]


def test_the_shipped_prompts_can_be_excluded() -> None:
    """Prevents a bench on prompts that the module was trained on, although they were to be left out."""
    exclusion = Exclusion(read_texts(HELD_OUT))
    with pytest.raises(DecodingError, match="all 60 prompts contain a text of --exclude"):
        select(read_prompts(HELD_OUT), exclusion, 0, seed=0)
    assert all(exclusion.matches(f"Please: {prompt['prompt']}") for prompt in held_out_prompts())
    assert not exclusion.matches("What is the capital of Portugal, and how many people live there?")
