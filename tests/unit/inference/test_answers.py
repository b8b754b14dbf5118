"""Answers to many texts at once."""

from __future__ import annotations

import tokenizers
from tokenizers import models, pre_tokenizers

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference import DecodingError, SamplingParams
from recycle_ds.inference.answers import Job, answer_all
from recycle_ds.inference.engine.build import local_engine
from tests.unit.inference.models import random_model


def test_a_prompt_that_cannot_be_encoded_stops_no_other() -> None:
    """Prevents one user's text from ending the answers to all others with an error of the tokenizer."""
    built = tokenizers.Tokenizer(models.WordLevel({"a": 0, "e": 1}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(built.to_str(), {"eos_token": "e"})
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    jobs = [Job(n, text, params, parse_special=False) for n, text in enumerate(["a a", "a e", "a"])]
    found = dict(answer_all(local_engine(random_model(2, 1), max_batch=1), tokenizer, jobs))
    assert isinstance(found[1], DecodingError) and "cannot encode 'e' as text" in str(found[1])
    answers = [found[0], found[2]]
    assert all(not isinstance(one, DecodingError) and len(one[0].token_ids) == 3 for one in answers)
