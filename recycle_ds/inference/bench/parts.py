"""Where the time of a step goes, measured in a pass of its own: the timers would slow down the passes whose speed counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from recycle_ds.inference.engine.device.capture import Piece, Pieces
from recycle_ds.inference.engine.device.runner import DeviceRunner
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.executor import LocalExecutor
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import SamplingParams

FULL_CALL, MODULE, HEAD, SAMPLING, HOST = "full_call", "module", "head", "sampling", "host"
PARTS = (FULL_CALL, MODULE, HEAD, SAMPLING, HOST)
"""The backbone's blocks with the embedding; the recycle module's block, with its head where
a tree grows in one call; other heads; choosing tokens and judging
drafts; everything else of a step, such as plans, the draft budget and the copies between calls. Steps in static buffers are
timed by piece: choosing tokens has its head, and the module the heads and the choice of its drafts. Those of them that do not
fit and run without padding, such as chains without a seed above temperature 0, count as `host` as a whole."""
_PIECES = {"read": FULL_CALL, "choose": SAMPLING, "recycle": MODULE, "chain": MODULE, "tree": MODULE}
"""Parts of the pieces of a `DeviceRunner`."""


class _Stopwatch:
    """Adds up seconds by part. Time inside a nested part counts for that part alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronise = torch.cuda.synchronize if device.type == "cuda" else None
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        if self._synchronise is not None:
            self._synchronise()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time in the block for a part."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()


class _Timed:
    """Stands for a callable object: times its calls, and has its other attributes."""

    def __init__(self, target: Any, name: str, watch: _Stopwatch) -> None:
        self._target, self._name, self._watch = target, name, watch

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._watch.part(self._name):
            return self._target(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class _TimedPieces:
    """Stands for what runs a step's pieces. It times around them: a graph is captured, or replayed without Python, inside."""

    def __init__(self, target: Pieces, watch: _Stopwatch) -> None:
        self._target, self._watch = target, watch

    @property
    def first_runs(self) -> int | None:
        """See `Pieces`."""
        return self._target.first_runs

    def run(self, key: tuple[str, Hashable], piece: Piece) -> None:
        """See `Pieces`."""
        with self._watch.part(_PIECES[key[0]]):
            self._target.run(key, piece)


def time_by_part(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], mode: str, params: SamplingParams
) -> dict[str, float]:
    """Milliseconds per new token by part, and in `total`, while prompts are decoded one by one; prefills are not counted.

    Raises DecodingError for an engine over several ranks, whose calls run elsewhere, and if nothing was decoded.
    """
    executor = engine._executor
    if not isinstance(executor, LocalExecutor):
        raise DecodingError("time by part: the engine spreads steps over ranks; give a single process")
    runner = executor._runner
    tokens = 0
    watch = _Stopwatch(runner._weights.device)
    for prompt in prompts:
        (answer,) = engine.add(prompt, params, mode)
        while answer.first_token_at is None:
            engine.step()
        before = len(answer.tokens)
        with _timed(runner, watch):
            while answer.ended_at is None:
                with watch.part(HOST):
                    engine.step()
        tokens += len(answer.tokens) - before
    if not tokens:
        raise DecodingError("time by part: every prompt ended with its first token; use other prompts")
    found = {name: 1000 * seconds / tokens for name, seconds in watch.seconds.items()}
    return found | {"total": sum(found.values())}


@contextmanager
def _timed(runner: Any, watch: _Stopwatch) -> Iterator[None]:
    """Times the parts of a runner's steps inside the block."""
    if isinstance(runner, DeviceRunner):
        undo_pieces = _replace(runner, "_launch", _TimedPieces(runner._launch, watch))
        try:
            yield
        finally:
            undo_pieces()
        return
    weights = runner._weights
    places: list[tuple[Any, str, str]] = [
        (weights, "embed", FULL_CALL),
        (weights, "run", FULL_CALL),
        (weights, "run_in_cache", FULL_CALL),
        (weights, "head", HEAD),
        (weights, "draft_head", HEAD),
        (weights, "likeliest", HEAD),
        (weights, "candidates", HEAD),
        (weights, "module", MODULE),
        (runner, "_choose", SAMPLING),
        (runner._drafter._trees, "_children", SAMPLING),
        (runner._drafter._chains, "_choose", SAMPLING),
    ]
    if weights.module is not None:
        places.append((weights.module, "read_cache", MODULE))
    if weights.grower is not None:  # with the head of the drafts and their choice
        places.append((weights.grower, "grow", MODULE))
    restore: list[Callable[[], None]] = []
    try:
        for owner, name, part in places:
            target = getattr(owner, name)
            if target is not None:
                restore.append(_replace(owner, name, _Timed(target, part, watch)))
        yield
    finally:
        for undo in restore:
            undo()


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of an object. Returns what undoes it: a method is the class's again."""
    own = vars(owner)
    before = own.get(name)
    was_own = name in own
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if was_own else delattr(owner, name)
