"""The page's routes: files, headers and the run's curves."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from recycle_ds.serving.page import page_router


def client(run: Path | None = None) -> TestClient:
    app = FastAPI()
    app.include_router(page_router(run))
    return TestClient(app)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "backbone_loss": 1.5, "recycle_loss": []}\n')
    return tmp_path


def test_every_file_that_the_page_names_is_served() -> None:
    """Prevents a page without its style or script, as after an installation that left package data out."""
    http = client()
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="(static/[^"]+)"', page.text))
    assert {"static/page.css", "static/page.js", "static/icon.svg"} <= named
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    waiting, seen = list(named), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        answer = http.get("/" + path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"] == f"{types[path.rpartition('.')[2]]}; charset=utf-8"
        if path.endswith(".js"):
            imported = {f"static/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)}
            waiting += sorted(imported - seen)
    shipped = {f"static/{file.name}" for file in (resources.files("recycle_ds.serving") / "static").iterdir()}
    assert seen == shipped - {"static/index.html"}, "files that nothing loads, or that are not shipped"


def test_the_page_has_nothing_inline_and_names_no_other_server() -> None:
    """Prevents scripts and styles that the content security policy blocks, and requests to other servers."""
    http = client()
    page = http.get("/").text
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=|javascript:", page) == []
    for file in (resources.files("recycle_ds.serving") / "static").iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        elsewhere = r"https?://|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
        assert re.findall(elsewhere, text) == [], file.name
        assert re.findall(r"""(?:src|href)="/|(?:call|fetch)\(["'`]/""", text) == [], (
            f"{file.name}: a path that a proxy moves"
        )


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css", "/run.json", "/static/none.js"])
def test_security_headers(run: Path, path: str) -> None:
    """Prevents a page that may load foreign code, be framed, or be guessed to be of another type."""
    headers = client(run).get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/run.json"])
def test_browsers_ask_again_and_get_304(run: Path, path: str) -> None:
    """Prevents old scripts after an update, and files that are sent again although they are the same."""
    http = client(run)
    first = http.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = http.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_is_answered_without_a_body() -> None:
    """Prevents 405 for proxies and monitors that ask with HEAD."""
    answer = client().head("/")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/static/none.js", "/static/", "/static/..%2fpage.py", "/static/%2e%2e/page.py", "/static/__init__.py"]
)
def test_other_files_are_not_served(path: str) -> None:
    """Prevents requests that read files outside the page's folder."""
    assert client().get(path).status_code == 404


def test_curves_follow_a_run_that_is_training(run: Path) -> None:
    """Prevents curves that stay as they were at the first request."""
    http = client(run)
    first = http.get("/run.json")
    assert first.json()["backbone_loss"] == [1.5]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 2.0, "backbone_loss": 1.25, "recycle_loss": []}\n')
    second = http.get("/run.json", headers={"If-None-Match": first.headers["etag"]})
    assert second.status_code == 200
    assert second.json()["backbone_loss"] == [1.5, 1.25]


@pytest.mark.parametrize("kind", ["no run", "no file"])
def test_without_curves_the_answer_is_a_404(tmp_path: Path, kind: str) -> None:
    """Prevents a 500, or curves of nothing, for a model that is no run folder."""
    answer = client(None if kind == "no run" else tmp_path).get("/run.json")
    assert answer.status_code == 404
    assert json.loads(answer.text)["error"]["code"] == "not_found"


def test_the_page_is_no_part_of_the_api() -> None:
    """Prevents the page's files from appearing in the OpenAPI schema."""
    assert client().get("/openapi.json").json()["paths"] == {}
