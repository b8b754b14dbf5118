"""The memory settings of the run's DeepSpeed file, with DeepSpeed 0.19's defaults for those that are not set."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.config.deepspeed_json import load_deepspeed_json


@dataclass(frozen=True)
class Settings:
    """Sizes in elements. One file is used for all candidates: its ZeRO stage is ignored, the rest applies to any stage."""

    reduce_bucket_size: float = 5e8
    """Size of a reduction bucket; stages 1 to 3 allocate it in full, even for a small model."""
    overlap: bool = False
    """overlap_comm: stages 1 and 2 fill a second bucket while the first is reduced."""
    kept_gathered: float = 1e9
    """Weights that ZeRO-3 keeps gathered during a pass because they are reused soon, or that it prefetches."""
    grad_accum_dtype: str | None = None
    """dtype in which gradients are accumulated, "fp32" or "bf16"; None if recycle_ds decides."""


def read_settings(path: str) -> Settings:
    """The settings of a DeepSpeed file. Raises ConfigError for a file that cannot be read or an invalid value.

    allgather_bucket_size is checked but takes no memory: ZeRO 1 and 2 gather the weights in place.
    """
    tree = load_deepspeed_json(path)
    zero = tree.get("zero_optimization") or {}

    def size(key: str, default: float) -> float:
        return float(zero.get(key, default))

    # weights reused within the reuse distance stay gathered and the next ones are prefetched, up to max_live in total
    reused_or_prefetched = size("stage3_max_reuse_distance", 1e9) + size("stage3_prefetch_bucket_size", 5e7)
    return Settings(
        reduce_bucket_size=size("reduce_bucket_size", 5e8),
        overlap=zero.get("overlap_comm") is True,
        kept_gathered=min(size("stage3_max_live_parameters", 1e9), reused_or_prefetched),
        grad_accum_dtype=(tree.get("data_types") or {}).get("grad_accum_dtype"),
    )
