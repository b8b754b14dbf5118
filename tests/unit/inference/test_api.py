"""The Python interface, on a checkpoint of a real, short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds import Engine, SamplingParams
from recycle_ds.checkpoint import CheckpointError
from recycle_ds.inference import DecodingError
from recycle_ds.inference.decoder import decode_one
from recycle_ds.inference.loading import load
from tests.unit.inference.command import PROMPT, Generate

PROMPTS = [PROMPT, "abc", "hij abc"]


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine.from_folder(model, dtype="fp32", max_batch=2)


def test_answers_are_those_of_the_command(engine: Engine, generate: Generate) -> None:
    """Prevents an interface that decodes differently from the command line, or changes the order of the prompts."""
    params = SamplingParams(max_new_tokens=20, temperature=0)
    answers = list(engine.generate(PROMPTS, params, mode="verified"))
    assert [answer.prompt for answer in answers] == PROMPTS
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        record = json.loads(generate("--prompt", prompt, "--max-new-tokens", "20", "--json").out)
        assert (answer.text, list(answer.token_ids)) == (record["text"], record["token_ids"])
        assert len(answer.recycled) == len(answer.token_ids) == 20 and answer.finish_reason == "length"
        assert answer.tokens_per_full_call >= 1
    reference = engine.generate(PROMPTS, params, mode="autoregressive")
    assert [answer.token_ids for answer in reference] == [answer.token_ids for answer in answers]


def test_one_text_is_one_prompt(engine: Engine) -> None:
    """Prevents a string from being treated as a sequence of one-letter prompts."""
    (answer,) = engine.generate("abcd", SamplingParams(max_new_tokens=3))
    assert answer.prompt == "abcd"


def test_a_seed_repeats_a_text_and_a_stop_string_cuts_it(engine: Engine) -> None:
    """Prevents parameters that do not reach the decoder."""
    sampled = SamplingParams(temperature=1.3, seed=3, max_new_tokens=24)
    first, again = (next(engine.generate(PROMPT, sampled)).text for _ in range(2))
    other = next(engine.generate(PROMPT, SamplingParams(temperature=1.3, seed=4, max_new_tokens=24))).text
    assert first == again != other
    text = next(engine.generate(PROMPT, SamplingParams(max_new_tokens=30))).text
    stopped = next(engine.generate(PROMPT, SamplingParams(max_new_tokens=30, stop=(text[7:10],))))
    assert stopped.text == text[: text.index(text[7:10])] and stopped.finish_reason == "stop"


def test_wrong_arguments_are_typed_errors(engine: Engine, tmp_path: Path) -> None:
    """Prevents a KeyError, and an error that is raised only with the first answer."""
    with pytest.raises(DecodingError, match="did you mean verified"):
        engine.generate(PROMPT, mode="verfied")
    with pytest.raises(DecodingError, match="max_new_tokens=0: must be at least 1"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(DecodingError, match=r"stop='end': must be a sequence of strings; write \('end',\)"):
        SamplingParams(stop="end")  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="must not be empty"):
        SamplingParams(stop=("",))
    with pytest.raises(DecodingError, match="draft_tokens=-1"):
        SamplingParams(draft_tokens=-1)
    with pytest.raises(DecodingError, match="the prompt is empty"):
        list(engine.generate([""]))
    with pytest.raises(CheckpointError, match="no such folder"):
        Engine.from_folder(tmp_path / "nowhere")
    with pytest.raises(DecodingError, match="max_batch=0"):
        Engine.from_folder(engine.path, max_batch=0)


def test_special_tokens_in_prompts(engine: Engine, model: Path) -> None:
    """Prevents a user's prompt from ending the document, and raw prompts that have lost their special tokens."""
    tokenizer = load(str(model), "fp32", None).tokenizer
    prompt, params = "ab<|endoftext|>c", SamplingParams(max_new_tokens=8)
    for parse_special in (True, False):
        ids = tokenizer.encode(prompt, parse_special=parse_special)
        assert (tokenizer.eos_id in ids) is parse_special
        (answer,) = engine.generate(prompt, params, parse_special=parse_special)
        expected = decode_one(engine.engine, ids, params, "verified")
        assert (answer.token_ids, answer.prompt) == (expected.token_ids, prompt)
