"""The mesh: which ranks hold which part of one model. Built once, immutable, passed to whoever needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from recycle_ds.config import ConfigError, ParallelConfig
from recycle_ds.parallel.device import let_megatron_run_on_cpu


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it: its place, the axis's length and the ranks along it."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """Tensor x data axes of a world. A group of None means the axis has a single rank and no process group exists."""

    rank: int = 0
    world_size: int = 1
    tensor: Axis = Axis()
    data: Axis = Axis()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def check_layout(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel size that a layout leaves in a world. Raises ConfigError with all numbers when it does not fit."""
    for name, value in (("pipeline", parallel.pipeline), ("ulysses", parallel.ulysses)):
        if value > 1:
            raise ConfigError(
                f"parallel.{name}={value}: only 1 is available in this version; use parallel.tensor and ZeRO"
            )
    if parallel.sequence:
        raise ConfigError("parallel.sequence=true: not available in this version; leave it false")
    if world_size % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor ({parallel.tensor}) must divide the number of ranks ({world_size}): "
            f"start a multiple of {parallel.tensor} ranks"
        )
    return world_size // parallel.tensor


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Creates the process groups of a layout over the initialised world, tensor ranks adjacent.

    Collective over all ranks. Raises ConfigError as `check_layout` does.
    """
    from megatron.core import parallel_state

    world_size = torch.distributed.get_world_size()
    data_size = check_layout(parallel, world_size)
    if parallel_state.model_parallel_is_initialized():  # an earlier run in this process
        parallel_state.destroy_model_parallel()
    let_megatron_run_on_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor)
    return Mesh(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        tensor=Axis(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel.tensor,
            parallel_state.get_tensor_model_parallel_group(),
        ),
        data=Axis(parallel_state.get_data_parallel_rank(), data_size, parallel_state.get_data_parallel_group()),
    )


class ModelParallelUnit:
    """The `mpu` object DeepSpeed asks for groups, answered from a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data.size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.data.group
