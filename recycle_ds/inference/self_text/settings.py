"""Settings of self-written text, and their checks. Imports no torch, so that wrong options are reported immediately."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import MIN_TEMPERATURE, check_batch, check_mode, check_runtime

PARTS_OF_SHARE = 10**6
"""A share is counted in millionths, so that rows are assigned without rounding."""
_GROUPS_AT_LEAST = 8
_BATCHES_PER_GROUP = 4


@dataclass(frozen=True)
class SelfTextSettings:
    """Everything that determines the text, apart from model, prompts and excluded texts.

    tokens: least number of tokens to train on, end-of-document tokens included. temperatures: of answers, used in turn;
    one that is listed twice is used twice as often. prompt_temperature: of what the model writes in a user's place. free:
    share of rows that begin with a prompt of the model's own. row_tokens: maximum length of a row. turns: maximum number
    of answers in a row. ngram, repeats: a row ends where an n-gram of its text occurs more than `repeats` times; 0
    cuts nothing. min_tokens: rows with fewer tokens of the model's own are left out. held_out: greedy rows to evaluate on.
    raw: ignore the chat template. Raises DecodingError for a value outside its range.
    """

    tokens: int
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    prompt_temperature: float = 1.0
    top_k: int = 64
    top_p: float = 1.0
    free: float = 0.25
    row_tokens: int = 640
    turns: int = 8
    ngram: int = 16
    repeats: int = 2
    min_tokens: int = 32
    held_out: int = 0
    seed: int = 0
    mode: str = "autoregressive"
    dtype: str = "bf16"
    max_batch: int = 32
    raw: bool = False

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.mode == "alternate":
            raise DecodingError(
                "mode=alternate: keeps tokens that the model has not verified, and the text must be the model's own; use "
                "autoregressive or verified"
            )
        check_runtime(self.dtype, None)
        check_batch(self.max_batch, None)
        if not self.temperatures:
            raise DecodingError("temperatures: give at least one, such as 0,0.6,1.0")
        for name, value in (
            *(("temperatures", one) for one in self.temperatures),
            ("prompt_temperature", self.prompt_temperature),
        ):
            if not math.isfinite(value) or (value < MIN_TEMPERATURE and value != 0):
                raise DecodingError(f"{name}={value}: must be 0 (greedy) or a number of at least {MIN_TEMPERATURE:g}")
        if self.prompt_temperature == 0 and self.free > 0:
            raise DecodingError("prompt_temperature=0: all prompts of the model's own would be equal; use 1.0")
        if not 0 <= self.free <= 1:
            raise DecodingError(f"free={self.free}: must be a share of the rows, from 0 to 1")
        least = {"tokens": 1, "row_tokens": 16, "turns": 1, "ngram": 2, "repeats": 0, "min_tokens": 1, "held_out": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise DecodingError(f"{name}={getattr(self, name)}: must be at least {lowest}")
        if self.min_tokens >= self.row_tokens:
            raise DecodingError(f"min_tokens={self.min_tokens}: must be below row_tokens ({self.row_tokens})")

    @property
    def group_rows(self) -> int:
        """Rows that are decoded together and stored at once: a few batches, fewer for little text."""
        needed = -(-self.tokens // self.row_tokens)
        return max(
            min(-(-needed // _GROUPS_AT_LEAST), _BATCHES_PER_GROUP * self.max_batch), min(self.max_batch, needed)
        )

    def free_before(self, row: int) -> int:
        """How many of the rows before `row` are free."""
        return row * round(self.free * PARTS_OF_SHARE) // PARTS_OF_SHARE


def parse_temperatures(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list. Raises DecodingError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DecodingError(f"--temperatures {text}: must be comma-separated numbers, such as 0,0.6,1.0") from None


def parse_held_out(text: str, tokens: int, row_tokens: int) -> int:
    """The number of rows that --held-out asks for: a whole number, or a share below 1, which asks for as many rows as would
    have this share of `tokens` if all were full. Most are shorter, so they have fewer tokens. Raises DecodingError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value == 0 or (value >= 1 and value.is_integer()):
        return int(value)
    if not 0 < value < 1:
        raise DecodingError(
            f"--held-out {text}: must be a number of rows, such as 64, or a share below 1, such as 0.02"
        )
    return math.ceil(value * tokens / row_tokens)
