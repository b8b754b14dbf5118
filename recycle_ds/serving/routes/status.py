"""GET /v1/models, /health, /ready and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from recycle_ds.serving.service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model of this server."""
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [await _model(service, request)]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    """The model, by its name."""
    return JSONResponse(await _model(service_of(request), request, name))


async def _model(service: Service, request: Request, name: str | None = None) -> dict[str, Any]:
    model, settings = await service.model(request, name), service.settings
    modes = list(model.capacity.modes)
    return {
        "id": settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "recycle_ds",
        "max_model_len": model.capacity.context,
        "modes": modes,
        "default_mode": settings.default_mode if settings.default_mode in modes else "autoregressive",
        "chat": model.chats.available,
        "run": settings.run_folder is not None,
    }


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the process does its work: it loads, decodes or shuts down."""
    service_of(request).check_alive(request)
    return JSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests are taken."""
    await service_of(request).model(request)  # also reads what the first request needs
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
