"""Blocks of the KV cache: reference counts, reuse of prefixes, copy on write. Pure bookkeeping, without tensors.

A block holds the keys and values of `size` consecutive positions of a sequence, of all layers of the backbone and of
the recycle module. Full blocks are registered by their content, so that a later sequence that begins with the same
tokens shares them (as in vLLM's automatic prefix caching). Their key is (key of the block before, the block's tokens):
equal keys mean equal positions and equal tokens from the first one on, without hash collisions. Blocks that only the
registry refers to are evicted when memory is needed, the least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

Content = int
"""Number of a registered content; equal numbers mean equal tokens in this block and in all blocks before it."""


_Key = tuple[Content, tuple[int, ...]]


class OutOfBlocks(Exception):
    """No block is free and none can be evicted. The scheduler then preempts a sequence."""


@dataclass
class BlockPool:
    """`count` blocks of `size` positions each."""

    count: int
    size: int
    _references: list[int] = field(init=False)
    _free: OrderedDict[int, None] = field(init=False)
    _contents: dict[_Key, int] = field(default_factory=dict)
    _key_of: dict[int, _Key] = field(default_factory=dict)
    _content_of: dict[int, Content] = field(default_factory=dict)
    _with_module: set[int] = field(default_factory=set)
    _next_content: Content = 1

    def __post_init__(self) -> None:
        self._references = [0] * self.count
        self._free = OrderedDict.fromkeys(range(self.count))

    @property
    def free(self) -> int:
        """Blocks that can be allocated, including registered ones that no sequence uses."""
        return len(self._free)

    def references(self, block: int) -> int:
        """Number of sequences that use a block."""
        return self._references[block]

    def held_by(self, tables: Sequence[Sequence[int]]) -> int:
        """Number of blocks that would become free if these sequences released all of theirs."""
        users = Counter(chain.from_iterable(tables))
        return sum(count == self._references[block] for block, count in users.items())

    def shared(self, block: int) -> bool:
        """Whether a block must be copied before it is written: another sequence uses it, or it is registered."""
        return self._references[block] > 1 or block in self._content_of

    def allocate(self, after: int | None = None) -> int:
        """Takes a block, if possible the one that follows `after`: attention reads adjacent blocks without copying them.

        Otherwise blocks without content are taken before registered ones. Raises OutOfBlocks.
        """
        if not self._free:
            raise OutOfBlocks
        follower = -1 if after is None else after + 1
        block = follower if follower in self._free else next(iter(self._free))
        del self._free[block]
        self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a reference of another sequence."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each block. The last block of a prefix is evicted first: others may still begin like it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than it was used"
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._content_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, before: Content, tokens: tuple[int, ...]) -> Content:
        """Records the content of a full block that follows the content `before` (0: the first). Returns its number.

        A content that is registered already keeps its block.
        """
        assert len(tokens) == self.size, "only full blocks are shared"
        known = self._contents.get((before, tokens))
        if known is not None:
            return self._content_of[known]
        if block in self._key_of:  # shared, and registered behind a block that has been evicted since
            del self._contents[self._key_of[block]]
        content, self._next_content = self._next_content, self._next_content + 1
        self._contents[before, tokens], self._key_of[block], self._content_of[block] = block, (before, tokens), content
        return content

    def add_module_entries(self, block: int) -> None:
        """Records that a block has the recycle module's entries too. They are not part of the key: a sequence that needs
        missing ones computes them from the stored hidden states."""
        self._with_module.add(block)

    def has_module_entries(self, block: int) -> bool:
        """Whether the recycle module's entries of a block are complete."""
        return block in self._with_module

    def match(self, tokens: Sequence[int]) -> tuple[list[int], Content]:
        """The registered blocks that hold the longest prefix of `tokens` in full blocks, and the last one's content."""
        found: list[int] = []
        content = 0
        for first in range(0, len(tokens) - self.size + 1, self.size):
            block = self._contents.get((content, tuple(tokens[first : first + self.size])))
            if block is None:
                break
            found.append(block)
            content = self._content_of[block]
        return found, content

    def _forget(self, block: int) -> None:
        """Removes a block from the registry. Blocks that continue its content can then no longer be found."""
        self._with_module.discard(block)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._contents[key], self._content_of[block]

    def state(self) -> dict[str, object]:
        """Users, order of eviction and registered contents, as copies, to print or compare."""
        contents = {block: (self._content_of[block], *key) for block, key in sorted(self._key_of.items())}
        return {
            "references": tuple(self._references),
            "free": tuple(self._free),
            "contents": contents,
            "with_module": tuple(sorted(self._with_module)),
        }

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Asserts that the counts are those of the sequences' block tables, and that no block is lost."""
        used = [0] * self.count
        for table in tables:
            assert len(set(table)) == len(table), f"a sequence has a block twice: {table}"
            for block in table:
                used[block] += 1
        assert used == self._references, "reference counts differ from the sequences' tables"
        assert {block for block, users in enumerate(used) if users == 0} == set(self._free), "blocks are lost"
        assert set(self._contents.values()) == set(self._content_of) == set(self._key_of), (
            "the registry is inconsistent"
        )
