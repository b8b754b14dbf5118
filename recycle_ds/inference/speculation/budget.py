"""The draft budget of a whole batch: how many drafts are made and how many are verified, from measured costs and
acceptance.

Let F(T) be the seconds of a full call over T tokens and D(N, L) those of growing trees of depth L for N sequences. A
step of N sequences costs F(N + verified drafts) + D(N, L), and yields N tokens plus the accepted drafts.

- Verified: the nodes of all trees, in order of their chance to be reached and accepted, up to the number with the most
  expected tokens per second of all numbers: a full call gets dearer in steps (after DSpark, arXiv 2607.05147, section
  3.2.2, which must stop at the first drop because its drafts are drawn at random; nodes are not, so that any choice of
  them is lossless).
- Made: the depths with the most expected tokens per second, by each sequence's acceptance so far (as in Leviathan et al.,
  arXiv 2211.17192, theorem 3.8, for one sequence).

With a depth of 0 the module does not run at all. Short probes then try drafts again, at increasing intervals while they
fail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

from recycle_ds.inference.speculation.acceptance import (
    MAX_DRAFT,
    Calibration,
    Candidate,
    DepthRecord,
    Ratio,
    Sizes,
    Verified,
    shrunk_rates,
)
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.inference.speculation.decision import Decision
from recycle_ds.inference.speculation.tree import MAX_NODES, MAX_WIDTH, depths, parents_of

MOST_DRAFT_SLOTS = MAX_DRAFT + (MAX_DRAFT - 1) * MAX_WIDTH
"""Most slots after a new token that a step writes: drafts accepted before it, and nodes of the next tree."""
START = 4
"""Depth of the first steps' trees, and of those of probes."""

# Weight of a sequence's own record, in predicted accepted drafts.
_OWN_WEIGHT = 4.0
# Verified nodes of each depth before any is known.
_PRIOR_NODES = 1.5
# Steps of a probe, steps without drafts before the first one, and the most after failed ones.
_PROBE, _FIRST_PATIENCE, _MOST_PATIENCE = 3, 64, 1024
# Sizes of a probe, in order of preference: sequences, and depth of each. Share of a step that it may cost.
_PROBES, _PROBE_SHARE = ((4, 4), (4, 2), (4, 1), (2, 1), (1, 1)), 0.25
# Steps between two estimates of whether drafting pays, while it is off and the batch stays the same.
_ESTIMATED = 8
# Steps after which a sequence without drafts, in a batch with drafts, tries one.
_RETRY = 32
# Expected gains below which none are made, and none verified: not worth the risk that estimates are wrong.
_LEAST_GAIN, _LEAST_STEP_GAIN = 1.06, 1.02
# Gain with all drafts accepted below which none are looked for: what is left of it is less than what looking for them costs.
_LEAST_HOPE = 1.5
# Chance that a further depth is worth: most of its nodes only take the place of others among those that are verified.
_FLOOR = 2.5
# Nodes with a smaller chance are only verified by probes.
_LEAST_CHANCE = 0.01


