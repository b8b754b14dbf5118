"""Trees of drafts: how they grow, which nodes are verified and which are accepted. Pure lists, without tensors.

Node 0 is the latest known token, and nodes 1, 2, ... are drafts. parents[k - 1] is the parent of node k, an earlier node;
no two children of a node have the same id. Empty parents mean a chain: 0, 1, 2, ... The confidence of a node is the
probability that it is accepted given that its parent is, and its chance the product along its path.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

BRANCH = 4
"""Children that a node gets at most."""
MAX_WIDTH = 4
"""Most nodes of one depth that get children."""
MAX_NODES = 16
"""Most nodes of a sequence that are verified in a step."""
_MOST_KEPT = 32
"""Most nodes among which those to be verified are chosen."""
# Most sequences of a batch, and nodes of one depth that get children then. Every row of a module call costs time, and is worth
# less in a batch, which verifies fewer drafts of each sequence.
_WIDTHS = ((2, MAX_WIDTH), (4, 2))


def width_of(sequences: int) -> int:
    """How many nodes of one depth get children, in a batch of some sequences that grow trees."""
    return next((width for most, width in _WIDTHS if sequences <= most), 1)


def parents_of(count: int, parents: Sequence[int]) -> Sequence[int]:
    """The parents of `count` nodes, written out for a chain."""
    return parents or range(count)


def without_chain(parents: Sequence[int]) -> tuple[int, ...]:
    """Parents; empty if they are those of a chain."""
    return () if all(parent == node for node, parent in enumerate(parents)) else tuple(parents)


def depths(parents: Sequence[int]) -> list[int]:
    """The depth of every node; the children of node 0 have depth 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 + (found[parent - 1] if parent else 0))
    return found


