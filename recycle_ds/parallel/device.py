"""The device and the collective backend: CPU with gloo, or CUDA with NCCL."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from recycle_ds.parallel.products import linear

# Dense peak FLOP/s (vendors' data sheets, without sparsity), by a substring of the device's name.
_CUDA_PEAKS = {
    "bf16": {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "A800": 312e12},
    "tf32": {"H200": 494.7e12, "H100 80GB HBM3": 494.7e12, "H100 PCIe": 378e12, "A100": 156e12, "A800": 156e12},
    "fp32": {"H200": 67e12, "H100 80GB HBM3": 67e12, "H100 PCIe": 51e12, "A100": 19.5e12, "A800": 19.5e12},
}


# Folder, limit and use of memory of version 2 and version 1 of Linux control groups.
_MEMORY_CONTROLLERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def local_device(index: int = 0) -> torch.device:
    """The CUDA device with this index, or the CPU without CUDA. `rendezvous.own_device` picks a rank's index."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def machine_name(device: torch.device) -> str:
    """Name of the hardware: the GPU, or the processor and the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line for line in information.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def backend() -> str:
    """Name of the collective backend for `local_device()`: "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def set_fp32_products(tf32: bool, device: torch.device) -> None:
    """Sets whether fp32 matrix products on a GPU round their operands to TF32 (10 bits of mantissa), for this process.
    Does nothing on a CPU: it has no TF32, but the setting would let its products round to bf16."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for the configuration's "fp32" or "bf16", and of operands of TF32 products."""
    return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}[name]


@lru_cache
def peak_flops(dtype: str, device: torch.device) -> float:
    """Peak FLOP/s of one rank, the reference for model FLOPs utilisation (MFU). dtype: "bf16", "fp32" or "tf32".

    On CUDA, the data sheet's dense figure. On a CPU or an unlisted GPU, the rate that `matmul_rate` measures.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in _CUDA_PEAKS[dtype].items():
            if part in name:
                return peak
    return matmul_rate(dtype, device)


@torch.no_grad()
def matmul_rate(dtype: str, device: torch.device, seconds: float = 0.05) -> float:
    """Measured FLOP/s of the model's matrix product. The square operands double in size until one product takes
    `seconds`. Their elements are random: a GPU multiplies constants faster, since fewer bits change, than a model's numbers."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    best, size, fastest = 0.0, 128, 0.0
    while fastest < seconds and size <= (8192 if device.type == "cuda" else 1024):
        a = torch.randn(size, size, generator=generator, device=device).to(torch_dtype(dtype))
        # the best of several: the first one prepares the kernel, and any of them may be interrupted
        fastest = min(_timed_product(a, device) for _ in range(4))
        best = max(best, 2 * size**3 / fastest)
        size *= 2
    return best


def _timed_product(a: torch.Tensor, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    linear(a, a)
    synchronise(device)
    return max(time.perf_counter() - start, 1e-9)


def let_megatron_run_on_cpu() -> None:
    """Without CUDA, makes torch.cuda.current_device return the CPU: megatron-core's gather and scatter call it."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def keep_freed_memory() -> bool:
    """On a CPU, configures glibc to keep freed memory for later tensors. Returns whether that succeeded.

    By default glibc returns large blocks to the kernel at once, so every step page-faults the same memory again: up to
    half of the time of a training step. On CUDA, PyTorch's own allocator keeps freed memory."""
    if torch.cuda.is_available():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without mallopt
        return False
    # never allocate with mmap; grow the heap in steps of 64 MiB and never shrink it
    return all(mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**26)))


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor on a device. The host does not wait for a GPU's copy: it is queued from page-locked memory."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def download(*tensors: torch.Tensor) -> Callable[[], list[list[float]]]:
    """Lets a GPU copy vectors to the host when it has computed them. The result waits for that, and returns their elements.
    They must not be changed meanwhile."""
    copies = [torch.empty_like(one, device="cpu", pin_memory=True) if one.is_cuda else one for one in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        if tensor.is_cuda:
            copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event(blocking=True) if any(one.is_cuda for one in tensors) else None
    if event is not None:
        event.record()

    def read() -> list[list[float]]:
        if event is not None:
            event.synchronize()
        return [copy.tolist() for copy in copies]

    return read


def synchronise(device: torch.device) -> None:
    """Waits for queued CUDA work. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: on a GPU, or on this host within the limit of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in _MEMORY_CONTROLLERS:
        try:
            bound = Path(folder, limit).read_text().strip()
            if bound.isdecimal():
                free = min(free, max(int(bound) - int(Path(folder, used).read_text()), 0))
        except OSError:  # this version of control groups is not mounted
            continue
    return free


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: the allocator's on CUDA, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
