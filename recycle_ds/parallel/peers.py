"""Reasons for a rank to exit that are not the user's error: a lost peer, a transient file-system error, a take-over."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Errors of unreachable file servers (NFS, Lustre, FUSE) and of full or broken disks.
_TRANSIENT = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EHOSTDOWN, errno.ESHUTDOWN,
    errno.ENOTCONN,
)  # fmt: skip
# Substrings of gloo's errors, which are plain RuntimeErrors.
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Gloo connectFullMesh")

PEER_LOST = 69
"""Exit code of a rank that has lost contact with another one or with a file system (EX_UNAVAILABLE)."""


class PeerLost(Exception):
    """Another rank, or the connection to it, is lost: the collective that this rank waits in cannot complete."""


class MachineFault(Exception):
    """A transient file-system error: a later start, possibly on other nodes, may succeed."""


class TakenOver(Exception):
    """A later start of the same job has taken over the run folder: this process must not write any more."""

    def __init__(self, what: str, by: str | None) -> None:
        by = by or "another process"
        super().__init__(
            f"{what} has been taken over by {by}, a later start of this job: this one exits without saving"
        )


def is_transient(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is a transient file-system error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _TRANSIENT:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """Raises PeerLost in place of a collective's error that says so in many lines."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_peer(error)
        if lost is None:
            raise
        raise lost from None


def lost_peer(error: Exception) -> PeerLost | None:
    """Converts an error of a collective that lost another rank into a one-line PeerLost; None for any other error.

    Returns the PeerLost and does not raise it.
    """
    import torch.distributed as dist  # not at the top: code that only catches PeerLost need not import torch

    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(part in text for part in _GLOO)):
        reason = " ".join(text.split())[:200]
        return PeerLost(f"lost contact with another rank ({reason}); the cause is in that rank's output")
    return None
