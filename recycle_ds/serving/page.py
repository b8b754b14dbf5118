"""Routes of the web page: the page itself, its files, and the curves of the run that it shows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from threading import Lock

from fastapi import APIRouter, Request, Response

from recycle_ds.serving.curves import METRICS, read_curves

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

HEADERS = {
    # Only this server's files are loaded and only this server is contacted. Model output reaches the page as text nodes;
    # trusted-types 'none' makes the browser refuse every other way.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time, answered with 304: after an update no browser mixes old files with new ones.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    type: str
    tag: str


@dataclass
class _Curves:
    """The latest curves as JSON; read again only if metrics.jsonl has changed."""

    path: Path
    lock: Lock = field(default_factory=Lock)
    state: tuple[int, int] | None = None
    file: _File | None = None

    def read(self) -> _File:
        """Raises OSError when the file cannot be read."""
        with self.lock:  # several requests at once read a long log once
            stat = self.path.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if self.file is None or state != self.state:
                self.state, self.file = state, _file(json.dumps(read_curves(self.path)).encode(), "application/json")
            return self.file


def page_router(run_folder: Path | None = None) -> APIRouter:
    """GET `/`, `/static/NAME` and `/run.json`. The first two contain nothing of the model and need no API key.

    run_folder: a run's folder, whose metrics.jsonl becomes `/run.json`; without one, `/run.json` is a 404.
    """
    router = APIRouter(include_in_schema=False)
    files = _read_files()
    curves = None if run_folder is None else _Curves(run_folder / METRICS)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        file = files.get(name)
        return _missing(f"/static/{name}: no such file") if file is None else _answer(request, file)

    @router.get("/run.json")
    def run(request: Request) -> Response:  # in a thread: a long log takes seconds
        if curves is None:
            return _missing("the model is not a run folder: there are no curves")
        try:
            return _answer(request, curves.read())
        except OSError as error:
            return _missing(f"{curves.path.name} of the run cannot be read: {error.strerror}")

    return router


def _read_files() -> dict[str, _File]:
    folder = resources.files("recycle_ds.serving") / "static"
    entries = ((entry, _TYPES.get(Path(entry.name).suffix)) for entry in folder.iterdir())
    return {entry.name: _file(entry.read_bytes(), kind) for entry, kind in entries if kind is not None}


def _file(content: bytes, kind: str) -> _File:
    return _File(content, f"{kind}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "ETag": file.tag, "Content-Type": file.type}
    known = request.headers.get("if-none-match", "")
    if file.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers)


def _missing(message: str) -> Response:
    error = {"error": {"message": message, "type": "not_found_error", "param": None, "code": "not_found"}}
    return Response(json.dumps(error), 404, {**HEADERS, "Cache-Control": "no-store"}, "application/json")
