"""The model's part of the configuration: backbone, rotary embedding and recycle module."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recycle_ds.config.errors import ConfigError
from recycle_ds.config.section import NonNegative, OnResume, Positive, Section

MOST_LAYERS, MOST_DEPTH = 10_000, 1_024
"""Blocks of a backbone or module, and steps that a module is unrolled for: more are a mistake in the configuration, and
would keep the process busy forever, if only to compute the shapes."""


class RopeScaling(Section):
    """How rotary frequencies are scaled for contexts longer than the model was first trained on."""

    kind: Literal["linear", "llama3"]
    """`linear`: all frequencies divided by `factor`. `llama3`: low ones divided, high ones kept, with a ramp in between."""
    factor: Annotated[float, Field(ge=1.0)]
    """Factor by which the context is extended."""
    low_frequency_factor: Annotated[float, Field(gt=0)] = 1.0
    """llama3: wavelengths above original_positions / low_frequency_factor are divided by `factor`."""
    high_frequency_factor: Annotated[float, Field(gt=0)] = 4.0
    """llama3: wavelengths below original_positions / high_frequency_factor are kept."""
    original_positions: Positive = 8192
    """llama3: context length, in tokens, before scaling."""

    @model_validator(mode="after")
    def _ramp_has_a_width(self) -> RopeScaling:
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor ({self.high_frequency_factor}) must be above "
                f"low_frequency_factor ({self.low_frequency_factor})"
            )
        return self


class RopeConfig(Section):
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in LLaMA."""

    theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: RopeScaling | None = None
    """Context extension, none by default."""
    unrotated_layers: tuple[NonNegative, ...] = ()
    """Blocks of the backbone, counted from 0, whose queries and keys are not rotated (SmolLM3)."""


class ModelConfig(Section):
    """The backbone: a LLaMA-type decoder. Sizes are those of the full model, before any sharding."""

    layers: Annotated[Positive, Field(le=MOST_LAYERS)]
    """Transformer blocks."""
    hidden: Positive
    """Width of the residual stream."""
    heads: Positive
    """Query heads."""
    kv_heads: Positive
    """Key and value heads; fewer than `heads` means grouped-query attention."""
    head_dim: Positive | None = None
    """Width of a head; hidden / heads if not given."""
    ffn: Positive
    """Inner width of the SwiGLU feed-forward."""
    vocab_size: Positive | None = None
    """Tokens in the vocabulary; taken from the tokenizer if not given."""
    vocab_multiple: Annotated[Positive, OnResume.FREE] = 64
    """The embedding is padded to a multiple of this times parallel.tensor; padding is never predicted or saved."""
    max_positions: Positive = 2048
    """Longest context, in tokens."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool = True
    """Whether the output head shares the embedding's weight."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, before the rotation (Qwen3)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get init_std / sqrt(2 layers)."""

    @property
    def dim_per_head(self) -> int:
        """Width of one head, in channels."""
        return self.head_dim if self.head_dim is not None else self.hidden // self.heads

    @model_validator(mode="after")
    def _sizes_divide(self) -> ModelConfig:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(
                f"hidden ({self.hidden}) must be divisible by heads ({self.heads}), or head_dim must be given"
            )
        if self.dim_per_head % 2:
            raise ValueError(
                f"the head width ({self.dim_per_head}) must be even for rotary embeddings; change head_dim"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})")
        wrong = [layer for layer in self.rope.unrotated_layers if layer >= self.layers]
        if wrong:
            raise ValueError(f"rope.unrotated_layers: {wrong[0]}: must be below layers ({self.layers})")
        return self


class RecycleConfig(Section):
    """The recycle module (RecycleGPT, arXiv 2308.03421): its size, and how it is trained."""

    layers: Annotated[NonNegative, Field(le=MOST_LAYERS)] = 1
    """Blocks in the module; 0 trains a plain language model."""
    depth: Annotated[Positive, Field(le=MOST_DEPTH)] = 1
    """K: number of steps that the module is unrolled for in training; the paper uses 1."""
    loss_weight: Annotated[float, Field(ge=0)] = 0.3
    """Lambda: weight of the mean recycle loss relative to the backbone's."""
    depth_decay: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Depth k has weight depth_decay^(k-1), normalised over depths."""
    step_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """The weights of the depths one by one, normalised likewise, in place of `depth_decay`."""
    draft_vocabulary: Annotated[Positive | None, OnResume.FREE] = None
    """When decoding, drafts are chosen among this many of the most frequent tokens of the training data, which makes them
    cheaper; `null`: among all tokens. The text of `verified` does not depend on it. A run that trains with it (see below)
    cannot change it at a resume."""
    draft_vocabulary_in_training: bool = False
    """Train the module over the draft vocabulary alone, with that part of the head: cheaper, and drafts come from nowhere else.
    `cross_entropy` then ignores other targets, `kl` scales the backbone's probabilities of that vocabulary to sum to 1, and
    `acceptance` takes them as they are."""
    gradient: Literal["joint", "detached", "frozen_backbone"] = "joint"
    """`joint`: both losses train everything. `detached`: the recycle loss reaches the module only. `frozen_backbone`: only
    the module trains."""
    taps: tuple[NonNegative, ...] = ()
    """Blocks of the backbone, counted from 0, whose output states join h in the module's input (EAGLE-3, arXiv 2503.01840):
    for example one low, one middle and one high block. They enter the first step; later steps have r in their place."""
    objective: Literal["cross_entropy", "kl", "acceptance"] = "cross_entropy"
    """What the module learns: the text (`cross_entropy`), the backbone's distribution p of the next token (`kl`), or to be
    accepted by it (`acceptance`: -log sum min(p, q), the LK loss of arXiv 2602.23881, which suits sampled drafts best)."""
    confidence: bool = False
    """Add a linear layer on r that learns the probability that a draft is accepted at temperature 0, without a gradient into
    the module. Decoding then decides by it, in place of the draft's own probability, how many drafts pay."""
    start_step: NonNegative = 0
    """Steps before the recycle loss starts to count."""
    warmup_steps: NonNegative = 0
    """Steps over which its weight then rises linearly to `loss_weight`."""

    @model_validator(mode="after")
    def _consistent(self) -> RecycleConfig:
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps ({list(self.taps)}) must be different blocks in ascending order")
        if self.taps and not self.layers:
            raise ValueError(f"taps ({list(self.taps)}) need a module, but layers is 0")
        weights = self.step_weights
        if weights is not None and (len(weights) != self.depth or not sum(weights)):
            raise ValueError(
                f"step_weights ({list(weights)}) must have one number for each of depth={self.depth} steps, not all 0"
            )
        if self.confidence and not self.layers:
            raise ValueError("confidence=true needs a module, but layers is 0")
        if self.draft_vocabulary_in_training and (self.draft_vocabulary is None or not self.layers):
            raise ValueError(
                "draft_vocabulary_in_training needs a module and its draft_vocabulary: set draft_vocabulary=N"
            )
        return self

    def check_taps(self, layers: int) -> None:
        """Raises ConfigError for a tapped block that a backbone of `layers` blocks does not have."""
        if self.taps and self.taps[-1] >= layers:
            raise ConfigError(f"recycle.taps: {self.taps[-1]}: must be below model.layers ({layers})")
