"""Bytes that autograd keeps for the backward pass, counted from the code of `recycle_ds.model`.

Each term is a tensor that a backward formula needs. The counts follow Korthikanti et al. (arXiv 2205.05198, section 4),
for this model: SwiGLU, grouped-query attention without a stored score matrix, no dropout, head and losses in chunks. Each
storage is counted once: the rotated queries and keys, for example, share one tensor.

Shapes: N tokens of a micro-batch, D hidden, H = heads x C and K = kv_heads x C of one tensor rank, F its share of ffn. With
sequence parallelism, the activations between tensor-parallel products are split over the tensor axis too.
"""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.config import ModelConfig, RecycleConfig


@dataclass(frozen=True)
class Kernels:
    """Which tensors a device's kernels keep. Tests measure the CPU's; CUDA's fused kernels keep less."""

    fused_norm: bool
    """RMSNorm keeps its input and one scale per row; otherwise fp32 copies of input and normalised input."""
    dense_mask: bool
    """Packed sequences need a mask of S x S numbers, shared by all layers."""


CPU = Kernels(fused_norm=False, dense_mask=True)
CUDA = Kernels(fused_norm=True, dense_mask=False)


@dataclass(frozen=True)
class Activations:
    """Counts the bytes of one micro-batch on one rank."""

    config: ModelConfig
    recycle: RecycleConfig
    micro_batch: int
    seq_length: int
    """Positions of a sequence on this rank: S, or S / u with Ulysses."""
    element: int
    """Bytes per element in the model's dtype."""
    tensor: int = 1
    sequence: bool = False
    ulysses: int = 1
    recompute: bool = False
    kernels: Kernels = CUDA

    @property
    def tokens(self) -> int:
        """N: tokens of the micro-batch on this rank."""
        return self.micro_batch * self.seq_length

    @property
    def _stream(self) -> int:
        """Elements of the residual stream on this rank."""
        return self.tokens * self.config.hidden // (self.tensor if self.sequence else 1)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """H, K and F of one rank."""
        config, channels = self.config, self.config.dim_per_head
        return (
            config.heads * channels // self.tensor,
            config.kv_heads * channels // self.tensor,
            config.ffn // self.tensor,
        )

    def norm(self) -> int:
        """Input and one scale per row; the unfused kernel also keeps the normalised input, both in fp32."""
        rows = self._stream // self.config.hidden
        if self.kernels.fused_norm:
            return self.element * self._stream + 4 * rows
        return 2 * 4 * self._stream + 4 * rows

    def attention(self, steps: int = 1) -> int:
        """Rotated queries and keys, values, output and log-sum-exp; keys and values of `steps` steps in an unrolled step."""
        query, kv, _ = self._widths
        el, n = self.element, self.tokens
        rows = 4 * n * self.config.heads // self.tensor
        unrolled = 2 * el * n * kv * steps if steps > 1 else 0
        fused = el * n * (query + 2 * kv)  # one tensor; the values are a view of it
        norms = self.head_norms(steps)
        if self.ulysses > 1:  # the all-to-all's result; the rotated tensors before it are not kept
            return fused + el * n * query + rows + unrolled + norms
        return el * n * (query + kv) + el * n * query + rows + (unrolled or fused) + norms

    def head_norms(self, steps: int = 1) -> int:
        """The norms of queries and keys: one scale per head, and their input if nothing else keeps it; with the unfused kernel
        the normalised heads in fp32, and a copy of a bf16 input instead of it."""
        config = self.config
        if not config.qk_norm:
            return 0
        query, kv, _ = self._widths
        rows = 4 * self.tokens * (config.heads + config.kv_heads) // self.tensor
        kept_elsewhere = steps == 1 and self.ulysses == 1
        inputs = 0 if kept_elsewhere else self.element * self.tokens * (query + 2 * kv)
        normalised = 4 * self.tokens * (query + kv)
        if self.kernels.fused_norm:
            return rows + inputs
        return rows + normalised + (inputs if self.element == 4 else normalised)

    def block(self, steps: int = 1) -> int:
        """One block without recomputation: two norms, the inputs of four products, attention, SwiGLU."""
        el, n = self.element, self.tokens
        ffn = self._widths[2]
        # inputs of query_key_value and gate_up; those of the other two products are counted below
        products = 2 * el * self._stream
        extra = 0
        if self.ulysses > 1:  # the all-to-all's result is the output product's input, in addition to attention's output
            extra = el * n * self._widths[0]
        return 2 * self.norm() + products + self.attention(steps) + extra + 4 * el * n * ffn

    def rotary(self) -> int:
        """Cosines and sines of one pass, shared by its layers."""
        return self.element * self.tokens * self.config.dim_per_head

    def mask(self, steps: int = 1) -> int:
        """The additive mask of one pass, shared by its layers; with recomputation also the boolean mask it is built from."""
        if not self.kernels.dense_mask:
            return 0
        length = self.seq_length * self.ulysses
        return (self.element + (1 if self.recompute else 0)) * self.micro_batch * length * length * steps

    def blocks(self, count: int) -> int:
        """What `count` blocks of the backbone keep for one micro-batch."""
        if count == 0:
            return 0
        if self.recompute:
            return count * self.element * self._stream + self.rotary() + self.mask()
        return count * self.block() + self.rotary() + self.mask()

    def module(self) -> int:
        """The recycle module at all its depths."""
        recycle = self.recycle
        if not recycle.layers:
            return 0
        query, kv, _ = self._widths
        total = 0
        for step in range(1, recycle.depth + 1):
            tapped = len(recycle.taps) if step == 1 else 0
            if tapped and not self.recompute:  # norms, and the projection's input
                total += tapped * (self.norm() + self.element * self._stream)
            if self.recompute:
                total += tapped * self.element * self._stream
                total += 2 * self.element * self._stream + self.rotary() + self.mask(step)
                if step < recycle.depth:  # the step's keys and values, which are views of larger tensors
                    total += recycle.layers * self.element * self.tokens * ((query + kv) + (query + 2 * kv))
            else:
                joined = 2 * self.norm() + 2 * self.element * self._stream
                total += joined + recycle.layers * self.block(step) + self.norm() + self.rotary() + self.mask(step)
        return total

    def head(self) -> int:
        """After the last block: the final norm, and the gradients that the loss computes in its forward pass."""
        if is_frozen(self.recycle):
            return self.recycle.depth * self.element * self._stream
        losses = 1 + (self.recycle.depth if self.recycle.layers else 0)
        return self.norm() + losses * self.element * self._stream + self.head_gradient(self.element)

    def head_gradient(self, element: int) -> int:
        """The output head's gradient on one rank, padding rows included."""
        return element * padded_rows(self.config, self.tensor) * self.config.hidden

    def stage(self, blocks: int, *, last: bool) -> int:
        """What one pipeline stage keeps for one micro-batch."""
        return self.blocks(0 if is_frozen(self.recycle) else blocks) + (self.module() + self.head() if last else 0)

    def logits(self, chunk: int) -> int:
        """The loss's workspace: a chunk's logits in fp32 and in the model's dtype, and the head's fp32 gradient."""
        rows = min(chunk, self.tokens)
        per_logit = 4 + (self.element if self.element < 4 else 0)
        logits = rows * padded_rows(self.config, self.tensor) * per_logit
        return logits if is_frozen(self.recycle) else logits + self.head_gradient(4)

    def working_set(self) -> int:
        """With recomputation: what one block keeps while it is recomputed."""
        return self.block() if self.recompute else 0


def is_frozen(recycle: RecycleConfig) -> bool:
    """Whether only the recycle module trains: the backbone keeps nothing for a backward pass."""
    return recycle.layers > 0 and recycle.gradient == "frozen_backbone"


def padded_rows(config: ModelConfig, tensor: int) -> int:
    """Rows of the embedding on one tensor rank, padding included."""
    assert config.vocab_size is not None
    unit = config.vocab_multiple * tensor
    return -(-config.vocab_size // unit) * unit // tensor
