"""The ranks that hold one copy of the model together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from recycle_ds.config import ParallelConfig
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


def build_team(tensor: int, pipeline: int) -> Team:
    """Divides the world into teams of tensor x pipeline ranks; each one decodes its own share of the requests.

    Collective over the initialised world. Raises ConfigError on every rank if the degrees do not divide the world size.
    """
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    layout = layout_of(parallel, dist.get_world_size())
    mesh = build_mesh(parallel)
    ranks: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        ranks.setdefault(layout.coordinates(rank).data, []).append(rank)
    # every rank takes part in the creation of every group
    groups = {data: dist.new_group(members, backend="gloo") for data, members in ranks.items()}
    own = ranks[mesh.data.rank]
    chooser = next(rank for rank in own if layout.coordinates(rank).pipeline == pipeline - 1)
    return Team(mesh, groups[mesh.data.rank], own[0], chooser)
