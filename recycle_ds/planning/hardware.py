"""Peak rates of GPUs and their links, from vendors' data sheets (dense, without sparsity)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from recycle_ds.planning.errors import PlanningError

_MOST_NODES, _MOST_GPUS_PER_NODE = 100_000, 1_024


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links. Bandwidths are per GPU and one way, in bytes/s."""

    name: str
    memory_gib: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    """To other GPUs of the node."""
    network_bandwidth: float
    """To other nodes."""
    host_bandwidth: float = 25e9
    """To host memory."""

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in the configuration's "fp32" or "bf16"."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40, 312e12, 19.5e12, 1.56e12, 300e9, 25e9),
        Gpu("a100-80", 80, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
        Gpu("l40s", 48, 362e12, 91.6e12, 0.86e12, 32e9, 12.5e9),
        Gpu("h100", 80, 989e12, 67e12, 3.35e12, 450e9, 50e9, 55e9),
        Gpu("h200", 141, 989e12, 67e12, 4.8e12, 450e9, 50e9, 55e9),
        Gpu("b200", 180, 2250e12, 80e12, 8.0e12, 900e9, 50e9, 55e9),
        Gpu("mi300x", 192, 1307e12, 163e12, 5.3e12, 448e9, 50e9, 55e9),
    )
}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU of this name, with `memory_gib` of memory if given. Raises PlanningError for an unknown name or memory."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise PlanningError(f"--gpu {name}: not known; choose one of {', '.join(sorted(GPUS))}")
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise PlanningError(f"--gpu-memory-gib {memory_gib}: must be above 0, and finite")
    return gpu if memory_gib is None else replace(gpu, memory_gib=memory_gib)


@dataclass(frozen=True)
class Cluster:
    """Identical nodes with identical GPUs. Raises PlanningError if a number is below 1 or above what any cluster has."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    def __post_init__(self) -> None:
        for name, value, most in (
            ("--nodes", self.nodes, _MOST_NODES),
            ("--gpus-per-node", self.gpus_per_node, _MOST_GPUS_PER_NODE),
        ):
            if not 1 <= value <= most:
                raise PlanningError(f"{name} {value}: must be from 1 to {most:,}")

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node
