"""Which prompt, temperature and seed a row has: a function of its number and the seed alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from recycle_ds.data.sampling import permute
from recycle_ds.inference.parameters import SEED_LIMIT
from recycle_ds.inference.self_text.prompts import Prompt, PromptSet
from recycle_ds.inference.self_text.settings import SelfTextSettings

TRAIN, VALIDATION = "train", "validation"
_ROUNDS = 6


@dataclass(frozen=True)
class RowPlan:
    """One row to be written. prompt: None if the model begins with one of its own."""

    side: str
    number: int
    prompt: Prompt | None
    temperature: float
    seed: int

    def seed_of(self, turn: int) -> int:
        """The seed of a turn's random numbers."""
        return _hash(f"{self.seed}/{self.side}/{self.number}/{turn}") % SEED_LIMIT


class RowPlanner:
    """Plans rows. Every prompt of the file is used once before one is used again, then at another temperature.

    Of the prompts with one opening, one is answered greedily, once: a second answer would be equal, up to the first
    follow-up at least. Held-out rows are all greedy.
    """

    def __init__(self, settings: SelfTextSettings, prompts: PromptSet) -> None:
        self._settings, self._prompts = settings, prompts
        self._keys = [_hash(f"{settings.seed}/order/{number}") for number in range(_ROUNDS)]
        self._sampled = [one for one in settings.temperatures if one > 0]
        first = {prompt.opening: prompt for prompt in reversed(prompts.train)}
        train = ((prompt, first[prompt.opening] is prompt) for prompt in prompts.train)
        # prompts, and whether they may be answered greedily; others are of no use without another temperature
        self._train = [(prompt, greedy) for prompt, greedy in train if greedy or self._sampled]

    def rows(self, side: str) -> int | None:
        """Number of rows of a side; None if there is no limit."""
        if side == VALIDATION:
            return self._settings.held_out
        limited = not self._sampled and self._settings.free == 0
        return len(self._train) if limited else None

    def row(self, side: str, number: int) -> RowPlan:
        """The plan of a row, from 0."""
        settings = self._settings
        before = settings.free_before(number)
        free = settings.free_before(number + 1) > before
        prompt: Prompt | None = None
        temperature = settings.temperatures[before % len(settings.temperatures)]
        if not free and side == VALIDATION:
            prompt = self._prompts.held_out[number - before]
        elif not free:
            turn, place = divmod(number - before, len(self._train))
            chosen, may_be_greedy = self._train[permute(place, len(self._train), self._keys)]
            found = self._temperature(place, turn, may_be_greedy)
            if found is None:  # greedy again: it is a free row instead
                temperature = 0.0
            else:
                prompt, temperature = chosen, found
        return RowPlan(side, number, prompt, 0.0 if side == VALIDATION else temperature, settings.seed)

    def _temperature(self, place: int, turn: int, may_be_greedy: bool) -> float | None:
        """Temperature of a prompt's answer when it is used for the `turn`-th time, from 0; None if it has been used at every
        one."""
        listed = self._settings.temperatures
        chosen = listed[(place + turn) % len(listed)]
        greedy_before = any(listed[(place + earlier) % len(listed)] == 0 for earlier in range(min(turn, len(listed))))
        if chosen > 0 or (may_be_greedy and not greedy_before):
            return chosen
        return self._sampled[(place + turn) % len(self._sampled)] if self._sampled else None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
