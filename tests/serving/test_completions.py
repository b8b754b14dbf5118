"""The official client against a running server: completions, streams, log probabilities, echoes, stops and modes."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.serving.answers.prompts import EchoedPrompt
from tests.serving.servers import NAME, TEXT, Server, engine_of, greedy

PROMPT = TEXT[:14]


def test_a_completion_in_all_four_forms_of_prompts(server: Server, loaded: LoadedModel) -> None:
    """Prevents an answer that is not the engine's, and choices or usage in the wrong order, for texts and token ids."""
    client, other = server.client(), "the cat "
    expected = [greedy(loaded, prompt, 20) for prompt in (PROMPT, other)]
    ids = [loaded.tokenizer.encode(prompt) for prompt in (PROMPT, other)]
    for prompt, texts in ((PROMPT, expected[:1]), (ids[0], expected[:1]), ([PROMPT, other], expected), (ids, expected)):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=20, temperature=0)  # type: ignore[arg-type]
        assert [(choice.index, choice.text) for choice in answer.choices] == [(n, t) for n, (t, _) in enumerate(texts)]
        assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
        assert answer.usage is not None and answer.object == "text_completion" and answer.model == NAME
        assert answer.usage.prompt_tokens == sum(map(len, ids[: len(texts)]))
        assert answer.usage.completion_tokens == sum(len(found) for _, found in texts)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert client.completions.create(model=NAME, prompt=PROMPT).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    """Prevents a stream whose text, tokens, log probabilities, end or usage differ from those of the complete answer, and that
    has no usage chunk or one per choice (vllm#8625, vllm#9357, sglang#10012)."""
    client = server.client()
    asked: dict[str, Any] = {
        "model": NAME,
        "prompt": [PROMPT, "the"],
        "max_tokens": 24,
        "temperature": 1.5,
        "seed": 5,
        "n": 2,
    }
    asked |= {"logprobs": 2, "extra_body": {"token_details": True}}
    whole = client.completions.create(**asked)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(**asked, stream=True, stream_options=options))
    *parts, last = chunks
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, name) == getattr(whole.usage, name)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] > 0, "usage so far must be cumulative"
    assert all(chunk.usage.prompt_tokens == whole.usage.prompt_tokens for chunk in chunks)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert (
            [one.finish_reason for one in mine if one.finish_reason]
            == [choice.finish_reason]
            == [mine[-1].finish_reason]
        )
        tokens = [token for one in mine for token in one.tokens]  # type: ignore[attr-defined]
        for token, same in zip(tokens, choice.tokens, strict=True):  # type: ignore[attr-defined]
            assert token["logprob"] == pytest.approx(same["logprob"], abs=1e-4)
            assert (token["id"], token["text"]) == (same["id"], same["text"])
        assert "".join(token["text"] for token in tokens) == choice.text
        assert choice.logprobs is not None
        for name in ("tokens", "text_offset"):
            assert [v for one in mine if one.logprobs for v in getattr(one.logprobs, name)] == getattr(
                choice.logprobs, name
            )
    assert len({choice.text for choice in whole.choices[:2]}) == 2, "n answers with one seed are the same"


def test_log_probabilities_of_completions(server: Server, loaded: LoadedModel) -> None:
    """Prevents log probabilities that are zero or missing under speculation (llama.cpp#27972, sglang#14046), in the wrong
    shape, or of other tokens."""
    text, ids = greedy(loaded, PROMPT, 12)
    (choice,) = (
        server.client().completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3).choices
    )
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.token_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(ids)
    for name, value, best, offset in zip(
        found.tokens, found.token_logprobs, found.top_logprobs or [], found.text_offset or [], strict=True
    ):
        assert value is not None and -20 < value < 0 and best[name] == value == max(best.values()), (
            "greedy: the likeliest"
        )
        assert 3 <= len(best) <= 4 and sum(map(math.exp, best.values())) < 1.001
        assert text[offset:].startswith(name) or name.startswith("bytes:")


def test_an_echoed_prompt_is_scored(server: Server, loaded: LoadedModel) -> None:
    """Prevents log probabilities of prompts that are shifted, that depend on what is decoded beside them (vllm#53488), or that
    cover the answer only."""
    client, ids = server.client(), loaded.tokenizer.encode(PROMPT)
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "echo": True, "logprobs": 1}
    (choice,) = client.completions.create(prompt=PROMPT, max_tokens=6, **asked).choices
    assert choice.text == PROMPT + greedy(loaded, PROMPT, 6)[0]
    found = choice.logprobs
    assert found is not None and found.token_logprobs is not None and len(found.token_logprobs) == len(ids) + 6
    assert found.token_logprobs[0] is None and all(
        value is not None and value < 0 for value in found.token_logprobs[1:]
    )
    assert found.text_offset == sorted(found.text_offset or []) and found.text_offset[0] == 0
    engine = engine_of(loaded)
    for count in (1, 5, len(ids) - 1):  # the score of a token is that of choosing it
        params = SamplingParams(max_new_tokens=1, logprobs=1, allowed_tokens=(ids[count],))
        (sequence,) = engine.add(ids[:count], params, "autoregressive")
        engine.finish([sequence])
        assert found.token_logprobs[count] == pytest.approx(sequence.logprobs[0][0], abs=1e-4)
    # the prompt alone, as token ids, for two answers
    pair = client.completions.create(prompt=[ids], max_tokens=0, n=2, **asked)
    for one in pair.choices:
        assert one.text == PROMPT and one.logprobs is not None
        assert one.logprobs.token_logprobs == pytest.approx(found.token_logprobs[: len(ids)], abs=1e-4)
    assert pair.usage is not None and pair.usage.completion_tokens == 0
    several = client.completions.create(prompt=[ids, ids[:4], ids[2:]], max_tokens=0, **asked).usage
    assert several is not None and several.model_dump()["recycle"]["tokens_per_second"] == 0
    (plain,) = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, temperature=0, echo=True).choices
    streamed = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, temperature=0, echo=True, stream=True)
    assert plain.text == "".join(chunk.choices[0].text for chunk in streamed) and plain.text.startswith(PROMPT)


