"""Runs one piece of a step, from static buffers to static buffers: eagerly, or as a CUDA graph.

A piece is a function without arguments or result. It may launch any work that does not wait for the device, reads and writes
tensors that exist as long as the engine, and does the same work whenever it is run with the same key: everything in it that
is not read from a tensor is part of the key. Under these conditions both classes give the same results.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

Piece = Callable[[], None]

_MOST_GRAPHS = 512
"""Graphs that are kept, because each takes memory. Pieces with further keys run eagerly."""


class Pieces(Protocol):
    """Runs pieces in the order of the calls."""

    @property
    def first_runs(self) -> int | None:
        """How often a piece took longer than it will again, because its key was new; None where that makes no difference."""

    def run(self, key: Hashable, piece: Piece) -> None:
        """Runs a piece exactly once, on the current stream."""


class EagerPieces:
    """Every piece is called: on CPUs, and to compare with graphs."""

    first_runs = None

    def run(self, key: Hashable, piece: Piece) -> None:
        """See `Pieces`."""
        piece()


class GraphPieces:
    """Every piece is captured after its first run, and replayed afterwards: one launch instead of hundreds.

    The first run is an ordinary one. It compiles Triton's kernels and allocates the workspaces of cuBLAS, neither of which may
    happen while a graph is captured. Capturing runs nothing. What a piece allocates inside is in one pool that all graphs
    share, which is safe because pieces pass nothing to each other but static buffers.
    """

    def __init__(self, device: torch.device) -> None:
        """device: a CUDA device."""
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._is_full = False

    @property
    def first_runs(self) -> int:
        """See `Pieces`."""
        return len(self._graphs)

    def run(self, key: Hashable, piece: Piece) -> None:
        """See `Pieces`."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            piece()
        current.wait_stream(self._stream)
        if len(self._graphs) < _MOST_GRAPHS:
            self._graphs[key] = self._captured(piece)
        elif not self._is_full:
            self._is_full = True
            print(
                f"note: {_MOST_GRAPHS} CUDA graphs are kept; steps of further shapes run without one", file=sys.stderr
            )

    def _captured(self, piece: Piece) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # other threads (a server's) may use CUDA meanwhile: only this one must not do what a capture forbids
        with (
            _no_collection(),
            torch.cuda.stream(self._stream),  # a capture that fails leaves the thread on the stream: this takes it back
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            piece()
        return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switches garbage collection off: finalizers of Triton's kernels call CUDA, which would break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
