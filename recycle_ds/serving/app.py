"""The HTTP application: routes, middleware, errors in OpenAI's shape."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import TextIO

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from recycle_ds.serving.access import warning_about
from recycle_ds.serving.conduct.log import Record
from recycle_ds.serving.conduct.middleware import Conduct, respond
from recycle_ds.serving.page import page_router
from recycle_ds.serving.protocol.errors import ApiError
from recycle_ds.serving.routes import answers, status, tokenizing
from recycle_ds.serving.routes.schemas import document
from recycle_ds.serving.service import Service
from recycle_ds.serving.settings import ServerSettings
from recycle_ds.serving.state import State


def create_app(
    state: State,
    settings: ServerSettings,
    *,
    log: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> FastAPI:
    """The application. It answers as soon as it runs, and generates once `state.model` is set.

    log: receives the log's lines; None for stderr. No documentation pages: they would load scripts from elsewhere.
    No redirects for a slash at the end: they would go to whatever host the request names.
    """
    app = FastAPI(title="recycle_ds", docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(state, settings, log=log, clock=clock)
    app.state.service = service
    routers = (answers.router, tokenizing.router, status.router, page_router(settings.run_folder))
    for router in routers:
        app.include_router(router)
    app.state.paths = {route.path for router in routers for route in router.routes if isinstance(route, Route)}
    app.add_middleware(Conduct, service=service)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    warning = warning_about(settings.host, settings.api_keys)
    if warning:
        service.log.warning(warning)
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record: Record = request.state.record
    record.error, record.ended = error.code, "error"
    return respond(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Errors of the router: no such path, or another method."""
    assert isinstance(error, HTTPException)
    texts = {404: ("not found: see /openapi.json for all paths", "not_found"), 405: ("wrong method", "wrong_method")}
    message, code = texts.get(error.status_code, (str(error.detail), None))
    headers = dict(error.headers or {})
    text = f"{request.method} {request.url.path[:200]!r}: {message}"
    near = _near(request.url.path, request.app.state.paths)
    if error.status_code == 404 and near:
        text += f"; did you mean {near}? (a client's base_url ends in /v1)"
    if "allow" in {name.lower() for name in headers}:
        text += f"; use {', '.join(value for name, value in headers.items() if name.lower() == 'allow')}"
    return await _on_api_error(request, ApiError(error.status_code, text, code=code, headers=headers))


def _near(path: str, known: set[str]) -> str | None:
    """The route that a wrong path was probably meant for."""
    plain = path[:200].rstrip("/")
    if f"/v1{plain}" in known:
        return f"/v1{plain}"
    found = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=0.8)
    return found[0] if found else None
