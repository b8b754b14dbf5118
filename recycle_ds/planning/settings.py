"""What the run's DeepSpeed file says about memory, with DeepSpeed 0.19's defaults where it says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recycle_ds.config import ConfigError
from recycle_ds.config.deepspeed_json import load_deepspeed_json

_DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Settings:
    """Sizes in elements. One file serves all candidates: its stage is not looked at, the rest holds at any stage."""

    reduce_bucket_size: float = 5e8
    """Of a reduction bucket; stages 1 to 3 allocate it whole, however small the model."""
    overlap: bool = False
    """overlap_comm: stages 1 and 2 fill a second bucket while the first is reduced."""
    kept_gathered: float = 1e9
    """Weights that ZeRO-3 keeps gathered during a pass, since they will be needed again soon, or fetches before they are."""
    grad_accum_dtype: str | None = None
    """Type that gradients are added up in, "fp32" or "bf16"; None where recycle_ds decides."""


def read_settings(path: str) -> Settings:
    """Those of a DeepSpeed file. Raises ConfigError for one that cannot be read, or a value that is none.

    allgather_bucket_size is looked at, but takes no memory: ZeRO 1 and 2 gather the weights where they lie.
    """
    tree = load_deepspeed_json(path)
    zero = tree.get("zero_optimization") or {}

    def size(key: str, default: float) -> float:
        return _size(path, key, zero.get(key, default))

    size("allgather_bucket_size", 5e8)
    # what is used again within the reuse distance stays, the next weights are fetched early, all up to max_live
    soon = size("stage3_max_reuse_distance", 1e9) + size("stage3_prefetch_bucket_size", 5e7)
    given = (tree.get("data_types") or {}).get("grad_accum_dtype")
    dtype = _DTYPES.get(str(given).removeprefix("torch."))
    if given is not None and dtype is None:
        raise ConfigError(f'{path}: data_types.grad_accum_dtype={given!r}: must be "fp32" or "bf16"')
    return Settings(
        reduce_bucket_size=size("reduce_bucket_size", 5e8),
        overlap=zero.get("overlap_comm") is True,
        kept_gathered=min(size("stage3_max_live_parameters", 1e9), soon),
        grad_accum_dtype=dtype,
    )


def _size(path: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"{path}: zero_optimization.{key}={value!r}: must be a number of elements")
    return float(value)