@dataclass
class DraftBudget:
    """Decides for all sequences of an engine. costs: see `CostModel`."""

    costs: CostModel = field(default_factory=CostModel)
    floor: float = 0.0
    """Trees end where the chances of the nodes that would get children sum to less: a further depth would not pay."""
    _all: DepthRecord = field(default_factory=DepthRecord)
    _own: dict[int, DepthRecord] = field(default_factory=dict)
    _grown: DepthRecord = field(default_factory=DepthRecord)
    """Whether a step whose trees could have grown to a depth did so."""
    _sizes: Sizes = field(default_factory=lambda: Sizes(_PRIOR_NODES))
    """Verified nodes by depth."""
    _calibration: defaultdict[tuple[bool, bool], Calibration] = field(default_factory=lambda: defaultdict(Calibration))
    """By whether tokens are drawn at random, and whether confidences are from repetition."""
    _ratios: dict[int, Ratio] = field(default_factory=dict)
    """Accepted drafts of each sequence in terms of the predicted ones."""
    _lengths: dict[int, int] = field(default_factory=dict)
    _for_new: int = START
    """Depth for a sequence that has not decoded yet."""
    _step: int = 0
    _probe: int = _PROBE
    _probing: bool = False
    _probed: int = START
    """Drafts that each step of a probe verifies, over the batch."""
    _idle: int = 0
    _good: int = 0
    """Steps in a row with drafts."""
    _patience: int = _FIRST_PATIENCE
    _idle_size: int = 0
    """Sequences of the step in which drafting was last found not to pay."""
    _longest: int = START
    hopeless: bool = False
    """Whether no draft could pay in the latest step, see `gives_up`."""
    decision: Decision | None = None
    """What was decided in the latest step that budgeted drafts."""

    @property
    def explanation(self) -> str:
        """What was decided in the latest step, and why."""
        if self.decision is None:
            return "no step has budgeted drafts"
        return self.decision.explained(self.costs)

    @property
    def active(self) -> bool:
        """Whether drafts are being made at all."""
        return self._for_new > 0

    def verify(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """Which drafts of each sequence to verify in the next step: numbers of nodes, from 1 on, with their parents.

        Also decides how deep a tree each makes, see `draft`."""
        chosen = [list(range(1, min(len(one.confidences), one.room, one.fixed or 0) + 1)) for one in candidates]
        adaptive = [i for i, one in enumerate(candidates) if one.fixed is None]
        if not adaptive:
            return chosen
        count, plain = len(candidates), len(candidates) + sum(map(len, chosen))
        if self.gives_up(count, len(adaptive), plain):
            return chosen
        self._probing = self._probe > 0
        # of equal chances the earlier node first: a parent is never after its child
        items = sorted(
            (-chance, node, i)
            for i in (one for one in adaptive if candidates[one].confidences)
            for node, chance, depth in self._chances(candidates[i])
            if depth <= candidates[i].room
        )
        if items:
            seconds = self.costs.steps(count, plain, plain + len(items), len(adaptive), self._calls(self._longest))
            expected = list(accumulate((-chance for chance, _, _ in items), initial=float(count)))
            best = max(range(len(items) + 1), key=lambda number: expected[number] / seconds[number])
            if expected[best] * seconds[0] < _LEAST_STEP_GAIN * expected[0] * seconds[best]:
                best = 0
            best = max(best, min(self._probed, len(items)) if self._probing else 0)  # a probe verifies at a loss
            picked = items[:best] or [one for one in items if self._is_tried_again(candidates[one[2]], one[1])][:1]
        else:
            picked = []
        for _, node, i in picked:
            chosen[i].append(node)
        self._choose_lengths([candidates[i].sequence for i in adaptive], count - len(adaptive))
        gained = sum(-chance for chance, _, _ in picked)
        self.decision = Decision(count, len(adaptive), len(items), plain + len(picked), self._for_new, count + gained)
        return chosen

    def gives_up(self, count: int, adaptive: int, tokens: int) -> bool:
        """Whether drafts could hardly pay in a step, however likely: then none is verified, made or even looked for, which
        would cost time too. count, adaptive: sequences, and those whose drafts are budgeted. tokens: of the full call."""
        is_probed = self._probe > 0 or self._idle >= self._patience  # costs may be wrong
        self.hopeless = not (is_probed or self.costs.can_pay(count, tokens, _LEAST_HOPE))
        if self.hopeless:
            self._step, self._idle, self._idle_size, self._good = self._step + 1, self._idle + 1, count, 0
            self._lengths, self._longest, self._for_new, self._probing, self.floor = {}, 0, 0, False, 0.0
            self.decision = Decision(count, adaptive, 0, tokens, 0, float(count))
        return self.hopeless

    def draft(self, sequence: int) -> int:
        """How deep a tree a sequence makes in the next step."""
        return self._lengths.get(sequence, self._for_new)

    def observe(self, one: Verified) -> None:
        """Records verified drafts."""
        parents = parents_of(len(one.confidences), one.parents)
        of_module, repeated = one.of_module or [True] * len(parents), one.repeated or [False] * len(parents)
        if one.ordered:
            path = list(takewhile(lambda node: of_module[node - 1], one.path))
            tested = one.tested if len(path) == len(one.path) else len(path) + 1
            if not self._probing:  # what was made and not verified has not paid; a probe verifies a few of many
                tested = max(tested, min(one.ordered, len(path) + 1))
                found = [depth for depth, own in zip(depths(parents), of_module, strict=True) if own]
                self._sizes.add(one.ordered, [found.count(depth) for depth in range(1, max(found, default=0) + 1)])
            self._all.add(tested, len(path))
            self._own.setdefault(one.sequence, DepthRecord()).add(tested, len(path))
        ratio = self._ratios.setdefault(one.sequence, Ratio())
        kinds = [self._calibration[one.sampled, again] for again in repeated]
        for at, node in enumerate((0, *one.path)[: one.tested]):
            accepted = one.path[at] if at < len(one.path) else None
            children = [k for k, parent in enumerate(parents, start=1) if parent == node]
            ratio.add(sum(kinds[k - 1].chance(one.confidences[k - 1]) for k in children), accepted is not None)
            for k in children:
                kinds[k - 1].observe([(one.confidences[k - 1], k == accepted)])

    def time(self, tokens: int, calls: Sequence[int], ordered: int, seconds: float) -> None:
        """Records how long a step took: `tokens` of a full call, and each sequence's depth, of `ordered` at most."""
        made = [count for count in calls if count]
        self._grown.add(ordered, max(made, default=0))
        self.costs.correct(len(calls), tokens, len(made), max(made, default=0), seconds)

    def forget(self, sequence: int) -> None:
        """Forgets a sequence that has ended."""
        self._own.pop(sequence, None)
        self._ratios.pop(sequence, None)

    def acceptance(self, sequence: int) -> list[float]:
        """Probability that a draft of a sequence is accepted at each depth, if one was at all depths before."""
        return shrunk_rates(self._own.get(sequence, DepthRecord()), self._all)

    def _chances(self, candidate: Candidate) -> list[tuple[int, float, int]]:
        """Node, probability to be reached and accepted, and depth, of a sequence's likelier drafts; at most `MAX_NODES`."""
        ratio = self._ratios.get(candidate.sequence, Ratio()).value(_OWN_WEIGHT)
        parents = parents_of(len(candidate.confidences), candidate.parents)
        kinds, reached = [self._calibration[candidate.sampled, again] for again in (False, True)], [1.0]
        for node, (confidence, parent) in enumerate(zip(candidate.confidences, parents, strict=True), start=1):
            again = node in candidate.repeated
            chance = min(kinds[again].chance(confidence) * ratio, 1.0)
            if again and self._is_tried_again(candidate, node):
                chance = confidence
            reached.append(reached[parent] * chance)
        found = [
            (node, chance, depth)
            for node, (chance, depth) in enumerate(zip(reached[1:], depths(parents), strict=True), start=1)
            if chance >= _LEAST_CHANCE or self._probing
        ]
        return sorted(found, key=lambda one: (-one[1], one[0]))[:MAX_NODES]

    def _is_tried_again(self, candidate: Candidate, node: int) -> bool:
        """Whether a draft is tried whatever was observed, as those from repetition are from time to time: they cost nothing to
        make. Only the first one of a path: it tells enough."""
        again = node in candidate.repeated and (self._step + candidate.sequence) % _RETRY == 0
        return again and parents_of(len(candidate.confidences), candidate.parents)[node - 1] == 0

    def _choose_lengths(self, sequences: Sequence[int], others: int) -> None:
        """Decides how deep a tree each sequence makes next, if `others` do not draft adaptively.

        Depths are considered in order of the probability that a draft is accepted there; the best number is the one with
        the most expected tokens per second. The deepest tree decides how often the module is called.
        """
        self._step += 1
        if self._probe > 1:
            self._probe -= 1
            return
        self._probe = 0
        tokens = len(sequences) + others
        if self._for_new == 0 and tokens == self._idle_size and self._idle % _ESTIMATED and self._idle < self._patience:
            self._idle += 1
            return
        items: list[tuple[float, int, int]] = []
        for sequence in sequences:
            reached = 1.0
            for length, rate in enumerate(self.acceptance(sequence), start=1):
                reached *= rate
                items.append((-reached, length, sequence))
        items.sort()
        best, speed = self._best_depths(items, tokens, len(sequences))
        best *= self.costs.can_pay(tokens, tokens, _LEAST_HOPE)  # else the next step would drop them
        # a sequence without drafts tries one from time to time: its text may have become easier
        lengths = {one: int((self._step + one) % _RETRY == 0) for one in sequences} if best else {}
        for _, length, sequence in items[:best]:
            lengths[sequence] = length
        self.floor = 0.0
        if best == 0:
            self._idle, self._idle_size = self._idle + 1, tokens
            if self._idle > self._patience:
                first = self._step % len(sequences)  # not always the same ones
                probed, depth = self._size_of_probe(len(sequences), tokens)
                lengths = dict.fromkeys((*sequences[first:], *sequences[:first])[:probed], depth)
                self._idle, self._probe, self._probed = 0, _PROBE, probed * depth
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
        else:
            self._idle = 0
            self._patience = _FIRST_PATIENCE if self._good >= _RETRY else self._patience
            further = self.costs.drafts(len(sequences), 2) - self.costs.drafts(len(sequences), 1)
            self.floor = min(_FLOOR * speed * further / len(sequences), 1.0)
        self._good = self._good + 1 if best else 0
        self._lengths = lengths
        self._longest = max(lengths.values(), default=0)
        self._for_new = min(self._longest, START) if self._probe == 0 else 0

    def _best_depths(self, items: Sequence[tuple[float, int, int]], tokens: int, drafting: int) -> tuple[int, float]:
        """How many of the depths (-chance, depth, sequence) to make, and the tokens per second expected with them."""
        nodes = self._sizes.means()
        seconds = self.costs.steps(tokens, tokens, tokens + drafting * MAX_NODES, 0, 0)
        making = [self.costs.drafts(drafting, self._calls(depth)) for depth in range(MAX_DRAFT + 1)]
        expected, verified, longest = float(tokens), 0.0, 0
        best, best_speed = 0, _LEAST_GAIN * expected / self.costs.full_call(tokens)
        for count, (chance, length, _) in enumerate(items, start=1):
            expected, verified, longest = expected - chance, verified + nodes[length - 1], max(longest, length)
            speed = expected / (seconds[min(round(verified), len(seconds) - 1)] + making[longest])
            if speed > best_speed:
                best, best_speed = count, speed
        return best, best_speed

    def _calls(self, longest: int) -> float:
        """Expected calls of the module in a step whose trees may grow to a depth: they end early where chances are small."""
        return max(sum(self._grown.rates(1.0)[:longest]), min(longest, 1.0))

    def _size_of_probe(self, sequences: int, tokens: int) -> tuple[int, int]:
        """Sequences in a probe and depth of each: the first of `_PROBES` that is cheap enough."""
        plain = self.costs.full_call(tokens)
        for most, depth in _PROBES:
            count = min(most, sequences)
            step = self.costs.step(tokens, tokens + count * depth, count, depth)
            if step - plain <= _PROBE_SHARE * plain:
                return count, depth
        return 1, 1
