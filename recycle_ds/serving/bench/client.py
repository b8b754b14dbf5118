"""A client that measures: sends one completion after the other over one connection, and times the stream."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

from recycle_ds.serving.process.errors import ServingError

_SECONDS = 600.0


@dataclass(frozen=True)
class Target:
    """A server. url: without a path. key: None for none. model: its name."""

    url: str
    key: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Timed:
    """A streamed answer. first, last: seconds from sending the request to its first and its last text. usage: as the server
    reports it."""

    first: float
    last: float
    usage: dict[str, Any]

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer."""
        return int(self.usage["completion_tokens"])

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first one, None if there is only that."""
        return (self.last - self.first) / (self.new_tokens - 1) if self.new_tokens > 1 else None


class Client:
    """One connection to a server. Raises ServingError if it cannot be reached or refuses a request."""

    def __init__(self, target: Target) -> None:
        self._target = target
        parts = urllib.parse.urlsplit(target.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ServingError(f"--url {target.url}: must be an address such as http://127.0.0.1:8000")
        self._connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=_SECONDS)
        self._headers = {"content-type": "application/json"}
        if target.key is not None:
            self._headers["authorization"] = f"Bearer {target.key}"

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        return json.loads(self._send("GET", path, None).read())

    def complete(self, prompt: str, mode: str, tokens: int, fields: dict[str, Any]) -> Timed:
        """Streams a completion of at most `tokens` tokens. fields: further ones of the request."""
        body = {"prompt": prompt, "mode": mode, "max_tokens": tokens, "model": self._target.model} | fields
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        response = self._send("POST", "/v1/completions", json.dumps(body).encode())
        lines: list[tuple[float, bytes]] = []  # read now, understood later: that takes time too
        while line := response.readline():
            if line.startswith(b"data: {"):
                lines.append((time.perf_counter() - start, line))
        first, last, usage = None, 0.0, None
        for seconds, line in lines:
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ServingError(f"{self._target.url}: {event['error']['message']}")
            if event["choices"]:
                first, last = seconds if first is None else first, seconds
            usage = event.get("usage") or usage
        if first is None or usage is None:
            raise ServingError(f"{self._target.url}: a stream ended early: see the server's log")
        if "recycle" not in usage:
            raise ServingError(
                f"{self._target.url}: its usage has no figures of recycling; give the address of `recycle-ds serve`"
            )
        return Timed(first, last, usage)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        url = self._target.url
        try:
            self._connection.request(method, path, body, self._headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ServingError(f"{url}: cannot be reached ({reason}); start a server there, or name another") from None
        if response.status == 200:
            return response
        text = " ".join(response.read().decode(errors="replace").split())[:300]
        if response.status == 429:
            raise ServingError(f"{url}: refuses requests ({text}); use fewer --clients, or raise the server's limits")
        raise ServingError(f"{url}{path}: status {response.status}: {text}")
