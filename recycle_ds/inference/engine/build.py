"""Builds engines: for a model in this process, and for a team of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.collectives import collectives
from recycle_ds.inference.engine.distributed import TeamExecutor
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.executor import Executor, LocalExecutor
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.team import Team
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.protocol import TextSource
from recycle_ds.inference.speculation.budget import MAX_DRAFT
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from recycle_ds.model import RecycleGPT
from recycle_ds.parallel.device import free_memory

BLOCK_SIZE = 16
_SHARE_OF_FREE_MEMORY = 0.5


def cache_blocks(
    weights: StageWeights, max_positions: int, max_batch: int, kv_memory_gib: float | None, block_size: int = BLOCK_SIZE
) -> int:
    """How many blocks the cache gets on this rank.

    By default enough for `max_batch` sequences of the longest context, but at most half of the memory that is free now.
    Raises DecodingError if that is less than one block."""
    per_block = Cache.bytes_per_block(weights, block_size)
    wanted = max_batch * (-(-(max_positions + MAX_DRAFT + 1) // block_size) + 1)
    room = kv_memory_gib * 2**30 if kv_memory_gib is not None else _SHARE_OF_FREE_MEMORY * free_memory(weights.device)
    blocks = min(wanted, int(room // per_block))
    if blocks < 2:
        raise DecodingError(
            f"kv_memory_gib={room / 2**30:.3g}: two blocks of {block_size} positions need {2 * per_block / 2**30:.3g} GiB; "
            "give more"
        )
    return blocks


def local_engine(
    model: RecycleGPT,
    *,
    max_batch: int = 8,
    kv_memory_gib: float | None = None,
    eos_ids: Iterable[int] = (),
    text_source: Callable[[], TextSource] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodingEngine:
    """An engine in this process. The model's weights are packed, and the model itself is not changed."""
    weights = StageWeights(model)
    blocks = cache_blocks(weights, model.max_positions, max_batch, kv_memory_gib)
    executor = LocalExecutor(Runner(weights, Cache(weights, blocks, BLOCK_SIZE), Vocabulary(0, model.vocab_size)))
    return _engine(executor, model, blocks, max_batch, eos_ids, text_source, clock)


def team_engine(
    model: RecycleGPT,
    team: Team,
    *,
    max_batch: int = 8,
    kv_memory_gib: float | None = None,
    eos_ids: Iterable[int] = (),
    text_source: Callable[[], TextSource] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodingEngine | None:
    """This rank's part of an engine over a team of ranks. Collective over the team.

    model: this rank's shard of its stage. Returns the engine on the owner. On the other ranks it runs the owner's
    plans, and returns None when the owner has closed its engine."""
    own = collectives(team.mesh.tensor, next(model.parameters()).device)
    weights = StageWeights(model, own)
    blocks = cache_blocks(weights, model.max_positions, max_batch, kv_memory_gib)
    fewest = torch.tensor(blocks)
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group=team.control)
    blocks = int(fewest)
    shards = own if own.size > 1 else None
    vocabulary = Vocabulary(model.shard.first, max(model.shard.valid, 1), shards)
    runner = Runner(weights, Cache(weights, blocks, BLOCK_SIZE), vocabulary)
    executor = TeamExecutor(runner, team, weights.width, weights.dtype, weights.device)
    if not team.owns:
        executor.follow()
        return None
    return _engine(executor, model, blocks, max_batch, eos_ids, text_source, clock)


def _engine(
    executor: Executor,
    model: RecycleGPT,
    blocks: int,
    max_batch: int,
    eos_ids: Iterable[int],
    text_source: Callable[[], TextSource] | None,
    clock: Callable[[], float],
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
        text_source=text_source,
        clock=clock,
    )