def test_a_prompt_that_is_too_long_is_not_echoed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the text of a prompt from being made, for seconds and in the event loop, before its length is checked."""
    made, original = [], EchoedPrompt.of

    def of(*arguments: Any) -> EchoedPrompt:
        made.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(EchoedPrompt, "of", of)
    for count, status in ((60_000, 400), (20, 200)):
        answer = server.http().post("/v1/completions", json={"prompt": [7] * count, "echo": True, "max_tokens": 1})
        assert answer.status_code == status
    assert len(made) == 1 and made[0].startswith("asyncio_"), "not in a thread of its own"


def test_stop_and_end_reasons(server: Server, loaded: LoadedModel) -> None:
    """Prevents a stop string that leaks into a stream, tokens behind it in log probabilities (vllm#47616), and a wrong reason
    when both the limit and a stop string end an answer (sglang#31599)."""
    client, (text, _) = server.client(), greedy(loaded, PROMPT, 40)
    stop = text[8:11]
    cut = text[: text.index(stop)]
    asked: dict[str, Any] = {
        "model": NAME,
        "prompt": PROMPT,
        "temperature": 0,
        "stop": ["\x00never", stop],
        "logprobs": 0,
    }
    for tokens in (40, len(greedy(loaded, PROMPT, 40, stop=(stop,))[1])):
        (choice,) = client.completions.create(**asked, max_tokens=tokens).choices
        assert (choice.text, choice.finish_reason) == (cut, "stop")
        assert choice.logprobs is not None and choice.logprobs.text_offset is not None
        assert all(offset <= len(cut) for offset in choice.logprobs.text_offset)
        pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, max_tokens=tokens, stream=True)]
        assert "".join(piece.text for piece in pieces) == cut and pieces[-1].finish_reason == "stop"
    (ended,) = client.completions.create(
        model=NAME, prompt=PROMPT, logit_bias={str(loaded.tokenizer.eos_id): 100}
    ).choices
    assert (ended.text, ended.finish_reason) == ("", "stop")
    ids = loaded.tokenizer.encode(PROMPT)
    (full,) = client.completions.create(
        model=NAME, prompt=[ids * 5], max_tokens=500, extra_body={"ignore_eos": True}
    ).choices
    assert full.finish_reason == "length", "the context is full"


def test_modes_give_the_same_text_and_say_what_they_did(server: Server) -> None:
    """Prevents a mode that is ignored, verified text that differs, and usage without the figures of recycling."""
    http = server.http()
    found = {}
    for mode in ("autoregressive", "alternate", "verified"):
        body = {
            "prompt": PROMPT,
            "max_tokens": 40,
            "temperature": 1.2,
            "seed": 3,
            "mode": mode,
            "token_details": True,
            "draft_tokens": 3,
        }
        answer = http.post("/v1/completions", json=body).json()
        (choice,), recycle = answer["choices"], answer["usage"]["recycle"]
        found[mode] = choice, answer["usage"]
        assert recycle["mode"] == mode and recycle["full_calls"] >= 1 and recycle["time_to_first_token"] > 0
        sources = {token["source"] for token in choice["tokens"]}
        assert sources == ({"full"} if mode == "autoregressive" else {"full", "recycled"})
        assert "".join(token["text"] for token in choice["tokens"]) == choice["text"]
        assert recycle["tokens_per_full_call"] == pytest.approx(40 / recycle["full_calls"], abs=1e-3)
    assert found["verified"][0]["text"] == found["autoregressive"][0]["text"]
    assert found["autoregressive"][1]["recycle"]["full_calls"] == 40
    choice, usage = found["verified"]
    details = usage["completion_tokens_details"]
    recycled = sum(token["source"] == "recycled" for token in choice["tokens"])
    assert details["accepted_prediction_tokens"] == recycled > 0 and usage["recycle"]["acceptance"]
    rejected = [one for token in choice["tokens"] for one in token["rejected"]]
    assert len(rejected) == details["rejected_prediction_tokens"] > 0 and all(one["text"] for one in rejected)
    assert all(token["logprob"] < 0 for token in choice["tokens"])
    assert {token["logprob"] for token in found["alternate"][0]["tokens"]} == {None}


def test_prompts_of_ids_that_end_inside_a_character(server: Server, loaded: LoadedModel) -> None:
    """Prevents the whole prompt from being sent again with the answer (vllm#48853), and the character from being lost: the
    answer completes it."""
    ids = loaded.tokenizer.encode("the cat \U0001f642")[:-2]
    answers = []
    for stream in (False, True):
        body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "stream": stream}
        text = server.http().post("/v1/completions", json=body).text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line and "[DONE]" not in line]
        answers.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))
    assert answers[0] == answers[1] and "\ufffd" not in answers[0] and answers[0].startswith("\U0001f642 the c")
