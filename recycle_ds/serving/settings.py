"""Settings of the server. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MOST_PROMPTS = 4096
"""Prompts of one request that a server can be started for."""


@dataclass(frozen=True)
class ServerSettings:
    """What the HTTP part needs to know before the model is loaded. None for a limit: only the model's own limits."""

    model_name: str
    """Name under which the model is served (`model` of a request)."""
    default_mode: str = "verified"
    """Mode of a request that names none. A model without a recycle module is served autoregressively."""
    run_folder: Path | None = None
    """Run folder whose curves the page shows."""
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Valid API keys; without any, no key is needed."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, besides its own, under which clients may ask a loopback server (header `Host`)."""
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    """Most new tokens of one answer."""
    max_n: int = 16
    """Most answers per prompt."""
    max_prompts: int = 64
    """Most prompts of one completion request."""
    max_requests: int = 256
    """Most requests with a body at once, queued ones included. More get 429."""
    max_connections: int = 512
    """Most open connections. More get 503 and are closed."""
    max_priority: int = 0
    """How far a request may raise itself above others: its `priority` is at least minus this."""
    request_seconds: float = 600.0
    """Time for a complete answer."""
    body_seconds: float = 30.0
    """Time for a client to send the head of its request, and for its body."""
    write_seconds: float = 60.0
    """Time for a client to read what is sent before its request is cancelled."""
    keep_alive_seconds: float = 15.0
    """A stream without text sends a comment after this time, so that proxies keep it open."""
    retry_after: int = 2
    """Seconds after which a refused client may try again (Retry-After)."""
    access_log: bool = True
