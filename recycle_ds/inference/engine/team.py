"""The ranks that hold one copy of the model together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recycle_ds.config import ParallelConfig
from recycle_ds.parallel.channels import Channel, GroupChannel, share
from recycle_ds.parallel.layout import layout_of
from recycle_ds.parallel.mesh import Mesh, build_mesh


@dataclass(frozen=True)
class Team:
    """The ranks that hold one copy of the model together. control: their gloo group; owner and chooser: global ranks of the
    rank with the scheduler and of the first one of the last stage."""

    mesh: Mesh
    control: dist.ProcessGroup
    owner: int
    chooser: int

    @property
    def owns(self) -> bool:
        """Whether this rank has the scheduler."""
        return self.mesh.rank == self.owner


def build_team(tensor: int, pipeline: int, device: torch.device) -> Team:
    """Divides the world into teams of tensor x pipeline ranks; each one decodes its own share of the requests.

    device: this rank's own. Collective over the initialised world. Raises ConfigError on every rank if the degrees do not
    divide the world size.
    """
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    layout = layout_of(parallel, dist.get_world_size())
    mesh = build_mesh(parallel, device)
    ranks: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        ranks.setdefault(layout.coordinates(rank).data, []).append(rank)
    # every rank takes part in the creation of every group
    groups = {data: dist.new_group(members, backend="gloo") for data, members in ranks.items()}
    own = ranks[mesh.data.rank]
    chooser = next(rank for rank in own if layout.coordinates(rank).pipeline == pipeline - 1)
    return Team(mesh, groups[mesh.data.rank], own[0], chooser)


@dataclass(frozen=True)
class Links:
    """The channels that end at this rank."""

    plans: Mapping[int, Channel]
    """From the owner: by receiver on the owner, and by the owner elsewhere."""
    reports: Mapping[int, Channel]
    """To the owner, by the same ranks."""
    outcomes: Channel | None
    """From the chooser to the owner; None on other ranks, and if they are the same."""
    before: Channel | None
    """States from the stage before; None on the first one."""
    after: Channel | None
    """States to the next stage; None on the last one."""

    def flush(self) -> None:
        """Waits until all that was sent has been received."""
        for channel in (*self.plans.values(), *self.reports.values(), self.outcomes, self.before, self.after):
            if channel is not None:
                channel.flush()


def open_links(team: Team) -> Links:
    """Opens a team's channels: through shared memory where all its ranks are on one host, apart from the states of GPUs.

    Collective over the team.
    """
    mesh, cpu = team.mesh, torch.device("cpu")
    stages = [mesh.rank] if mesh.pipeline.size == 1 else dist.get_process_group_ranks(mesh.pipeline.group)
    place = stages.index(mesh.rank)
    pairs: list[tuple[int, int] | None] = [None] * dist.get_world_size(team.control)
    own_pair = None if mesh.last_stage else (mesh.rank, stages[place + 1])
    dist.all_gather_object(pairs, own_pair, group=team.control)
    followers = [rank for rank in dist.get_process_group_ranks(team.control) if rank != team.owner]
    plans = [(team.owner, rank) for rank in followers]
    reports = [(rank, team.owner) for rank in followers]
    outcomes = [] if team.chooser == team.owner else [(team.chooser, team.owner)]
    states = [pair for pair in pairs if pair is not None]
    under_way = max(8, 2 * len(stages) + 2)  # a plan for each stage, and as many that the next one has not taken yet

    def mine(
        routes: list[tuple[int, int]], group: dist.ProcessGroup | None, to: torch.device
    ) -> dict[int, GroupChannel]:
        return {
            index: GroupChannel(sum(route) - mesh.rank, group, to, under_way=under_way)
            for index, route in enumerate(routes)
            if mesh.rank in route
        }

    def by_peer(routes: list[tuple[int, int]]) -> dict[int, Channel]:
        found = share(routes, mine(routes, team.control, cpu), team.control, under_way)
        return {sum(routes[index]) - mesh.rank: channel for index, channel in found.items()}

    own_states = mine(states, mesh.pipeline.group, mesh.device)
    between = share(states, own_states, team.control, under_way) if mesh.device.type == "cpu" else dict(own_states)
    return Links(
        plans=by_peer(plans),
        reports=by_peer(reports),
        outcomes=next(iter(by_peer(outcomes).values()), None),
        before=next((between[index] for index in between if states[index][1] == mesh.rank), None),
        after=next((between[index] for index in between if states[index][0] == mesh.rank), None),
    )