def ancestry(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """For every node from node 0 on, the nodes of its path: its ancestors after node 0, and itself."""
    found: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(parents, start=1):
        found.append((*found[parent], node))
    return found


def child(ids: Sequence[int], parents: Sequence[int], node: int, token: int) -> int | None:
    """The child of a node with this token; None if it has no such child."""
    of = parents_of(len(ids), parents)
    return next(
        (k for k, (id_, parent) in enumerate(zip(ids, of, strict=True), 1) if parent == node and id_ == token), None
    )


def walk(ids: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> list[int]:
    """The accepted nodes, by depth. choices[k]: the full model's token after node k, from node 0 on."""
    path: list[int] = []
    while (node := child(ids, parents, path[-1] if path else 0, choices[path[-1] if path else 0])) is not None:
        path.append(node)
    return path


def path_of(ids: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The nodes of the path with these tokens, which is in the tree."""
    path: list[int] = []
    for token in tokens:
        node = child(ids, parents, path[-1] if path else 0, token)
        assert node is not None, f"token {token} is in no child of node {path[-1] if path else 0}"
        path.append(node)
    return path


def main_path_first(parents: Sequence[int], nodes: Container[int], chances: Sequence[float]) -> list[int]:
    """Those nodes of a tree, parents before children: first the path of the best child each time, then the others.

    The nodes of the main path then lie at their own positions, and need not be moved if they are accepted. nodes: contains
    the parents of its nodes. chances: of all nodes."""
    order: list[int] = []
    children = [node for node in range(1, len(parents) + 1) if node in nodes and parents[node - 1] == 0]
    while children:
        order.append(max(children, key=lambda node: chances[node - 1]))
        children = [n for n in range(order[-1] + 1, len(parents) + 1) if n in nodes and parents[n - 1] == order[-1]]
    main = set(order)
    return order + [node for node in range(1, len(parents) + 1) if node in nodes and node not in main]


def renumbered(parents: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The parents of some nodes in a new order, in which each has a new number, from 1 on."""
    numbers = {0: 0} | {node: number for number, node in enumerate(order, start=1)}
    return tuple(numbers[parents[node - 1]] for node in order)


def grafted(
    ids: Sequence[int], parents: Sequence[int], confidences: Sequence[float], chain: Sequence[tuple[int, float]]
) -> tuple[list[int], list[int], list[float], frozenset[int]]:
    """A tree with a chain of further drafts (id, confidence) from node 0 on: nodes that it has not are added at the end.

    Returns ids, parents and confidences, and the nodes that have their confidence from the chain: new ones, and those whose
    own was lower."""
    found, of, values = list(ids), list(parents_of(len(ids), parents)), list(confidences)
    from_chain, last, known = set[int](), 0, 0
    for token, confidence in chain:
        node = child(ids, parents, last, token)
        if node is None:
            break
        if values[node - 1] < confidence:
            values[node - 1] = confidence
            from_chain.add(node)
        last, known = node, known + 1
    for node, (token, confidence) in enumerate(chain[known:], start=len(found) + 1):
        found.append(token)
        of.append(last)
        values.append(confidence)
        from_chain.add(node)
        last = node
    return found, of, values, frozenset(from_chain)


def confidences_of(probabilities: Sequence[float], layer: float | None) -> list[float]:
    """Confidences of a node's children. probabilities: by the draft head, descending. layer: that the likeliest one is
    accepted, by the module's confidence layer, if it has one: the other children share the rest."""
    if layer is None:
        return list(probabilities)
    rest = 1 - probabilities[0]
    return [layer, *(min((1 - layer) * one / rest, 1.0) if rest > 0 else 0.0 for one in probabilities[1:])]


@dataclass
class GrowingTree:
    """A tree that grows depth by depth: each time, the nodes of the beam get children.

    limit: depth at which it ends. width: most nodes of a beam. floor: it ends where the chances of the beam sum to less.
    end_ids: tokens after which nothing follows.
    """

    limit: int
    width: int
    floor: float = 0.0
    end_ids: Container[int] = ()
    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    depth: int = 0
    beam: list[int] = field(default_factory=lambda: [0])
    """Nodes that get children next; empty when the tree is complete."""
    expanded: list[int] = field(default_factory=list)
    """All nodes that have been in a beam, in this order: that of their slots after the latest known token."""

    def grow(self, children: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Adds the children (id, confidence) of every node of the beam, and chooses the next beam."""
        first = len(self.ids) + 1
        for node, row in zip(self.beam, children, strict=True):
            self.add(node, row)
        self.depth += 1
        open_ = [node for node in range(first, len(self.ids) + 1) if self.ids[node - 1] not in self.end_ids]
        beam = sorted(open_, key=lambda node: -self.chances[node - 1])[: self.width]
        worth = self.depth < self.limit and sum(self.chances[node - 1] for node in beam) >= self.floor
        self.beam = beam if worth else []
        self.expanded += self.beam

    def add(self, node: int, children: Sequence[tuple[int, float]]) -> None:
        """Adds the children (id, confidence) of one node."""
        reached = self.chances[node - 1] if node else 1.0
        for token, confidence in children:
            self.ids.append(token)
            self.parents.append(node)
            self.confidences.append(confidence)
            self.chances.append(reached * confidence)

    def slot_parents(self) -> tuple[int, ...]:
        """Parents of all nodes that have been in a beam, numbered in that order; empty for a chain."""
        return without_chain(renumbered(self.parents, self.expanded))

    def path_ids(self, node: int) -> list[int]:
        """The tokens from the first depth to a node."""
        found = []
        while node:
            found.append(self.ids[node - 1])
            node = self.parents[node - 1]
        return found[::-1]

    def best(self) -> list[int]:
        """The nodes with the highest chances, parents before children."""
        # of equal chances the earlier node first, so that a parent never comes after its child
        ranked = sorted(range(1, len(self.ids) + 1), key=lambda node: (-self.chances[node - 1], node))
        return sorted(ranked[:_MOST_KEPT])
