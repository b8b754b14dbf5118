"""Which part of the work a rank has: teams of tensor x pipeline ranks hold one model together and share requests with
nobody."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from recycle_ds.inference.engine.liveness import PATIENCE, Liveness, own_store, print_and_exit
from recycle_ds.inference.engine.step_watch import StepWatch
from recycle_ds.inference.engine.team import Team, build_team
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import PEER_LOST, PeerLost, lost_peer
from recycle_ds.parallel.processes import identity_of
from recycle_ds.parallel.rendezvous import Launch, LaunchError, own_device, start, stop


@dataclass(frozen=True)
class Ranks:
    """This rank's place. team: None if every rank has a model of its own."""

    rank: int
    world_size: int
    device_index: int
    on_host: int = 1
    """Ranks on this host."""
    team: Team | None = None
    liveness: Liveness | None = None
    """None for a single process."""
    watch: StepWatch = field(default_factory=StepWatch)
    """Is told of this rank's steps."""

    @property
    def owns(self) -> bool:
        """Whether this rank takes requests: it is alone, or has its team's scheduler."""
        return self.team is None or self.team.owns

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the team; None for a model of this rank alone."""
        return None if self.team is None else self.team.mesh

    @property
    def team_rank(self) -> int:
        """Number of this rank's team."""
        return self.rank if self.team is None else self.team.mesh.data.rank

    @property
    def teams(self) -> int:
        """Number of teams."""
        return self.world_size if self.team is None else self.team.mesh.data.size

    def leave(self) -> str:
        """Ends this rank's part, when its work is done. On rank 0, names a rank that was lost before it ended."""
        if self.liveness is None:
            return ""
        if self.team is None:
            return self.liveness.stop(1)
        lost = self.liveness.stop(self.world_size)
        stop()
        return lost

    def tell(self, text: str | None) -> None:
        """Sends a text from the owner to the other ranks of the team."""
        if self.team is not None:
            dist.broadcast_object_list([text], src=self.team.owner, group=self.team.control)

    def hear(self) -> str | None:
        """Receives what the owner tells."""
        assert self.team is not None
        message: list[str | None] = [None]
        dist.broadcast_object_list(message, src=self.team.owner, group=self.team.control)
        return message[0]


def join(launch: Launch, tensor: int, pipeline: int, on_loss: Callable[[str, float], None] | None = None) -> Ranks:
    """Divides the ranks of a launch into teams. Collective over all ranks if a team has more than one.

    on_loss: called when a rank is lost or hangs, see `Liveness`; by default it prints the message and ends the process. Raises
    LaunchError if this host has fewer GPUs than ranks, and if the degrees do not divide the number of ranks.
    """
    if launch.world_size % (tensor * pipeline):
        raise LaunchError(
            f"--tensor {tensor} x --pipeline {pipeline} = {tensor * pipeline}: must divide the number of ranks "
            f"({launch.world_size}): start a multiple of {tensor * pipeline} ranks, or change the degrees"
        )
    device = own_device(launch)  # before a model is loaded onto a device that another rank uses
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton's kernels and page-locked memory use the thread's, else they are GPU 0's
    team, members, together = None, [launch.rank], [launch.rank]  # one with a model of its own waits for nobody
    store: dist.Store = dist.HashStore()
    processes: dict[int, str] = {}
    if tensor * pipeline > 1:
        start(launch)
        team = build_team(tensor, pipeline, device)
        store, members = own_store(), dist.get_process_group_ranks(team.control)
        found: list[str | None] = [None] * len(members)
        dist.all_gather_object(found, identity_of(os.getpid()), group=team.control)
        processes = {rank: one for rank, one in zip(members, found, strict=True) if one is not None}
        if tensor > 1:
            together = dist.get_process_group_ranks(team.mesh.tensor.group)
    watch, liveness = StepWatch(PATIENCE if device.type == "cpu" else None), None
    if launch.world_size > 1:  # a single process keeps no other one waiting
        leave = on_loss or print_and_exit(PEER_LOST)
        liveness = Liveness(store, members, launch.rank, leave, tensor_ranks=together, steps=watch, processes=processes)
        liveness.start()
    on_host = max(launch.local_world_size, 1)
    return Ranks(launch.rank, launch.world_size, device.index or 0, on_host, team, liveness, watch)


@contextmanager
def lost_ranks_end_the_job() -> Iterator[None]:
    """Turns an error of a collective that has lost a rank into the end of this process, with one message that names the
    rank.

    gloo does not know which rank it has lost. The liveness thread finds out, prints the message and ends the process; if
    it does not within its patience, the error itself is printed.
    """
    try:
        yield
    except (PeerLost, RuntimeError) as error:
        lost = error if isinstance(error, PeerLost) else lost_peer(error)
        if lost is None:
            raise
        time.sleep(PATIENCE + 4)
        print(f"error: {lost}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)
