"""Why a request is not taken now, although it could be decoded."""

from __future__ import annotations


class WorkerError(Exception):
    """The worker takes no request now. Its text is one line for the client."""


class QueueFull(WorkerError):
    """As many answers as allowed are being decoded or wait: the client may try again later."""


class Draining(WorkerError):
    """The server is shutting down: it only completes what it has accepted."""


class EngineFailed(WorkerError):
    """The engine broke: no request can be answered until the server is restarted."""
