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
    """Whether a request may be served. authorization: the header's value, `Bearer KEY`."""
    if not keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
        return True
    return has_key(authorization, keys)


def has_key(authorization: str | None, keys: tuple[str, ...]) -> bool:
    """Whether a request has one of the keys. authorization: as in `is_allowed`."""
    scheme, _, given = (authorization or "").partition(" ")
    found = False
    # all keys are compared, each in constant time: the time that it takes reveals nothing about them
    for key in keys:
        found |= hmac.compare_digest(key.encode(), given.strip().encode("utf-8", "surrogateescape"))
    return found and scheme.lower() == "bearer"


def is_host_allowed(header: str | None, host: str, also: tuple[str, ...], keys: tuple[str, ...]) -> bool:
    """Whether a request is addressed to a name of this server. header: `Host`, with or without a port; None if the request
    has none, which no browser does. host: the server's own address. also: further names.

    A page of another site that the user of a loopback server visits can let its own name point to 127.0.0.1 (DNS rebinding)
    and would then read all answers. Where a key is needed, or other machines are served, names are checked only if `also`
    has any.
    """
    if header is None or (not also and (keys or not is_loopback(host))):
        return True
    name = _name_of(header)
    return is_loopback(name) or name in {_name_of(one) for one in (host, *also)}


def sees_causes(authorization: str | None, host: str, keys: tuple[str, ...]) -> bool:
    """Whether a client may see why the engine failed: one with a key, or any one of a loopback server without keys."""
    return has_key(authorization, keys) if keys else is_loopback(host)


def _name_of(header: str) -> str:
    """A host without its port, in small letters, without the dot at its end."""
    name, colon, port = header.strip().rpartition(":")
    # an IPv6 address without brackets has colons of its own
    if not colon or not port.isdigit() or (":" in name and not name.endswith("]")):
        name = header.strip()
    return name.lower().removesuffix(".").strip("[]")


def warning_about(host: str, keys: tuple[str, ...]) -> str | None:
    """What is dangerous about an address, None if nothing is."""
    if keys or is_loopback(host):
        return None
    return (
        f"--host {host} without --api-key-file: everyone who reaches this address can use the model; "
        "give keys, or bind to 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether an address or name is of programs on this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
