"""Parameters x modes x streaming: answers over HTTP are the engine's own, ids, texts and reasons alike."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.answers import text_of
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.parameters import MODES, SamplingParams
from recycle_ds.serving.answers.answering import REASONS
from tests.serving.servers import TEXT, Server, engine_of

# Fields of a request, the engine's name, and values to draw.
FIELDS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("top_k", "top_k", (5, 40)),
    ("top_p", "top_p", (0.7, 0.95)),
    ("min_p", "min_p", (0.05,)),
    ("repetition_penalty", "repetition_penalty", (1.3, 0.9)),
    ("presence_penalty", "presence_penalty", (0.5, -0.5)),
    ("frequency_penalty", "frequency_penalty", (0.3,)),
    ("stop", "stop", (["at"], ["\uc774", "caf\u00e9 "], [" "], ["\U0001f642 the c"])),
    ("stop_token_ids", "stop_tokens", ([40], [41, 42])),
    ("bad_token_ids", "bad_tokens", ([30, 31],)),
    ("min_tokens", "min_new_tokens", (3,)),
    ("ignore_eos", "ignore_eos", (True,)),
    ("draft_tokens", "draft_tokens", (0, 1, 4)),
)


def draw(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request's fields and the engine's parameters."""
    source = random.Random(seed)
    body: dict[str, Any] = {
        "max_tokens": source.choice([1, 3, 17, 40]),
        "temperature": source.choice([0, 0, 0.8, 1.5]),
        "seed": source.randrange(1000),
        "mode": MODES[seed % 3],
        "n": source.choice([1, 1, 1, 2, 3]),
    }
    params = {name: body[name] for name in ("temperature", "seed", "n")} | {"max_new_tokens": body["max_tokens"]}
    for name, engine_name, values in source.sample(FIELDS, source.randint(0, 4)):
        value = source.choice(values)
        if name == "min_tokens":
            value = min(value, body["max_tokens"])
        body[name], params[engine_name] = value, tuple(value) if isinstance(value, list) else value
    if source.random() < 0.3:
        body["logit_bias"], params["logit_bias"] = {"50": 3, "51": -2.5}, {50: 3, 51: -2.5}
    return body, params


def expected_of(loaded: LoadedModel, ids: list[int], params: SamplingParams, mode: str) -> list[Generation]:
    """The engine's answers, each prompt alone; verified ones by autoregressive decoding, which they must equal."""
    engine = engine_of(loaded)
    sequences = engine.add(ids, params, mode if mode == "alternate" else "autoregressive")
    engine.finish(sequences)
    return [sequence.generation(0.0) for sequence in sequences]


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Text, ids and reason of each choice, of a stream or a complete answer."""
    found: dict[int, dict[str, Any]] = {}

    def add(choice: dict[str, Any]) -> None:
        one = found.setdefault(choice["index"], {"text": "", "ids": [], "reason": None, "token_text": ""})
        part = choice.get("delta", choice.get("message", choice))
        one["text"] += part.get("content") or part.get("text") or ""
        one["ids"] += [token["id"] for token in choice["tokens"]]
        one["token_text"] += "".join(token["text"] for token in choice["tokens"])
        one["reason"] = choice["finish_reason"] or one["reason"]

    if not body["stream"]:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        for choice in answer.json()["choices"]:
            add(choice)
        return found
    async with client.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    add({"tokens": []} | choice)
    return found


def test_answers_over_http_are_the_engines(server: Server, loaded: LoadedModel) -> None:
    """Prevents a parameter that is lost, renamed or changed on its way, an answer that depends on what is decoded beside it or
    on how it is sent, and text that is not that of its tokens."""
    asked = []
    for seed in range(72):
        body, params = draw(seed)
        prompt = TEXT[seed % 20 : seed % 20 + 3 + seed % 13]
        path, given = "/v1/completions", {"prompt": prompt}
        ids = loaded.tokenizer.encode(prompt)
        if seed % 4 == 3:
            path, given = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
            ids = loaded.tokenizer.encode(f"<s><|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        body |= given | {"stream": seed % 2 == 0, "token_details": True}
        asked.append((path, body, SamplingParams(**params), ids))
    expected = [expected_of(loaded, ids, params, body["mode"]) for _, body, params, ids in asked]

    async def all_at_once() -> list[dict[int, dict[str, Any]]]:
        gate = asyncio.Semaphore(12)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:

            async def one(path: str, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
                async with gate:
                    return await ask(client, path, body)

            return await asyncio.gather(*(one(path, body) for path, body, _, _ in asked))

    stopped = 0
    for (path, body, params, ids), answers, found in zip(asked, expected, asyncio.run(all_at_once()), strict=True):
        for index, answer in enumerate(answers):
            mine, text = found[index], text_of(loaded.tokenizer, params, answer.token_ids, ids)
            assert mine["text"] == mine["token_text"] == text, (path, body)
            assert mine["reason"] == REASONS[answer.finish_reason], (path, body)
            kept = list(answer.token_ids)
            if answer.finish_reason == "stop":  # tokens behind the cut are no part of the answer
                stopped += 1
                kept = kept[: len(mine["ids"])]
            assert mine["ids"] == kept, (path, body)
        assert len(found) == len(answers)
    assert stopped > 3, "no stop string was found: the test has no power"
