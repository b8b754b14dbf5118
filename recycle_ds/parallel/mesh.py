"""The mesh: which ranks hold which part of one model. It is built once, is immutable and is passed as an argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from recycle_ds.config import ParallelConfig
from recycle_ds.parallel.device import let_megatron_run_on_cpu
from recycle_ds.parallel.layout import Layout, layout_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from this rank: its index along the axis, the axis's size and its process group."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's view of the pipeline x data x ulysses x tensor axes of a world. `Mesh()` is a single process.

    A group of None means that the axis has one rank and no process group.
    """

    rank: int = 0
    world_size: int = 1
    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data: Axis = Axis()
    """Ranks that read different samples."""
    ulysses: Axis = Axis()
    """Ranks that read different parts of the same samples' sequences."""
    replicas: Axis = Axis()
    """data x ulysses: ranks with the same weights. Gradients are averaged over them, and ZeRO partitions over them."""
    sequence: bool = False
    """Whether norms and residuals are split over the tensor axis too (Megatron's sequence parallelism)."""
    device: torch.device = _CPU
    """Where this rank computes: its GPU, the CPU, or "meta" in a layout that is not running."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files that a run has only once."""
        return self.rank == 0

    @property
    def first_stage(self) -> bool:
        """Whether this rank is on the first pipeline stage, which reads tokens."""
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, which computes losses."""
        return self.pipeline.rank == self.pipeline.size - 1


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """Creates the process groups of all axes over the initialised world and returns this rank's mesh.

    device: this rank's own, see `rendezvous.own_device`. Collective over the world. Raises ConfigError on every rank,
    before any group is created, if the degrees do not divide the world size.
    """
    from megatron.core import parallel_state

    layout = layout_of(parallel, torch.distributed.get_world_size())
    if parallel_state.model_parallel_is_initialized():  # an earlier run in this process
        parallel_state.destroy_model_parallel()
    let_megatron_run_on_cpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.ulysses,
        order="tp-cp-ep-dp-pp",
    )
    rank = torch.distributed.get_rank()
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "ulysses": parallel_state.get_context_parallel_group(),
        "replicas": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return _mesh(layout, rank, groups, device, sequence=parallel.sequence and layout.tensor > 1)


@contextmanager
def world_of_one() -> Iterator[None]:
    """Initialises a process group with only this process, unless one exists; destroys it on exit.

    megatron-core asks a group for its size only if torch.distributed is initialised.
    """
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def virtual_mesh(layout: Layout, rank: int, *, sequence: bool = False) -> Mesh:
    """The mesh of one rank of a layout that is not running, to build this rank's part of a model on the meta device.

    Not collective. Its groups have a rank and a size but cannot communicate. megatron-core uses their size only if
    torch.distributed is initialised: see `world_of_one`.
    """
    return _mesh(layout, rank, None, torch.device("meta"), sequence=sequence and layout.tensor > 1)


class _VirtualGroup:
    """The methods of a process group that megatron-core's constructors call."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _mesh(
    layout: Layout, rank: int, groups: dict[str, ProcessGroup] | None, device: torch.device, *, sequence: bool
) -> Mesh:
    at = layout.coordinates(rank)
    indices = {
        "tensor": (at.tensor, layout.tensor),
        "pipeline": (at.pipeline, layout.pipeline),
        "data": (at.data, layout.data),
        "ulysses": (at.ulysses, layout.ulysses),
        "replicas": (at.data * layout.ulysses + at.ulysses, layout.data * layout.ulysses),
    }
    axes: dict[str, Axis] = {}
    for name, (index, size) in indices.items():
        group: Any = _VirtualGroup(index, size) if groups is None else groups[name]
        assert (group.rank(), group.size()) == (index, size), (
            f"the {name} group does not follow the layout's rank order"
        )
        axes[name] = Axis(index, size, group)
    return Mesh(rank=rank, world_size=layout.world_size, sequence=sequence, device=device, **axes)


class ModelParallelUnit:
    """The `mpu` object that gives DeepSpeed its process groups, from a mesh. Its data axis is the mesh's `replicas`."""

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
        return self._mesh.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.replicas.size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.replicas.group
