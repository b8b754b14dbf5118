"""The Python interface, on a checkpoint of a real, short run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recycle_ds import Engine, SamplingParams
from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.inference import DecodingError
from recycle_ds.inference.decoder import decode_one
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.loading import load
from tests.unit.inference.command import PROMPT, Generate
from tests.unit.inference.models import random_model

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
    for options, message in (
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_batch": "4"}, "max_batch='4': must be a whole number"),
        ({"threads": "2"}, "threads='2': must be a whole number"),
        ({"kv_memory_gib": "1"}, "kv_memory_gib='1': must be a number"),
    ):
        with pytest.raises(DecodingError, match=message):
            Engine.from_folder(engine.path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 2.5, "max_new_tokens=2.5: must be a whole number"),
        ("max_new_tokens", "5", "max_new_tokens='5': must be a whole number"),
        ("seed", True, "seed=True: must be a whole number"),
        ("n", None, "n=None: must be a whole number"),
        ("temperature", "a", "temperature='a': must be a number"),
        ("top_p", None, "top_p=None: must be a number"),
        ("stop", 5, "stop=5: must be a sequence of strings"),
        ("stop", (1,), "stop=(1,): must be a sequence of strings"),
        ("logit_bias", [1], "logit_bias=[1]: must be pairs of token id and number, such as {42: -1.5}"),
        ("logit_bias", {2.7: 1}, "logit_bias={2.7: 1}: must be pairs of token id and number, such as {42: -1.5}"),
        (
            "logit_bias",
            {3: 1e39},
            "logit_bias=1e+39 for token 3: must be from -1e+06 to 1e+06; bad_tokens forbids a token",
        ),
        ("frequency_penalty", -2e6, "frequency_penalty=-2000000.0: must be from -1e+06 to 1e+06; 0 disables it"),
        ("temperature", 1e39, "temperature=1e+39: must be 0 (greedy), or from 0.0001 to 1e+06"),
        ("temperature", float("nan"), "temperature=nan: must be 0 (greedy), or from 0.0001 to 1e+06"),
        ("top_k", 2**63, "top_k=9223372036854775808: must be from 0 (keep all tokens) to 2147483647"),
        ("min_new_tokens", 2**63, "min_new_tokens=9223372036854775808: must be from 0 to 2147483647"),
        ("repetition_penalty", 0.0, "repetition_penalty=0.0: must be from 1e-06 to 1e+06; 1 disables it"),
        ("ignore_eos", "no", "ignore_eos='no': must be True or False"),
        ("bad_tokens", "x", "bad_tokens='x': must be a sequence of token ids"),
        ("allowed_tokens", 3, "allowed_tokens=3: must be a sequence of token ids"),
        ("stop_tokens", (1.5,), "stop_tokens=(1.5,): must be a sequence of token ids"),
    ],
)
def test_values_of_other_types_and_sizes_are_refused(field: str, value: object, message: str) -> None:
    """Prevents a value that ends in an error of Python, or in another text, once a prompt is being decoded."""
    with pytest.raises(DecodingError, match=f"^{re.escape(message)}$"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers() -> None:
    """Prevents the refusal of what users compute: numpy's numbers, lists and dicts."""
    params = SamplingParams(
        max_new_tokens=np.int64(4),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        bad_tokens=[1, 2],  # type: ignore[arg-type]
        logit_bias={3: 1},  # type: ignore[arg-type]
    )
    assert params.bad_tokens == (1, 2) and params.logit_bias == ((3, 1.0),) and params.max_new_tokens == 4
    assert type(params.max_new_tokens) is int and type(params.temperature) is float, "other ranks get them as JSON"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts=None: must be a text or a sequence of texts"),
        ([PROMPT, 5], "prompt 1 is of type int: must be a text"),
        ([[1, 2]], "prompt 0 is of type list: must be a text (`engine.engine.add` takes token ids)"),
        (["ab\ud800"], "prompt 0 has half of a surrogate pair at character 2"),
    ],
)
def test_what_is_no_text_is_named(engine: Engine, prompts: Any, message: str) -> None:
    """Prevents an error that blames the tokenizer, without the prompt's number."""
    with pytest.raises(DecodingError, match=re.escape(message)):
        engine.generate(prompts)
    with pytest.raises(DecodingError, match=r"params: of type dict; give SamplingParams\(\.\.\.\)"):
        engine.generate(PROMPT, {"n": 1})  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="mode=None: must be one of"):
        engine.generate(PROMPT, mode=None)  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    """Prevents empty answers without a word from a checkpoint of a run that has diverged."""
    folder = tmp_path / "hf"
    convert(str(model), str(folder), Conversion("hf"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 2] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DecodingError, match=r"the model's blocks.*down.*has a weight that is not a finite number"):
        Engine.from_folder(folder)


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


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt_ids": "abc"}, "prompt_ids=abc: must be a sequence of token ids, and encoded first if it is a text"),
        ({"prompt_ids": [347.9]}, r"prompt_ids=\[347\.9\]: must be"),
        ({"prompt_ids": [[1, 2]]}, "must be a sequence of token ids"),
        ({"prompt_ids": 5}, "must be a sequence of token ids"),
        ({"prompt_ids": [0.0, 347.9]}, "must be a sequence of token ids"),
        ({"prompt_ids": [False, 3]}, "must be a sequence of token ids"),
        ({"prompt_ids": np.array([[1, 2]])}, "must be a sequence of token ids"),
        ({"prompt_ids": np.array(5)}, "must be a sequence of token ids"),
        ({"priority": "a"}, "priority='a': must be a whole number"),
        ({"params": None}, "params=None: must be SamplingParams"),
        ({"on_tokens": 5}, "on_tokens=5: must be a function"),
    ],
)
def test_requests_of_other_types_do_not_end_the_others(asked: dict[str, Any], message: str) -> None:
    """Prevents a wrong request from being found first in a step, which ends all requests beside it."""
    engine = local_engine(random_model(7, 1), max_batch=2)
    (other,) = engine.add(np.array([1, 2]), SamplingParams(max_new_tokens=5), "autoregressive")
    assert engine.add(torch.tensor([0, 2]), SamplingParams(max_new_tokens=1), "autoregressive")[0].tokens == [0, 2]  # type: ignore[arg-type]
    engine.step()
    with pytest.raises(DecodingError, match=message):
        engine.add(**({"prompt_ids": [1, 2], "params": SamplingParams(max_new_tokens=3)} | asked))
    engine.finish([other])
    assert len(other.tokens) == 7
