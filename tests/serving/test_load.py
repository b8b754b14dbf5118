"""Many clients at once, most of them badly behaved: nothing crashes or leaks, and every complete answer is the right one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.parameters import MODES
from tests.conftest import TEST_ALL
from tests.serving.servers import TEXT, Server, serving

REQUESTS, CLIENTS = (2000, 64) if TEST_ALL else (240, 24)
PATH = "/v1/completions"
WAYS = ("complete", "stream", "slow", "leave", "abort", "bad", "long")


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests whose answers do not depend on anything else."""
    draw = random.Random(5)
    return [
        {
            "prompt": TEXT[draw.randrange(20) :][: draw.randint(3, 20)],
            "max_tokens": draw.choice([4, 20, 60]),
            "temperature": draw.choice([0, 1.2]),
            "seed": number,
            "mode": MODES[number % 3],
            "n": draw.choice([1, 1, 2]),
            **({"stop": ["at", "\uc774"]} if number % 4 == 0 else {}),
        }
        for number in range(count)
    ]


def resident() -> int:
    """Bytes of memory of this process: server and clients."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def one(client: httpx.AsyncClient, way: str, body: dict[str, Any], draw: random.Random) -> list[str] | str:
    """A request of some kind. Returns the texts of a complete answer, else what happened."""
    if way == "bad":
        wrong = draw.choice([b"{", b'{"prompt": 5}', b'{"prompt": "a", "n": -1}', b'{"prompt": [999999]}'])
        answer = await client.post(PATH, content=wrong, headers={"content-type": "application/json"})
        return "refused" if answer.status_code == 400 else f"status {answer.status_code}"
    if way == "long":
        answer = await client.post(PATH, json=body | {"prompt": "the cat " * draw.choice([100, 40_000])})
        return "refused" if answer.status_code in (400, 413) else f"status {answer.status_code}"
    if way == "abort":
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post(
                PATH, json=body | {"max_tokens": 100}, timeout=httpx.Timeout(5, read=draw.uniform(0.001, 0.1))
            )
        return "aborted"
    if way == "complete":
        answer = await client.post(PATH, json=body)
        if answer.status_code == 200:
            return [choice["text"] for choice in answer.json()["choices"]]
        return f"status {answer.status_code}"
    texts, events = [""] * body["n"], 0
    async with client.stream("POST", PATH, json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                content = json.loads(line[6:])
                assert "error" not in content, content
                texts[content["choices"][0]["index"]] += content["choices"][0]["text"]
                events += 1
            if way == "slow" and events % 3 == 0:
                await asyncio.sleep(draw.uniform(0, 0.01))
            if way == "leave" and events >= 2:
                return "left"
    return texts


async def storm(
    server: Server, asked: list[dict[str, Any]], expected: list[list[str]]
) -> tuple[Counter[str], list[int]]:
    """All requests, from CLIENTS at a time. Returns what happened, and the memory at each tenth of them."""
    draw, happened, memory = random.Random(7), Counter[str](), []
    numbers = iter(range(REQUESTS))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as connection:
            for number in numbers:
                way, which = draw.choice(WAYS), number % len(asked)
                found = await one(connection, way, asked[which], draw)
                if isinstance(found, list):
                    assert found == expected[which], asked[which]
                    found = f"{way}: right"
                happened[found] += 1
                if number % (REQUESTS // 10) == 0:
                    memory.append(resident())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return happened, memory


def test_a_storm_of_clients(loaded: LoadedModel) -> None:
    """Prevents crashes, leaked blocks, requests and memory, and answers that are disturbed by what happens beside them."""
    asked = bodies(24)
    with serving(loaded, max_queued=CLIENTS * 2, max_body_bytes=200_000, engine={"max_batch": 8}) as server:
        http = server.http()
        # one at a time; verified ones by autoregressive decoding, which they must equal
        reference = [one | ({"mode": "autoregressive"} if one["mode"] == "verified" else {}) for one in asked]
        expected = [[choice["text"] for choice in http.post(PATH, json=one).json()["choices"]] for one in reference]
        happened, memory = asyncio.run(storm(server, asked, expected))
        server.wait_idle()
        assert sum(happened.values()) == REQUESTS
        assert not [name for name in happened if name.startswith("status")], happened
        assert all(happened[f"{way}: right"] > REQUESTS // 20 for way in ("complete", "stream", "slow")), happened
        assert memory[-1] - memory[2] < 64 * 2**20, [one // 2**20 for one in memory]
        assert not [line for line in server.lines if line["level"] == "error" or line.get("status", 0) >= 500]
        assert http.post(PATH, json=asked[0]).status_code == 200
