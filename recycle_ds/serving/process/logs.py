"""The log of the process: JSON lines like those of requests."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

from recycle_ds.serving.process.errors import ServingError

LEVELS = ("debug", "info", "warning", "error")


def check_level(level: str) -> None:
    """Raises ServingError for an unknown level."""
    if level not in LEVELS:
        raise ServingError(f"--log-level {level}: must be one of {', '.join(LEVELS)}")


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, event, message and, after an exception, its trace."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": "server", "message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: str) -> None:
    """Sends this package's messages from a level on, and uvicorn's from WARNING on, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, least in (("recycle_ds.serving", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(least)
        logger.propagate = False
