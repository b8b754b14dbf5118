"""API keys, and who may be served without one."""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

from recycle_ds.config import ConfigError

OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/static/"
"""Served without a key: nothing of the model, of requests or of metrics."""


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys of a file: one per line; empty lines and lines that begin with # are skipped.

    Raises ConfigError for a file that cannot be read, that has no key, or a key that a header cannot carry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file {path}: cannot be read ({error}); give a text file with one key per line"
        ) from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: has no key; write one per line, or leave the option out")
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"--api-key-file {path}: key {number} must be printable ASCII without spaces; replace it")
    return keys


def is_allowed(path: str, authorization: str | None, keys: tuple[str, ...]) -> bool:
    """Whether a request may be served. authorization: the header's value, `Bearer KEY`.

    All keys are compared, each in constant time: how long it takes tells nothing about them.
    """
    if not keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
        return True
    scheme, _, given = (authorization or "").partition(" ")
    found = False
    for key in keys:
        found |= hmac.compare_digest(key.encode(), given.strip().encode("utf-8", "surrogateescape"))
    return found and scheme.lower() == "bearer"


def warning_about(host: str, keys: tuple[str, ...]) -> str | None:
    """What is dangerous about an address, None if nothing is."""
    if keys or _is_loopback(host):
        return None
    return (
        f"--host {host} without --api-key-file: everyone who reaches this address can use the model; "
        "give keys, or bind to 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
