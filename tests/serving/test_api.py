"""The official client against a running server: chats, errors, models and tokens, and models that lack a part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import Tokenizer
from tests.serving.servers import NAME, TEXT, Server, greedy, make_tokenizer, serving
from tests.unit.inference.models import random_model

CHAT: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]


def test_a_chat_and_its_stream(server: Server, loaded: LoadedModel) -> None:
    """Prevents a chat that is not the template's text, a stream without role or end, and log probabilities without bytes."""
    client = server.client()
    rendered = (
        "<s>"
        + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
        + "<|im_start|>assistant\n"
    )
    text, ids = greedy(loaded, rendered, 20)
    asked: dict[str, Any] = {"model": NAME, "messages": CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked, max_completion_tokens=20)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.message.content == text and whole.usage is not None
    assert whole.usage.prompt_tokens == len(loaded.tokenizer.encode(rendered))
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert len(content) == len(ids)
    joined = b"".join(bytes(one.bytes or ()) for one, token in zip(content, ids, strict=True) if token > 2)
    assert joined.decode("utf-8", "replace").startswith(text.rstrip("\ufffd")[:5])
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.logprob for one in content)
    chunks = list(client.chat.completions.create(**asked, max_tokens=20, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks].count(choice.finish_reason) == 1
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason and len({chunk.id for chunk in chunks}) == 1


def test_a_chat_of_two_turns(server: Server) -> None:
    """Prevents the server from refusing its own message as part of the next request, as the official client sends it."""
    client, messages = server.client(), list(CHAT)
    for content in ("and the mat?", "and then?"):
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
        messages += [answer.choices[0].message, {"role": "user", "content": content}]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=4).choices[0].message.content


def test_values_that_ask_for_nothing(server: Server) -> None:
    """Prevents requests of clients that write out defaults from being refused, and values from being ignored that are none."""
    http, body = server.http(), {"messages": CHAT, "max_tokens": 4, "seed": 3}
    plain = http.post("/v1/chat/completions", json=body).json()["choices"]
    neutral: dict[str, Any] = {"response_format": {"type": "text"}, "store": False, "tool_choice": "none", "tools": []}
    neutral |= {"service_tier": "auto", "modalities": ["text"], "metadata": {}, "parallel_tool_calls": False}
    neutral |= {"logprobs": False, "top_logprobs": 0, "length_penalty": 1}
    assert http.post("/v1/chat/completions", json=body | neutral).json()["choices"] == plain
    for name, value in {
        "store": 0,
        "tools": {},
        "metadata": {"a": "b"},
        "tool_choice": "required",
        "top_logprobs": 1,
    }.items():
        answer = http.post("/v1/chat/completions", json=body | {name: value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    greedy, least, *seeds = (
        http.post("/v1/chat/completions", json=body | fields).json()["choices"]
        for fields in ({"temperature": 0}, {"top_p": 0}, {"seed": -1}, {"seed": 2**63 - 1})
    )
    assert greedy == least and seeds[0] == seeds[1] != plain


def test_errors_are_openais(server: Server) -> None:
    """Prevents errors that the client cannot read: status, message, parameter and code."""
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="model='other'") as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="suffix: insertion is not supported") as refused:
        client.completions.create(model=NAME, prompt="a", suffix="b")
    assert refused.value.param == "suffix" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="unknown field 'max_token': did you mean max_tokens"):
        client.completions.create(model=NAME, prompt="a", extra_body={"max_token": 1})
    with pytest.raises(openai.BadRequestError, match="context holds 128"):
        client.completions.create(model=NAME, prompt=[7] * 200)
    with pytest.raises(openai.BadRequestError, match="tools: tools are not supported"):
        client.chat.completions.create(
            model=NAME, messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        answer = server.http().get(path)
        assert answer.status_code == status and answer.json()["error"]["message"].startswith("GET")


def test_models_and_tokens(server: Server, loaded: LoadedModel) -> None:
    """Prevents a model that clients cannot look up, and token ids that are not those of the server's own prompts."""
    client, http = server.client(), server.http()
    (model,) = client.models.list().data
    assert model == client.models.retrieve(NAME) and model.id == NAME
    assert model.max_model_len == 128 and model.chat and not model.run  # type: ignore[attr-defined]
    found = http.post("/tokenize", json={"prompt": TEXT + "<s>", "return_token_strs": True}).json()
    assert found["tokens"] == loaded.tokenizer.encode(TEXT + "<s>") and found["count"] == len(found["token_strs"])
    plain = http.post("/tokenize", json={"prompt": "<s>", "parse_special": False}).json()["tokens"]
    assert plain == loaded.tokenizer.encode("<s>", parse_special=False) and len(plain) > 1
    count = http.post("/v1/completions", json={"prompt": "<s>", "parse_special": False, "max_tokens": 1}).json()[
        "usage"
    ]
    assert count["prompt_tokens"] == len(plain)
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": TEXT + "<s>"}
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"


def test_all_end_tokens_end_an_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    """Prevents answers that run over an end token that only generation_config.json names (vllm#4180), and stop_token_ids that
    replace the model's own instead of joining them (mlx-vlm#2112)."""
    tokenizer = make_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 40]}))
    with serving(replace(loaded, tokenizer=Tokenizer.load(tmp_path))) as server:
        for token, fields in (
            (40, {}),
            (tokenizer.eos_id, {}),
            (40, {"stop_token_ids": [50]}),
            (50, {"stop_token_ids": [50]}),
        ):
            body = {"prompt": "the", "logit_bias": {str(token): 100}, "token_details": True} | fields
            (choice,) = server.http().post("/v1/completions", json=body).json()["choices"]
            assert (choice["finish_reason"], choice["text"], len(choice["tokens"])) == ("stop", "", 1)
        body = {"prompt": "the", "logit_bias": {"40": 100}, "ignore_eos": True}
        assert server.http().post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "length"


def test_a_model_without_a_template_or_module(loaded: LoadedModel, tmp_path: Any) -> None:
    """Prevents a chat that is rendered by a template of another model, and an error that does not say what is missing."""
    tokenizer = make_tokenizer(tmp_path, template=None)
    plain = random_model(tokenizer.vocab_size, recycle_layers=0, max_positions=128)
    with serving(replace(loaded, tokenizer=tokenizer, model=plain)) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
            client.chat.completions.create(model=NAME, messages=CHAT)
        assert refused.value.code == "no_chat_template"
        with pytest.raises(openai.BadRequestError, match="no recycle module"):
            client.completions.create(model=NAME, prompt="a", extra_body={"mode": "verified"})
        answer = client.completions.create(model=NAME, prompt="a", max_tokens=2)
        assert answer.usage is not None and answer.usage.recycle["mode"] == "autoregressive"  # type: ignore[attr-defined]
        (model,) = client.models.list().data
        assert model.modes == ["autoregressive"] and not model.chat  # type: ignore[attr-defined]
