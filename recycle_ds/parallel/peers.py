"""What others have to do with the end of a rank: a fault of its own is told from peers that have gone, or taken over."""

from __future__ import annotations

# What gloo's errors, which are plain RuntimeErrors, have in common.
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Gloo connectFullMesh")


class PeerLost(Exception):
    """Another rank, or the way to it, has gone: what this rank waits for will not come."""


class MachineFault(Exception):
    """A file system that one node cannot use for now: a later start, on other nodes perhaps, may well succeed."""


class TakenOver(Exception):
    """A later start of the same job has taken over what this process works on: it must write nothing any more."""

    def __init__(self, what: str, by: str | None) -> None:
        by = by or "another process"
        super().__init__(
            f"{what} has been taken over by {by}, a later start of this job: this one leaves, and saves nothing"
        )


def lost_peer(error: Exception) -> PeerLost | None:
    """What an error of a collective says of another rank, in one line; None for any other error."""
    import torch.distributed as dist  # late: what catches PeerLost need not wait for torch

    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(part in text for part in _GLOO)):
        reason = " ".join(text.split())[:200]
        return PeerLost(f"lost contact with another rank ({reason}); what that rank says of it is the cause")
    return None
