"""Options of a conversion. Does not import torch, so that a wrong one is reported at once."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config.model_sections import MOST_DEPTH, MOST_LAYERS

TARGETS = ("hf", "portable", "megatron", "vllm")
DTYPES = ("fp32", "bf16", "fp16")
_GIB = 2**30
_SHARD_GIB, _LARGEST_SHARD_GIB = 1.0, 2.0**20
_MOST_SEEDS = 2**63 - 1


@dataclass(frozen=True)
class Conversion:
    """The options of a conversion."""

    target: str
    dtype: str | None = None
    """None keeps the source's dtype."""
    shard_gib: float | None = None
    """All but megatron: maximum file size; None is 1 GiB."""
    tensor: int = 1
    """megatron: tensor-parallel ranks to shard for."""
    pipeline: int = 1
    """megatron: pipeline stages to shard for."""
    verify: bool = True
    """Read the result back and compare every tensor bit for bit."""
    config: str | None = None
    """Configuration file for a source without one of its own."""
    recycle_layers: int = 0
    """Blocks of a newly initialised recycle module to add to a source without one; 0 adds none."""
    recycle_depth: int | None = None
    """Unrolled steps of the new module in training; None is 1."""
    seed: int | None = None
    """Seed of the new module's weights, as training.seed of a run. None is the default of training.seed."""
    draft_vocabulary: int | None = None
    """Tokens of the recycle module's draft vocabulary; 0 removes it, None keeps it."""
    rank_tokens: tuple[str, ...] = ()
    """Prefixes of token files that say which tokens are the most frequent; by default the source's own ranking does."""
    before_norm: bool = False
    """vllm: fold the final norm's weight into the module, for states before that norm."""

    @property
    def shard_bytes(self) -> int:
        """Maximum file size in bytes."""
        return int((_SHARD_GIB if self.shard_gib is None else self.shard_gib) * _GIB)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the chosen options."""
        if self.target != "vllm":
            return ()
        if self.before_norm:
            return ("for vLLM only; for SGLang, and to read the folder back, omit --before-norm",)
        return ("vLLM needs --before-norm, or the base model in a folder of its own: docs/checkpoints.md",)

    def check(self) -> None:
        """Raises CheckpointError for invalid options."""
        if self.target not in TARGETS:
            raise CheckpointError(f"--to {self.target}: must be one of {', '.join(TARGETS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise CheckpointError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.shard_gib is not None and not 0 < self.shard_gib <= _LARGEST_SHARD_GIB:
            raise CheckpointError(
                f"--shard-gib {self.shard_gib}: must be above 0, and at most {_LARGEST_SHARD_GIB:,.0f}"
            )
        if self.shard_gib is not None and self.target == "megatron":
            raise CheckpointError(
                f"--shard-gib {self.shard_gib} --to megatron: its files follow the layout; choose it by --tp and --pp"
            )
        if min(self.tensor, self.pipeline) < 1:
            raise CheckpointError(f"--tp {self.tensor} --pp {self.pipeline}: must be at least 1")
        if self.target != "megatron" and self.tensor * self.pipeline > 1:
            raise CheckpointError(
                f"--tp {self.tensor} --pp {self.pipeline}: only --to megatron has a layout; the other formats load at any"
            )
        if self.draft_vocabulary is not None and self.draft_vocabulary < 0:
            raise CheckpointError(f"--draft-vocabulary {self.draft_vocabulary}: must be at least 0, which removes it")
        if self.rank_tokens and not self.draft_vocabulary:
            raise CheckpointError(f"--rank-tokens {self.rank_tokens[0]}: only with --draft-vocabulary N")
        if self.before_norm and self.target != "vllm":
            raise CheckpointError(f"--before-norm --to {self.target}: only with --to vllm")
        for option, value, least, most in (
            ("--recycle-layers", self.recycle_layers, 0, MOST_LAYERS),
            ("--recycle-depth", self.recycle_depth, 1, MOST_DEPTH),
            ("--seed", self.seed, 0, _MOST_SEEDS),
        ):
            if value is None:
                continue
            if not least <= value <= most:
                raise CheckpointError(f"{option} {value}: must be from {least} to {most:,}")
            if not self.recycle_layers and option != "--recycle-layers":
                raise CheckpointError(f"{option} {value}: only with --recycle-layers N, which adds a module")
