"""Trees of drafts: growth, order, and which nodes are accepted, on lists of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.inference.engine.plan import Part
from recycle_ds.inference.speculation.tree import (
    GrowingTree,
    ancestry,
    confidences_of,
    depths,
    grafted,
    main_path_first,
    path_of,
    renumbered,
    walk,
    width_of,
    without_chain,
)


@st.composite
def trees(draw: st.DrawFn, most: int = 20) -> tuple[list[int], list[int], list[float]]:
    """Ids, parents and chances of a tree in which children have different ids, and no higher chance than their parent."""
    ids: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    for node in range(1, draw(st.integers(0, most)) + 1):
        parent = draw(st.integers(0, node - 1))
        taken = {ids[k] for k, other in enumerate(parents) if other == parent}
        ids.append(draw(st.integers(0, 30).filter(lambda one, taken=taken: one not in taken)))
        parents.append(parent)
        chances.append(draw(st.floats(0, 1)) * (chances[parent - 1] if parent else 1.0))
    return ids, parents, chances


@given(tree=trees(), choices=st.lists(st.integers(0, 30), min_size=21, max_size=21))
def test_the_accepted_path_is_the_one_that_the_full_model_would_take(
    tree: tuple[list[int], list[int], list[float]], choices: list[int]
) -> None:
    """Prevents an accepted draft whose parent was rejected, one that is not the full model's choice, and a draft that
    agrees and is rejected."""
    ids, parents, _ = tree
    path = walk(ids, parents, choices)
    for before, node in pairwise((0, *path)):
        assert parents[node - 1] == before and ids[node - 1] == choices[before]
    last = path[-1] if path else 0
    assert not any(parent == last and token == choices[last] for token, parent in zip(ids, parents, strict=True))
    assert path_of(ids, parents, [ids[node - 1] for node in path]) == path
    assert ancestry(parents)[last] == tuple(path) and (depths(parents)[last - 1] if last else 0) == len(path)


@pytest.mark.parametrize("parents", [(), (0, 1, 2)])
def test_a_chain_is_a_tree(parents: tuple[int, ...]) -> None:
    """Prevents chains from being verified by another rule when their parents are written out."""
    assert walk([5, 6, 7], parents, [5, 6, 1, 2]) == [1, 2]
    assert walk([5, 6, 7], parents, [1, 6, 7, 2]) == []
    assert path_of([5, 6, 7], parents, [5, 6]) == [1, 2]
    assert without_chain((0, 1, 2)) == () and without_chain((0, 1, 1)) == (0, 1, 1)


@given(tree=trees(), count=st.integers(0, 20))
def test_the_main_path_comes_first(tree: tuple[list[int], list[int], list[float]], count: int) -> None:
    """Prevents a node before its parent, a lost node, and a likely path that has to be moved whenever it is accepted."""
    ids, parents, chances = tree
    ranked = sorted(range(1, len(ids) + 1), key=lambda node: (-chances[node - 1], node))[:count]
    order = main_path_first(parents, set(ranked), chances)
    new_parents = renumbered(parents, order)
    assert sorted(order) == sorted(ranked), "the likeliest nodes have their parents, so that none is lost"
    assert all(parent <= node for node, parent in enumerate(new_parents))
    assert [ancestry(new_parents)[k][-1] for k in range(1, len(order) + 1)] == list(range(1, len(order) + 1))
    node, length = 0, 0
    while children := [one for one in ranked if parents[one - 1] == node]:
        node, length = max(children, key=lambda one: (chances[one - 1], -one)), length + 1
        assert order[length - 1] == node and new_parents[length - 1] == length - 1


@given(
    limit=st.integers(1, 6),
    width=st.integers(1, 4),
    floor=st.sampled_from([0.0, 0.3]),
    rows=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=4), min_size=30, max_size=30),
)
def test_a_tree_grows_where_it_is_most_likely(limit: int, width: int, floor: float, rows: list[list[int]]) -> None:
    """Prevents beams that leave out likelier nodes, children after an end of text, growth beyond the limit or below the
    floor, and entries of the module whose slots do not follow one another."""
    end = 3
    tree, source = GrowingTree(limit, width, floor, {end}), iter(rows)
    while tree.beam:
        before, beam = len(tree.ids), list(tree.beam)
        children = [[(n, weight / 40) for n, weight in enumerate(next(source))] for _ in beam]
        tree.grow(children)
        assert len(tree.ids) == before + sum(map(len, children))
        new = [node for node in range(before + 1, len(tree.ids) + 1) if tree.ids[node - 1] != end]
        assert set(tree.beam) <= set(new) and len(tree.beam) <= width
        left = [tree.chances[node - 1] for node in new if node not in tree.beam]
        if tree.beam:
            assert tree.depth < limit and sum(tree.chances[node - 1] for node in tree.beam) >= floor
            assert len(tree.beam) == min(width, len(new))
            assert not left or max(left) <= min(tree.chances[node - 1] for node in tree.beam)
        assert tree.expanded[len(tree.expanded) - len(tree.beam) :] == tree.beam
        slot_parents = tree.slot_parents() or tuple(range(len(tree.expanded)))
        paths = [[tree.expanded[k - 1] for k in path] for path in ancestry(slot_parents)[1:]]
        assert [[tree.ids[k - 1] for k in path] for path in paths] == [tree.path_ids(node) for node in tree.expanded]
    best = tree.best()
    assert all(tree.parents[node - 1] in (0, *best) for node in best)
    assert max(depths(tree.parents), default=0) <= limit


def test_confidences_of_a_nodes_children() -> None:
    """Prevents a confidence layer that is ignored, and children that are accepted together with a probability above 1."""
    assert confidences_of([0.5, 0.3, 0.1], None) == [0.5, 0.3, 0.1]
    assert confidences_of([0.5, 0.3, 0.1], 0.8) == pytest.approx([0.8, 0.12, 0.04])
    assert confidences_of([1.0, 0.0], 0.9) == pytest.approx([0.9, 0.0])


def test_larger_batches_grow_narrower_trees() -> None:
    """Prevents a width that grows with the batch: every row of a module call costs time."""
    widths = [width_of(sequences) for sequences in range(1, 40)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 1 == widths[-1]


def test_accepted_nodes_move_to_their_own_positions() -> None:
    """Prevents keys and values of an accepted draft from staying where the next step writes."""
    part = Part(0, 6, (1, 2, 3, 4, 5), 4, True, 0, 0, 9, 3, (7, 3, 5), parents=(0, 1, 0, 3))
    assert part.known == 7 and (part.span().root, part.span().position(9), part.span().position(10)) == (6, 7, 8)
    assert part.moves([1, 2], 4) == []
    # nodes 3 and 4 lie in slots 9 and 10 of the sequence, in its third block, and belong into 7 and 8
    assert part.moves([3, 4], 4) == [(5 * 4 + 1, 3 * 4 + 3), (5 * 4 + 2, 5 * 4)]


def test_a_chain_is_grafted() -> None:
    """Prevents two children of a node with the same id, a lower confidence that hides a higher one, and wrong parents."""
    tree = ([5, 6, 7], [0, 0, 1], [0.5, 0.4, 0.9])
    assert grafted(*tree, [(5, 0.7), (7, 0.8), (9, 0.6), (5, 0.55)]) == (
        [5, 6, 7, 9, 5], [0, 0, 1, 3, 4], [0.7, 0.4, 0.9, 0.6, 0.55], frozenset({1, 4, 5}),
    )  # fmt: skip
    assert grafted([], (), [], [(4, 0.5), (4, 0.6)]) == ([4, 4], [0, 1], [0.5, 0.6], frozenset({1, 2}))
    assert grafted([3, 2], (), [0.5, 0.5], [(3, 0.1)]) == ([3, 2], [0, 1], [0.5, 0.5], frozenset())
