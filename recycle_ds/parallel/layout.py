"""The coordinates of each rank: a pure function of the parallel degrees, without process groups."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """A rank's index along each axis."""

    pipeline: int
    data: int
    ulysses: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Tensor ranks are adjacent, so that they share a node; pipeline stages are farthest apart.

        rank = ((pipeline x data_size + data) x ulysses_size + ulysses) x tensor_size + tensor

    This is megatron-core's order "tp-cp-dp-pp" and DeepSpeed's PipeModelDataParallelTopology.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    ulysses: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks of the layout."""
        return self.tensor * self.pipeline * self.data * self.ulysses

    @property
    def replicas(self) -> int:
        """Number of ranks with the same weights, data x ulysses: gradients are averaged and ZeRO partitions over them."""
        return self.data * self.ulysses

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank in [0, world_size)."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        rest, tensor = divmod(rank, self.tensor)
        rest, ulysses = divmod(rest, self.ulysses)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, ulysses, tensor)

    def rank_of(self, at: Coordinates) -> int:
        """The rank at these coordinates; the inverse of `coordinates`."""
        rest = (at.pipeline * self.data + at.data) * self.ulysses + at.ulysses
        return rest * self.tensor + at.tensor


def layout_of(parallel: ParallelConfig, world_size: int) -> Layout:
    """The layout of `world_size` ranks. The data-parallel degree is world_size / (tensor x pipeline x ulysses).

    Raises ConfigError, naming all degrees, when the division has a remainder.
    """
    model = parallel.tensor * parallel.pipeline * parallel.ulysses
    if world_size % model:
        raise ConfigError(
            f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline}) x parallel.ulysses "
            f"({parallel.ulysses}) = {model} must divide the number of ranks ({world_size}): "
            f"start a multiple of {model} ranks"
        )
    return Layout(parallel.tensor, parallel.pipeline, world_size // model, parallel.ulysses)


def check_node(parallel: ParallelConfig, world_size: int, local_world_size: int) -> None:
    """Raises ConfigError when a tensor group would span nodes of `local_world_size` ranks each (0: unknown)."""
    if 0 < local_world_size < world_size and local_world_size % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor ({parallel.tensor}) must divide the ranks of a node ({local_world_size}), or tensor groups "
            "would span nodes: lower it and raise parallel.pipeline"
        )
