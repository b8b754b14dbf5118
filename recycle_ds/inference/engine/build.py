"""Builds engines: for a model in this process, and for a team of ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.distributed as dist

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.collectives import Collectives, collectives
from recycle_ds.inference.engine.costs.cost_file import CostFile, cost_file
from recycle_ds.inference.engine.device.capture import EagerPieces, GraphPieces
from recycle_ds.inference.engine.device.fields import FEW_TOKENS
from recycle_ds.inference.engine.device.paged import paged_attention
from recycle_ds.inference.engine.device.runner import DeviceRunner
from recycle_ds.inference.engine.distributed import TeamExecutor
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.executor import Executor, LocalExecutor
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.step_watch import StepWatch
from recycle_ds.inference.engine.team import Team
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.native.stack import why_not_compiled
from recycle_ds.inference.protocol import NewTextSource
from recycle_ds.inference.speculation.budget import MOST_DRAFT_SLOTS
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from recycle_ds.model import RecycleGPT
from recycle_ds.parallel.device import free_memory, keep_freed_memory

BLOCK_SIZE = 16
_SHARE_OF_FREE_MEMORY = 0.5

Steps = Literal["graphs", "static", "flat"]
"""How steps run. "graphs": in static buffers and CUDA graphs. "static": in the same buffers without graphs, on any device, to
compare. "flat": without padding, with the compiled kernels on a CPU that has them, and several waits for a GPU in a step."""


def cache_blocks(
    weights: StageWeights, max_positions: int, max_batch: int, kv_memory_gib: float | None, ranks_on_host: int = 1
) -> int:
    """How many blocks the cache gets on this rank.

    By default enough for `max_batch` sequences of the longest context, but at most half of the memory that is free now,
    which the ranks of a host share if they run on its processors.
    """
    wanted = max_batch * (-(-(max_positions + MOST_DRAFT_SLOTS + 1) // BLOCK_SIZE) + 1)
    sharers = ranks_on_host if weights.device.type == "cpu" else 1
    room = _SHARE_OF_FREE_MEMORY * free_memory(weights.device) / sharers
    if kv_memory_gib is not None:
        room = kv_memory_gib * 2**30
    return min(wanted, int(room // Cache.bytes_per_block(weights, BLOCK_SIZE)))


def check_blocks(blocks: int, weights: StageWeights) -> None:
    """Raises DecodingError for a cache that is too small for any sequence."""
    if blocks < 2:
        needed = 2 * Cache.bytes_per_block(weights, BLOCK_SIZE) / 2**30
        raise DecodingError(
            f"too little memory for a KV cache: two blocks of {BLOCK_SIZE} positions need {needed:.3g} GiB on this rank; "
            "raise --kv-memory-gib, or free memory"
        )


def check_finite(model: RecycleGPT, group: dist.ProcessGroup | None = None) -> None:
    """Raises DecodingError if a weight is not a finite number, since every token would be the same: on all ranks of a group if
    one of them has it. Collective over the group."""
    weights = ((name, weight.detach()) for name, weight in model.named_parameters() if weight.numel())
    own = next((name for name, one in weights if not all(bool(bound.isfinite()) for bound in torch.aminmax(one))), None)
    found = [own]
    if group is not None:
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, own, group=group)
    if any(found):
        name = next(filter(None, found))
        raise DecodingError(f"the model's {name} has a weight that is not a finite number: take an earlier checkpoint")


def local_engine(
    model: RecycleGPT,
    *,
    max_batch: int = 8,
    kv_memory_gib: float | None = None,
    ranks_on_host: int = 1,
    eos_ids: Iterable[int] = (),
    text_source: NewTextSource | None = None,
    clock: Callable[[], float] = time.perf_counter,
    compiled: bool = True,
    steps: Steps | None = None,
    watch: StepWatch | None = None,
) -> DecodingEngine:
    """An engine in this process. The model's weights are packed, and the model itself is not changed.

    compiled: whether bf16 and int8 products on CPUs run in kernels that this machine's compiler makes. Without them a note
    on stderr says why. steps: how steps run; None is "graphs" on a GPU and "flat" elsewhere. watch: is told of steps.
    """
    check_finite(model)
    steps = steps or ("graphs" if next(model.parameters()).device.type == "cuda" else "flat")
    weights = StageWeights(model, compiled=compiled and steps == "flat")
    if compiled and steps == "flat":
        _note(weights, weights.why_not_compiled)
    blocks = cache_blocks(weights, model.max_positions, max_batch, kv_memory_gib, ranks_on_host)
    check_blocks(blocks, weights)
    vocabulary = Vocabulary(0, model.vocab_size)
    if steps == "flat":
        runner = Runner(weights, Cache(weights, blocks, BLOCK_SIZE), vocabulary)
    else:
        attend, note = paged_attention(weights.device)
        if note:
            print(f"note: {note}", file=sys.stderr)
        launch = GraphPieces(weights.device) if steps == "graphs" else EagerPieces()
        most = model.max_positions + MOST_DRAFT_SLOTS + 1
        runner = DeviceRunner(weights, Cache(weights, blocks + 1, BLOCK_SIZE), vocabulary, most, attend, launch)
    executor = LocalExecutor(runner, watch)
    # else every gathered batch is page-faulted anew: 3.0 instead of 0.7 ms a layer at 16 sequences of 512 positions
    keep_freed_memory()
    stored = cost_file(model, 1, 1, compiled=weights.why_not_compiled is None)
    engine = _engine(executor, model, blocks, max_batch, eos_ids, text_source, clock, stored)
    if steps != "flat":  # a longer chunk of a prompt takes those that decode out of their graphs
        engine.scheduler.piece = FEW_TOKENS
    return engine


def team_engine(
    model: RecycleGPT,
    team: Team,
    *,
    max_batch: int = 8,
    kv_memory_gib: float | None = None,
    ranks_on_host: int = 1,
    eos_ids: Iterable[int] = (),
    text_source: NewTextSource | None = None,
    clock: Callable[[], float] = time.perf_counter,
    watch: StepWatch | None = None,
) -> DecodingEngine | None:
    """This rank's part of an engine over a team of ranks. Collective over the team.

    model: this rank's shard of its stage. watch: is told of steps. Returns the engine on the owner. On the other ranks it
    runs the owner's plans, and returns None when the owner has closed its engine.
    """
    check_finite(model, team.control)
    own = collectives(team.mesh.tensor, team.mesh.device)
    reason = _why_not_compiled(model, own, team)
    weights = StageWeights(model, own, compiled=reason is None)
    if team.owns:
        _note(weights, reason)
    blocks = cache_blocks(weights, model.max_positions, max_batch, kv_memory_gib, ranks_on_host)
    fewest = torch.tensor(blocks)
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group=team.control)
    blocks = int(fewest)
    check_blocks(blocks, weights)  # on all ranks or on none
    shards = own if own.size > 1 else None
    vocabulary = Vocabulary(model.shard.first, max(model.shard.valid, 1), shards)
    runner = Runner(weights, Cache(weights, blocks, BLOCK_SIZE), vocabulary)
    keep_freed_memory()
    if watch is not None:
        watch.exchanges = lambda: own.begun
    executor = TeamExecutor(runner, team, weights.received_width, weights.dtype, watch)
    if not team.owns:
        executor.follow()
        return None
    sizes = (team.mesh.tensor.size, team.mesh.pipeline.size)
    stored = cost_file(model, *sizes, compiled=weights.why_not_compiled is None)
    return _engine(executor, model, blocks, max_batch, eos_ids, text_source, clock, stored)


def _why_not_compiled(model: RecycleGPT, own: Collectives, team: Team) -> str | None:
    """Why the compiled kernels are not used: all ranks of a team can, or none does. Collective over the team."""
    reasons: list[str | None] = [None] * dist.get_world_size(team.control)
    dist.all_gather_object(reasons, why_not_compiled(model, own.size, own.exchange), group=team.control)
    ranks = dist.get_process_group_ranks(team.control)
    found = [f"rank {rank}: {reason}" for rank, reason in zip(ranks, reasons, strict=True) if reason is not None]
    return found[0] if found else None


def _note(weights: StageWeights, reason: str | None) -> None:
    """Says on stderr why bf16 and int8 products on a CPU are slow."""
    if reason and weights.device.type == "cpu" and weights.dtype == torch.bfloat16:
        print(f"note: decoding without the compiled kernels: {reason}", file=sys.stderr)


def _engine(
    executor: Executor,
    model: RecycleGPT,
    blocks: int,
    max_batch: int,
    eos_ids: Iterable[int],
    text_source: NewTextSource | None,
    clock: Callable[[], float],
    stored: CostFile | None,
) -> DecodingEngine:
    return DecodingEngine(
        executor,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        has_module=model.recycle_layers > 0,
        blocks=blocks,
        block_size=BLOCK_SIZE,
        max_batch=max_batch,
        eos_ids=eos_ids,
        unnamed_ids=model.unnamed_ids,
        text_source=text_source,
        clock=clock,
        cost_file=stored,
    )
