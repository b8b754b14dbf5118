"""Figures of a server under load, against the engine's own."""

from __future__ import annotations

import json
import math
import runpy
import socket
import sys
from pathlib import Path

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference import SamplingParams
from recycle_ds.inference.bench.serving import spread_length
from recycle_ds.serving.bench import load
from recycle_ds.serving.bench.client import Target
from recycle_ds.serving.bench.load import LoadSettings
from recycle_ds.serving.bench.own_server import own_server
from recycle_ds.serving.bench.report import bench_server, results_table
from recycle_ds.serving.process.errors import ServingError
from tests.runs import ROOT
from tests.serving.servers import NAME, TEXT, Server, engine_of, serving

PROMPTS = [TEXT[start : start + 12] for start in range(0, 20, 4)]
FIELDS = {"temperature": 0, "draft_tokens": 2}


def test_figures_are_those_of_the_engine(server: Server, loaded: LoadedModel) -> None:
    """Prevents a report whose tokens, calls and acceptance are not what was decoded, whose times are not those of the clients,
    and a table or file that differs from it."""
    settings = LoadSettings((1, 3), max_new_tokens=12, repeats=2, fields=FIELDS)
    report = bench_server(Target(server.url), PROMPTS, settings)
    assert report["model"] == NAME and report["url"] == server.url
    for clients, count in ((1, 5), (3, 6)):
        engine = engine_of(loaded, max_batch=1)
        for mode in settings.modes:
            found = report["clients"][str(clients)][mode]
            answers = []
            for number in range(count):
                length = spread_length(number, settings.max_new_tokens)
                params = SamplingParams(max_new_tokens=length, draft_tokens=2, temperature=0)
                answers += engine.add(loaded.tokenizer.encode(PROMPTS[number % len(PROMPTS)]), params, mode)
            engine.finish(answers)
            generations = [answer.generation(0.0) for answer in answers]
            tokens = sum(len(one.token_ids) for one in generations)
            assert found["requests"] == 2 * count and found["new_tokens"] == 2 * tokens
            per_call = tokens / sum(one.full_calls for one in generations)
            assert math.isclose(found["tokens_per_full_call"], per_call)
            tested, accepted = [0, 0], [0, 0]
            for one in generations:
                for position in range(len(one.tested)):
                    tested[position] += one.tested[position]
                    accepted[position] += one.accepted[position]
            expected = [hits / trials for hits, trials in zip(accepted, tested, strict=True) if trials]
            assert found["acceptance"] == pytest.approx(expected), mode
            first, token = found["time_to_first_token"], found["time_per_output_token"]
            assert 0 < first["p50"] <= first["p99"] and 0 <= token["p50"] <= token["p99"]
            assert found["tokens_per_second"] > 0 and 0 <= found["cached_prompt_share"] <= 1
    assert report["clients"]["1"]["verified"]["tokens_per_full_call"] > 1.2
    columns = [list(column.cells) for column in results_table(report).columns]
    assert columns[:2] == [["1", "1", "3", "3"], [*settings.modes, *settings.modes]]
    assert columns[8][1] == f"{report['clients']['1']['verified']['tokens_per_full_call']:.2f}"


def test_percentiles() -> None:
    """Prevents a p99 that no request has had, or that leaves out the slowest one of a few."""
    assert load._percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0}
    assert load._percentiles([float(value) for value in range(1, 201)]) == {"p50": 100.0, "p99": 198.0}
    assert load._percentiles([]) is None


def test_what_cannot_be_measured(server: Server, loaded: LoadedModel, tmp_path: Path) -> None:
    """Prevents figures of requests that were refused, and traces or endless waits where a server is missing."""
    settings = LoadSettings((2,), ("verified",), max_new_tokens=4, repeats=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServingError, match="cannot be reached"):
        bench_server(Target(f"http://127.0.0.1:{port}"), PROMPTS, settings)
    with pytest.raises(ServingError, match="such as http"):
        bench_server(Target("localhost:8000"), PROMPTS, settings)
    with pytest.raises(ServingError, match=r"status 404: .* this server has 'tiny' only"):
        bench_server(Target(server.url, model="another"), PROMPTS, settings)
    with serving(loaded, api_keys=("a-key",), max_requests=1, max_prompt_tokens=60) as small:
        with pytest.raises(ServingError, match=r"status 401: .*no valid API key"):
            bench_server(Target(small.url), PROMPTS, settings)
        with pytest.raises(ServingError, match="refuses requests"):
            bench_server(Target(small.url, "a-key"), PROMPTS * 5, LoadSettings((8,), ("verified",), repeats=1))
        with pytest.raises(ServingError, match="the prompt has"):
            bench_server(Target(small.url, "a-key"), [TEXT * 2], LoadSettings((1,), ("verified",), repeats=1))
        small.wait_idle()
    for wrong, words in (({"clients": ()}, "clients="), ({"repeats": 0}, "repeats=0"), ({"requests": 0}, "requests=0")):
        with pytest.raises(ServingError, match=words):
            LoadSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ServingError, match="no-such-model"), own_server(str(tmp_path / "no-such-model")):
        pass


def test_the_tool_asks_a_running_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a tool whose options do not reach the measurement."""

    def run(*options: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench_server.py", "--prompts", str(prompts), *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "bench_server.py"), run_name="__main__")
        return (ended.value.code or 0, *capsys.readouterr())

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out" / "report.json"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = ["--url", f"{server.url}/v1", "--clients", "2", "--modes", "alternate", "--max-new-tokens", "6"]
    options += ["--repeats", "1", "--requests", "3", "--json", str(out)]
    code, printed, errors = run(*options)
    assert code == 0, errors
    assert "alternate" in printed and "first token p50" in printed
    figures = json.loads(out.read_text())["clients"]["2"]["alternate"]
    assert figures["requests"] == 3 and figures["new_tokens"] <= 18
    code, _, errors = run()
    assert code == 2 and errors == (
        "error: give either --url of a running server or --model DIR, for which one is started\n"
    )
