"""Drafts that may be verified, and records of verified ones: how many were accepted, by depth and by confidence. Older ones
decay."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

MAX_DRAFT = 8
"""Most drafts of a sequence one after the other in a step: the depth of its tree."""

# Decay of older observations with every new one; the last fifty or so count.
_DECAY = 0.98
# Prior acceptance rate, and its weight in observations.
_PRIOR, _PRIOR_WEIGHT = 0.75, 2.0
# Observations with which a sequence's own acceptance outweighs that of all sequences.
_OWN_WEIGHT = 8.0
# Weight of a new tree in the mean number of its nodes.
_SIZE_WEIGHT = 0.05
# Limits of the classes of confidence. Most nodes of a tree have small ones.
_LIMITS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Candidate:
    """A sequence that is about to decode. confidences, parents: of its drafts, see tree.py. fixed: how many drafts to verify
    if that is given; None if it is adaptive. room: the most, one after the other, that can be of use."""

    sequence: int
    confidences: tuple[float, ...]
    fixed: int | None
    room: int
    parents: tuple[int, ...] = ()
    sampled: bool = False
    """Whether its tokens are drawn at random."""
    repeated: Container[int] = ()
    """Nodes that have their confidence from repetition."""


@dataclass(frozen=True)
class Verified:
    """What a step verified of one sequence: confidences and parents of its nodes, and the accepted path. ordered: depth of
    the tree that was asked for. tested: depths at which the full model looked for its token. of_module, repeated: of each
    node, whether the module made it, and whether it has its confidence from repetition; empty: all, and none."""

    sequence: int
    confidences: Sequence[float]
    parents: Sequence[int]
    path: Sequence[int]
    ordered: int
    tested: int
    sampled: bool = False
    of_module: Sequence[bool] = ()
    repeated: Sequence[bool] = ()


@dataclass
class DepthRecord:
    """Observations by depth, from 1 on, and how many of them were successes."""

    tested: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    succeeded: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)

    def add(self, tested: int, succeeded: int) -> None:
        """Counts an observation at each of the first `tested` depths: a success at the first `succeeded`."""
        for depth in range(min(tested, MAX_DRAFT)):
            self.tested[depth] = _DECAY * self.tested[depth] + 1
            self.succeeded[depth] = _DECAY * self.succeeded[depth] + (depth < succeeded)

    def rates(self, prior: float = _PRIOR) -> list[float]:
        """The share of successes at each depth. Its prior is the one of the depth before."""
        found = []
        for tested, succeeded in zip(self.tested, self.succeeded, strict=True):
            prior = (succeeded + _PRIOR_WEIGHT * prior) / (tested + _PRIOR_WEIGHT)
            found.append(prior)
        return found


class Sizes:
    """The number of nodes at each depth of a tree, as a mean."""

    def __init__(self, prior: float) -> None:
        self._means = [prior] * MAX_DRAFT

    def __repr__(self) -> str:
        return f"Sizes({self._means})"

    def add(self, depth: int, nodes: Sequence[int]) -> None:
        """Counts a tree that could have grown to a depth. nodes: of each depth that it has."""
        for at in range(min(depth, MAX_DRAFT)):
            found = nodes[at] if at < len(nodes) else 0
            self._means[at] += _SIZE_WEIGHT * (found - self._means[at])

    def means(self) -> list[float]:
        """The mean number of nodes at each depth from 1 on."""
        return list(self._means)


def shrunk_rates(own: DepthRecord, everyone: DepthRecord) -> list[float]:
    """A sequence's rates by depth: its own record counts on top of all sequences'."""
    found, ratio = [], 1.0
    for depth, estimate in enumerate(everyone.rates()):
        # a sequence that does better or worse than all at one depth is expected to do so at the next
        prior = min(ratio * estimate, 1.0)
        rate = (own.succeeded[depth] + _OWN_WEIGHT * prior) / (own.tested[depth] + _OWN_WEIGHT)
        ratio = rate / estimate if estimate > 0 else 1.0
        found.append(rate)
    return found


@dataclass
class Ratio:
    """Successes in terms of how many were predicted."""

    predicted: float = 0.0
    succeeded: float = 0.0

    def add(self, predicted: float, succeeded: bool) -> None:
        """Counts one prediction."""
        self.predicted = _DECAY * self.predicted + predicted
        self.succeeded = _DECAY * self.succeeded + succeeded

    def value(self, prior: float) -> float:
        """The ratio, with a prior of 1 that weighs as much as `prior` predicted successes."""
        return (self.succeeded + prior) / (self.predicted + prior)


@dataclass
class Calibration:
    """What confidences are worth. Within a class of similar confidences, a higher one counts for more."""

    _classes: list[Ratio] = field(default_factory=lambda: [Ratio() for _ in range(len(_LIMITS) + 1)])

    def observe(self, children: Iterable[tuple[float, bool]]) -> None:
        """Counts the verified children of a node that was reached: confidence, and whether the child was accepted."""
        for confidence, accepted in children:
            self._classes[bisect_right(_LIMITS, confidence)].add(confidence, accepted)

    def chance(self, confidence: float) -> float:
        """The probability that a draft of this confidence is accepted, if its parent is."""
        ratio = self._classes[bisect_right(_LIMITS, confidence)].value(_OWN_WEIGHT * max(confidence, 1e-3))
        return min(confidence * ratio, 1.0)
