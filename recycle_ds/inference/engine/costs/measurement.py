"""Measures what calls cost, once for each engine, before drafts are budgeted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from threading import Timer

from recycle_ds.inference.engine.costs.cost_file import CostFile, Extent
from recycle_ds.inference.engine.executor import Executor
from recycle_ds.inference.engine.plan import Part, Plan, Rules
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.inference.speculation.tree import MAX_NODES, MAX_WIDTH, width_of

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_REPEATS = ((4, 12), (16, 6), (128, 4))
"""Runs of calls up to a size. Small ones take milliseconds, and what drafts add to them is a tenth of that."""
_FURTHER = 3
"""Depths after the first one in the deeper of two trees, so that their difference is not lost in noise."""
_MOST_SECONDS = 15.0
"""Seconds after which no larger size is timed: on a busy machine a start should not take minutes."""
_SILENT_SECONDS = 1.5
"""After so long, a user is told what takes time."""
_CONTEXT = 128
"""Tokens of context that the timed sequences have."""
# Stored costs hold as long as a call takes at most this factor more or less time.
_MOST_CHANGE = 1.25
# More than any engine numbers its sequences.
_SCRATCH = 2**40


def known_or_measured(
    executor: Executor,
    file: CostFile | None,
    blocks: int,
    block_size: int,
    positions: int,
    max_batch: int,
    with_module: bool,
) -> CostModel:
    """The costs in the file, if a call still takes the time that they say, else measured ones, which are stored.

    Arguments and conditions are those of `measure`.
    """
    context = _blocks_of_context(blocks, block_size, positions)
    extent = Extent(context, _most_tokens(blocks - context, max_batch), max_batch if with_module else 0)
    known = None if file is None else file.read(extent)
    if known is not None:
        size, seconds = known.full[0]
        _read_context(executor, context, context * block_size, with_module)
        (times,) = _in_turn([partial(_run, executor, context, context * block_size, size, 0)], _repeats(size))
        found = min(times)  # other programs only make a call slower
        if 1 / _MOST_CHANGE < found / seconds < _MOST_CHANGE:
            known.full_scale = found / seconds
            return known
    text = "note: measuring what calls of this model cost on this machine; later starts know it"
    note = Timer(_SILENT_SECONDS, partial(print, text, file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    try:
        costs = measure(executor, blocks, block_size, positions, max_batch, with_module)
    finally:
        note.cancel()
    if file is not None:
        file.write(costs, extent)
    return costs


def measure(
    executor: Executor, blocks: int, block_size: int, positions: int, max_batch: int, with_module: bool
) -> CostModel:
    """Times full calls, and the first and further depths of trees of drafts, of several sizes. Nothing may be under way or in
    the cache: its first blocks are written.

    Full calls are timed with sequences of one token each, as far as blocks last, because the attention of many
    sequences costs more than that of one. All attend to the same context. positions: the model's longest context.
    Every size is timed in turn with the one before it, and its cost is computed from their ratio.
    """
    context = _blocks_of_context(blocks, block_size, positions)
    _read_context(executor, context, context * block_size, with_module)
    sizes = [size for size in _SIZES if size <= _most_tokens(blocks - context, max_batch)]
    run = partial(_run, executor, context, context * block_size)
    end = time.monotonic() + _MOST_SECONDS
    full: list[tuple[int, float]] = []
    first: list[tuple[int, float]] = []
    module: list[tuple[int, float]] = []
    for size in sizes:
        if len(full) > 1 and time.monotonic() > end:
            break
        drafts = (0, 1, 1 + _FURTHER) if with_module and size <= max_batch else (0,)
        smaller, known = full[-1] if full else (size, 0.0)
        befores, *times = _in_turn([partial(run, smaller, 0), *(partial(run, size, n) for n in drafts)], _repeats(size))
        if not full:
            known = min(*befores, *times[0])
            full.append((size, known))
        else:  # in terms of the next smaller one at the same time: the speed of memory changes from one second to the next
            ratio = median(own / before for own, before in zip(times[0], befores, strict=True))
            full.append((size, max(ratio, 1.0) * known))
        if len(drafts) > 1:
            scale = known / median(befores)
            first.append((size, scale * _difference(times[1], times[0])))
            module.append((size, scale * _difference(times[2], times[1]) / _FURTHER))
    if len(full) < 2:
        full.append((full[0][0] + 1, full[0][1]))
    least = 1e-3 * full[0][1]
    calls = without_outliers(ascending(full, least))
    return CostModel(calls, ascending(module, least) or CostModel().module, ascending(first, least))


def without_outliers(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Measurements (size, seconds), ascending, without what other programs added to single ones: a call does not cost more
    than a larger one, nor more than smaller ones that do the same work."""
    found: list[tuple[int, float]] = []
    for index, (size, _) in enumerate(points):
        shortest = min(seconds for _, seconds in points[index:])
        found.append((size, min([shortest, *(-(-size // other) * seconds for other, seconds in found)])))
    return tuple(found)


def ascending(points: Sequence[tuple[int, float]], least: float) -> tuple[tuple[int, float], ...]:
    """Ratios or differences of measurements (size, seconds), which err in both directions: where a larger size seems to cost
    less than a smaller one, both cost their mean (isotonic regression by pooling adjacent violators). No cost is below
    `least`."""
    pools: list[tuple[float, int]] = []  # sum and number of neighbours that have the same cost
    for _, seconds in points:
        total, count = seconds, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, number = pools.pop()
            total, count = total + before, count + number
        pools.append((total, count))
    values = [max(total / count, least) for total, count in pools for _ in range(count)]
    return tuple((size, value) for (size, _), value in zip(points, values, strict=True))


def _blocks_of_context(blocks: int, block_size: int, positions: int) -> int:
    room = positions - _FURTHER - 3  # for the token that is read, the one chosen, and drafts
    assert block_size >= 2 + _FURTHER * MAX_WIDTH, "a sequence has one block of its own"
    return max(min(_CONTEXT // block_size, room // block_size, (blocks - 1) // 2), 0)


def _most_tokens(blocks: int, max_batch: int) -> int:
    """Tokens of the largest call that is worth timing: each is one of a sequence with a block of its own."""
    return min(blocks, _SIZES[-1], max(2 * max_batch * 4, MAX_NODES + 8))


def _read_context(executor: Executor, context: int, tokens: int, with_module: bool) -> None:
    """Fills the blocks of the context. What memory holds before would be read as states otherwise."""
    if context:
        part = Part(
            _SCRATCH, 0, (0,) * tokens, 0, samples=False, module_start=int(with_module), drafts=0, room=1,
            prompt_tokens=tokens + 1, blocks=tuple(range(context)),
        )  # fmt: skip
        executor.submit(Plan((part,), rules=((_SCRATCH, Rules(TokenSampling(), 0)),)))
        executor.collect()


def _run(executor: Executor, context: int, start: int, sequences: int, drafts: int) -> None:
    """One step of sequences with `context` blocks of context, the same for all, and a block of their own."""
    numbers = range(_SCRATCH, _SCRATCH + sequences)
    parts = tuple(
        Part(
            number, start, (0,), 0, samples=True, module_start=start + 1 if drafts else 0, drafts=drafts,
            room=drafts + 1, prompt_tokens=start + 1, blocks=(*range(context), context + index),
            width=width_of(sequences),
        )
        for index, number in enumerate(numbers)
    )  # fmt: skip
    rules = Rules(TokenSampling(), 0)
    executor.submit(Plan(parts, rules=tuple((number, rules) for number in numbers)))
    executor.collect()
    executor.submit(Plan((), ended=tuple(numbers)))
    executor.collect()


def _repeats(size: int) -> int:
    return next(repeats for most, repeats in _REPEATS if size <= most)


def _in_turn(actions: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of several runs of each, after one that does not count. The actions take turns, so that what distinguishes two of
    them is not the state of the machine, and every other time in reverse, so that it is not what ran before."""
    times: list[list[float]] = [[] for _ in actions]
    pairs = list(zip(actions, times, strict=True))
    for repeat in range(1 + repeats):
        for action, own in pairs if repeat % 2 else pairs[::-1]:
            start = time.perf_counter()
            action()
            if repeat:
                own.append(time.perf_counter() - start)
    return times


def _difference(longer: Sequence[float], shorter: Sequence[float]) -> float:
    """By how much one action takes longer than another, by the median of neighbouring runs."""
    return median(one - other for one, other in zip(longer, shorter, strict=True))
