"""How fast a step's kernels are: bytes that the memory-bound ones move, and measured fractions of a GPU's peak rates.

Between its matrix products a block passes over its tensors: norms, rotary embedding, SwiGLU, residual sums, copies. How often
depends on the implementation. A pass reads or writes every element of a tensor once; the counts are those of forward and
backward together, from the code. Per token and block, in elements: D of the residual stream, Q + K of queries and keys,
Q + 2 K of the joint projection, Q of attention's output, F of the feed-forward's inner width.

The fractions of EAGER and HUGGING_FACE are fitted to one measurement, of the 135 M shape on one H100 (`MEASURED`). Those of the
compiled implementations are estimates: their passes are counted too, but their speed has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.config import ModelConfig


@dataclass(frozen=True)
class Kernels:
    """One implementation of the model's kernels."""

    name: str
    stream: float
    """Passes over D: two norms, two residual sums."""
    rotary: float
    """Passes over Q + K."""
    projected: float
    """Passes over Q + 2 K."""
    merged: float
    """Passes over Q."""
    ffn: float
    """Passes over F."""
    forward: float
    """Fraction of a block's passes in its forward pass."""
    logits: tuple[float, float]
    """Bytes per logit and loss, of bf16 and of fp32 runs."""
    attention: float
    """Fraction of the peak FLOP/s that attention reaches."""
    elementwise: float
    """Fraction of the memory bandwidth that a block's memory-bound kernels reach."""
    measured: bool
    """Whether the fractions were fitted to a measurement."""

    def block_bytes(self, config: ModelConfig, element: int, tensor: int = 1, *, sequence: bool = False) -> float:
        """Bytes per token that the memory-bound kernels of one block move, on one tensor rank, forward and backward."""
        channels = config.dim_per_head
        query, kv = config.heads * channels / tensor, config.kv_heads * channels / tensor
        elements = self.stream * config.hidden / (tensor if sequence else 1)
        elements += self.rotary * (query + kv) + self.projected * (query + 2 * kv) + self.merged * query
        return element * (elements + self.ffn * config.ffn / tensor)

    def logit_bytes(self, element: int) -> float:
        """Bytes per logit and loss, beyond those of the products."""
        return self.logits[0] if element == 2 else self.logits[1]


# FlexAttention: 40 ms for 7.0 TFLOP, forward and backward. SDPA's flash kernel: from published figures at this head size.
FLEX, FLASH = 0.18, 0.30

EAGER = Kernels("eager", 26, 12, 2, 2, 18, 0.34, (46, 36), FLEX, 0.54, measured=True)
HUGGING_FACE = Kernels("Hugging Face", 117, 22, 0, 2, 14, 0.36, (32, 28), FLASH, 0.54, measured=True)
"""LlamaForCausalLM: its norms are a chain of fp32 operations, and it keeps all logits."""
COMPILED = Kernels("compiled", 18, 0, 4, 2, 9, 0.42, (6, 12), FLEX, 0.8, measured=False)
FUNCTIONS = Kernels("compiled functions", 24, 6, 2, 2, 9, 0.40, (6, 12), FLEX, 0.7, measured=False)
"""Blocks around tensor-parallel products or ZeRO-3's hooks: see training/engine/compiling.py."""


@dataclass(frozen=True)
class Measurement:
    """Tokens per second of a step on one GPU."""

    subject: str
    """"backbone", "recycle" (with a one-layer module at depth 1) or "huggingface"."""
    kernels: Kernels
    tokens_per_second: float


GPU_MEASURED = "h100"
SOURCE = "one H100 80GB HBM3, torch 2.11, ZeRO 1, bf16, 16 x 2048 tokens of one document each, training.loss_chunk=8192"
MEASURED = (
    Measurement("backbone", EAGER, 183_500.0),
    Measurement("recycle", EAGER, 148_300.0),
    Measurement("huggingface", HUGGING_FACE, 141_000.0),
)
"""SOURCE. Before training compiled anything, and with FlexAttention for single documents too."""
