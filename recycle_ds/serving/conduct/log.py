"""Structured logs: one JSON object per line, with the request's id, and never with texts of prompts or answers."""

from __future__ import annotations

import json
import re
import secrets
import threading
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO

_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


_PROBES = ("/health", "/ready", "/metrics", "/static/")
"""Paths that programs ask for all the time."""


@dataclass
class Record:
    """What is known of a request when it has ended."""

    request_id: str
    method: str
    path: str
    client: str | None
    started: float
    status: int | None = None
    ended: str = "complete"
    """Or "disconnected", "slow_reader", "error"."""
    error: str | None = None
    """Code of the error."""
    details: dict[str, Any] = field(default_factory=dict)
    """Mode, counts of tokens and times, of a request that generates."""


class Log:
    """Writes lines to a stream. enabled: whether requests are logged; errors always are."""

    def __init__(self, stream: TextIO, enabled: bool = True) -> None:
        self._stream, self._enabled = stream, enabled
        self._statuses: dict[str, int | None] = {}
        """Of the latest probe of each kind."""
        self._lock = threading.Lock()

    def request(self, record: Record, seconds: float) -> None:
        """A request that has ended. Of probes, which come every second, only those with a new status are logged."""
        probe = next((path for path in _PROBES if record.path.startswith(path)), None)
        repeats = probe is not None and self._statuses.get(probe, 200) == record.status
        if probe is not None:
            self._statuses[probe] = record.status
        if self._enabled and not repeats:
            shown: dict[str, Any] = {
                "request_id": record.request_id,
                "method": record.method,
                "path": record.path[:256],
            }
            shown |= {"client": record.client, "status": record.status, "ended": record.ended}
            shown |= {"error": record.error} if record.error else {}
            self._write("info", "request", shown | {"seconds": round(seconds, 6)} | record.details)

    def error(self, request_id: str, error: BaseException) -> None:
        """An error of the server itself, with its trace."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._write("error", "error", {"request_id": request_id, "error": type(error).__name__, "trace": trace})

    def warning(self, message: str) -> None:
        """A warning about the server's settings."""
        self._write("warning", "warning", {"message": message})

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "level": level, "event": event} | fields, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def request_id(given: str | None) -> str:
    """The id that a client gave its request if it can be logged as it is, else a new one."""
    return given if given is not None and _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
