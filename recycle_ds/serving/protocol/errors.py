"""Errors of the HTTP interface, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"
ENGINE_FAILED = "the engine failed; the server's log has the reason"
"""What clients get that may not see the reason."""
_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat every 5xx unless this header forbids it."""


class ApiError(Exception):
    """An error that a client gets: status, message, and the parameter that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never be answered: 400."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, retry_after: int) -> ApiError:
    """More requests than the server takes: 429."""
    headers = {"retry-after": str(retry_after)}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    """The server does not answer requests now: 503. code: "loading", "draining" or "failed"."""
    headers = {"retry-after": str(retry_after)}
    return ApiError(503, message, kind="service_unavailable", code=code, headers=headers)


def internal(message: str = "internal error; the server's log has the details under this request id") -> ApiError:
    """An error of the server itself: 500."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def failed(message: str) -> ApiError:
    """An answer that cannot be completed because the engine broke or the server shuts down: 500."""
    return ApiError(500, message, kind="server_error", code="failed", headers=_NO_RETRY)


def timeout(seconds: float) -> ApiError:
    """An answer that took too long: 504."""
    message = f"the answer was not complete after {seconds:g} s: lower max_tokens, or raise the server's time limit"
    return ApiError(504, message, kind="timeout_error", code="timeout", headers=_NO_RETRY)
