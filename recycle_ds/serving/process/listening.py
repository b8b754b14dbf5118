"""The port that the server listens on. It is bound before anything is loaded: that it is in use shows at once."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from recycle_ds.serving.process.errors import ServingError

_BACKLOG = 2048
_REASONS = {
    errno.EADDRINUSE: "is in use by another process: choose another one (--port N; 0 takes any free one)",
    errno.EACCES: "may not be used by this user: choose one above 1023 (--port N)",
    errno.EADDRNOTAVAIL: "cannot be used: --host must be an address of this machine, 127.0.0.1 for local clients only",
}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. port: 0 takes any free one. Raises ServingError."""
    if not 0 <= port <= 65535:
        raise ServingError(f"--port {port}: must be from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ServingError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, f"cannot be used: {error.strerror}")
        raise ServingError(f"port {port} of {host} {reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address for clients: of a socket that listens on all addresses, with this machine's name."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announcement(model: str, listener: socket.socket, in_job: bool) -> str:
    """The line that names the address. in_job: the reader is on another machine."""
    text = f"serving {model} at {url_of(listener)}"
    if in_job and is_local(listener):
        port, node = listener.getsockname()[1], socket.gethostname()
        return f"{text} of {node}, for programs there; from elsewhere: ssh -N -L {port}:127.0.0.1:{port} {node}"
    return text


def is_local(listener: socket.socket) -> bool:
    """Whether only programs of this machine reach the socket."""
    return ipaddress.ip_address(os.fsdecode(listener.getsockname()[0]).partition("%")[0]).is_loopback
