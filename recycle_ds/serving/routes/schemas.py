"""Schemas of bodies for the OpenAPI document: bodies are checked by protocol/parsing.py, not by FastAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from recycle_ds import __version__
from recycle_ds.serving.protocol.chats import ChatRequest
from recycle_ds.serving.protocol.completions import CompletionRequest
from recycle_ds.serving.protocol.parsing import Body
from recycle_ds.serving.protocol.tokenizing import DetokenizeRequest, TokenizeRequest

_PLACE = "#/components/schemas/{model}"
_BODIES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def body_of(model: type[Body]) -> dict[str, Any]:
    """A route's description of its body and of its errors."""
    schema = {"$ref": _PLACE.format(model=model.__name__)}
    error = {"application/json": {"schema": {"$ref": _PLACE.format(model="Error")}}}
    texts = {
        "400": "A field is wrong.",
        "401": "No valid key.",
        "403": "The host is not a name of this server.",
        "404": "No such model.",
        "413": "The body is too large.",
    }
    texts |= {"415": "Not JSON.", "429": "Too many requests.", "503": "Loading, or shutting down."}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {status: {"description": text, "content": error} for status, text in texts.items()},
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    if app.openapi_schema is None:
        found = get_openapi(title="recycle_ds", version=__version__, routes=app.routes)
        schemas: dict[str, Any] = {"Error": _ERROR}
        for body in _BODIES:
            schema = body.model_json_schema(ref_template=_PLACE)
            schemas |= schema.pop("$defs", {})
            schemas[body.__name__] = schema
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        app.openapi_schema = found
    return app.openapi_schema
