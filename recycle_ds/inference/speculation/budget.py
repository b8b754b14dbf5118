"""The draft budget of a whole batch: how many drafts are made and how many are verified, from measured costs and
acceptance.

Let F(T) be the seconds of a full call over T tokens and D(N, L) those of making drafts for N sequences, in chains of at
most L. A step of N sequences costs F(N + verified drafts) + D(N, L), and yields N tokens plus the accepted drafts.

- Verified: drafts are admitted in order of their probability to be reached and accepted, while the expected tokens per
  second of the step grow, and not beyond the first one with which they fall (DSpark, arXiv 2607.05147, section 3.2.2).
  Looking further would make the choice depend on later drafts, which depend on what was drawn: the output would not be
  lossless.
- Made: the lengths of the chains with the most expected tokens per second, by each sequence's acceptance so far (as in
  Leviathan et al., arXiv 2211.17192, theorem 3.8, for one sequence).

With a length of 0 the module does not run at all. Short probes then try drafts again, at increasing intervals while
they fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from recycle_ds.inference.speculation.cost_model import CostModel

MAX_DRAFT = 8
"""Most drafts of a sequence in a step."""
START = 4
"""Drafts of the first steps and of probes."""

# Decay of older observations with every new one; the last fifty or so count.
_DECAY = 0.98
# Prior acceptance rate, and its weight in observations.
_PRIOR, _PRIOR_WEIGHT = 0.75, 2.0
# Observations with which a sequence's own acceptance outweighs that of all sequences.
_OWN_WEIGHT = 8.0
# Classes of confidence: acceptance is counted for each of them.
_CLASSES = 10
# Steps of a probe, steps without drafts before the first one, and the most after failed ones.
_PROBE, _FIRST_PATIENCE, _MOST_PATIENCE = 3, 64, 1024
# Sizes of a probe, in order of preference: sequences, and drafts of each. Share of a step that it may cost.
_PROBES, _PROBE_SHARE = ((4, 4), (4, 2), (4, 1), (2, 1), (1, 1)), 0.25
# Steps between two estimates of whether drafting pays, while it is off and the batch stays the same.
_ESTIMATED = 8
# Steps after which a sequence without drafts, in a batch with drafts, tries one.
_RETRY = 32
# Expected gain below which drafts are not worth the risk that estimates are wrong.
_LEAST_GAIN = 1.06


@dataclass(frozen=True)
class Candidate:
    """A sequence that is about to decode. confidences: of its drafts. fixed: how many drafts to verify if that is given;
    None if it is adaptive. room: the most that can be of use."""

    sequence: int
    confidences: tuple[float, ...]
    fixed: int | None
    room: int
    made: int = 0
    """Drafts that were ordered. What was drawn may have cut the chain short, and must not decide what is verified."""


@dataclass(frozen=True)
class Decision:
    """One step's budget. adaptive: sequences whose drafts are budgeted. drafts: could be verified. tokens: of the full
    call, one of each sequence and the verified drafts. made_next: the most drafts that a sequence makes next. expected:
    tokens that the step yields."""

    sequences: int
    adaptive: int
    drafts: int
    tokens: int
    made_next: int
    expected: float


@dataclass
class _Acceptance:
    """Drafts verified and accepted, by position. Older ones decay."""

    tested: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    accepted: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)

    def add(self, tested: int, accepted: int) -> None:
        for position in range(min(tested, MAX_DRAFT)):
            self.tested[position] = _DECAY * self.tested[position] + 1
            self.accepted[position] = _DECAY * self.accepted[position] + (position < accepted)


@dataclass
class DraftBudget:
    """Decides for all sequences of an engine. costs: see `CostModel`."""

    costs: CostModel = field(default_factory=CostModel)
    _all: _Acceptance = field(default_factory=_Acceptance)
    _own: dict[int, _Acceptance] = field(default_factory=dict)
    _class_tested: list[float] = field(default_factory=lambda: [0.0] * _CLASSES)
    _class_accepted: list[float] = field(default_factory=lambda: [0.0] * _CLASSES)
    _lengths: dict[int, int] = field(default_factory=dict)
    _for_new: int = START
    """Drafts of a sequence that has not decoded yet."""
    _step: int = 0
    _probe: int = _PROBE
    _probed: int = START
    """Drafts that each step of a probe verifies, over the batch."""
    _idle: int = 0
    _good: int = 0
    """Steps in a row with drafts."""
    _patience: int = _FIRST_PATIENCE
    _idle_size: int = 0
    """Sequences of the step in which drafting was last found not to pay."""
    decision: Decision | None = None
    """What was decided in the latest step that budgeted drafts."""

    @property
    def explanation(self) -> str:
        """What was decided in the latest step, and why."""
        if self.decision is None:
            return "no step has budgeted drafts"
        count, tokens, full = self.decision.sequences, self.decision.tokens, self.costs.full_call
        first = self.costs.drafts(self.decision.adaptive, 1)
        further = self.costs.drafts(self.decision.adaptive, 2) - first
        return (
            f"{count} sequences: {tokens - count} of {self.decision.drafts} drafts verified, at most {self._for_new} made "
            f"next. Full call over {tokens} tokens {1e3 * full(tokens):.1f} ms, over {count} {1e3 * full(count):.1f} ms; a "
            f"first draft {1e3 * first:.1f} ms, a further one {1e3 * further:.1f} ms; expected tokens "
            f"{self.decision.expected:.2f}"
        )

    @property
    def active(self) -> bool:
        """Whether drafts are being made at all."""
        return self._for_new > 0

    def verify(self, candidates: Sequence[Candidate]) -> list[int]:
        """How many drafts of each sequence to verify in the next step. Also decides how many each makes, see `draft`."""
        counts = [min(len(one.confidences), one.room, one.fixed or 0) for one in candidates]
        adaptive = [i for i, one in enumerate(candidates) if one.fixed is None]
        if not adaptive:
            return counts
        tokens, expected = len(candidates) + sum(counts), float(len(candidates))
        chances = {
            (i, position): chance
            for i in adaptive
            for position, chance in enumerate(self._chances(candidates[i])[: candidates[i].room])
        }
        made = max((candidates[i].made for i in adaptive), default=0)
        speed = expected / self.costs.step(len(candidates), tokens, len(adaptive), made)
        probed = self._probed if self._probe > 0 else 0  # drafts of a probe that are verified at a loss, over the batch
        # a stable sort: of equal chances, earlier drafts first
        for (i, _), chance in sorted(chances.items(), key=lambda item: -item[1]):
            faster = (expected + chance) / self.costs.step(len(candidates), tokens + 1, len(adaptive), made)
            if faster < speed:
                if probed == 0:
                    break
                probed -= 1
            expected, tokens, speed = expected + chance, tokens + 1, faster
            counts[i] += 1
        self._choose_lengths([candidates[i].sequence for i in adaptive], len(candidates) - len(adaptive))
        self.decision = Decision(len(candidates), len(adaptive), len(chances), tokens, self._for_new, expected)
        return counts

    def draft(self, sequence: int) -> int:
        """How many drafts a sequence makes in the next step."""
        return self._lengths.get(sequence, self._for_new)

    def observe(self, sequence: int, confidences: Sequence[float], tested: int, accepted: int) -> None:
        """Records verified drafts: the first `tested` were looked at, the first `accepted` were accepted."""
        self._all.add(tested, accepted)
        self._own.setdefault(sequence, _Acceptance()).add(tested, accepted)
        for position, confidence in enumerate(confidences[:tested]):
            number = _class_of(confidence)
            self._class_tested[number] = _DECAY * self._class_tested[number] + 1
            self._class_accepted[number] = _DECAY * self._class_accepted[number] + (position < accepted)

    def time(self, tokens: int, drafts: Sequence[int], seconds: float) -> None:
        """Records how long a step took: `tokens` of a full call, and the drafts made by each sequence."""
        made = [count for count in drafts if count]
        self.costs.correct(len(drafts), tokens, len(made), max(made, default=0), seconds)

    def forget(self, sequence: int) -> None:
        """Forgets a sequence that has ended."""
        self._own.pop(sequence, None)

    def acceptance(self, sequence: int) -> list[float]:
        """Probability that a sequence's draft at each position is accepted, given that all before it were.

        The prior of a position is the estimate of the position before it; a sequence's own record counts on top of all
        others'.
        """
        own = self._own.get(sequence, _Acceptance())
        estimates, estimate, ratio = [], _PRIOR, 1.0
        for position in range(MAX_DRAFT):
            tested, accepted = self._all.tested[position], self._all.accepted[position]
            estimate = (accepted + _PRIOR_WEIGHT * estimate) / (tested + _PRIOR_WEIGHT)
            # a sequence that does better or worse than all at one position is expected to do so at the next
            prior = min(ratio * estimate, 1.0)
            shrunk = (own.accepted[position] + _OWN_WEIGHT * prior) / (own.tested[position] + _OWN_WEIGHT)
            ratio = shrunk / estimate if estimate > 0 else 1.0
            estimates.append(shrunk)
        return estimates

    def _chances(self, candidate: Candidate) -> list[float]:
        """Probability that each draft of a sequence is reached and accepted; never more than that of the one before."""
        if not candidate.confidences:
            return []
        reached, found = 1.0, []
        # not strict: a chain is shorter than the longest one that has an estimate
        for confidence, prior in zip(candidate.confidences, self.acceptance(candidate.sequence), strict=False):
            number = _class_of(confidence)
            tested, accepted = self._class_tested[number], self._class_accepted[number]
            reached *= (accepted + _OWN_WEIGHT * prior) / (tested + _OWN_WEIGHT)
            found.append(reached)
        return found

    def _choose_lengths(self, sequences: Sequence[int], others: int) -> None:
        """Decides how many drafts each sequence makes next, if `others` do not draft adaptively.

        Drafts are considered in order of their probability to be reached and accepted; the best number is the one with
        the most expected tokens per second. The longest chain decides how often the module is called.
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
        expected, longest = float(tokens), 0
        best, best_speed = 0, _LEAST_GAIN * expected / self.costs.full_call(tokens)
        items.sort()
        for count, (chance, length, _) in enumerate(items, start=1):
            expected, longest = expected - chance, max(longest, length)
            speed = expected / self.costs.step(tokens, tokens + count, len(sequences), longest)
            if speed > best_speed:
                best, best_speed = count, speed
        # a sequence without drafts tries one from time to time: its text may have become easier
        lengths = {one: int((self._step + one) % _RETRY == 0) for one in sequences} if best else {}
        for _, length, sequence in items[:best]:
            lengths[sequence] = length
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
        self._good = self._good + 1 if best else 0
        self._lengths = lengths
        self._for_new = min(max(lengths.values(), default=0), START) if self._probe == 0 else 0

    def _size_of_probe(self, sequences: int, tokens: int) -> tuple[int, int]:
        """Sequences that take part in a probe and drafts of each: the first of `_PROBES` that is cheap enough."""
        plain = self.costs.full_call(tokens)
        for most, depth in _PROBES:
            count = min(most, sequences)
            step = self.costs.step(tokens, tokens + count * depth, count, depth)
            if step - plain <= _PROBE_SHARE * plain:
                return count, depth
        return 1, 1


def _class_of(confidence: float) -> int:
    return min(int(confidence * _CLASSES), _CLASSES - 1)
