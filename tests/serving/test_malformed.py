"""Malformed requests: always a 4xx in OpenAI's shape, never a 5xx, and the server goes on."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.serving.protocol.chats import ChatRequest
from recycle_ds.serving.protocol.completions import CompletionRequest
from recycle_ds.serving.protocol.errors import ApiError
from recycle_ds.serving.protocol.parsing import Body, parse
from recycle_ds.serving.protocol.tokenizing import DetokenizeRequest
from recycle_ds.serving.protocol.unsupported import UNSUPPORTED
from tests.serving.servers import NAME, Server, serving

JSON = {"content-type": "application/json"}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the cat", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "the cat"},
    "/detokenize": {"tokens": [5, 6]},
}
# Values that are wrong for every field but those named in WELCOME.
WRONG: tuple[Any, ...] = (
    *("text", "", "1", -1, 10**30, -(10**30), 1.5, -0.5, 1e300, True, [], [[]], [None], ["a", 1], {}, {"a": {"b": []}}),
    *(
        [-1],
        [10**12],
        [1.5],
        [[1], "a"],
        {"role": "user"},
        "\ud7ff\x00\u2028",
        [[[1]]],
        {"-1": 1},
        {"5": 1000},
        {"5": "a"},
    ),
)
TEXTS = ("text", "", "1", "\ud7ff\x00\u2028")
OBJECTS: tuple[Any, ...] = ({}, {"a": {"b": []}}, {"role": "user"})
# Values of WRONG that are right after all, by field, or by path and field. Any name is a model's, if not of this one.
WELCOME: dict[str, tuple[Any, ...]] = {
    **{"model": TEXTS, "user": TEXTS, "stop": ("text", "1", TEXTS[3], []), "chat_template_kwargs": OBJECTS},
    **{"/v1/completions prompt": ("text", "1", TEXTS[3]), "/tokenize prompt": TEXTS, "tokens": ([],)},
    **{"temperature": (1.5,), "seed": (-1,), "top_k": (-1,), "repetition_penalty": (1.5,)},
    **{"presence_penalty": (-1, 1.5, -0.5), "frequency_penalty": (-1, 1.5, -0.5)},
    **{"logit_bias": ({},), "stop_token_ids": ([],), "bad_token_ids": ([],)},
    **dict.fromkeys(("stream", "echo", "logprobs", "token_details", "ignore_eos", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("parse_special", "return_token_strs"), (True,)),
    "/v1/completions logprobs": (),
}


@pytest.fixture(scope="module")
def guarded(loaded: LoadedModel) -> Iterator[Server]:
    """A server that must not have failed once when all tests have run."""
    with serving(loaded, max_n=4) as server:
        yield server
        server.wait_idle()
        assert server.http().post("/v1/completions", json=VALID["/v1/completions"]).status_code == 200
        assert not [line for line in server.lines if line["level"] == "error" or line.get("status", 0) >= 500]


def check(answer: httpx.Response, what: object) -> int:
    """Asserts an answer or a readable refusal; returns the status."""
    assert answer.status_code < 500, (what, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert (
            set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]
        ), what
        assert len(error["message"]) < 1200, what
    return answer.status_code


def test_wrong_values_of_every_field(guarded: Server) -> None:
    """Prevents values of another type or range from reaching the engine, or from being answered or refused without naming
    the field."""
    http, found = guarded.http(), Counter[int]()
    schemas = http.get("/openapi.json").json()
    for path, valid in VALID.items():
        reference = schemas["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for name in schemas["components"]["schemas"][reference.rpartition("/")[2]]["properties"]:
            shared = "chat" in path and name in schemas["components"]["schemas"]["CompletionRequest"]["properties"]
            for value in WRONG[:: 5 if shared else 1]:
                body = valid | {name: value}
                if (path, name) == ("/tokenize", "messages"):
                    del body["prompt"]  # of the two it takes one
                what = (path, name, value)
                answer = http.post(path, content=json.dumps(body), headers=JSON)
                status = check(answer, what)
                found[status] += 1
                right = WELCOME.get(f"{path} {name}", WELCOME.get(name, ()))
                if any(type(one) is type(value) and one == value for one in right):
                    assert status == (404 if name == "model" else 200), (what, answer.text)
                    continue
                assert status == 400, what
                param = answer.json()["error"]["param"] or ""
                # without messages there is no source of text at all, which is said of both fields
                missing = path == "/tokenize" and value == [] and name == "messages"
                assert param == name or param.startswith(f"{name}.") or (missing and param == "prompt"), (
                    what,
                    answer.text,
                )
    assert found[400] > 1000 and set(found) == {200, 400, 404}, found


def test_bodies_that_are_no_requests(guarded: Server) -> None:
    """Prevents syntax errors, deep nesting, wrong encodings and huge numbers from becoming a 500."""
    http = guarded.http()
    raw = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"a"',
        b"1",
        b"\xff\xfe",
        b"{}",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b"{}{}",
    ]
    raw += [
        b"[" * 50_000,
        b'{"prompt":' * 500 + b"1",
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b"\x00",
    ]
    raw += [
        b'{"prompt": "a", "temperature": %s}' % one for one in (b"Infinity", b"-Infinity", b"1e999", b"1e-400", b"-0.0")
    ]
    raw += [
        b'{"prompt": "a", "max_tokens": 1, "\\u0000": 1}',
        b'{"prompt": "a", "": 1}',
        b'{"prompt": "a", "%s": 1}' % (b"x" * 9000),
    ]
    for path in VALID:
        for body in raw:
            status = check(http.post(path, content=body, headers=JSON), (path, body[:40]))
            assert status == 400 or b"-0.0" in body or b"e-400" in body, (path, body[:40], status)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (DetokenizeRequest, {"tokens": [""] * 200_000}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [""] * 200_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(number): "" for number in range(100_000)}}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * 100_000}]}),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": "a"}], "stream_options": dict.fromkeys(map(str, range(100_000)))},
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": "a", "name": ""}] * 2 + [1] * 100_000}),
    ],
)
def test_a_long_list_of_wrong_values_is_one_error(body: type[Body], fields: dict[str, Any]) -> None:
    """Prevents an error with its text for each of a million elements, which took 16 s and a gigabyte."""
    content = json.dumps(fields).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as refused:
            parse(body, content)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert refused.value.param and refused.value.param.partition(".")[0] in fields


@pytest.mark.parametrize(
    ("body", "fields", "message"),
    [
        (ChatRequest, {"messages": []}, "messages: list should have at least 1 item, not 0"),
        (
            ChatRequest,
            {"messages": [VALID["/v1/chat/completions"]["messages"][0]] * 3000},
            "messages: list should have at most",
        ),
    ],
)
def test_a_list_of_a_wrong_length(body: type[Body], fields: dict[str, Any], message: str) -> None:
    """Prevents a message that speaks of what happens inside ("0 after validation, not []"), or repeats the whole list."""
    with pytest.raises(ApiError) as refused:
        parse(body, json.dumps(fields).encode())
    assert str(refused.value).startswith(message) and len(str(refused.value)) < 80


def test_what_is_not_supported_is_refused_by_name(guarded: Server) -> None:
    """Prevents a field of OpenAI's or of other servers from being ignored in silence (TensorRT-LLM#17701), and null, which
    stands for the default, from being refused."""
    http = guarded.http()
    for path in ("/v1/completions", "/v1/chat/completions"):
        for name in UNSUPPORTED:
            answer = http.post(path, json=VALID[path] | {name: "x"})
            assert check(answer, name) == 400 and answer.json()["error"]["param"] == name
            assert (
                answer.json()["error"]["code"] == "unsupported_parameter"
                and len(answer.json()["error"]["message"]) > 30
            )
            assert http.post(path, json=VALID[path] | {name: None}).status_code == 200
        answer = http.post(path, json=VALID[path] | {"bad_token_ids": [10**6]})
        assert check(answer, "bad_token_ids") == 400 and answer.json()["error"]["param"] == "bad_token_ids"
    wrong: tuple[dict[str, Any], ...] = (
        *(
            {"best_of": 3},
            {"n": 5},
            {"logit_bias": {"5": 101}},
            {"logit_bias": {"100000": 1}},
            {"stop": ["a"] * 17},
            {"stop": ""},
        ),
        *(
            {"stream_options": {"include_usage": True}},
            {"logprobs": 21},
            {"max_tokens": 0},
            {"min_tokens": 3},
            {"mode": "fast"},
        ),
        *(
            {"stream": True, "echo": True, "logprobs": 1},
            {"mode": "alternate", "logprobs": 1},
            {"stop_token_ids": [999]},
        ),
        *({"temperature": 0.00001}, {"allowed_token_ids": [5], "bad_token_ids": [5]}, {"allowed_token_ids": []}),
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    )
    for fields in wrong:
        answer = http.post("/v1/completions", json=VALID["/v1/completions"] | fields)
        assert check(answer, fields) == 400, fields
    everything = dict.fromkeys(
        http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    )
    assert http.post("/v1/completions", json=everything | {"prompt": "a", "model": NAME, "n": 1}).status_code == 200


def test_generated_requests(guarded: Server) -> None:
    """Prevents what nobody thought of: hundreds of requests made from the OpenAPI document, valid and not, on every route."""
    schema = schemathesis.openapi.from_url(f"{guarded.url}/openapi.json")
    http, found = guarded.http(), Counter[str]()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            if operation.method.upper() == "GET" and mode is GenerationMode.NEGATIVE:
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=25 if mode is GenerationMode.NEGATIVE else 6,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, (case.body, answer.text)
                found[f"{mode.value} {answer.status_code // 100}xx"] += 1  # noqa: B023

            ask()
    assert found["negative 4xx"] > 60 and found["positive 2xx"] > 5, found
    assert http.get("/health").status_code == 200
