"""Reasons for a rank to exit that are not the user's error: a lost peer, a transient file-system error, a take-over."""

from __future__ import annotations

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
