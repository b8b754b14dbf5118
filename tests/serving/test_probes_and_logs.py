"""What operators see of a server: probes in each of its states, its log and metrics, and wrong paths."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from tests.serving.servers import LONG, NAME, TEXT, Server, serving, slow_down, until


def test_no_redirects(server: Server) -> None:
    """Prevents a slash at the end from sending a client, with its key and prompt, to whatever host the request names."""
    found = server.http().post("/v1/completions/", json={"prompt": "a"})
    assert found.status_code == 404 and "location" not in found.headers


def test_probes_by_head(server: Server) -> None:
    """Prevents load balancers that probe with HEAD from taking the server for dead."""
    for path in ("/health", "/ready"):
        found = server.http().head(path)
        assert found.status_code == 200 and not found.content


def test_a_wrong_path_is_answered_with_the_right_one(server: Server) -> None:
    """Prevents a puzzle for those whose base_url lacks /v1."""
    for path, meant in (("/completions", "/v1/completions"), ("/v1/chat/completion", "/v1/chat/completions")):
        assert f"did you mean {meant}?" in server.http().post(path, json={}).json()["error"]["message"]
    assert "did you mean" not in server.http().get("/nothing/like/it").text


def test_probes_that_repeat_are_not_logged(loaded: LoadedModel) -> None:
    """Prevents probes of every second from filling the log, and a probe that begins to fail from missing in it."""
    with serving(loaded) as server:
        http = server.http()
        for _ in range(5):
            assert http.get("/ready").status_code == 200
        server.state.draining = True
        assert http.get("/ready").status_code == http.get("/ready").status_code == 503
        http.get("/nothing/last")
        until(lambda: any(line["path"] == "/nothing/last" for line in server.lines))
        assert [line["status"] for line in server.lines if line["path"] == "/ready"] == [503]
        server.state.draining = False


def test_the_client_in_the_log_is_the_connection(server: Server) -> None:
    """Prevents a client from choosing the address that is logged for it."""
    server.http().get("/nothing/forged", headers={"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https"})
    until(lambda: any(line["path"] == "/nothing/forged" for line in server.lines))
    assert [line["client"] for line in server.lines if line["path"] == "/nothing/forged"] == ["127.0.0.1"]


def test_a_server_that_loads_drains_or_is_broken(loaded: LoadedModel) -> None:
    """Prevents requests that hang before the model is loaded, that are taken while draining, or that wait for a broken engine;
    running ones must end in each case."""
    with serving(None) as loading:
        http = loading.http()
        assert http.get("/health").status_code == 200
        for found in (http.get("/ready"), http.post("/v1/completions", json=LONG), http.get("/v1/models")):
            assert (
                found.status_code == 503 and found.json()["error"]["code"] == "loading" and found.headers["retry-after"]
            )
        assert "recycle_ready 0.0" in http.get("/metrics").text
        loading.state.failure = "rank 1 is lost"
        assert http.get("/health").status_code == 503 and "rank 1 is lost" in http.get("/ready").text
    with serving(loaded) as server:
        slow_down(server)
        http, stream = (
            server.http(),
            server.client().completions.create(model=NAME, prompt="the", max_tokens=30, stream=True),
        )
        first = next(iter(stream))
        server.state.draining = True
        server.worker.drain()
        for found in (http.get("/ready"), http.post("/v1/completions", json=LONG)):
            assert found.status_code == 503 and found.json()["error"]["code"] == "draining"
        assert http.get("/health").status_code == 200
        assert first.choices and [chunk.choices[0].finish_reason for chunk in stream][-1] is not None
    with serving(loaded) as broken:
        slow_down(broken)
        http, stream = (
            broken.http(),
            broken.client().completions.create(model=NAME, prompt="the", max_tokens=90, stream=True),
        )
        next(iter(stream))

        def fail() -> Any:
            raise RuntimeError("no memory")

        broken.worker.engine.step = fail  # type: ignore[method-assign]
        with pytest.raises(openai.APIError, match="the engine failed: RuntimeError: no memory"):
            list(stream)
        assert http.get("/health").status_code == 503 and http.post("/v1/completions", json=LONG).status_code == 503


def test_logs_and_ids(server: Server) -> None:
    """Prevents requests that cannot be found in the log, ids that break its lines, and texts of users in it."""
    http, secret = server.http(), "a secret \ud558\ub298"
    answer = http.post("/v1/completions", json={"prompt": secret, "max_tokens": 3}, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for given in ('x"\\', "a b", "y" * 200, ""):
        made = http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)
    http.post("/v1/completions", json={"prompt": secret, "unknown": secret})
    until(lambda: server.lines[-1]["status"] == 400)
    (line,) = [one for one in server.lines if one["request_id"] == "abc-1"]
    assert (line["status"], line["path"], line["ended"], line["mode"]) == (
        200,
        "/v1/completions",
        "complete",
        "verified",
    )
    assert line["completion_tokens"] == 3 and line["prompt_tokens"] > 3 and line["time_to_first_token"] > 0
    assert server.lines[-1]["error"] == "unknown_parameter"
    assert "secret" not in server.log.getvalue() and "\\ud558" not in server.log.getvalue()


def test_metrics_count_what_was_served(loaded: LoadedModel) -> None:
    """Prevents metrics that stay at zero, that are shared between applications, or that grow with every path asked for."""
    with serving(loaded) as server:
        http = server.http()
        body = {"prompt": TEXT[:10], "max_tokens": 40, "temperature": 0, "draft_tokens": 2}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        http.post("/v1/completions", json=body | {"prompt": "", "n": 0})
        for number in range(5):
            http.get(f"/nothing/{number}")
        until(lambda: 'route="other",status="404"} 5.0' in http.get("/metrics").text)
        text = http.get("/metrics").text
        values = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.M) if name[0] != "#"}
        assert values['recycle_requests_total{route="/v1/completions",status="200"}'] == 1
        assert values['recycle_requests_total{route="/v1/completions",status="400"}'] == 1
        assert values["recycle_prompt_tokens_total"] == usage["prompt_tokens"]
        sources = [
            values[f'recycle_completion_tokens_total{{mode="verified",source="{name}"}}']
            for name in ("full", "recycled")
        ]
        assert sum(sources) == usage["completion_tokens"] == values["recycle_decoded_tokens_total"] and min(sources) > 0
        accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
        by_position = [values[name] for name in values if name.startswith("recycle_drafts_accepted_total")]
        assert sum(by_position) == accepted == values['recycle_context_drafts_accepted_total{up_to="256"}']
        for name in (
            "time_to_first_token_seconds",
            "time_per_output_token_seconds",
            "request_seconds",
            "tokens_per_full_call",
        ):
            assert (
                values[f'recycle_{name}_count{{mode="verified"}}'] == 1
                and values[f'recycle_{name}_sum{{mode="verified"}}'] > 0
            )
        assert (
            values["recycle_ready"] == 1 and values["recycle_kv_blocks"] > 0 and values["recycle_answers_running"] == 0
        )
