"""The functions between the matrix products, and the head's loss: what the compiler makes of them, beside liger-kernel.

liger-kernel (Hsu et al., arXiv 2410.10989) is a library of Triton kernels for training, and no dependency of this package.
These figures decide whether any of its kernels should be used.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recycle_ds.config import ModelConfig, load_config
from recycle_ds.model.losses.chunks import HeadShard
from recycle_ds.model.losses.cross_entropy import head_losses
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.model.mlp import swiglu
from recycle_ds.model.norm import normalise
from recycle_ds.model.rope import rotate
from recycle_ds.parallel.device import local_device, synchronise
from recycle_ds.parallel.mesh import Axis

Write = Callable[[dict[str, Any]], None]
Kernel = Callable[..., Sequence[Tensor]]
"""Takes a case's inputs and returns its outputs."""

LIGER = "liger_kernel"
_CHUNK = 8192
_ROUNDS = 20
_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Of the difference between two results, as a share of their norm."""


@dataclass(frozen=True)
class Case:
    """One function in two libraries. inputs: they all get gradients. of_other: the other library's inputs, the same numbers in
    its own layout. to_ours: brings its outputs, or the gradients of its inputs, into the layout of ours."""

    inputs: tuple[Tensor, ...]
    ours: Kernel
    other: Kernel | None = None
    of_other: tuple[Tensor, ...] | None = None
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple


def kernels(write: Write, small: bool) -> None:
    """Forward and backward seconds of each function at the 135 M shape, 16 x 2,048 tokens, in bf16."""
    other = None if small else importlib.import_module(f"{LIGER}.transformers.functional")
    tokens, sequences = (64, 2) if small else (32768, 16)
    dtype = torch.float32 if small else torch.bfloat16
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager" if small else "inductor")
    shape = load_config("bench_135m", []).model
    for name, case in cases(shape, tokens, sequences, dtype, local_device(), compiler, other).items():
        write({name: measured(case, 2 if small else _ROUNDS)})


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of both libraries, in turn, and of the other one over ours; only ours without another. If outputs or
    gradients of the other one differ, by how much instead of its seconds, as a share of their norm."""
    device = case.inputs[0].device
    runs = {"ours": _Run(case.ours, case.inputs)}
    if case.other is not None:
        other = _Run(case.other, case.of_other or case.inputs)
        differs_by = _difference(runs["ours"].results, [case.to_ours(part) for part in other.results])
        if differs_by > _TOLERANCE[case.inputs[0].dtype]:
            return {"liger_differs_by": differs_by}
        runs["liger"] = other
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronise(device)
            start = time.perf_counter()
            run.repeat()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    found = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    if case.other is not None:
        found["liger_over_ours"] = found["liger_seconds"] / found["ours_seconds"]
    return found


class _Run:
    """Forward and backward passes of one kernel. The first one compiles, and its results are kept."""

    def __init__(self, kernel: Kernel, inputs: Sequence[Tensor]) -> None:
        self._kernel, self._inputs = kernel, [one.detach().requires_grad_() for one in inputs]
        outputs = kernel(*self._inputs)
        # a loss has a gradient of 1; those of other outputs are not all alike
        self._given = [one.detach().sin() if one.dim() else torch.ones_like(one) for one in outputs]
        kept = [one.detach().clone() for one in outputs]
        gradients = torch.autograd.grad(outputs, self._inputs, [one.clone() for one in self._given])
        self.results = (kept, [one.clone() for one in gradients])

    def repeat(self) -> None:
        """Once more. Some kernels change inputs and gradients in place, which takes no other time."""
        torch.autograd.grad(self._kernel(*self._inputs), self._inputs, self._given)


@torch.no_grad()
def _difference(ours: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference of two tensors, as a share of the norm of ours; infinite if there is no number for it."""
    pairs = [pair for own, other in zip(ours, others, strict=True) for pair in zip(own, other, strict=True)]
    shares = [float((left.float() - right.float()).norm() / left.float().norm()) for left, right in pairs]
    return max(share if math.isfinite(share) else math.inf for share in shares)


def cases(
    shape: ModelConfig,
    tokens: int,
    sequences: int,
    dtype: torch.dtype,
    device: torch.device,
    compiler: Callable[[Callable[..., Any]], Any],
    other: Any | None,
) -> Mapping[str, Case]:
    """The functions of a model of this shape. other: liger-kernel's functional module, or one with the same functions."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    norm = compiler(normalise)
    activate, turn = compiler(swiglu), compiler(rotate)
    x, weight, epsilon = random(tokens, shape.hidden), random(shape.hidden), shape.norm_epsilon
    found = {
        "norm": Case(
            (x, weight),
            lambda x, weight: (norm(x, weight, epsilon),),
            other and (lambda x, weight: (other.liger_rms_norm(x, weight, epsilon, 0.0, "llama", False),)),
        )
    }
    gate_up = random(tokens, 2 * shape.ffn)
    halves = tuple(one.contiguous() for one in gate_up.chunk(2, dim=-1))
    found["swiglu"] = Case(
        (gate_up,),
        lambda both: (activate(both),),
        other and (lambda gate, up: (other.liger_swiglu(gate, up),)),
        halves,  # of two products
        lambda parts: parts if len(parts) == 1 else (torch.cat(tuple(parts), dim=-1),),
    )
    found["rotary"] = _rotary(shape, tokens, sequences, random, turn, other)
    vocabulary = shape.vocab_size
    assert vocabulary is not None, "the configuration gives one"
    states, head = random(tokens, shape.hidden), random(vocabulary, shape.hidden, scale=0.02)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    scale = torch.full((1,), 1 / tokens, device=device)
    shard, fused = HeadShard(0, vocabulary, Axis()), FusedLosses.compiled(compiler)

    def loss(states: Tensor, head: Tensor) -> tuple[Tensor]:
        ours = head_losses([states], head, targets[None], scale, shard, chunk=_CHUNK, train_head=[True], fused=fused)
        return (ours[0],)

    found["head_loss"] = Case(
        (states, head),
        loss,
        other
        and (
            lambda states, head: (
                # summed in fp32 like ours
                other.liger_fused_linear_cross_entropy(states, head, targets, accum_dtype=torch.float32),
            )
        ),
    )
    return found


def _rotary(
    shape: ModelConfig,
    tokens: int,
    sequences: int,
    random: Callable[..., Tensor],
    turn: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
    other: Any | None,
) -> Case:
    """Queries and keys [S, B, H, C]; the other library's are [B, H, S, C], transposed from [B, S, H, C], with the angles of
    both halves."""
    length, channels = tokens // sequences, shape.dim_per_head
    query, key = (random(length, sequences, heads, channels) for heads in (shape.heads, shape.kv_heads))
    angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, channels, 2).float() / channels))
    cosine, sine = (one.to(query.device, query.dtype) for one in (angles.cos(), angles.sin()))
    rotary = (cosine[:, None, None], sine[:, None, None])
    both = [torch.cat((one, one), dim=-1)[None] for one in (cosine, sine)]
    turned = tuple(one.transpose(0, 1).contiguous().transpose(1, 2) for one in (query, key))
    return Case(
        (query, key),
        lambda query, key: (turn(query, rotary), turn(key, rotary)),
        other and (lambda query, key: other.liger_rope(query, key, *both)),
        turned,
        lambda parts: [one.permute(2, 0, 1, 3) for one in parts],
    )
