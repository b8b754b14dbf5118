"""Where a step's time goes: milliseconds by kind of kernel, from the profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

_KINDS = {
    "attention": ("flex_attention", "flash", "fmha", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "::mm", "::addmm", "::bmm", "mkldnn", "matmul", "linear"),
    "optimizer and norms of gradients": ("adam", "multi_tensor", "foreach"),
    "copies and casts": ("copy", "memcpy", "memset", "catarray", "::cat", "::to", "clone"),
}
_COMPILED = "triton_"
"""How the names of the compiler's kernels begin; the operations that one fuses follow, whatever its own kind."""
OTHER = "other elementwise kernels and reductions"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, or of an operation on a CPU, by its name."""
    name = kernel.lower()
    if name.startswith(_COMPILED):
        if "flex_attention" in name:
            return "attention"
        return "matrix products" if "triton_tem_" in name or "mm" in name.split("_") else "fused by the compiler"
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), OTHER)


def milliseconds_by_kind(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kind, the most expensive first: of kernels on a GPU, of operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        if is_kernel == on_gpu and not event.is_user_annotation:  # an annotation has the time of the kernels inside
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kind = kind_of(event.key)
            found[kind] = found.get(kind, 0.0) + spent / 1000
    return dict(sorted(found.items(), key=lambda item: -item[1]))
