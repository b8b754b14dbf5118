"""What clients ask of the server under load: requests with the engine's own answers, and requests that are none."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.answers import text_of
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.serving.answers.answering import REASONS
from tests.serving.clients import CHATS, COMPLETIONS, Reply, choices_of, chunked, post
from tests.serving.servers import TEXT
from tests.serving.test_matrix import draw

BODY_LIMIT = 20_000
# Content of a request, and the status that it gets.
NONSENSE: tuple[tuple[bytes, int], ...] = (
    *(
        (post(path, content), 400)
        for path in (COMPLETIONS, CHATS)
        for content in (b"", b"{", b"[]", b"\xff\xfe", b"{}")
    ),
    (post(COMPLETIONS, b'{"prompt": NaN}'), 400),
    (post(COMPLETIONS, b"[" * 15_000), 400),
    (post(COMPLETIONS, b'{"prompt": "\\ud800"}'), 400),
    (post(COMPLETIONS, b'{"prompt": "a", "max_tokens": -1}'), 400),
    (post(COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), 400),
    (post(COMPLETIONS, b'{"prompt": [1, 2, 999999]}'), 400),
    (post(COMPLETIONS, b'{"prompt": "a", "nonsense": 1}'), 400),
    (post(COMPLETIONS, b'{"prompt": "a", "mode": "alternate", "logprobs": 1}'), 400),
    (post(CHATS, b'{"messages": [{"role": "user"}]}'), 400),
    (post(CHATS, b'{"messages": []}'), 400),
    (post(COMPLETIONS, b'{"prompt": "a", "model": "another"}'), 404),
    (post("/v1/nothing", b"{}"), 404),
    (post("/health", b"{}"), 405),
    (post(COMPLETIONS, b'{"prompt": "a"}', kind="text/plain"), 415),
)
TOO_LARGE: tuple[tuple[bytes, int], ...] = (
    (post(COMPLETIONS, json.dumps({"prompt": "the cat " * 200}).encode()), 400),
    (post(COMPLETIONS, json.dumps({"prompt": [3] * 500, "stream": True}).encode()), 400),
    (post(CHATS, json.dumps({"messages": [{"role": "user", "content": TEXT * 20}]}).encode()), 400),
    (post(COMPLETIONS, b'{"prompt": "' + b"a" * BODY_LIMIT + b'"}'), 413),
    (post(COMPLETIONS, b"{", declared=10**12), 413),
    (chunked(CHATS, [b'{"messages": "' + b"a" * 9000] * 3), 413),
)


@dataclass(frozen=True)
class Question:
    """A request with the engine's own answers to it."""

    path: str
    body: dict[str, Any]
    prompt: list[int]
    params: SamplingParams
    answers: list[Generation]

    def request(self, *, stream: bool, details: bool) -> bytes:
        """The request as bytes."""
        body = self.body | {"stream": stream, "token_details": details}
        if stream:
            body["stream_options"] = {"include_usage": True}
        return post(self.path, json.dumps(body).encode())

    def check(self, loaded: LoadedModel, reply: Reply, *, stream: bool, details: bool) -> int:
        """Asserts that a reply has the engine's answers. Returns its count of new tokens."""
        found, usage = choices_of(reply, stream)
        assert len(found) == len(self.answers), self
        for index, answer in enumerate(self.answers):
            given = found[index]
            assert given["text"] == text_of(loaded.tokenizer, self.params, answer.token_ids, self.prompt), self
            assert given["reason"] == REASONS[answer.finish_reason], self
            ids, scores = list(answer.token_ids), [score for score, _ in answer.logprobs]
            if answer.finish_reason == "stop":  # tokens behind the cut are no part of the answer
                ids, scores = ids[: len(given["ids"])], scores[: len(given["logprobs"])]
            if details:
                assert given["ids"] == ids, self
            if self.params.logprobs is not None:
                assert len(given["logprobs"]) == len(scores), self
                worst = max((abs(a - b) for a, b in zip(given["logprobs"], scores, strict=True)), default=0.0)
                assert worst < 1e-3, self
        tokens = sum(len(answer.token_ids) for answer in self.answers)
        assert usage["completion_tokens"] == tokens, self
        return tokens


def questions(loaded: LoadedModel, engine: DecodingEngine, count: int, seed: int) -> list[Question]:
    """Requests of all kinds. engine: decodes the answers, each request alone; verified ones by autoregressive decoding,
    which they must equal. Many prompts share a prefix of several blocks."""
    found = []
    for number in range(count):
        source = random.Random(f"{seed}/{number}")
        body, params = draw(source.randrange(10**6))
        start = source.choice([0, 0, 5])
        prompt = TEXT[start : start + source.choice([4, 15, 30, 40])]
        path, given, rendered = COMPLETIONS, {"prompt": prompt}, prompt
        if source.random() < 0.3:
            path, given = CHATS, {"messages": [{"role": "user", "content": prompt[:20]}]}
            rendered = f"<s><|im_start|>user\n{prompt[:20]}<|im_end|>\n<|im_start|>assistant\n"
        if source.random() < 0.3 and body["mode"] != "alternate":
            params["logprobs"] = 2
            body |= {"logprobs": 2} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 2}
        sampling = SamplingParams(**params)
        mode = body["mode"] if body["mode"] == "alternate" else "autoregressive"
        ids = loaded.tokenizer.encode(rendered)
        sequences = engine.add(ids, sampling, mode)
        engine.finish(sequences)
        answers = [sequence.generation(0.0) for sequence in sequences]
        found.append(Question(path, body | given, ids, sampling, answers))
    return found


def sleepers_request(name: str) -> bytes:
    """A stream of some hundred kilobytes. name: its id."""
    body = {
        "prompt": TEXT[:10],
        "max_tokens": 90,
        "ignore_eos": True,
        "n": 4,
        "stream": True,
        "token_details": True,
        "logprobs": 5,
        "mode": "autoregressive",
        "stream_options": {"continuous_usage_stats": True},
    }
    return post(COMPLETIONS, json.dumps(body).encode(), request_id=name)
