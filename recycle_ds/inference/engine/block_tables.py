"""Gives sequences their blocks: those of a known prefix, new ones, and copies of shared ones before they are
written."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from recycle_ds.inference.engine.blocks import BlockPool, OutOfBlocks
from recycle_ds.inference.engine.sequence import Sequence


@dataclass
class BlockTables:
    """The block tables of all sequences over one pool."""

    pool: BlockPool
    _copies: list[tuple[int, int]] = field(default_factory=list)
    _moves: list[tuple[int, int]] = field(default_factory=list)

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The copies, (from, to), that the next step must make before it writes."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def move(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Lets the next step move slots, (from, to), before anything else. No step under way reads or writes them."""
        self._moves += pairs

    def take_moves(self) -> tuple[tuple[int, int], ...]:
        """The moves, (from, to), that the next step must make before its copies."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def pending(self) -> dict[str, object]:
        """What the next step must move and copy, to print or compare."""
        return {"copies": tuple(self._copies), "moves": tuple(self._moves)}

    @staticmethod
    def positions(sequence: Sequence) -> int:
        """For how many positions `place` needs blocks: all tokens and those of the next step that must not depend on memory."""
        recycled = 0
        if sequence.mode == "alternate":  # what it recycles is part of its text
            recycled = min(sequence.fixed_drafts or 0, sequence.stopping.remaining - 1)
        return len(sequence.tokens) + 1 + recycled

    def place(self, sequence: Sequence, running: Container[Sequence]) -> bool:
        """Gives a sequence the blocks of a known prefix, and new ones for all its tokens and the next one.

        Returns False, with nothing changed, if there are not enough blocks.
        """
        size, source = self.pool.size, sequence.fork_of
        if source is not None and source in running and source.cached >= source.prompt_tokens:
            shared, content, registered = source.blocks[: -(-sequence.prompt_tokens // size)], 0, 0
            # the last token of the prompt is read again: its state gives the first new token
            cached, module_read = sequence.prompt_tokens - 1, min(source.module_read, sequence.prompt_tokens)
        else:
            # tokens can only be scored by reading those before them
            shared, content = ([], 0) if sequence.targets(0, 1) else self.pool.match(sequence.tokens[:-1])
            cached, registered = len(shared) * size, len(shared)
            with_module = 0
            while with_module < len(shared) and self.pool.has_module_entries(shared[with_module]):
                with_module += 1
            module_read = max(with_module * size, 1)
        for block in shared:
            self.pool.share(block)
        sequence.blocks = list(shared)
        try:
            self.reserve(sequence, cached, self.positions(sequence))
        except OutOfBlocks:
            self.release(sequence)
            return False
        sequence.cached, sequence.module_read = cached, module_read
        sequence.registered, sequence.content = registered, content
        if sequence.preemptions == 0:
            sequence.reused = cached
        return True

    def reserve(self, sequence: Sequence, first: int, end: int) -> None:
        """Gives a sequence blocks of its own for positions first..end-1. Raises OutOfBlocks, having changed nothing."""
        blocks = sequence.blocks
        shared, missing = self._needed(sequence, first, end)
        if len(shared) + missing > self.pool.free:
            raise OutOfBlocks
        for index in shared:
            copy = self.pool.allocate(blocks[index - 1] if index else None)
            self._copies.append((blocks[index], copy))
            self.pool.release([blocks[index]])
            blocks[index] = copy
        for _ in range(missing):
            blocks.append(self.pool.allocate(blocks[-1] if blocks else None))

    def needed(self, sequence: Sequence, first: int, end: int) -> int:
        """How many blocks `reserve` would take, at most."""
        shared, missing = self._needed(sequence, first, end)
        return len(shared) + missing

    def _needed(self, sequence: Sequence, first: int, end: int) -> tuple[list[int], int]:
        """Which of its blocks, by their place, have to be copied, and how many are missing."""
        pool, blocks = self.pool, sequence.blocks
        start, stop, held = first // pool.size, -(-end // pool.size), len(blocks)
        shared = [index for index in range(start, min(held, stop)) if pool.shared(blocks[index])]
        return shared, max(stop - held, 0)

    def register(self, sequence: Sequence) -> None:
        """Offers the sequence's full blocks to others."""
        size = self.pool.size
        # accepted drafts after the end of a sequence are in the cache, but no tokens of it
        known = min(sequence.cached, len(sequence.tokens))
        while (sequence.registered + 1) * size <= known:
            first = sequence.registered * size
            tokens = tuple(sequence.tokens[first : first + size])
            sequence.content = self.pool.register(sequence.blocks[sequence.registered], sequence.content, tokens)
            sequence.registered += 1
        complete = min(sequence.registered, sequence.module_read // size)
        for index in range(sequence.registered_with_module, complete):
            self.pool.add_module_entries(sequence.blocks[index])
        sequence.registered_with_module = max(sequence.registered_with_module, complete)

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence, which would have to read its tokens again."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.cached, sequence.module_read = 0, 1
        sequence.registered, sequence.registered_with_module, sequence.content = 0, 0, 0
