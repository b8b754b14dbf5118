"""What the timed runs of one mode or peer gave, and the figures over all prompts or some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from recycle_ds.inference.generation import Generation


@dataclass(frozen=True)
class Timed:
    """One text. timed_tokens: those after the prefill's step; seconds: the time that they took. generation: with the counts of
    our own engine; None for a peer."""

    token_ids: tuple[int, ...]
    timed_tokens: int
    seconds: float
    generation: Generation | None = None

    @classmethod
    def of(cls, generation: Generation) -> Timed:
        """A text of our own engine: its prefill gives the first token."""
        ids = generation.token_ids
        return cls(ids, max(len(ids) - 1, 0), generation.decode_seconds, generation)


@dataclass
class Runs:
    """The texts of one mode or peer: [repeat][prompt]. `among` below: numbers of prompts; None for all."""

    repeats: list[list[Timed]] = field(default_factory=list)

    @property
    def first(self) -> list[Timed]:
        """The first repeat."""
        return self.repeats[0]

    @property
    def token_ids(self) -> list[list[tuple[int, ...]]]:
        """The tokens, by repeat and prompt."""
        return [[one.token_ids for one in texts] for texts in self.repeats]

    def tokens_per_second(self, among: Sequence[int] | None = None) -> float:
        """Median over repeats of all timed tokens over all seconds; 0 if there are none."""
        speeds = []
        for texts in self.repeats:
            chosen = texts if among is None else [texts[index] for index in among]
            tokens, seconds = sum(one.timed_tokens for one in chosen), sum(one.seconds for one in chosen)
            speeds.append(tokens / seconds if tokens else 0.0)
        return median(speeds)

    def tokens_per_full_call(self, among: Sequence[int] | None = None) -> float:
        """All new tokens over all full calls, prefills included."""
        found = list(self._generations(among))
        return sum(len(one.token_ids) for one in found) / sum(one.full_calls for one in found)

    def acceptance(self, among: Sequence[int] | None = None) -> list[float]:
        """By draft position, over all repeats; positions that were never verified are left out."""
        found = list(self._generations(among))
        tested = add_up(one.tested for one in found)
        accepted = add_up(one.accepted for one in found)
        return [hits / trials for hits, trials in zip(accepted, tested, strict=True) if trials]

    def _generations(self, among: Sequence[int] | None) -> Iterator[Generation]:
        for texts in self.repeats:
            for one in texts if among is None else [texts[index] for index in among]:
                assert one.generation is not None, "only our own engine counts calls"
                yield one.generation


def add_up(rows: Iterable[Sequence[int]]) -> list[int]:
    """The sums of rows of different lengths, position by position."""
    total: list[int] = []
    for row in rows:
        total.extend([0] * (len(row) - len(total)))
        for position, number in enumerate(row):
            total[position] += number
    return total


def run_interleaved(
    contenders: Mapping[str, Callable[[int], Timed]],
    prompts: int,
    repeats: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, Runs]:
    """Lets every contender decode every prompt, by its number, `repeats` times. Which one begins changes from prompt to prompt.

    on_progress: called with the numbers of completed and of all texts.
    """
    runs = {name: Runs([[] for _ in range(repeats)]) for name in contenders}
    names, done = tuple(contenders), 0
    for repeat in range(repeats):
        for number in range(prompts):
            first = (repeat + number) % len(names)
            for name in names[first:] + names[:first]:
                runs[name].repeats[repeat].append(contenders[name](number))
                done += 1
                on_progress(done, repeats * prompts * len(names))
    return runs
